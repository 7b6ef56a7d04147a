"""Two tensors bit for bit, whatever their layouts, in constant memory.

The comparison runs the same panels as a conversion from A to B would, except that B's side is read instead of written.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from reshard_service.catalogue import Catalogue, Chunks, Int64s, Notice, Tensor
from reshard_service.engine.buffers import Buffer
from reshard_service.engine.rounds import Fetcher, Place
from reshard_service.engine.source import Source
from reshard_service.planning.budget import Budget
from reshard_service.planning.coverage import tiling_fault
from reshard_service.planning.intersect import first_copies, intersect, widen
from reshard_service.planning.panels import Arrays, Move, Panel, Span, cut_panels

_LEAST_PANEL_BYTES = 256


def compare_pairs(
    a: Catalogue, b: Catalogue, pairs: list[tuple[int, int]], threads: int, progress: Callable[[int], None]
) -> list[Notice]:
    """The first difference of each pair (index in ``a``, index in ``b``) that is not the same bits, in that order."""
    different: list[Notice] = []
    readable: list[tuple[int, int]] = []
    for i, j in pairs:
        notice = (
            _header_difference(a.tensors[i], b.tensors[j]) or _coverage_fault(a, i, "a") or _coverage_fault(b, j, "b")
        )
        if notice is None:
            readable.append((i, j))
        else:
            different.append(notice)
    source_a, source_b = Source(a), Source(b)
    groups = [readable[k::threads] for k in range(threads)]
    try:
        with ThreadPoolExecutor(threads) as pool:
            for found in pool.map(lambda group: _Comparer(source_a, source_b, progress).run(group), groups):
                different += found
    finally:
        source_a.close()
        source_b.close()
    order = {a.tensors[i].key: position for position, (i, _) in enumerate(pairs)}
    return sorted(different, key=lambda notice: order.get(notice.name or "", 0))


def compare_tensors(a: Catalogue, i: int, b: Catalogue, j: int) -> Notice | None:
    """The first difference between one tensor of ``a`` and one of ``b``; None if they are the same bits."""
    found = _header_difference(a.tensors[i], b.tensors[j]) or _coverage_fault(a, i, "a") or _coverage_fault(b, j, "b")
    if found is not None:
        return found
    sources = Source(a), Source(b)
    try:
        different = _Comparer(*sources, lambda compared: None).run([(i, j)])
    finally:
        for source in sources:
            source.close()
    return different[0] if different else None


def _header_difference(mine: Tensor, other: Tensor) -> Notice | None:
    if mine.dtype != other.dtype:
        return Notice("dtype", f"{mine.dtype} in A, {other.dtype} in B", mine.key)
    if mine.shape != other.shape:
        return Notice("shape", f"{list(mine.shape)} in A, {list(other.shape)} in B", mine.key)
    return None


def _coverage_fault(catalogue: Catalogue, index: int, side: str) -> Notice | None:
    rows = catalogue.chunks.rows(index)
    tensor = catalogue.tensors[index]
    fault = tiling_fault(tensor.shape, catalogue.chunks.offsets[rows], catalogue.chunks.sizes[rows])
    return None if fault is None else Notice("coverage", f"in {side.upper()}: {fault}", tensor.key)


@dataclass(slots=True)
class _Comparison:
    """A panel whose bytes are on their way: what one side's spans hold against what the other's do.

    The panel reads from one side as a conversion would, and the spans that it would write are read from the other.
    """

    tensor: Tensor
    panel: Panel
    written: Arrays
    sizes: Int64s
    """Of the rectangles of ``written``."""
    is_swapped: bool
    """The panel reads from B."""
    first_a: int
    first_b: int


class _Comparer:
    """One thread: walks pairs of tensors panel by panel."""

    def __init__(self, a: Source, b: Source, progress: Callable[[int], None]) -> None:
        budget = Budget()
        self._a, self._b = a, b
        self._budget = budget.panel_bytes
        self._progress = progress
        self._buffers = Buffer(budget.staging_bytes), Buffer(budget.staging_bytes)
        self._fetch_a, self._fetch_b = Fetcher(a, self._buffers[0]), Fetcher(b, self._buffers[1])
        self._waiting: list[_Comparison] = []
        self._done: list[tuple[int, int]] = []
        self._found: dict[str, Notice] = {}

    def run(self, pairs: list[tuple[int, int]]) -> list[Notice]:
        try:
            for i, j in pairs:
                self._pair(i, j)
                self._done.append((i, j))
            self._flush()
        finally:
            for buffer in self._buffers:
                buffer.close()
        return list(self._found.values())

    def _pair(self, i: int, j: int) -> None:
        a, b = self._a.catalogue, self._b.catalogue
        rows_a, rows_b = a.chunks.rows(i), b.chunks.rows(j)
        dims = max(a.chunks.rank, b.chunks.rank, 1)
        side_a, side_b = _Side.of(a.chunks, rows_a, dims), _Side.of(b.chunks, rows_b, dims)
        stored = max(int(a.chunks.length[rows_a].sum()), int(b.chunks.length[rows_b].sum()), a.tensors[i].nbytes, 1)
        budget = max(_LEAST_PANEL_BYTES, self._budget * max(1, a.tensors[i].nbytes) // stored)
        self._walk(i, j, side_a, side_b, None, budget, is_swapped=False)
        # A conversion reads one of several replicas. Here all of A's count, as all of B's did.
        replicas = side_a.replicas()
        if len(replicas):
            self._walk(i, j, side_b, side_a, replicas, budget, is_swapped=True)

    def _walk(
        self, i: int, j: int, given: _Side, wanted: _Side, only: Int64s | None, budget: int, *, is_swapped: bool
    ) -> None:
        tensor, other = self._a.catalogue.tensors[i], self._b.catalogue.tensors[j]
        first_row_a, first_row_b = (
            source.catalogue.chunks.rows(at).start for source, at in ((self._a, i), (self._b, j))
        )
        itemsize = tensor.dtype.itemsize
        pattern = intersect(given.arrays.offsets, given.sizes, wanted.arrays.offsets, wanted.sizes)
        if only is not None:
            pattern = pattern.only_targets(only)
        panels = cut_panels(
            tensor.shape, pattern, given.arrays, wanted.arrays, itemsize, itemsize, budget, only_rows=only
        )
        for panel in panels:
            if tensor.key in self._found:
                break
            spans = tuple(write.span for write in panel.writes)
            from_a, from_b = (spans, panel.reads) if is_swapped else (panel.reads, spans)
            if not (self._fetch_a.room_for(first_row_a, from_a) and self._fetch_b.room_for(first_row_b, from_b)):
                self._flush()
            first_a = self._fetch_a.ask(first_row_a, from_a, tensor)
            first_b = self._fetch_b.ask(first_row_b, from_b, other)
            self._waiting.append(_Comparison(tensor, panel, wanted.arrays, wanted.sizes, is_swapped, first_a, first_b))

    def _flush(self) -> None:
        places_a, places_b = self._fetch_a.fetch(), self._fetch_b.fetch()
        for one in self._waiting:
            if one.tensor.key not in self._found:
                from_a, from_b = places_a[one.first_a :], places_b[one.first_b :]
                reads, writes = (from_b, from_a) if one.is_swapped else (from_a, from_b)
                where = _first_difference(one, reads, writes)
                if where is not None:
                    reason = f"first difference at index {where}" + (" of a replica in A" if one.is_swapped else "")
                    self._found[one.tensor.key] = Notice("bytes", reason, one.tensor.key, at=where)
            if not one.is_swapped:
                self._progress(one.panel.bytes_out)
        self._waiting.clear()
        for i, j in self._done:
            _forget(self._a, i)
            _forget(self._b, j)
        self._done.clear()


@dataclass(frozen=True, slots=True)
class _Side:
    """One tensor's rectangles and the arrays that they lie in."""

    arrays: Arrays
    sizes: Int64s

    @staticmethod
    def of(chunks: Chunks, rows: slice, dims: int) -> _Side:
        return _Side(Arrays.of(chunks, rows, dims), widen(chunks.sizes[rows], dims, 1))

    def replicas(self) -> Int64s:
        """Rows of the arrays that hold rectangles which an earlier row holds too."""
        again = np.setdiff1d(np.arange(len(self.sizes)), first_copies(self.arrays.offsets, self.sizes))
        return np.flatnonzero(np.isin(self.arrays.array, self.arrays.array[again])).astype(np.int64)


def _forget(source: Source, index: int) -> None:
    rows = source.catalogue.chunks.rows(index)
    source.forget(range(rows.start, rows.stop))


def _first_difference(one: _Comparison, reads: list[Place], writes: list[Place]) -> str | None:
    """Global index of the first element that differs, row-major within the panel."""
    itemsize = one.tensor.dtype.itemsize
    first: tuple[int, ...] | None = None
    for write, (array_w, at_w) in zip(one.panel.writes, writes, strict=False):
        for move in write.moves:
            array_r, at_r = reads[move.read]
            shape = (*move.shape[:-1], move.shape[-1] * itemsize)
            here = np.ndarray(shape, np.uint8, array_r, at_r + move.source_start, (*move.source_strides[:-1], 1))
            there = np.ndarray(shape, np.uint8, array_w, at_w + move.target_start, (*move.target_strides[:-1], 1))
            if np.array_equal(here, there):
                continue
            index = np.unravel_index(int(np.argmax(here != there)), here.shape)
            found = _global_index(write.span, move, [int(x) for x in index], one)
            first = found if first is None else min(first, found)
    return None if first is None else str(list(first))


def _global_index(span: Span, move: Move, index: list[int], one: _Comparison) -> tuple[int, ...]:
    """From a byte of a written span to the element of the tensor it belongs to."""
    arrays = one.written
    byte = span.start + move.target_start
    byte += sum(i * stride for i, stride in zip(index[:-1], move.target_strides[:-1], strict=True)) + index[-1]
    local = np.array(np.unravel_index(byte // one.tensor.dtype.itemsize, tuple(arrays.stored[span.row].tolist())))
    inside = local - arrays.local
    holds = (arrays.array == span.row) & (inside >= 0).all(axis=1) & (inside < one.sizes).all(axis=1)
    row = int(np.flatnonzero(holds)[0])
    place: list[int] = (arrays.offsets[row] + inside[row]).tolist()
    return tuple(place[: len(one.tensor.shape)])
