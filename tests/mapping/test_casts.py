"""Casts against the oracle: torch.Tensor.to on every bit pattern of the 16-bit types and millions of others."""

import numpy as np
import pytest
import torch

from reshard_service import dtypes
from reshard_service.mapping.casts import cast, stored_type

BITS = {
    "F64": (torch.float64, torch.int64),
    "F32": (torch.float32, torch.int32),
    "F16": (torch.float16, torch.int16),
    "BF16": (torch.bfloat16, torch.int16),
}


def every_kind_of_value(name: str) -> torch.Tensor:
    real, integer = BITS[name]
    if name in ("F16", "BF16"):
        return torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(real)
    generator = torch.Generator().manual_seed(7)
    low, high = (-(2**31), 2**31 - 1) if name == "F32" else (-(2**63), 2**63 - 1)
    wild = torch.randint(low, high, (1_000_064,), dtype=torch.int64, generator=generator).to(integer).view(real)
    tame = torch.randn(1_000_000, dtype=real, generator=generator) * torch.exp(
        torch.randn(1_000_000, dtype=real, generator=generator) * 8
    )
    ties = (torch.arange(0, 1 << 16, dtype=torch.int32) << 15).view(torch.float32).to(real)
    return torch.cat([wild, tame, ties])


@pytest.mark.parametrize("source", BITS)
@pytest.mark.parametrize("target", BITS)
def test_a_cast_is_bit_equal_to_torch(source: str, target: str) -> None:
    values = every_kind_of_value(source)
    if source == "F64":
        values = values[~torch.isnan(values)]  # torch's f64 NaN narrowing differs between its own kernels
    expected = values.to(BITS[target][0]).view(BITS[target][1]).numpy()
    given = values.view(BITS[source][1]).numpy().view(stored_type(dtypes.by_name(source)))
    found = cast(given, dtypes.by_name(source), dtypes.by_name(target)).view(expected.dtype)
    different = np.flatnonzero(found != expected)
    assert len(different) == 0, [(hex(int(found[i])), hex(int(expected[i]))) for i in different[:4]]


def test_integers_and_fp8_are_never_cast() -> None:
    assert not any(d.castable for d in dtypes.all_dtypes() if d.name not in BITS)
