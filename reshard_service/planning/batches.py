"""Groups a plan's tensors into batches, the unit that one thread works on, and batches into workers' parts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reshard_service.catalogue import Int64s

BATCH_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Batch:
    """Tensors ``[first, stop)`` of the design, in order; or, if given, just the chunk ``rows``, in that order."""

    first: int
    stop: int
    read_bytes: int
    write_bytes: int
    rows: Int64s | None = None


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
        batches.append(Batch(int(tensors.min()), int(tensors.max()) + 1, read, int(bytes_of_row[rows].sum()), rows))
    return tuple(batches)


def parts(batches: tuple[Batch, ...], workers: int) -> tuple[tuple[Batch, ...], ...]:
    """One part per worker: consecutive batches, cut where the running sum of bytes passes each worker's share."""
    weights = np.array([batch.read_bytes + batch.write_bytes for batch in batches], dtype=np.int64)
    total = int(weights.sum())
    middle = np.cumsum(weights) - weights // 2
    owner = np.minimum((middle * workers) // max(total, 1), workers - 1) if len(weights) else weights
    return tuple(
        tuple(batch for batch, who in zip(batches, owner.tolist(), strict=True) if who == worker)
        for worker in range(workers)
    )
