"""Chunk tables of rank-local arrays, one or several rectangles each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from reshard_service.catalogue import Chunks, Int32s, Int64s, Storing, Tensor
from reshard_service.layouts.holdings import Holdings


def local_chunks(
    tensors: Sequence[Tensor],
    held: Sequence[Holdings],
    starts: Int64s,
    file_of: Int32s,
) -> Chunks:
    """The chunk table of tensors held as ``held`` says; rectangles of one rank's packed tensor share its array.

    ``starts`` and ``file_of`` tell where rank ``r``'s local tensor ``i`` lies: ``[i, r]``.
    """
    dims = max((len(tensor.shape) for tensor in tensors), default=0)
    counts = np.array([len(holdings.rank) for holdings in held], dtype=np.int64)
    total = int(counts.sum())
    first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    offsets, local = np.zeros((total, dims), dtype=np.int64), np.zeros((total, dims), dtype=np.int64)
    sizes, stored = np.ones((total, dims), dtype=np.int64), np.ones((total, dims), dtype=np.int64)
    start, file = np.zeros(total, dtype=np.int64), np.zeros(total, dtype=np.int32)
    length = np.zeros(total, dtype=np.int64)
    for i, holdings in enumerate(held):
        rows = slice(int(first[i]), int(first[i + 1]))
        width = len(tensors[i].shape)
        offsets[rows, :width] = holdings.offsets
        sizes[rows, :width] = holdings.sizes
        local[rows, :width] = holdings.local
        stored[rows, :width] = holdings.local_shape[holdings.rank]
        start[rows] = starts[i, holdings.rank]
        file[rows] = file_of[i, holdings.rank]
        length[rows] = stored[rows].prod(axis=1) * tensors[i].dtype.itemsize
    plain = bool((sizes == stored).all())
    return Chunks(
        first=first,
        offsets=offsets,
        sizes=sizes,
        file=file,
        start=start,
        length=length,
        storing=np.full(total, int(Storing.RAW), dtype=np.uint8),
        local=None if plain else local,
        stored=None if plain else stored,
    )
