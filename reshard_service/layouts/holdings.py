"""Which rank holds which rectangles of one tensor."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

Int64s = NDArray[np.int64]


class View(StrEnum):
    """Two readings of a layout (design: Layouts): what a framework asks a checkpoint for, or holds in memory."""

    CHECKPOINT = "checkpoint"
    MEMORY = "memory"


@dataclass(frozen=True, slots=True)
class Holdings:
    """All rectangles of one tensor over all ranks, as columns, ordered by rank and then by place in the local tensor.

    Row ``i``: rank ``rank[i]`` holds the global rectangle (``offsets[i]``, ``sizes[i]``) at ``local[i]`` of its local
    tensor, whose shape is ``local_shape[rank]``. Replicas appear once per rank. A rank that holds nothing has no row
    (its local shape has a zero), except that an empty tensor has one zero-sized row per rank.
    """

    rank: Int64s
    offsets: Int64s
    sizes: Int64s
    local: Int64s
    local_shape: Int64s
