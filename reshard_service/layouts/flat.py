"""Where a flat buffer puts the tensors of one group, and which rows of them each rank gets.

Geometry of Megatron-FSDP's DBuffer (megatron-fsdp 0.6.1, ``megatron_fsdp/experimental/layout.py``): tensors are packed
so that every cut into equal ranges falls between rows. Newer Megatron-LM can also pack by subgroups of ranks, which its
checkpoints do not record and which is not covered here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm, prod

import numpy as np

from reshard_service.errors import LayoutInvalid
from reshard_service.layouts.holdings import Holdings, Int64s
from reshard_service.layouts.mesh import Mesh

_MAX_ELEMENTS = 1 << 61


@dataclass(frozen=True, slots=True)
class FlatBuffer:
    """One group's buffer: the offset of each tensor and the padded size, in elements."""

    offsets: tuple[int, ...]
    size: int


def pack(shapes: Sequence[tuple[int, ...]], ranks: int) -> FlatBuffer:
    """Place tensors, in the order the framework sees them, in a buffer that ``ranks`` ranks share evenly.

    The buffer is counted in chunks, a chunk being the least common multiple of the row widths. Tensors of at least a
    chunk keep their order and begin at a chunk; the hole that one leaves behind takes the beginning of the first later
    tensor whose own part of a chunk fits in, then small tensors, largest first. Small tensors left over come last.
    Row widths must not be zero.
    """
    widths = [prod(shape[1:]) for shape in shapes]
    counts = [prod(shape) for shape in shapes]
    chunk = lcm(*widths)
    offsets = [0] * len(shapes)
    waiting = [tensor for tensor in range(len(shapes)) if counts[tensor] >= chunk]
    small = [tensor for tensor in range(len(shapes)) if counts[tensor] < chunk]
    small.sort(key=lambda tensor: -counts[tensor])
    end = 0
    while waiting:
        tensor = waiting.pop(0)
        offsets[tensor] = end
        excess = counts[tensor] % chunk
        hole = end + counts[tensor]
        end = _up_to(hole, chunk)
        if not excess:
            continue
        hole_end = end
        partner = next((other for other in waiting if 0 < counts[other] % chunk <= chunk - excess), None)
        if partner is not None:
            # It straddles the chunk border so that its whole chunks stay whole.
            waiting.remove(partner)
            hole_end = offsets[partner] = end - counts[partner] % chunk
            end = hole_end + counts[partner]
        for other in list(small):
            begin = _up_to(hole, widths[other])
            if begin + counts[other] <= hole_end:
                offsets[other] = begin
                hole = begin + counts[other]
                small.remove(other)
    for tensor in small:
        offsets[tensor] = _up_to(end, widths[tensor])
        end = offsets[tensor] + counts[tensor]
    return FlatBuffer(tuple(offsets), _up_to(end, chunk * ranks))


def _up_to(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def flat_index(mesh: Mesh, axes: Sequence[int]) -> Int64s:
    """For each rank, which of the equal ranges of the buffer it holds: the last axis selects the big range first."""
    index = np.zeros(mesh.world, dtype=np.int64)
    for axis in reversed(axes):
        index = index * mesh.sizes[axis] + mesh.coordinates[:, axis]
    return index


def flat_holdings(
    mesh: Mesh,
    axes: Sequence[int],
    padding_ranks: int,
    names: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    within: Sequence[Holdings],
) -> list[Holdings]:
    """What each rank holds of each tensor of a group whose buffer is cut along ``axes``.

    ``within`` are the holdings under the mesh's other axes (tensor parallelism, say), at most one rectangle a rank:
    ranks with the same rectangles share a buffer of those local tensors. ``padding_ranks`` is the size of the whole
    data-parallel mesh, replicas included, for which the framework pads the buffer. :class:`LayoutInvalid` names a
    tensor that has no rows to cut between.
    """
    ranges = prod(mesh.sizes[axis] for axis in axes)
    index = flat_index(mesh, axes)
    first = np.zeros((len(shapes), mesh.world), dtype=np.int64)
    last = np.zeros((len(shapes), mesh.world), dtype=np.int64)
    boxes = [_boxes(holdings, mesh.world) for holdings in within]
    keys = np.concatenate([np.concatenate(box, axis=1) for box in boxes], axis=1)
    _, sharing = np.unique(keys, axis=0, return_inverse=True)
    sharing = sharing.reshape(-1)
    for group in range(int(sharing.max()) + 1):
        ranks = np.flatnonzero(sharing == group)
        local = [tuple(int(size) for size in holdings.local_shape[ranks[0]]) for holdings in within]
        for name, shape in zip(names, local, strict=True):
            if prod(shape[1:]) == 0:
                raise LayoutInvalid(
                    f"tensor {name!r} has rows of no elements ({list(shape)} on rank {ranks[0]}), which a flat buffer "
                    "can't be cut between",
                    tensor=name,
                    hint="give it a rule of its own without flat",
                )
        buffer = pack(local, padding_ranks)
        if buffer.size > _MAX_ELEMENTS:
            raise LayoutInvalid(
                f"the flat buffer of {len(names)} tensors around {names[0]!r} would have {buffer.size} elements, "
                "because their row widths have no small common multiple",
                tensor=names[0],
                hint="give tensors with odd row widths a unit of their own",
            )
        length = buffer.size // ranges
        for tensor, shape in enumerate(local):
            width = prod(shape[1:])
            begin = index[ranks] * length - buffer.offsets[tensor]
            first[tensor, ranks] = np.clip(begin, 0, prod(shape)) // width
            last[tensor, ranks] = np.clip(begin + length, 0, prod(shape)) // width
    return [_rows(boxes[tensor], first[tensor], last[tensor], shape) for tensor, shape in enumerate(shapes)]


def _boxes(holdings: Holdings, world: int) -> tuple[Int64s, Int64s]:
    """Offset and sizes of each rank's only rectangle; sizes are the local shape, so also right where it is empty."""
    offsets = np.zeros((world, holdings.local_shape.shape[1]), dtype=np.int64)
    offsets[holdings.rank] = holdings.offsets
    return offsets, holdings.local_shape


def _rows(box: tuple[Int64s, Int64s], first: Int64s, last: Int64s, shape: tuple[int, ...]) -> Holdings:
    """Rows ``[first, last)`` of each rank's rectangle."""
    offsets, sizes = box[0].copy(), box[1].copy()
    offsets[:, 0] += first
    sizes[:, 0] = last - first
    ranks = np.arange(len(first), dtype=np.int64)
    held = np.flatnonzero(sizes.all(axis=1)) if prod(shape) else ranks
    return Holdings(ranks[held], offsets[held], sizes[held], np.zeros_like(offsets[held]), sizes)
