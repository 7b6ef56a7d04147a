"""``reshard.layout.json``: what the rank files alone don't tell."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from reshard_service.errors import SourceCorrupt, UsageError
from reshard_service.formats.safetensors.header import MAX_DIM, MAX_DIMS
from reshard_service.formats.strict_json import parse_json

if TYPE_CHECKING:
    from reshard_service.layouts.layout import Layout

LAYOUT_NAME = "reshard.layout.json"
MAX_LAYOUT_BYTES = 256_000_000

_RANK_FILE = re.compile(r"model-rank-(\d{1,7})-part-(\d{1,5})\.safetensors\Z")
_KEYS = {"version", "world", "layout", "shapes", "parameters", "bound"}

Shape = tuple[int, ...]


def rank_file_name(rank: int, part: int) -> str:
    """Name of a part (from 0) of a rank's tensors."""
    return f"model-rank-{rank}-part-{part}.safetensors"


def parse_rank_file_name(name: str) -> tuple[int, int] | None:
    """(rank, part) of a rank file's name; None for any other name."""
    match = _RANK_FILE.match(name)
    return None if match is None else (int(match[1]), int(match[2]))


@dataclass(frozen=True, slots=True)
class LayoutFile:
    """The layout, and the global shape of every tensor by name.

    ``parameters`` gives the shape of each parameter that has slots here but is not here itself: a slot is cut like its
    parameter only if it is shaped like it.
    """

    layout: Layout
    shapes: Mapping[str, Shape] = field(repr=False)
    parameters: Mapping[str, Shape] = field(repr=False, default_factory=dict)

    def to_bytes(self) -> bytes:
        """The file, a line per tensor."""
        head = json.dumps(
            {
                "version": 1,
                "world": self.layout.world,
                "layout": self.layout.document.model_dump(mode="json", exclude_none=True),
                "parameters": {name: list(shape) for name, shape in self.parameters.items()},
                "bound": None if self.layout.bound is None else [list(entry) for entry in self.layout.bound],
            },
            indent=1,
            ensure_ascii=False,
        )
        shapes = ",\n".join(
            f"  {json.dumps(name, ensure_ascii=False)}: {list(shape)}" for name, shape in self.shapes.items()
        )
        return f'{head[:-2]},\n "shapes": {{\n{shapes}\n }}\n}}\n'.encode()


def parse_layout_file(data: bytes) -> LayoutFile:
    """The checked content of a layout file; :class:`SourceCorrupt` says what is wrong."""
    from reshard_service.documents.layout import layout_document
    from reshard_service.layouts.layout import layout_from_document

    document = parse_json(data, file=LAYOUT_NAME)
    if not isinstance(document, dict) or document.get("version") != 1 or not set(document) <= _KEYS:
        raise SourceCorrupt(f"{LAYOUT_NAME} is no layout file of version 1", file=LAYOUT_NAME)
    try:
        layout = layout_from_document(layout_document(document.get("layout"), LAYOUT_NAME), rules_known=True)
    except UsageError as error:  # nobody wrote this one by hand
        raise SourceCorrupt(f"the layout in {error.message}", file=LAYOUT_NAME, hint=error.hint) from None
    if layout.world != document.get("world"):
        raise SourceCorrupt(
            f"{LAYOUT_NAME} says world {document.get('world')!r}, but its layout is of {layout.world} ranks",
            file=LAYOUT_NAME,
        )
    bound = document.get("bound")
    if bound is not None:
        layout = layout.bind(_bound(bound))
    return LayoutFile(layout, _shapes(document.get("shapes")), _shapes(document.get("parameters", {})))


def _shapes(value: Any) -> dict[str, Shape]:
    if not isinstance(value, dict):
        raise SourceCorrupt(f"{LAYOUT_NAME} has no map of tensor names to shapes", file=LAYOUT_NAME)
    return {name: _shape(name, shape) for name, shape in value.items()}


def _shape(name: str, value: Any) -> Shape:
    if (
        not isinstance(value, list)
        or len(value) > MAX_DIMS
        or any(type(size) is not int or not 0 <= size <= MAX_DIM for size in value)
    ):
        raise SourceCorrupt(
            f"{LAYOUT_NAME} gives tensor {name!r} the impossible shape {str(value)[:60]}", tensor=name, file=LAYOUT_NAME
        )
    return tuple(value)


def _bound(value: Any) -> list[tuple[str, Shape, str]]:
    if not isinstance(value, list) or not all(
        isinstance(entry, list) and len(entry) == 3 and isinstance(entry[0], str) and isinstance(entry[2], str)
        for entry in value
    ):
        raise SourceCorrupt(f"'bound' of {LAYOUT_NAME} is no list of name, shape and dtype", file=LAYOUT_NAME)
    return [(name, _shape(name, shape), dtype) for name, shape, dtype in value]
