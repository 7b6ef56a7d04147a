"""The header parser against the safetensors library, and against headers that the library lets through."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reshard_service.dtypes import all_dtypes, by_name
from reshard_service.errors import CannotHold, ReshardError, UnsafeSource
from reshard_service.formats.safetensors.header import (
    HeaderEntry,
    build_header,
    parse_header,
    read_header,
    shape_in_values,
)
from reshard_service.storage.local import LocalStorage
from tests.formats.safetensors.headers import ATTACKS, ENTRY, spell


def parse(data: bytes, **options: int):
    return parse_header(data, len(data), file="x.safetensors", **options)


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_header_is_refused_with_its_code_and_the_files_name(name: str, tmp_path: Path) -> None:
    data, code = ATTACKS[name]
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(ReshardError) as caught:
        read_header(LocalStorage(tmp_path), "x.safetensors")
    assert caught.value.code == code
    assert "x.safetensors" in str(caught.value)


def test_a_file_of_the_library_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    tensors = {
        "w": torch.arange(12, dtype=torch.float32).reshape(3, 4),
        "half": torch.zeros(5, dtype=torch.bfloat16),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.zeros(0, 7),
        "flag": torch.ones(3, dtype=torch.bool),
        "fp8": torch.ones(2, 2).to(torch.float8_e4m3fn),
        "c": torch.ones(2, dtype=torch.complex64),
        "ключ": torch.ones(1, dtype=torch.uint16),
    }
    safetensors.torch.save_file(tensors, tmp_path / "m.safetensors", {"format": "pt", "note": "é"})
    header = read_header(LocalStorage(tmp_path), "m.safetensors")
    assert header.metadata == {"format": "pt", "note": "é"}
    data = (tmp_path / "m.safetensors").read_bytes()
    for name, value in dict(safetensors.deserialize(data)).items():
        at = header.names.index(name)
        start, length = int(header.starts[at]), int(header.lengths[at])
        assert data[start : start + length] == bytes(value["data"])
        assert header.dtypes[at].name == value["dtype"]
        assert list(header.shapes[at]) == value["shape"]


def test_a_header_larger_than_the_first_read_is_read_whole(tmp_path: Path) -> None:
    tensors = {f"layer.{i}.weight": torch.zeros(1, dtype=torch.uint8) for i in range(2000)}
    safetensors.torch.save_file(tensors, tmp_path / "m.safetensors")
    header = read_header(LocalStorage(tmp_path), "m.safetensors")
    assert header.data_start > 65_536
    assert sorted(header.names) == sorted(tensors)


@pytest.mark.parametrize(
    ("dtype", "shape", "stored", "nbytes"),
    [("F4", [3, 4], (3, 2), 6), ("F6_E2M3", [2, 8], (2, 2), 12), ("F6_E3M2", [4], (1,), 3), ("F8_E8M0", [3], (3,), 3)],
)
def test_sub_byte_types_are_counted_in_stored_elements(
    dtype: str, shape: list[int], stored: tuple[int, ...], nbytes: int
) -> None:
    data = spell({"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, nbytes]}}, b"\0" * nbytes)
    safetensors.deserialize(data)
    header = parse(data)
    assert header.shapes == (stored,)
    assert shape_in_values(by_name(dtype), stored) == shape


def test_fields_may_come_in_any_order_and_names_may_be_field_names() -> None:
    header = parse(spell(b'{"a":{"data_offsets":[0,8],"shape":[2],"dtype":"F32"}}   \n'))
    assert header.names == ("a",)
    named = {
        name: {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]}
        for i, name in enumerate(("dtype", "shape", "data_offsets"))
    }
    data = spell(named, b"\0" * 3)
    assert set(parse(data).names) == {name for name, _ in safetensors.deserialize(data)}
    metadata = spell({"__metadata__": {"dtype": "a", "shape": "b", "data_offsets": "c"}, "a": ENTRY})
    assert parse(metadata).metadata == {"dtype": "a", "shape": "b", "data_offsets": "c"}


def test_empty_tensors_may_share_an_offset_and_an_empty_file_is_a_file() -> None:
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [8, 8]}
    header = parse(spell({"x": {**empty, "data_offsets": [0, 0]}, "a": ENTRY, "y": empty, "z": empty}))
    assert header.names == ("x", "a", "y", "z")
    assert parse(spell(b"{}", b"")).names == ()


def test_too_many_tensors_are_refused() -> None:
    with pytest.raises(UnsafeSource, match="at most 0"):
        parse(spell({"a": ENTRY}), max_tensors=0)


@pytest.mark.parametrize("dtype", [dtype for dtype in all_dtypes() if dtype.in_safetensors], ids=str)
def test_the_library_reads_a_built_header_of_every_type(dtype) -> None:
    shape = (2, 3)
    nbytes = 6 * dtype.itemsize
    payload = bytes(range(nbytes))
    data = build_header([HeaderEntry('w"\\é😀', dtype, shape, 0, nbytes)]) + payload
    assert (len(data) - nbytes) % 8 == 0
    ((name, value),) = safetensors.deserialize(data)
    assert name == 'w"\\é😀'
    assert value["dtype"] == dtype.name
    assert bytes(value["data"]) == payload
    assert parse(data).shapes == (shape,)


@pytest.mark.parametrize("dtype", [dtype for dtype in all_dtypes() if not dtype.in_safetensors], ids=str)
def test_a_type_that_safetensors_lacks_is_refused_by_tensor_name(dtype) -> None:
    with pytest.raises(CannotHold, match=r"'w'.*--exclude"):
        build_header([HeaderEntry("w", dtype, (1,), 0, dtype.itemsize)])


@pytest.mark.parametrize("name", ["", "a\0", "\ud800", "__metadata__", "x" * 1025])
def test_a_name_that_no_header_should_hold_is_refused(name: str) -> None:
    with pytest.raises(CannotHold):
        build_header([HeaderEntry(name, by_name("U8"), (1,), 0, 1)])


VALID = json.dumps(
    {
        "__metadata__": {"format": "pt"},
        "a.weight": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
        "b": {"dtype": "I64", "shape": [], "data_offsets": [12, 20]},
        "c": {"dtype": "F32", "shape": [0, 4], "data_offsets": [20, 20]},
        "d": {"dtype": "F4", "shape": [1, 8], "data_offsets": [20, 24]},
    }
).encode()


def agrees_with_the_library(data: bytes) -> None:
    """Either refused with an error of ours, or read exactly as the library does."""
    try:
        header = parse(data)
    except ReshardError:
        return
    expected = dict(safetensors.deserialize(data))
    assert set(header.names) == set(expected)
    for at, name in enumerate(header.names):
        start, length = int(header.starts[at]), int(header.lengths[at])
        assert bytes(expected[name]["data"]) == data[start : start + length]
        assert expected[name]["shape"] == shape_in_values(header.dtypes[at], header.shapes[at])


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_a_mutated_header_is_refused_or_read_as_the_library_reads_it(data: st.DataObject) -> None:
    text = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text) - 1))
        kind = data.draw(st.sampled_from(["flip", "drop", "insert", "digit", "copy"]))
        if kind == "flip":
            text[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "drop":
            del text[at : at + data.draw(st.integers(1, 8))]
        elif kind == "insert":
            text[at:at] = data.draw(st.sampled_from([b'"', b",", b"{", b"}", b"[", b"]", b"-", b"9" * 19, b"\\u0000"]))
        elif kind == "digit":
            digits = [i for i, byte in enumerate(text) if 48 <= byte < 58]
            if digits:
                text[data.draw(st.sampled_from(digits))] = 48 + data.draw(st.integers(0, 9))
        else:
            text[at:at] = text[at : at + data.draw(st.integers(1, 80))]
        if not text:
            text = bytearray(b"{")
    agrees_with_the_library(spell(bytes(text), bytes(range(24))))


_numbers = st.one_of(st.integers(-3, 40), st.just(1 << 64), st.just(2.5), st.just("2"), st.none())
_entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "BF16", "F4", "F6_E2M3", "Q", None]),
        "shape": st.one_of(st.lists(_numbers, max_size=3), st.lists(st.integers(0, 4), max_size=2), _numbers),
        "data_offsets": st.one_of(
            st.lists(_numbers, max_size=3), st.tuples(st.integers(0, 24), st.integers(0, 24)).map(list)
        ),
    }
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.text(max_size=4), _entries, max_size=3), st.integers(0, 24))
def test_an_invented_header_is_refused_or_read_as_the_library_reads_it(header: dict, payload: int) -> None:
    agrees_with_the_library(spell(header, bytes(payload)))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60))
def test_random_bytes_are_refused_or_read_as_the_library_reads_them(data: bytes) -> None:
    agrees_with_the_library(data)
    agrees_with_the_library(struct.pack("<Q", len(data)) + data)
