"""One move: bytes from a source array's span into a target array's span, cast on the way if asked."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from reshard_service.dtypes import DType
from reshard_service.mapping.casts import cast, stored_type
from reshard_service.planning.panels import Move

_CAST_ELEMENTS = 1 << 17
_VOID_RUN_BYTES = 256
"""Up to this run length numpy copies whole runs as one opaque element, which is twice as fast as bytes."""

Bytes = NDArray[Any]


def move_bytes(move: Move, source: Bytes, source_at: int, target: Bytes, target_at: int, itemsize: int) -> None:
    """Copy without looking at the elements; ``*_at`` is where the spans begin in the two buffers."""
    source_at += move.source_start
    target_at += move.target_start
    run = move.shape[-1] * itemsize
    if len(move.shape) == 1:
        target[target_at : target_at + run] = source[source_at : source_at + run]
        return
    if run <= _VOID_RUN_BYTES:
        shape: tuple[int, ...] = move.shape[:-1]
        kind: np.dtype[Any] = np.dtype((np.void, run))
        s_strides, t_strides = move.source_strides[:-1], move.target_strides[:-1]
    else:
        shape, kind = (*move.shape[:-1], run), np.dtype(np.uint8)
        s_strides, t_strides = (*move.source_strides[:-1], 1), (*move.target_strides[:-1], 1)
    np.copyto(
        np.ndarray(shape, kind, target, target_at, t_strides), np.ndarray(shape, kind, source, source_at, s_strides)
    )


def move_cast(
    move: Move, source: Bytes, source_at: int, target: Bytes, target_at: int, from_dtype: DType, to_dtype: DType
) -> None:
    """Copy and convert, a few hundred KB at a time so that intermediate values stay in the cache."""
    given, wanted = stored_type(from_dtype), stored_type(to_dtype)
    values = np.ndarray(move.shape, given, source, source_at + move.source_start, move.source_strides)
    result = np.ndarray(move.shape, wanted, target, target_at + move.target_start, move.target_strides)
    if len(move.shape) == 1:
        for start in range(0, move.shape[0], _CAST_ELEMENTS):
            stop = start + _CAST_ELEMENTS
            result[start:stop] = cast(values[start:stop], from_dtype, to_dtype)
        return
    rows = max(1, _CAST_ELEMENTS // max(1, int(np.prod(move.shape[1:]))))
    for start in range(0, move.shape[0], rows):
        result[start : start + rows] = cast(values[start : start + rows], from_dtype, to_dtype)
