"""``fsdp=4,tp=2,ep=8``: the common meshes in one line, and the way from any text a user gives to a layout."""

from __future__ import annotations

from math import prod
from pathlib import Path

from reshard_service.documents.layout import MAX_WORLD, LayoutDocument, layout_document, read_layout_document
from reshard_service.errors import LayoutInvalid, UsageError
from reshard_service.layouts.layout import Layout, layout_from_document

KEYS = ("pp", "dp_replicate", "fsdp", "tp", "ep", "efsdp_dim")
_SUFFIXES = (".yaml", ".yml", ".json")
_HINT = f"write KEY=NUMBER,… with keys {', '.join(KEYS)}, or the path of a layout document ({', '.join(_SUFFIXES)})"


def parse_layout(text: str, *, rules_known: bool = False) -> Layout:
    """The layout that ``text`` means: shorthand, or the path of a local YAML or JSON document.

    ``rules_known`` as in :func:`layout_from_document`. A path is read: give only what a local user wrote; for text
    from elsewhere there is :func:`parse_shorthand`.
    """
    text = text.strip()
    if text.endswith(_SUFFIXES) or ("=" not in text and "/" in text):
        return layout_from_document(read_layout_document(Path(text).expanduser()), rules_known=rules_known)
    return layout_from_document(parse_shorthand(text), rules_known=rules_known)


def parse_shorthand(text: str) -> LayoutDocument:
    """The document that a shorthand stands for (decision 11): a set of keys, absent ones are 1, order means nothing."""
    given = _numbers(text)
    sizes = {key: given.get(key, 1) for key in KEYS if key != "efsdp_dim"}
    world = prod(size for key, size in sizes.items() if key != "ep")
    if max(world, sizes["ep"]) > MAX_WORLD:
        raise UsageError(f"layout {text!r} has {max(world, sizes['ep'])} ranks, more than {MAX_WORLD}")
    ep = sizes.pop("ep")
    document: dict[str, object] = {"version": 1, "mesh": {"axes": [[key, size] for key, size in sizes.items()]}}
    if ep > 1:
        over = sizes["fsdp"] * sizes["tp"]
        if over % ep:
            fitting = [size for size in range(1, over + 1) if over % size == 0]
            raise LayoutInvalid(
                f"layout {text!r}: ep={ep} does not divide fsdp*tp={over}",
                hint=f"experts are spread over the same ranks; valid ep: {', '.join(map(str, fitting))}",
            )
        document["expert_mesh"] = {
            "axes": [["pp", sizes["pp"]], ["dp_replicate", sizes["dp_replicate"]], ["efsdp", over // ep], ["ep", ep]],
            "efsdp_dim": given.get("efsdp_dim", 0),
        }
    elif given.get("efsdp_dim", 0):
        raise UsageError(f"layout {text!r}: efsdp_dim means something only with ep > 1, which makes an efsdp axis")
    return layout_document(document, f"layout {text!r}")


def _numbers(text: str) -> dict[str, int]:
    given: dict[str, int] = {}
    for part in text.split(","):
        key, equals, number = (piece.strip() for piece in part.partition("="))
        if not equals or key not in KEYS:
            raise UsageError(f"layout {text!r}: {part.strip()!r} is not one of its keys with a number", hint=_HINT)
        if key in given:
            raise UsageError(f"layout {text!r} has {key} twice", hint=_HINT)
        least = 0 if key == "efsdp_dim" else 1
        # int() would also take signs, spaces, underscores and other scripts' digits.
        if not (number.isascii() and number.isdigit()) or len(number) > 9 or int(number) < least:
            raise UsageError(f"layout {text!r}: {key} must be a whole number of at least {least}", hint=_HINT)
        given[key] = int(number)
    return given
