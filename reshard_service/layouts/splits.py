"""From placements to the order in which a tensor's dims are really split.

The order of splits is the truth, not the placements' names: ``[strided(0,2), shard(0)]`` on (fsdp, tp=2) means split by
tp, then by fsdp. torch 2.13's own arithmetic for this differs from what ``fully_shard`` really does in some uneven
cases; splitting in the true order does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from reshard_service.layouts.mesh import Mesh
from reshard_service.layouts.placements import Flat, Innermost, Placement, Replicate, Shard, StridedShard


@dataclass(frozen=True, slots=True)
class DimSplits:
    """The splits of one tensor dim: ``axes`` are positions in the mesh, first split first.

    ``blocks`` > 1 is a packed shard: the dim is that many equal blocks, each split so; there is one axis then.
    """

    dim: int
    axes: tuple[int, ...]
    blocks: int = 1


@dataclass(frozen=True, slots=True)
class Fault:
    """Why placements can't be applied to a shape: a stable code, the reason, and what to do."""

    code: str
    reason: str
    fix: str | None = None


def order_splits(mesh: Mesh, placements: Sequence[Placement], shape: tuple[int, ...]) -> tuple[DimSplits, ...] | Fault:
    """The splits of each dim that is split at all, or what is wrong.

    ``placements`` are in the order of the mesh's axes. Axes of size 1 split nothing and are never a fault. ``Flat`` is
    left to :mod:`reshard_service.layouts.flat`.
    """
    by_dim: dict[int, list[tuple[int, Shard | StridedShard | Innermost]]] = {}
    for axis, placement in enumerate(placements):
        if mesh.sizes[axis] == 1 or isinstance(placement, (Replicate, Flat)):
            continue
        dim = placement.dim + len(shape) if placement.dim < 0 else placement.dim
        if not 0 <= dim < len(shape):
            return Fault(
                "dim_missing",
                f"axis {mesh.names[axis]} shards dim {placement.dim}, but the shape {list(shape)} has {len(shape)} "
                f"dim{'s' if len(shape) != 1 else ''}",
                f"add a rule for this tensor with {mesh.names[axis]}: replicate, or a dim that it has",
            )
        by_dim.setdefault(dim, []).append((axis, placement))
    found = []
    for dim, sharding in sorted(by_dim.items()):
        splits = _order_one(mesh, dim, shape[dim], sharding)
        if isinstance(splits, Fault):
            return splits
        found.append(splits)
    return tuple(found)


def _order_one(
    mesh: Mesh, dim: int, size: int, sharding: Sequence[tuple[int, Shard | StridedShard | Innermost]]
) -> DimSplits | Fault:
    order: list[int] = []
    innermost = [axis for axis, placement in sharding if isinstance(placement, Innermost)]
    # From the right: a plain shard splits before everything found so far, a strided one after it.
    for axis, placement in reversed(sharding):
        if isinstance(placement, Shard):
            order.insert(0, axis)
        elif isinstance(placement, StridedShard):
            if placement.split_factor == prod(mesh.sizes[right] for right in order):
                order.append(axis)
            elif len(sharding) == 1:
                return _packed(dim, size, axis, placement)
            else:
                return _nested(mesh, dim, axis, placement, [other for other, _ in sharding if other != axis])
    return DimSplits(dim, (*order, *innermost))


def _packed(dim: int, size: int, axis: int, placement: StridedShard) -> DimSplits | Fault:
    blocks = placement.split_factor
    if size % blocks:
        below, above = size - size % blocks, size - size % blocks + blocks
        return Fault(
            "packed_not_divisible",
            f"{placement} needs dim {dim} ({size}) to be {blocks} equal blocks",
            f"sizes that would be: {below}, {above}; or give this tensor a rule with shard({dim})",
        )
    return DimSplits(dim, (axis,), blocks)


def _nested(mesh: Mesh, dim: int, axis: int, placement: StridedShard, others: list[int]) -> Fault:
    names = " and ".join(mesh.names[other] for other in others)
    right = prod(mesh.sizes[other] for other in others if other > axis)
    return Fault(
        "packed_nested",
        f"{mesh.names[axis]}={mesh.sizes[axis]} has the packed shard {placement} and {names} shard"
        f"{'s' if len(others) == 1 else ''} the same dim {dim}, whose order of rows is not defined",
        f"let {names} shard another dim or replicate"
        + (
            f"; if {mesh.names[axis]} splits after the axes to its right, write strided({dim},{right})"
            if right > 1
            else ""
        )
        + f"; or write {mesh.names[axis]}: shard({dim}) in the checkpoint view if the framework asks for plain shards",
    )
