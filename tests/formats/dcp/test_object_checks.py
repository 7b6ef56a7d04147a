"""Objects that torch saved, whole and damaged, and objects that are something else."""

import io
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.serialization import set_crc32_options

from reshard_service.formats.dcp.object_checks import damaged_member


def saved(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


VALUES = [7, {"lr": 0.1, "betas": (0.9, 0.95)}, b"x" * 5000, {"seed": torch.arange(50)}, np.arange(9), list(range(999))]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_a_flip_in_any_member_is_noticed(value: object) -> None:
    item = saved(value)
    assert damaged_member(item) is None
    with zipfile.ZipFile(io.BytesIO(item)) as archive:
        for info in archive.infolist():
            content = archive.read(info)
            at = item.find(content, info.header_offset + 30 + len(info.filename)) if content else -1
            if at >= 0:
                broken = item[:at] + bytes([item[at] ^ 1]) + item[at + 1 :]
                assert damaged_member(broken) == info.filename


def test_nothing_is_said_where_no_checksum_was_recorded() -> None:
    set_crc32_options(False)
    try:
        item = saved({"lr": 0.1})
    finally:
        set_crc32_options(True)
    assert damaged_member(item) is None


@given(st.one_of(st.binary(), st.binary().map(lambda tail: b"PK\x03\x04" + tail)))
def test_what_is_no_zip_of_torch_is_left_alone(item: bytes) -> None:
    damaged_member(item)


def test_a_compressed_zip_is_left_alone() -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/b", b"text" * 99)
    assert damaged_member(file.getvalue()) is None
