"""Random ways to cut a tensor up, as checkpoints do: into rectangles, with replicas, or packed into arrays."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from reshard_service.catalogue import Chunks, build_chunks

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes."""
Bytes = NDArray[np.uint8]


unhurried = settings(max_examples=60, deadline=None)
"""For property tests that may share their cores with others."""


@dataclass(frozen=True)
class Tiling:
    """Rectangles of one tensor. ``arrays[i]`` is the stored array that rectangle ``i`` lies in, at ``local[i]``."""

    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    arrays: tuple[int, ...]
    local: tuple[tuple[int, ...], ...]
    stored: tuple[tuple[int, ...], ...]
    packed: bool

    @property
    def offsets(self) -> NDArray[np.int64]:
        return np.array([box[0] for box in self.boxes], dtype=np.int64).reshape(len(self.boxes), len(self.shape))

    @property
    def sizes(self) -> NDArray[np.int64]:
        return np.array([box[1] for box in self.boxes], dtype=np.int64).reshape(len(self.boxes), len(self.shape))

    def chunks(self) -> Chunks:
        """A catalogue's table of this one tensor; the array's number stands for its place."""
        count = len(self.boxes)
        return build_chunks(
            1,
            [0] * count,
            [box[0] for box in self.boxes],
            [box[1] for box in self.boxes],
            file=[0] * count,
            start=self.arrays,
            length=[int(np.prod(stored, dtype=np.int64)) for stored in self.stored],
            local=self.local if self.packed else None,
            stored=self.stored if self.packed else None,
        )

    def contents(self, whole: NDArray[np.generic]) -> dict[int, bytearray]:
        """What each stored array holds of the tensor ``whole``."""
        kind = whole.dtype
        found: dict[int, NDArray[np.generic]] = {}
        for (offsets, sizes), array, local, stored in zip(
            self.boxes, self.arrays, self.local, self.stored, strict=True
        ):
            values = found.setdefault(array, np.zeros(stored, kind))
            values[_slices(local, sizes)] = whole[_slices(offsets, sizes)]
        return {array: bytearray(values.tobytes()) for array, values in found.items()}


def _slices(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))


def shapes(max_dims: int = 4, max_side: int = 6) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes from 0-dim to ``max_dims``; now and then a dim of 0."""
    return st.lists(st.integers(0, max_side), max_size=max_dims).map(tuple)


@st.composite
def rectangles(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[Box, ...]:
    """Rectangles that tile ``shape`` exactly: cut in two, again and again, along any dim."""

    def cut(box: Box, depth: int) -> list[Box]:
        offsets, sizes = box
        wide = [dim for dim, size in enumerate(sizes) if size > 1]
        if not wide or depth == 0 or not draw(st.booleans()):
            return [box]
        dim = draw(st.sampled_from(wide))
        at = draw(st.integers(1, sizes[dim] - 1))
        low = (offsets, (*sizes[:dim], at, *sizes[dim + 1 :]))
        high = (
            (*offsets[:dim], offsets[dim] + at, *offsets[dim + 1 :]),
            (*sizes[:dim], sizes[dim] - at, *sizes[dim + 1 :]),
        )
        return cut(low, depth - 1) + cut(high, depth - 1)

    return tuple(cut(((0,) * len(shape), shape), 4))


@st.composite
def plain(draw: st.DrawFn, shape: tuple[int, ...]) -> Tiling:
    """Every rectangle an array of its own, in any order; some stored several times."""
    boxes = list(draw(rectangles(shape)))
    boxes += draw(st.lists(st.sampled_from(boxes), max_size=3))
    if 0 in shape and draw(st.booleans()):
        boxes.append(((0,) * len(shape), shape))
    boxes = draw(st.permutations(boxes))
    count = len(boxes)
    return Tiling(
        shape,
        tuple(boxes),
        tuple(range(count)),
        ((0,) * len(shape),) * count,
        tuple(sizes for _, sizes in boxes),
        packed=False,
    )


@st.composite
def packed(draw: st.DrawFn, shape: tuple[int, ...]) -> Tiling:
    """Arrays of several rectangles each, as strided and packed shards are; some replicated.

    Along each dim the range is cut into pieces, and the pieces are dealt to owners; an owner's array holds the product
    of its pieces, one behind the other.
    """
    if 0 in shape:
        return Tiling(shape, (((0,) * len(shape), shape),), (0,), ((0,) * len(shape),), (shape,), packed=True)
    dealt: list[list[list[tuple[int, int]]]] = []
    for size in shape:
        edges = sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=3))})
        owners = draw(st.integers(1, 2))
        pieces: list[list[tuple[int, int]]] = [[] for _ in range(owners)]
        for begin, end in pairwise(edges):
            pieces[draw(st.integers(0, owners - 1))].append((begin, end))
        dealt.append([held for held in pieces if held])
    arrays: list[list[tuple[Box, tuple[int, ...], tuple[int, ...]]]] = []
    for owner in product(*dealt):
        stored = tuple(sum(end - begin for begin, end in held) for held in owner)
        places = [
            [(begin, end, sum(e - b for b, e in held[:number])) for number, (begin, end) in enumerate(held)]
            for held in owner
        ]
        rows = []
        for piece in product(*places):
            offsets = tuple(begin for begin, _, _ in piece)
            sizes = tuple(end - begin for begin, end, _ in piece)
            rows.append(((offsets, sizes), tuple(at for _, _, at in piece), stored))
        arrays.append(rows)
    arrays += draw(st.lists(st.sampled_from(arrays), max_size=2))
    flat = [(number, *row) for number, rows in enumerate(arrays) for row in rows]
    flat = draw(st.permutations(flat))
    return Tiling(
        shape,
        tuple(box for _, box, _, _ in flat),
        tuple(number for number, _, _, _ in flat),
        tuple(local for _, _, local, _ in flat),
        tuple(stored for _, _, _, stored in flat),
        packed=True,
    )


def tilings(shape: tuple[int, ...]) -> st.SearchStrategy[Tiling]:
    """Either kind."""
    return st.one_of(plain(shape), packed(shape))
