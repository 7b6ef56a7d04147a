"""Holdings as the arrays that ranks would hold: what tests compare with torch's real local tensors."""

from __future__ import annotations

from math import prod

import numpy as np
from numpy.typing import NDArray

from reshard_service.documents.layout import RuleDocument, layout_document
from reshard_service.layouts.holdings import Holdings
from reshard_service.layouts.layout import Layout, layout_from_document

Shape = tuple[int, ...]
Array = NDArray[np.int64]


def make_layout(axes: list[tuple[str, int]], *rules: dict[str, object], expert_mesh: object = None) -> Layout:
    """A layout of one mesh and rules written as in a document; axes that no rule names may be of any size."""
    document = {"version": 1, "mesh": {"axes": axes}, "rules": rules, "expert_mesh": expert_mesh}
    return layout_from_document(layout_document(document), rules_known=True)


def rule(match: str, **placements: str) -> dict[str, object]:
    """A rule for both views."""
    return RuleDocument(match=match, placements=placements).model_dump()


def locals_of(holdings: Holdings, shape: Shape) -> list[Array]:
    """Each rank's local tensor, if the global one holds 0, 1, 2, …; a place that no rectangle fills is -1."""
    whole = np.arange(prod(shape), dtype=np.int64).reshape(shape)
    found = [np.full(tuple(local), -1, dtype=np.int64) for local in holdings.local_shape]
    for rank, offset, size, at in zip(holdings.rank, holdings.offsets, holdings.sizes, holdings.local, strict=True):
        found[rank][_box(at, size)] = whole[_box(offset, size)]
    return found


def joined(holdings: Holdings, shape: Shape, pieces: list[Array]) -> Array:
    """The global tensor put together from local tensors, where the rectangles say."""
    whole = np.full(shape, -1, dtype=np.int64)
    for rank, offset, size, at in zip(holdings.rank, holdings.offsets, holdings.sizes, holdings.local, strict=True):
        whole[_box(offset, size)] = pieces[rank][_box(at, size)]
    return whole


def coverage(offsets: Array, sizes: Array, shape: Shape) -> Array:
    """How many rectangles cover each element."""
    counts = np.zeros(shape, dtype=np.int64)
    for offset, size in zip(offsets, sizes, strict=True):
        counts[_box(offset, size)] += 1
    return counts


def _box(offset: Array, size: Array) -> tuple[slice, ...]:
    return tuple(slice(int(begin), int(begin + length)) for begin, length in zip(offset, size, strict=True))
