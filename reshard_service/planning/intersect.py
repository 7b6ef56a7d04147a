"""Which source rectangles hold which part of which target rectangles, for one tensor at a time.

Layers of a model repeat, so the same pair of chunk patterns comes back hundreds of times: a :class:`Pattern` is
computed once and shared by every tensor that has it. That keeps a plan over a million chunks small and quick.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from reshard_service.catalogue import Chunks, Int64s


@dataclass(frozen=True, slots=True)
class Pattern:
    """All copies of one tensor: copy ``i`` moves the global rectangle ``offsets[i]``/``sizes[i]``.

    ``source[i]`` and ``target[i]`` are row numbers counted from the tensor's first row in either chunk table.
    """

    source: Int64s
    target: Int64s
    offsets: Int64s
    sizes: Int64s

    def __len__(self) -> int:
        return len(self.source)

    def volumes(self) -> Int64s:
        """Stored elements of each copy."""
        volume: Int64s = self.sizes.prod(axis=1)
        return volume

    def only_targets(self, keep: Int64s) -> Pattern:
        """The copies into the given target rows."""
        mask = np.isin(self.target, keep)
        return Pattern(self.source[mask], self.target[mask], self.offsets[mask], self.sizes[mask])


def overlapping_pairs(a_from: Int64s, a_to: Int64s, b_from: Int64s, b_to: Int64s) -> tuple[Int64s, Int64s]:
    """Index pairs ``(i, j)`` whose half-open boxes ``a`` and ``b`` share at least one element.

    Shapes ``[n, d]`` and ``[m, d]``. Sorted by ``i``, then by the position of ``b`` along the busiest dim: an interval
    join on that dim (binary search over running maxima), the other dims filter.
    """
    n, dims = a_from.shape
    if n == 0 or len(b_from) == 0:
        none = np.empty(0, dtype=np.int64)
        return none, none
    if dims == 0:
        return (
            np.repeat(np.arange(n, dtype=np.int64), len(b_from)),
            np.tile(np.arange(len(b_from), dtype=np.int64), n),
        )
    dim = max(range(dims), key=lambda d: len(np.unique(b_from[:, d])))
    order = np.argsort(b_from[:, dim], kind="stable")
    starts = b_from[order, dim]
    latest_end = np.maximum.accumulate(b_to[order, dim])
    first = np.searchsorted(latest_end, a_from[:, dim], side="right")
    beyond = np.searchsorted(starts, a_to[:, dim], side="left")
    counts = np.maximum(beyond - first, 0)
    i = np.repeat(np.arange(n, dtype=np.int64), counts)
    within = np.arange(len(i), dtype=np.int64) - np.repeat(np.cumsum(counts) - counts, counts)
    j = order[np.repeat(first, counts) + within]
    shared = np.ones(len(i), dtype=bool)
    for d in range(dims):
        shared &= (a_from[i, d] < b_to[j, d]) & (b_from[j, d] < a_to[i, d])
        shared &= (a_from[i, d] < a_to[i, d]) & (b_from[j, d] < b_to[j, d])
    return i[shared], j[shared]


def first_copies(offsets: Int64s, sizes: Int64s) -> Int64s:
    """Row numbers without replicas: of rows with the same rectangle only the first."""
    if len(offsets) < 2:
        return np.arange(len(offsets), dtype=np.int64)
    _, first = np.unique(np.concatenate([offsets, sizes], axis=1), axis=0, return_index=True)
    return np.sort(first).astype(np.int64)


def intersect(source_offsets: Int64s, source_sizes: Int64s, target_offsets: Int64s, target_sizes: Int64s) -> Pattern:
    """The copies that fill the target rectangles from the source rectangles; replicas of a source count once."""
    keep = first_copies(source_offsets, source_sizes)
    s_from, s_to = source_offsets[keep], source_offsets[keep] + source_sizes[keep]
    t_from, t_to = target_offsets, target_offsets + target_sizes
    target, source = overlapping_pairs(t_from, t_to, s_from, s_to)
    offsets = np.maximum(t_from[target], s_from[source])
    sizes = np.minimum(t_to[target], s_to[source]) - offsets
    return Pattern(keep[source], target, offsets, sizes)


def widen(table: Int64s, dims: int, fill: int) -> Int64s:
    """``table`` with columns added on the right up to ``dims``."""
    missing = dims - table.shape[1]
    if missing <= 0:
        return table
    return np.pad(table, ((0, 0), (0, missing)), constant_values=fill)


class PatternCache:
    """Patterns by the bytes of their geometry."""

    def __init__(self, source: Chunks, target: Chunks) -> None:
        dims = max(source.rank, target.rank, 1)
        self._source = np.ascontiguousarray(
            np.concatenate([widen(source.offsets, dims, 0), widen(source.sizes, dims, 1)], axis=1)
        )
        self._target = np.ascontiguousarray(
            np.concatenate([widen(target.offsets, dims, 0), widen(target.sizes, dims, 1)], axis=1)
        )
        self.dims = dims
        self._found: dict[tuple[bytes, bytes], int] = {}
        self.patterns: list[Pattern] = []

    def pattern(self, source_rows: slice, target_rows: slice) -> int:
        """Number of the pattern between these rows, computed if it is new."""
        source, target = self._source[source_rows], self._target[target_rows]
        key = (source.tobytes(), target.tobytes())
        known = self._found.get(key)
        if known is None:
            d = self.dims
            known = self._found[key] = len(self.patterns)
            self.patterns.append(intersect(source[:, :d], source[:, d:], target[:, :d], target[:, d:]))
        return known
