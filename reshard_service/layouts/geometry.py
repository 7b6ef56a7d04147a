"""Splits to rectangles: every rank's pieces of one tensor at once, in plain integers (oracle: torch's DTensor)."""

from __future__ import annotations

from math import prod

import numpy as np
from numpy.typing import NDArray

from reshard_service.layouts.holdings import Holdings, Int64s
from reshard_service.layouts.mesh import Mesh
from reshard_service.layouts.splits import DimSplits


def chunk_of(length: Int64s, parts: int, index: Int64s) -> tuple[Int64s, Int64s]:
    """Begin and length of piece ``index`` of ``parts`` of a run, cut as ``torch.chunk`` does: ceil-sized pieces."""
    piece = -(-length // parts)
    begin = np.minimum(length, piece * index)
    return begin, np.minimum(length, begin + piece) - begin


def rectangles(mesh: Mesh, splits: tuple[DimSplits, ...], shape: tuple[int, ...]) -> Holdings:
    """What each rank of the mesh holds of a tensor of ``shape``."""
    world, rank = mesh.world, len(shape)
    blocks = [1] * rank
    begins = np.zeros((world, rank), dtype=np.int64)
    lengths = np.empty((world, rank), dtype=np.int64)
    lengths[:] = shape
    for split in splits:
        blocks[split.dim] = split.blocks
        begin = begins[:, split.dim]
        length = lengths[:, split.dim] // split.blocks
        for axis in split.axes:
            within, length = chunk_of(length, mesh.sizes[axis], mesh.coordinates[:, axis])
            begin = begin + within
        begins[:, split.dim] = begin
        lengths[:, split.dim] = length
    local_shape = lengths * np.array(blocks, dtype=np.int64)
    if prod(shape) == 0:
        ranks = np.arange(world, dtype=np.int64)
        return Holdings(ranks, begins, local_shape, np.zeros_like(begins), local_shape)
    # Piece p of a rank is one choice of a block in every packed dim, in the local tensor's row-major order.
    pieces = np.array(list(np.ndindex(*blocks)), dtype=np.int64).reshape(prod(blocks), rank)
    steps = np.array([size // count for size, count in zip(shape, blocks, strict=True)], dtype=np.int64)
    offsets = begins[:, None, :] + pieces * steps
    local = pieces * lengths[:, None, :]
    sizes = np.broadcast_to(lengths[:, None, :], offsets.shape)
    owner = np.broadcast_to(np.arange(world, dtype=np.int64)[:, None], offsets.shape[:2])
    full: NDArray[np.bool_] = np.all(lengths > 0, axis=1)
    held = np.broadcast_to(full[:, None], owner.shape)
    return Holdings(owner[held], offsets[held], sizes[held], local[held], local_shape)
