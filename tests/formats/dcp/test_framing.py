"""What we frame is what torch and Python's zipfile read."""

import io
import os
import zipfile
import zlib
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reshard_service.dtypes import DType, all_dtypes, by_name
from reshard_service.errors import CannotHold
from reshard_service.formats.dcp.framing import ALIGNMENT, TorchItemFraming
from reshard_service.formats.dcp.item import AFTER_BYTES, HEAD_BYTES, ItemReader, checksum

FRAMING = TorchItemFraming()
TORCH_DTYPES = [dtype for dtype in all_dtypes() if dtype.torch is not None]
SIZES = [(), (1,), (7,), (3, 5), (2, 3, 4), (2, 3, 4, 5, 1), (0,), (4, 0, 2), (300, 70)]


def framed(dtype: DType, sizes: tuple[int, ...]) -> tuple[bytes, bytes]:
    """An item, and its payload: bytes of 0 and 1, which every type can hold."""
    payload = bytes(i % 2 for i in range(prod(sizes) * dtype.itemsize))
    return FRAMING.head(dtype, sizes) + payload + FRAMING.tail(dtype, sizes, zlib.crc32(payload)), payload


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
def test_torch_loads_our_items_safely_and_bit_for_bit(dtype: DType, sizes: tuple[int, ...]) -> None:
    item, payload = framed(dtype, sizes)
    loaded = torch.load(io.BytesIO(item), weights_only=True)
    assert loaded.dtype is getattr(torch, dtype.torch or "")
    assert tuple(loaded.shape) == sizes
    assert loaded.stride() == torch.empty(sizes).stride()
    assert bytes(loaded.untyped_storage().tolist()) == payload


@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
def test_our_items_are_sound_zips_that_we_find_the_payload_of(dtype: DType) -> None:
    for sizes in SIZES:
        item, payload = framed(dtype, sizes)
        with zipfile.ZipFile(io.BytesIO(item)) as archive:
            assert archive.testzip() is None
            assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        place = ItemReader().locate(
            memoryview(item)[:HEAD_BYTES], dtype, sizes, item_bytes=len(item), key="k", file="f"
        )
        assert place.start == len(FRAMING.head(dtype, sizes))
        assert place.is_plain
        after = memoryview(item)[place.start + len(payload) :][:AFTER_BYTES]
        assert checksum(after, len(payload)) == (zlib.crc32(payload) or None)


@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
def test_lengths_are_known_beforehand_and_keep_payloads_aligned(dtype: DType) -> None:
    for rank in range(6):
        shapes = [sizes for sizes in SIZES if len(sizes) == rank] or [(1,) * rank]
        nbytes = np.array([prod(sizes) * dtype.itemsize for sizes in shapes], dtype=np.int64)
        heads, totals = FRAMING.item_lengths(dtype, rank, nbytes)
        for sizes, head, total in zip(shapes, heads.tolist(), totals.tolist(), strict=True):
            assert head == len(FRAMING.head(dtype, sizes))
            assert total == len(framed(dtype, sizes)[0])
            assert head % ALIGNMENT == total % ALIGNMENT == 0


@given(st.sampled_from(TORCH_DTYPES), st.lists(st.integers(0, 9), max_size=8))
def test_the_heads_length_depends_on_dtype_and_rank_only(dtype: DType, sizes: list[int]) -> None:
    assert len(FRAMING.head(dtype, tuple(sizes))) == len(FRAMING.head(dtype, (1,) * len(sizes)))


def test_a_type_that_torch_does_not_have_is_refused_by_name() -> None:
    with pytest.raises(CannotHold, match="F6_E2M3"):
        FRAMING.head(by_name("F6_E2M3"), (4,))


@pytest.mark.slow
@pytest.mark.parametrize("count", [0xFFFEFFFF, (1 << 32) - 2, (1 << 32) + 5])
def test_items_around_4_gib_switch_to_zip64_and_load(count: int, tmp_path: Path) -> None:
    dtype = by_name("U8")
    crc, zeros, left = 0, bytes(1 << 24), count
    while left:
        crc = zlib.crc32(zeros[: min(left, len(zeros))], crc)
        left -= min(left, len(zeros))
    head, tail = FRAMING.head(dtype, (count,)), FRAMING.tail(dtype, (count,), crc)
    path = tmp_path / "item.pt"
    with path.open("wb") as file:  # sparse: the payload takes no disk
        file.write(head)
        file.seek(len(head) + count)
        file.write(tail)
    total = os.path.getsize(path)
    assert [column[0] for column in FRAMING.item_lengths(dtype, 1, np.array([count]))] == [len(head), total]
    place = ItemReader().locate(memoryview(head), dtype, (count,), item_bytes=total, key="k", file="f")
    assert place.start == len(head)
    assert checksum(memoryview(tail), count) == crc
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("archive/data/0")
        assert (info.file_size, info.CRC) == (count, crc)
    loaded = torch.load(path, weights_only=True, mmap=True)
    assert loaded.shape == (count,)
    assert loaded[-1] == 0
