"""Groups a plan's tensors into batches, the unit that one thread works on, and batches into workers' parts."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reshard_service.catalogue import Chunks, Int64s

BATCH_BYTES = 64 << 20
_BATCHES_PER_WORKER = 8


@dataclass(frozen=True, slots=True)
class Batch:
    """Tensors ``[first, stop)`` of the design, in order; or, if given, just the chunk ``rows``.

    ``in_order``: each of the rows is written whole before the next one, as a file that is one stream needs.
    """

    first: int
    stop: int
    read_bytes: int
    write_bytes: int
    rows: Int64s | None = None
    in_order: bool = False


def batch_bytes(total_bytes: int, workers: int) -> int:
    """Largest batch: small enough that each worker gets several, so that their shares can be evened out."""
    return min(BATCH_BYTES, max(1, total_bytes // (workers * _BATCHES_PER_WORKER)))


def split_tensor(batch: Batch, target: Chunks, source: Chunks, source_tensor: int, largest: int) -> tuple[Batch, ...]:
    """The batch of one large tensor cut between blocks of its rows (dim 0), where no chunk lies across the cut.

    Column shards of the same rows stay together, so nothing is read twice. A chunk stays whole: the target's because
    its digests and CRC run from its first byte to its last, the source's because its CRC does, if it has one.
    """
    rows = target.rows(batch.first)
    if len(range(rows.start, rows.stop)) < 2 or max(batch.read_bytes, batch.write_bytes) <= largest:
        return (batch,)
    if target.stored is not None or target.rank == 0:
        return (batch,)
    given = source.rows(source_tensor)
    edges = [_spans(target, rows)]
    if source.crc is not None or source.storing[given].any():
        edges.append(_spans(source, given))
    cuts = _free_cuts(edges)
    begins = target.offsets[rows, 0]
    block_of_row = np.searchsorted(cuts, begins, side="right")
    block_bytes = np.bincount(block_of_row, weights=target.length[rows], minlength=len(cuts) + 1)
    piece_of_block = _grouped(block_bytes, largest)
    piece_of_row = piece_of_block[block_of_row]
    total = float(block_bytes.sum())
    pieces = []
    for piece in range(int(piece_of_block[-1]) + 1):
        members = np.flatnonzero(piece_of_row == piece).astype(np.int64)
        share = float(target.length[rows][members].sum()) / total
        read, written = round(batch.read_bytes * share), round(batch.write_bytes * share)
        pieces.append(Batch(batch.first, batch.stop, read, written, members + rows.start))
    return tuple(pieces) if len(pieces) > 1 else (batch,)


def _spans(chunks: Chunks, rows: slice) -> tuple[Int64s, Int64s]:
    """Where chunks begin and end on dim 0, empty ones left out."""
    begins = chunks.offsets[rows, 0]
    ends = begins + chunks.sizes[rows, 0]
    return begins[ends > begins], ends[ends > begins]


def _free_cuts(edges: list[tuple[Int64s, Int64s]]) -> Int64s:
    """Rows at which the first table's chunks begin and no chunk of any table lies across."""
    cuts = np.unique(edges[0][0])[1:]
    for begins, ends in edges:
        order = np.argsort(begins, kind="stable")
        reach = np.maximum.accumulate(ends[order])
        before = np.searchsorted(begins[order], cuts, side="left")
        cuts = cuts[reach[before - 1] <= cuts] if len(cuts) else cuts
    return cuts


def _grouped(block_bytes: NDArray[Any], largest: int) -> Int64s:
    """Piece number of each block: neighbours together up to ``largest`` bytes."""
    pieces, filled, number = [], 0.0, 0
    for size in block_bytes.tolist():
        if filled and filled + size > largest:
            number, filled = number + 1, 0.0
        filled += size
        pieces.append(number)
    return np.array(pieces, dtype=np.int64)


def batches_by_tensor(read_bytes: Int64s, write_bytes: Int64s, *, largest: int = BATCH_BYTES) -> tuple[Batch, ...]:
    """Consecutive tensors up to ``largest`` bytes read or written: for targets with positional writes."""
    batches: list[Batch] = []
    first, read, written = 0, 0, 0
    for t, (r, w) in enumerate(zip(read_bytes.tolist(), write_bytes.tolist(), strict=True)):
        if t > first and max(read + r, written + w) > largest:
            batches.append(Batch(first, t, read, written))
            first, read, written = t, 0, 0
        read += r
        written += w
    if first < len(read_bytes):
        batches.append(Batch(first, len(read_bytes), read, written))
    return tuple(batches)


def batches_by_file(
    tensor_of_row: Int64s,
    file_of_row: Int64s,
    start_of_row: Int64s,
    bytes_of_row: Int64s,
    source_scale: NDArray[np.float64],
) -> tuple[Batch, ...]:
    """One file a batch, its rows front to back: for targets where an object is written in order by one worker.

    ``source_scale[row]`` is source bytes per target byte of a row, so that casts are counted right.
    """
    if len(file_of_row) == 0:
        return ()  # nothing but objects
    order = np.lexsort((start_of_row, file_of_row))
    _, begins = np.unique(file_of_row[order], return_index=True)
    ends = [*begins[1:].tolist(), len(order)]
    batches = []
    for begin, end in zip(begins.tolist(), ends, strict=True):
        rows = order[begin:end].astype(np.int64)
        tensors = tensor_of_row[rows]
        read = int((bytes_of_row[rows] * source_scale[rows]).sum())
        written = int(bytes_of_row[rows].sum())
        batches.append(Batch(int(tensors.min()), int(tensors.max()) + 1, read, written, rows, in_order=True))
    return tuple(batches)


def parts(batches: tuple[Batch, ...], workers: int) -> tuple[tuple[Batch, ...], ...]:
    """One part per worker, balanced by bytes, each in batch order.

    Consecutive batches go to one worker, which reads sequentially, unless that is more than a tenth worse than giving
    each batch, largest first, to the worker with the least so far.
    """
    weights = [batch.read_bytes + batch.write_bytes for batch in batches]
    consecutive, greedy = _consecutive(weights, workers), _greedy(weights, workers)
    owner = consecutive if _load(weights, consecutive, workers) <= 1.1 * _load(weights, greedy, workers) else greedy
    return tuple(
        tuple(batch for batch, who in zip(batches, owner, strict=True) if who == worker) for worker in range(workers)
    )


def _consecutive(weights: list[int], workers: int) -> list[int]:
    total, running, owner = max(1, sum(weights)), 0, []
    for weight in weights:
        owner.append(min((2 * running + weight) * workers // (2 * total), workers - 1))
        running += weight
    return owner


def _greedy(weights: list[int], workers: int) -> list[int]:
    loads = [(0, worker) for worker in range(workers)]
    owner = [0] * len(weights)
    for position in sorted(range(len(weights)), key=lambda i: -weights[i]):
        load, worker = heapq.heappop(loads)
        owner[position] = worker
        heapq.heappush(loads, (load + weights[position], worker))
    return owner


def _load(weights: list[int], owner: list[int], workers: int) -> int:
    loads = [0] * workers
    for weight, worker in zip(weights, owner, strict=True):
        loads[worker] += weight
    return max(loads)
