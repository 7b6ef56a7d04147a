"""The proof that every element of the target is written exactly once, from a source that tiles its tensors."""

from __future__ import annotations

import itertools

import numpy as np

from reshard_service.catalogue import Int64s
from reshard_service.planning.intersect import first_copies, overlapping_pairs


def tiling_fault(shape: tuple[int, ...], offsets: Int64s, sizes: Int64s) -> str | None:
    """Why these rectangles do not tile ``shape`` exactly once (replicas aside), or None if they do."""
    dims = offsets.shape[1]
    extent = np.ones(dims, dtype=np.int64)
    extent[: len(shape)] = shape
    outside = np.flatnonzero(((offsets < 0) | (sizes < 0) | (offsets + sizes > extent)).any(axis=1))
    if len(outside):
        return f"chunk {_box(offsets[outside[0]], sizes[outside[0]], len(shape))} reaches out of shape {list(shape)}"
    if 0 in shape:
        return None
    keep = first_copies(offsets, sizes)
    keep = keep[sizes[keep].prod(axis=1) > 0]
    offsets, sizes = offsets[keep], sizes[keep]
    i, j = overlapping_pairs(offsets, offsets + sizes, offsets, offsets + sizes)
    clash = np.flatnonzero(i < j)
    if len(clash):
        a, b = int(i[clash[0]]), int(j[clash[0]])
        return f"chunks {_box(offsets[a], sizes[a], len(shape))} and {_box(offsets[b], sizes[b], len(shape))} overlap"
    if int(sizes.prod(axis=1).sum()) == int(extent.prod()):
        return None
    return f"no chunk holds {_first_gap(extent, offsets, sizes, len(shape))} of shape {list(shape)}"


def _box(offsets: Int64s, sizes: Int64s, dims: int) -> str:
    ranges = ", ".join(f"{int(o)}:{int(o + s)}" for o, s in zip(offsets[:dims], sizes[:dims], strict=True))
    return f"[{ranges}]"


def _first_gap(extent: Int64s, offsets: Int64s, sizes: Int64s, dims: int) -> str:
    """The first uncovered cell (row-major) of the grid that all chunk edges cut out."""
    low, high = np.zeros_like(extent), extent.copy()
    for d in range(len(extent)):
        edges = np.unique(np.concatenate([[0, extent[d]], offsets[:, d], offsets[:, d] + sizes[:, d]]))
        for start, stop in itertools.pairwise(edges):
            inside = (offsets[:, d] <= start) & (offsets[:, d] + sizes[:, d] >= stop)
            wanted = int(extent[d + 1 :].prod())
            if int(sizes[inside, d + 1 :].prod(axis=1).sum()) < wanted:
                low[d], high[d] = start, stop
                offsets, sizes = offsets[inside], sizes[inside]
                break
    return _box(low, high - low, dims)


def uncovered_target(target_sizes: Int64s, target: Int64s, volumes: Int64s) -> int | None:
    """The first target row whose copies do not add up to its volume; None if all do.

    With a source that tiles its tensor the copies are disjoint, so equal volumes prove exact, single coverage.
    """
    covered = np.bincount(target, weights=volumes, minlength=len(target_sizes)) if len(target) else 0
    missing = np.flatnonzero(target_sizes.prod(axis=1) != np.asarray(covered, dtype=np.int64))
    return int(missing[0]) if len(missing) else None
