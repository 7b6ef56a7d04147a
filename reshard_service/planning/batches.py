"""Groups a plan's tensors into batches, the unit that one thread works on, and batches into workers' parts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reshard_service.catalogue import Int64s

BATCH_BYTES = 64 << 20
STREAMS_AT_ONCE = 8
"""Files that one batch writes in step when each must be written in order: every open upload holds a part in memory."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Tensors ``[first, stop)`` of the design, in order; only rows in ``files`` if given."""

    first: int
    stop: int
    read_bytes: int
    write_bytes: int
    files: frozenset[int] | None = None


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
    tensor_of_row: Int64s, file_of_row: Int64s, bytes_of_row: Int64s, source_scale: NDArray[np.float64], files: int
) -> tuple[Batch, ...]:
    """Whole files, a few at a time in step: for targets where an object is written in order by one worker.

    ``source_scale[row]`` is source bytes per target byte of a row, so that casts are counted right.
    """
    batches = []
    for first_file in range(0, files, STREAMS_AT_ONCE):
        members = frozenset(range(first_file, min(first_file + STREAMS_AT_ONCE, files)))
        mask = np.isin(file_of_row, np.array(sorted(members)))
        tensors = tensor_of_row[mask]
        if len(tensors) == 0:
            continue
        written = int(bytes_of_row[mask].sum())
        read = int((bytes_of_row[mask] * source_scale[mask]).sum())
        batches.append(Batch(int(tensors.min()), int(tensors.max()) + 1, read, written, members))
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
