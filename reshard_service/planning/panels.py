"""Cuts one tensor's copies into panels: steps whose reads and writes are contiguous and fit the buffers.

A panel is a slab of the global tensor (some leading indices fixed, a range on the next dim). Within a slab every
stored array that is row-major contributes one contiguous byte range, on the source side as on the target side, whatever
the two layouts are. So rows are read once and scattered to all their column shards, and each target array grows front
to back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod

import numpy as np

from reshard_service.catalogue import Chunks, Int64s
from reshard_service.planning.intersect import Pattern, widen


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes ``[start, start + length)`` of the payload of the array in chunk row ``row``.

    Rows are counted from the tensor's first. ``whole`` says that the span is the array's entire payload of
    ``array_bytes``.
    """

    row: int
    start: int
    length: int
    array_bytes: int

    @property
    def whole(self) -> bool:
        return self.length == self.array_bytes


@dataclass(frozen=True, slots=True)
class Move:
    """One copy from a read span into a write span; starts are bytes from the beginning of the span.

    ``read`` is an index into the panel's reads. ``shape`` counts elements with the innermost run collapsed; strides are
    bytes. A contiguous move has one dim.
    """

    read: int
    source_start: int
    target_start: int
    shape: tuple[int, ...]
    source_strides: tuple[int, ...]
    target_strides: tuple[int, ...]

    @property
    def contiguous(self) -> bool:
        return len(self.shape) == 1


@dataclass(frozen=True, slots=True)
class Write:
    """A span of a target array and the moves that fill every byte of it."""

    span: Span
    moves: tuple[Move, ...]


@dataclass(frozen=True, slots=True)
class Panel:
    """One step: fill all ``reads``, then each of ``writes`` can be made from them."""

    reads: tuple[Span, ...]
    writes: tuple[Write, ...]
    bytes_in: int
    bytes_out: int


@dataclass(frozen=True, slots=True)
class Arrays:
    """Stored arrays behind the chunk rows of one tensor: representative row, place in it, its sizes."""

    array: Int64s
    offsets: Int64s
    local: Int64s
    stored: Int64s

    @staticmethod
    def of(chunks: Chunks, rows: slice, dims: int) -> Arrays:
        offsets = widen(chunks.offsets[rows], dims, 0)
        sizes = widen(chunks.sizes[rows], dims, 1)
        count = len(offsets)
        if chunks.local is None or chunks.stored is None:
            return Arrays(np.arange(count, dtype=np.int64), offsets, np.zeros_like(offsets), sizes)
        place = np.stack([chunks.file[rows].astype(np.int64), chunks.start[rows]], axis=1)
        _, first, inverse = np.unique(place, axis=0, return_index=True, return_inverse=True)
        return Arrays(
            first.astype(np.int64)[inverse.reshape(-1)],
            offsets,
            widen(chunks.local[rows], dims, 0),
            widen(chunks.stored[rows], dims, 1),
        )

    def key(self) -> bytes:
        return self.array.tobytes() + self.local.tobytes() + self.stored.tobytes()

    def element_strides(self) -> Int64s:
        """Row-major strides of each row's array, in elements."""
        strides = np.ones_like(self.stored)
        strides[:, :-1] = self.stored[:, :0:-1].cumprod(axis=1)[:, ::-1]
        return strides


def slabs(shape: tuple[int, ...], element_bytes: int, budget_bytes: int) -> Iterator[tuple[Int64s, Int64s]]:
    """Lower and upper corners of slabs of at most ``budget_bytes`` that tile ``shape``, in row-major order."""
    if prod(shape) * element_bytes <= budget_bytes:
        yield np.zeros(len(shape), dtype=np.int64), np.array(shape, dtype=np.int64)
        return
    dim = 0
    while dim < len(shape) - 1 and prod(shape[dim + 1 :]) * element_bytes > budget_bytes:
        dim += 1
    rows = max(1, budget_bytes // max(1, prod(shape[dim + 1 :]) * element_bytes))
    for lead in product(*(range(extent) for extent in shape[:dim])):
        for start in range(0, shape[dim], rows):
            low = np.zeros(len(shape), dtype=np.int64)
            high = np.array(shape, dtype=np.int64)
            low[:dim] = lead
            high[:dim] = low[:dim] + 1
            low[dim] = start
            high[dim] = min(start + rows, shape[dim])
            yield low, high


def cut_panels(
    shape: tuple[int, ...],
    pattern: Pattern,
    source: Arrays,
    target: Arrays,
    source_itemsize: int,
    target_itemsize: int,
    budget_bytes: int,
    only_rows: Int64s | None = None,
) -> Iterator[Panel]:
    """Panels of one tensor in row-major order. ``shape`` is padded with ones to the pattern's number of dims.

    ``pattern`` may be restricted to some target rows; then ``only_rows`` names them.
    """
    dims = pattern.offsets.shape[1]
    extent = (*shape, *([1] * (dims - len(shape))))
    source_strides, target_strides = source.element_strides(), target.element_strides()
    empty = [
        Write(Span(int(row), 0, 0, 0), ())
        for row in np.flatnonzero(target.stored.prod(axis=1) == 0)
        if target.array[row] == row and (only_rows is None or row in only_rows)
    ]
    if len(pattern) == 0:
        if empty:
            yield Panel((), tuple(empty), 0, 0)
        return
    start_of, stop_of = pattern.offsets, pattern.offsets + pattern.sizes
    for low, high in slabs(extent, max(source_itemsize, target_itemsize), budget_bytes):
        lower, upper = np.maximum(start_of, low), np.minimum(stop_of, high)
        inside = np.flatnonzero((upper > lower).all(axis=1))
        if len(inside) == 0:
            continue
        lower, sizes = lower[inside], upper[inside] - lower[inside]
        s_rows, t_rows = pattern.source[inside], pattern.target[inside]
        reads, s_index, s_start = _spans(source, source_strides, s_rows, lower, sizes, source_itemsize)
        spans, t_index, t_start = _spans(target, target_strides, t_rows, lower, sizes, target_itemsize)
        bytes_out = int(sizes.prod(axis=1).sum()) * target_itemsize
        if bytes_out != sum(span.length for span in spans):
            raise AssertionError(f"a slab of shape {shape} does not fill contiguous target ranges")
        moves: list[list[Move]] = [[] for _ in spans]
        for read, write, source_start, target_start, size, s_strides, t_strides in zip(
            s_index.tolist(),
            t_index.tolist(),
            s_start.tolist(),
            t_start.tolist(),
            sizes.tolist(),
            (source_strides[s_rows] * source_itemsize).tolist(),
            (target_strides[t_rows] * target_itemsize).tolist(),
            strict=True,
        ):
            moves[write].append(_move(read, source_start, target_start, size, s_strides, t_strides))
        writes = (*(Write(span, tuple(into)) for span, into in zip(spans, moves, strict=True)), *empty)
        yield Panel(reads, writes, sum(span.length for span in reads), bytes_out)
        empty = []


def _spans(
    arrays: Arrays, strides: Int64s, rows: Int64s, lower: Int64s, sizes: Int64s, itemsize: int
) -> tuple[tuple[Span, ...], Int64s, Int64s]:
    """The byte span of every array touched; per copy the index of its span and its start within it, in bytes."""
    place = lower - arrays.offsets[rows] + arrays.local[rows]
    first = (place * strides[rows]).sum(axis=1)
    last = ((place + sizes - 1) * strides[rows]).sum(axis=1)
    touched, index = np.unique(arrays.array[rows], return_inverse=True)
    index = index.reshape(-1)
    span_from = np.full(len(touched), np.iinfo(np.int64).max, dtype=np.int64)
    span_to = np.zeros(len(touched), dtype=np.int64)
    np.minimum.at(span_from, index, first)
    np.maximum.at(span_to, index, last + 1)
    volumes = arrays.stored[touched].prod(axis=1)
    spans = tuple(
        Span(row, start * itemsize, (stop - start) * itemsize, volume * itemsize)
        for row, start, stop, volume in zip(
            touched.tolist(), span_from.tolist(), span_to.tolist(), volumes.tolist(), strict=True
        )
    )
    return spans, index, (first - span_from[index]) * itemsize


def _move(
    read: int,
    source_start: int,
    target_start: int,
    sizes: list[int],
    source_strides: list[int],
    target_strides: list[int],
) -> Move:
    """A move with every pair of dims merged that is contiguous on both sides, innermost outwards.

    The last stride on either side is always the element size, so a run is bytes in both.
    """
    shape, s_strides, t_strides = [1], [source_strides[-1]], [target_strides[-1]]
    for size, s_stride, t_stride in zip(
        reversed(sizes), reversed(source_strides), reversed(target_strides), strict=True
    ):
        if size == 1:
            continue
        if s_stride == shape[-1] * s_strides[-1] and t_stride == shape[-1] * t_strides[-1]:
            shape[-1] *= size
        else:
            shape.append(size)
            s_strides.append(s_stride)
            t_strides.append(t_stride)
    return Move(read, source_start, target_start, tuple(shape[::-1]), tuple(s_strides[::-1]), tuple(t_strides[::-1]))
