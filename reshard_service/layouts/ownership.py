"""Who stores what: every distinct rectangle once, in the file of one of the ranks that hold it (decision 13)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from reshard_service.layouts.holdings import Holdings, Int64s, View
from reshard_service.layouts.layout import Layout, Shape

OwnedItem = tuple[str, Shape, Shape | None, int]
"""FQN, shape, the parameter's shape (None for the parameter itself) and bytes of one element."""


@dataclass(frozen=True, slots=True)
class OwnedChunks:
    """Columns grouped by item, as in :class:`reshard_service.catalogue.Chunks`.

    Rows ``first[t] : first[t + 1]`` are item ``t``'s distinct rectangles, ordered by the lowest rank that holds them;
    ``owner`` is the rank whose file stores the rectangle and ``replicated`` whether other ranks hold it too. Offsets
    and sizes are padded to the largest rank of all items with 0 and 1. An empty tensor is one zero-sized chunk of its
    whole shape, owned by rank 0.
    """

    first: Int64s
    offsets: Int64s
    sizes: Int64s
    owner: Int64s
    replicated: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class _Cells:
    """The distinct rectangles of one tensor. A cell is what one rank holds; replicas of it are other holders."""

    offsets: Int64s
    sizes: Int64s
    cell: Int64s
    """Per rectangle."""
    holders: Int64s
    """Per cell the ranks that hold it, ascending; splits are even over replicas, so each cell has as many."""
    volumes: Int64s
    """Elements per cell."""


def own_chunks(layout: Layout, items: Sequence[OwnedItem], view: View = View.CHECKPOINT) -> OwnedChunks:
    """The chunks of all items and their owners.

    A chunk that only one rank holds is its own; among several holders, all rectangles of one cell go to the rank with
    the fewest bytes so far (the lowest of equals), largest cells first, after everything unreplicated is counted.
    Deterministic. :class:`reshard_service.errors.LayoutInvalid` names an item that the layout can't be applied to.
    """
    # Patterns repeat from layer to layer and the layout answers with one object for each, so that the work here is
    # done once a pattern, and numpy spreads the result over the items that share it.
    cells_of: dict[int, _Cells] = {}
    sharing: dict[int, list[int]] = {}
    seen: dict[int, Holdings] = {}
    for at, (fqn, shape, parameter_shape, _) in enumerate(items):
        holdings = layout.holdings(fqn, shape, view, parameter_shape)
        key = id(holdings)
        if key not in cells_of:
            seen[key] = holdings  # keeps the id in use
            cells_of[key] = _cells_of(holdings, shape)
        sharing.setdefault(key, []).append(at)

    counts = np.zeros(len(items), dtype=np.int64)
    for key, members in sharing.items():
        counts[members] = len(cells_of[key].cell)
    first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    columns = max((len(shape) for _, shape, _, _ in items), default=0)
    offsets = np.zeros((int(first[-1]), columns), dtype=np.int64)
    sizes = np.ones((int(first[-1]), columns), dtype=np.int64)
    owner = np.zeros(int(first[-1]), dtype=np.int64)
    replicated = np.zeros(int(first[-1]), dtype=np.bool_)
    itemsizes = np.array([itemsize for _, _, _, itemsize in items], dtype=np.int64)
    owners = _choose_owners(layout.world, cells_of, sharing, itemsizes)
    for key, members in sharing.items():
        cells = cells_of[key]
        rows = first[members][:, None] + np.arange(len(cells.cell))
        offsets[rows, : cells.offsets.shape[1]] = cells.offsets
        sizes[rows, : cells.sizes.shape[1]] = cells.sizes
        owner[rows] = owners[key][:, cells.cell]
        replicated[rows] = cells.holders.shape[1] > 1
    return OwnedChunks(first, offsets, sizes, owner, replicated)


def _cells_of(holdings: Holdings, shape: Shape) -> _Cells:
    if prod(shape) == 0:
        whole = np.array([shape], dtype=np.int64)
        zero = np.zeros(1, dtype=np.int64)
        return _Cells(np.zeros_like(whole), whole, zero, zero[:, None], zero)
    # Two ranks hold the same or share nothing, so a rank's first rectangle tells its cell.
    ranks, begins, pieces = np.unique(holdings.rank, return_index=True, return_counts=True)
    table = holdings.offsets[begins]
    _, lowest, cell_of = np.unique(table, axis=0, return_index=True, return_inverse=True)
    cell_of = cell_of.reshape(-1)
    # Number cells by the lowest rank that holds them.
    order = np.argsort(lowest, kind="stable")
    cell_of = np.argsort(order, kind="stable")[cell_of]
    lowest = lowest[order]
    holders = ranks[np.argsort(cell_of, kind="stable")].reshape(len(lowest), -1)
    taken = np.isin(holdings.rank, ranks[lowest])
    offsets, sizes = holdings.offsets[taken], holdings.sizes[taken]
    cell = np.repeat(np.arange(len(lowest), dtype=np.int64), pieces[lowest])
    volumes = np.zeros(len(lowest), dtype=np.int64)
    np.add.at(volumes, cell, sizes.prod(axis=1))
    return _Cells(offsets, sizes, cell, holders, volumes)


def _choose_owners(
    world: int, cells_of: dict[int, _Cells], sharing: dict[int, list[int]], itemsizes: Int64s
) -> dict[int, Int64s]:
    """For each pattern a table (members, cells) of owning ranks."""
    loads = np.zeros(world, dtype=np.int64)
    owners: dict[int, Int64s] = {}
    contested: list[tuple[int, int, int, int]] = []
    for key, members in sharing.items():
        cells = cells_of[key]
        owners[key] = np.broadcast_to(cells.holders[:, 0], (len(members), len(cells.volumes)))
        if cells.holders.shape[1] == 1:
            loads[cells.holders[:, 0]] += cells.volumes * int(itemsizes[members].sum())
        else:
            owners[key] = owners[key].copy()
            largest = int(cells.volumes.max())
            contested += [(-largest * int(itemsizes[at]), at, key, member) for member, at in enumerate(members)]
    # Largest first, then in the order of the items; an item occurs once, so the key never decides.
    for _, at, key, member in sorted(contested):
        cells = cells_of[key]
        chosen = loads[cells.holders].argmin(axis=1)
        ranks = cells.holders[np.arange(len(chosen)), chosen]
        owners[key][member] = ranks
        loads[ranks] += cells.volumes * int(itemsizes[at])  # cells have no holder in common
    return owners
