"""From a document's text to a checked model: strict YAML or JSON, errors that point at the place."""

from __future__ import annotations

import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from reshard_service.errors import DocumentInvalid, UsageError

MAX_DOCUMENT_BYTES = 1 << 20
_SHOWN_ERRORS = 5
_PLAINER = {
    "missing": "is missing",
    "extra_forbidden": "unknown key",
    "model_type": "should be a mapping",
    "dict_type": "should be a mapping",
    "tuple_type": "should be a list",
}
"""Our words for pydantic's error types where its own speak of Python."""

Model = TypeVar("Model", bound=BaseModel)


class _StrictLoader(yaml.SafeLoader):
    """Plain YAML data: no tags beyond YAML's own, no aliases (they expand without bound), no key twice."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = parent.start_mark if parent is not None else None
            raise yaml.composer.ComposerError(None, None, "aliases are not allowed; one is in what begins", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} twice")
    return found


def document_data(text: str, name: str) -> object:
    """The plain data of a YAML or JSON text; ``name`` is what errors call it."""
    if len(text.encode(errors="surrogatepass")) > MAX_DOCUMENT_BYTES:
        raise DocumentInvalid(f"{name} is larger than {MAX_DOCUMENT_BYTES} bytes", file=name)
    try:
        if text.lstrip().startswith("{"):
            try:
                return json.loads(text, object_pairs_hook=_unique)
            except json.JSONDecodeError:
                pass  # YAML's {a: b} begins like JSON too
        return yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DocumentInvalid(f"{name} is neither YAML nor JSON: {reason}", file=name) from None
    except RecursionError:
        raise DocumentInvalid(f"{name} is nested too deeply", file=name) from None


def read_document_text(path: Path) -> str:
    """The text of a local document file."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_DOCUMENT_BYTES + 1)
        return data.decode()
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"no document at {str(path)!r}") from None
    except UnicodeDecodeError:
        raise DocumentInvalid(f"{str(path)!r} is not UTF-8 text", file=str(path)) from None
    except OSError as error:
        raise UsageError(f"can't read {str(path)!r}: {error.strerror}") from None


def validated(model: type[Model], data: object, name: str) -> Model:
    """``data`` as ``model``, or :class:`DocumentInvalid` with a JSON pointer for each thing that is wrong."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise document_invalid(error, name) from None


def document_invalid(error: ValidationError, name: str) -> DocumentInvalid:
    """A pydantic error in our words: ``at /rules/3/match: …``, the first few of them."""
    found = error.errors(include_url=False, include_input=False)
    # A list whose items are wrong also counts as too short; only the items are worth telling.
    found = [
        entry
        for entry in found
        if entry["type"] != "too_short"
        or not any(other is not entry and other["loc"][: len(entry["loc"])] == entry["loc"] for other in found)
    ]
    lines = []
    for entry in found[:_SHOWN_ERRORS]:
        # Validators that look at the whole document tell the place in their context.
        context = entry.get("ctx", {})
        pointer = context.get("pointer") or "".join(f"/{_escape(part)}" for part in entry["loc"] if part != "[key]")
        reason = _PLAINER.get(entry["type"]) or entry["msg"].removeprefix("Value error, ")
        lines.append(f"at {pointer or 'the top'}: {reason}")
    if len(found) > _SHOWN_ERRORS:
        lines.append(f"and {len(found) - _SHOWN_ERRORS} more")
    return DocumentInvalid(f"{name}: {'; '.join(lines)}", file=name)


def _escape(part: str | int) -> str:
    return str(part).replace("~", "~0").replace("/", "~1")
