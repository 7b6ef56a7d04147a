"""Casts between floating types, bit-equal to ``torch.Tensor.to`` (round to nearest, ties to even).

bf16 has no numpy type and never becomes one: it is widened to the upper half of a 32-bit word and rounded by integer
arithmetic. NaNs follow what torch's x86 kernels give: 0xFFFF in bf16 (0x7FC0 from fp16), a quiet NaN with the upper
payload bits in fp16 (torch 2.13, measured; checked against torch in tests).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from reshard_service.dtypes import DType
from reshard_service.errors import UsageError

Bits = NDArray[Any]

_STORED: dict[str, type[np.generic]] = {"F64": np.float64, "F32": np.float32, "F16": np.uint16, "BF16": np.uint16}


def stored_type(dtype: DType) -> np.dtype[Any]:
    """The numpy type under which elements of a castable dtype are viewed: 16-bit types as plain bits."""
    try:
        return np.dtype(_STORED[dtype.name])
    except KeyError:
        raise UsageError(f"{dtype.name} can't be cast; --dtype applies to F64, F32, F16 and BF16") from None


def cast(values: Bits, source: DType, target: DType) -> Bits:
    """A new array of ``stored_type(target)`` with ``values`` (viewed as ``stored_type(source)``) converted."""
    if source == target:
        return values
    single = _to_float32(values, source)
    if target.name == "F32":
        return single
    if target.name == "F64":
        with np.errstate(invalid="ignore"):
            return single.astype(np.float64)
    if target.name == "F16":
        return _float32_to_float16(single)
    return _float32_to_bfloat16(single, nan=0x7FC0 if source.name == "F16" else 0xFFFF)


def _to_float32(values: Bits, source: DType) -> Bits:
    if source.name == "F32":
        return values
    if source.name == "F64":
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            return values.astype(np.float32)
    if source.name == "BF16":
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    with np.errstate(invalid="ignore"):
        widened = values.view(np.float16).astype(np.float32).view(np.uint32)
    nan = (widened & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(nan, widened | np.uint32(0x00400000), widened).view(np.float32)


def _float32_to_bfloat16(single: Bits, *, nan: int) -> Bits:
    bits = np.ascontiguousarray(single).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    if is_nan.any():
        rounded[is_nan] = nan
    return rounded


def _float32_to_float16(single: Bits) -> Bits:
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        half = np.ascontiguousarray(single).astype(np.float16).view(np.uint16)
    bits = np.ascontiguousarray(single).view(np.uint32)
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    if nan.any():
        quiet = ((bits >> np.uint32(16)) & np.uint32(0x8000)) | np.uint32(0x7E00)
        half = np.where(nan, quiet | ((bits >> np.uint32(13)) & np.uint32(0x1FF)), half).astype(np.uint16)
    return half
