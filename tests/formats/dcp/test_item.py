"""Items that torch wrote, in every form its zips have had, and items that no torch would write."""

import io
import struct
import threading
import zipfile
import zlib
from collections import OrderedDict
from math import prod
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.serialization import set_crc32_options

from reshard_service.dtypes import DType, all_dtypes, by_name, by_torch_name
from reshard_service.errors import GeometryWrong, ReshardError, SourceCorrupt, UnsafeSource, UnsupportedSource
from reshard_service.formats.dcp.data_pickle import read_array_pickle
from reshard_service.formats.dcp.item import HEAD_BYTES, ItemReader, Payload, checksum

F32 = by_name("F32")
# safetensors' 6-bit types have no torch counterpart.
TORCH_DTYPES = [dtype for dtype in all_dtypes() if dtype.torch is not None]


def saved(value: object, **options: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def locate(item: bytes, dtype: DType, sizes: tuple[int, ...], reader: ItemReader | None = None) -> Payload:
    head = memoryview(item)[:HEAD_BYTES]
    return (reader or ItemReader()).locate(head, dtype, sizes, item_bytes=len(item), key="a.b", file="__0_0.distcp")


def recorded(item: bytes, payload: Payload) -> int | None:
    if payload.crc32 is not None:
        return payload.crc32
    return checksum(memoryview(item)[payload.start + payload.storage_bytes :], payload.storage_bytes)


def filled(dtype: DType, sizes: tuple[int, ...]) -> torch.Tensor:
    """A tensor of any type with known bytes (0 and 1 only, which bool can hold)."""
    raw = torch.tensor([i % 2 for i in range(prod(sizes) * dtype.itemsize)], dtype=torch.uint8)
    assert dtype.torch is not None
    return raw.view(getattr(torch, dtype.torch)).reshape(sizes)


def members(item: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(item)) as archive:
        return {info.filename.partition("/")[2]: archive.read(info) for info in archive.infolist()}


def rewritten(parts: dict[str, bytes], prefix: str = "archive", compress: bool = False) -> bytes:
    """The same members zipped by Python, which puts sizes and CRCs into the local headers."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as archive:
        for name, data in parts.items():
            archive.writestr(f"{prefix}/{name}", data)
    return file.getvalue()


@pytest.mark.parametrize("sizes", [(), (7,), (3, 5), (2, 3, 4, 5, 1), (0,), (4, 0, 2), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
def test_the_payload_of_what_torch_saved_is_found_for_every_type_and_shape(
    dtype: DType, sizes: tuple[int, ...]
) -> None:
    tensor = filled(dtype, sizes)
    item = saved(tensor)
    payload = locate(item, dtype, sizes)
    raw = bytes(tensor.untyped_storage().tolist())
    assert payload.is_plain
    assert payload.storage_bytes == len(raw)
    assert item[payload.start : payload.start + len(raw)] == raw
    assert recorded(item, payload) in (zlib.crc32(raw), None if not raw else -1)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_is_read(protocol: int) -> None:
    item = saved(torch.arange(6.0).reshape(2, 3), pickle_protocol=protocol)
    assert locate(item, F32, (2, 3)).is_plain


def test_strides_of_a_transposed_tensor_are_reported() -> None:
    payload = locate(saved(torch.arange(6.0).reshape(2, 3).t()), F32, (3, 2))
    assert payload.strides == (1, 3)


def test_transposed_and_plain_items_of_one_shape_are_told_apart_by_the_same_reader() -> None:
    reader = ItemReader()
    plain, turned = saved(torch.ones(4, 4)), saved(torch.ones(4, 4).t())
    for _ in range(3):
        assert locate(plain, F32, (4, 4), reader).strides is None
        assert locate(turned, F32, (4, 4), reader).strides == (1, 4)


def test_a_dim_of_one_element_may_have_any_stride() -> None:
    tensor = torch.arange(12.0).reshape(3, 4)[:, 1:2].clone().as_strided((3, 1), (1, 77))
    assert locate(saved(tensor), F32, (3, 1)).strides is None


def test_a_view_into_a_larger_storage_is_located_with_its_offset() -> None:
    item = saved(torch.arange(10.0)[4:7])
    payload = locate(item, F32, (3,))
    assert (payload.storage_bytes, payload.storage_offset_bytes, payload.strides) == (40, 16, None)
    at = payload.start + payload.storage_offset_bytes
    assert struct.unpack("<3f", item[at : at + 12]) == (4.0, 5.0, 6.0)
    assert recorded(item, payload) == zlib.crc32(item[payload.start : payload.start + 40])


def test_an_expanded_tensor_has_stride_zero() -> None:
    assert locate(saved(torch.ones(1).expand(5)), F32, (5,)).strides == (0,)


def test_parameters_and_tensors_with_attributes_are_plain_payloads() -> None:
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    assert locate(saved(parameter), F32, (2, 2)).is_plain
    parameter.note = "x"
    assert locate(saved(parameter), F32, (2, 2)).is_plain
    tensor = torch.ones(2, 2)
    tensor.note = True
    assert locate(saved(tensor), F32, (2, 2)).is_plain
    assert locate(saved(torch.nn.Buffer(torch.ones(2, 2))), F32, (2, 2)).is_plain


class _Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "tensor",
    [
        lambda: torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8),
        lambda: torch.eye(2).to_sparse(),
        lambda: torch.ones(2, 2, dtype=torch.complex64).conj(),
        lambda: torch.ones(2, 2, dtype=torch.complex64).conj().imag,
        lambda: torch.ones(2, 2).as_subclass(_Subclass),
        lambda: torch.empty(2, 2, device="meta"),
    ],
    ids=["quantised", "sparse", "conjugate", "negative", "subclass", "meta"],
)
@pytest.mark.filterwarnings("ignore")
def test_a_tensor_that_is_more_than_its_bytes_is_refused(tensor: object) -> None:
    value = tensor()
    dtype = F32 if value.dtype is torch.qint8 else by_torch_name(str(value.dtype).removeprefix("torch."))
    with pytest.raises(UnsupportedSource, match=r"a\.b"):
        locate(saved(value), dtype, (2, 2))


def test_another_shape_than_the_metadata_says_is_wrong_geometry() -> None:
    with pytest.raises(GeometryWrong, match=r"\(7, 1\).*\(6, 1\)"):
        locate(saved(torch.ones(7, 1)), F32, (6, 1))


def test_another_type_than_the_metadata_says_is_corruption() -> None:
    with pytest.raises(SourceCorrupt, match=r"torch\.float32.*BF16"):
        locate(saved(torch.ones(4)), by_name("BF16"), (4,))


def test_an_item_shorter_than_its_storage_is_corrupt() -> None:
    item = saved(torch.ones(1000))
    reader = ItemReader()
    for length in (900, 4700):
        with pytest.raises(SourceCorrupt):
            reader.locate(memoryview(item)[:length], F32, (1000,), item_bytes=length, key="k", file="f")
    locate(item, F32, (1000,), reader)
    with pytest.raises(SourceCorrupt):  # also when the head is already known
        reader.locate(memoryview(item)[:900], F32, (1000,), item_bytes=900, key="k", file="f")


@pytest.mark.parametrize(
    "order",
    [
        "data.pkl data/0 version",
        "data.pkl byteorder data/0 version .data/serialization_id",
        "version data/0 data.pkl byteorder",
        "data.pkl code/x version byteorder data/0",
    ],
)
@pytest.mark.parametrize("prefix", ["archive", "pytorch_model", "ünicode.name"])
def test_members_may_come_in_any_order_under_any_prefix(order: str, prefix: str) -> None:
    parts = members(saved(torch.arange(5.0))) | {"code/x": b"PK\x07\x08 is no descriptor here"}
    item = rewritten({name: parts[name] for name in order.split()}, prefix)
    payload = locate(item, F32, (5,))
    assert struct.unpack("<5f", item[payload.start : payload.start + 20]) == (0, 1, 2, 3, 4)
    assert payload.crc32 == zlib.crc32(parts["data/0"])


def test_items_whose_description_follows_the_payload_never_share_a_known_head() -> None:
    reader = ItemReader()
    plain, turned = (members(saved(tensor)) for tensor in (torch.ones(4, 4), torch.ones(4, 4).t()))
    for _ in range(2):
        for parts, strides in ((plain, None), (turned, (1, 4))):
            item = rewritten({name: parts[name] for name in ("version", "data/0", "data.pkl")})
            assert locate(item, F32, (4, 4), reader).strides == strides


def test_a_description_beyond_the_first_bytes_is_refused_not_guessed() -> None:
    parts = members(saved(torch.ones(5000)))
    item = rewritten({name: parts[name] for name in ("data/0", "data.pkl", "version")})
    with pytest.raises(UnsupportedSource, match="first 4096 bytes"):
        locate(item, F32, (5000,))


def test_torch_without_crc_records_none() -> None:
    set_crc32_options(False)
    try:
        item = saved(torch.arange(3.0))
    finally:
        set_crc32_options(True)
    payload = locate(item, F32, (3,))
    assert struct.unpack("<3f", item[payload.start : payload.start + 12]) == (0, 1, 2)
    assert recorded(item, payload) is None


def test_a_payload_not_followed_by_its_record_is_corrupt() -> None:
    item = saved(torch.arange(3.0))
    start = locate(item, F32, (3,)).start
    for at, nbytes in ((start + 11, 12), (start + 12, 11), (start + 13, 12), (len(item), 12)):
        with pytest.raises(SourceCorrupt):
            checksum(memoryview(item)[at:], nbytes)


def test_big_endian_items_are_refused() -> None:
    parts = members(saved(torch.ones(3))) | {"byteorder": b"big"}
    with pytest.raises(UnsupportedSource, match="big-endian"):
        locate(rewritten(parts), F32, (3,))


def test_compressed_items_are_refused() -> None:
    with pytest.raises(UnsupportedSource, match="compressed"):
        locate(rewritten(members(saved(torch.ones(300))), compress=True), F32, (300,))


def test_what_is_no_zip_is_corrupt() -> None:
    for item in (b"", b"\x80\x02.", bytes(5000), saved(torch.ones(3), _use_new_zipfile_serialization=False)):
        with pytest.raises(SourceCorrupt):
            locate(item, F32, (3,))


def test_a_payload_planted_in_an_item_is_named_and_never_runs() -> None:
    class Planted:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (eval, ("1/0",))

    with pytest.raises(UnsafeSource, match="eval"):
        locate(saved(Planted()), F32, (3,))
    with pytest.raises(UnsafeSource, match="eval"):
        locate(saved(OrderedDict(a=Planted())), F32, (3,))


def test_a_damaged_description_fails_its_crc() -> None:
    item = bytearray(saved(torch.ones(3, 5)))
    item[item.index(b"_rebuild_tensor_v2")] ^= 1
    with pytest.raises(ReshardError):
        locate(bytes(item), F32, (3, 5))
    item = bytearray(saved(torch.ones(3, 300)))
    at = item.index(b"M,\x01", item.index(b"_rebuild"))  # the 300 of the stride or shape
    item[at + 1] = 0x2B
    with pytest.raises(ReshardError):
        locate(bytes(item), F32, (3, 300))


def test_several_threads_may_share_a_reader() -> None:
    reader = ItemReader()
    items = {(n, 3): saved(torch.ones(n, 3)) for n in range(1, 40)}
    failures: list[object] = []

    def work() -> None:
        for _ in range(20):
            for sizes, item in items.items():
                if locate(item, F32, sizes, reader).storage_bytes != prod(sizes) * 4:
                    failures.append(sizes)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


class _Skipping(io.RawIOBase):
    """Keeps what is written except for large pieces, of which only the length counts."""

    def __init__(self) -> None:
        self.pieces: list[tuple[int, bytes]] = []
        self.length = 0

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        view = memoryview(data).cast("B")
        if len(view) < 1 << 16:
            self.pieces.append((self.length, bytes(view)))
        self.length += len(view)
        return len(view)

    def read_at(self, start: int, count: int) -> bytes:
        out = bytearray(count)
        for at, piece in self.pieces:
            low, high = max(at, start), min(at + len(piece), start + count)
            if low < high:
                out[low - start : high - start] = piece[low - at : high - at]
        return bytes(out)


@pytest.mark.slow
def test_an_item_beyond_4_gib_that_torch_wrote_is_located() -> None:
    count = (1 << 32) + 5
    file = _Skipping()
    torch.save(torch.zeros(count, dtype=torch.uint8), file)
    head = memoryview(file.read_at(0, HEAD_BYTES))
    payload = ItemReader().locate(head, by_name("U8"), (count,), item_bytes=file.length, key="k", file="f")
    assert payload.is_plain
    assert payload.storage_bytes == count
    crc, zeros, left = 0, bytes(1 << 24), count
    while left:
        crc = zlib.crc32(zeros[: min(left, len(zeros))], crc)
        left -= min(left, len(zeros))
    assert checksum(memoryview(file.read_at(payload.start + count, 24)), count) == crc


_FUZZED = [
    (saved(torch.arange(6.0).reshape(2, 3)), F32, (2, 3)),
    (saved(torch.arange(6.0).reshape(3, 2).t()), F32, (2, 3)),
    (saved(torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))), F32, (2, 3)),
    (saved(torch.zeros(2, 3, dtype=torch.float8_e4m3fn)), by_name("F8_E4M3"), (2, 3)),
    (saved(torch.ones(2, 3, dtype=torch.bfloat16), pickle_protocol=4), by_name("BF16"), (2, 3)),
    (rewritten(members(saved(torch.arange(6.0).reshape(2, 3)))), F32, (2, 3)),
    (rewritten(dict(reversed(members(saved(torch.arange(6.0).reshape(2, 3))).items()))), F32, (2, 3)),
]
_EDIT = st.tuples(st.integers(0, 2), st.integers(0, 900), st.binary(min_size=1, max_size=6))


def edited(item: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    out = bytearray(item)
    for kind, at, data in edits:
        at %= len(out) + 1
        if kind == 0:
            out[at : at + len(data)] = data
        elif kind == 1:
            out[at:at] = data
        else:
            del out[at : at + len(data)]
    return bytes(out)


@settings(max_examples=600, deadline=None)
@given(st.sampled_from(_FUZZED), st.lists(_EDIT, min_size=1, max_size=4))
def test_a_mutated_item_is_refused_or_read_right(
    case: tuple[bytes, DType, tuple[int, ...]], edits: list[tuple[int, int, bytes]]
) -> None:
    original, dtype, sizes = case
    truth = locate(original, dtype, sizes)
    item = edited(original, edits)
    try:
        payload = locate(item, dtype, sizes)
        crc = recorded(item, payload)
    except ReshardError:
        return
    data = item[payload.start : payload.start + payload.storage_bytes]
    if crc is not None and crc == zlib.crc32(data) and len(data) == truth.storage_bytes:
        assert data == original[truth.start : truth.start + truth.storage_bytes]
        assert (payload.strides, payload.storage_offset_bytes) == (truth.strides, truth.storage_offset_bytes)


@settings(max_examples=600, deadline=None)
@given(st.sampled_from(_FUZZED), st.lists(_EDIT, max_size=4))
def test_a_mutated_description_never_raises_anything_unexpected(
    case: tuple[bytes, DType, tuple[int, ...]], edits: list[tuple[int, int, bytes]]
) -> None:
    data = edited(members(case[0])["data.pkl"], edits)
    try:
        array, end = read_array_pickle(data)
    except ReshardError:
        return
    assert end <= len(data)
    assert len(array.sizes) == len(array.strides)
    assert min((array.storage_bytes, array.offset, *array.sizes, *array.strides)) >= 0


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_every_item_of_a_real_checkpoint_is_located_from_what_its_metadata_says(tmp_path: Path) -> None:
    state = {
        "bias": torch.arange(5, dtype=torch.bfloat16),
        "turned": torch.arange(6.0).reshape(2, 3).t(),
        "flag": torch.tensor([True, False]),
        "count": torch.tensor(7),
        "slice": torch.arange(12.0).reshape(3, 4)[:, 1:3],
        "parameter": torch.nn.Parameter(torch.ones(2, 2)),
        "nothing": torch.empty(0, 2),
    }
    dcp.save(state, checkpoint_id=str(tmp_path), no_dist=True)
    metadata = dcp.FileSystemReader(str(tmp_path)).read_metadata()
    reader = ItemReader()
    for index, info in metadata.storage_data.items():
        item = (tmp_path / info.relative_path).read_bytes()[info.offset : info.offset + info.length]
        value = state[index.fqn].detach()
        payload = locate(item, by_torch_name(str(value.dtype).removeprefix("torch.")), tuple(value.shape), reader)
        data = item[payload.start : payload.start + payload.storage_bytes]
        # torch 2.13 clones a view into a storage of its own, but keeps the order of dims (filesystem.py).
        assert payload.storage_bytes == value.nbytes
        assert payload.strides == ((1, 3) if index.fqn == "turned" else None)
        stored = torch.tensor(list(data), dtype=torch.uint8).view(value.dtype)
        found = stored.as_strided(value.shape, payload.strides) if payload.strides else stored.reshape(value.shape)
        assert torch.equal(found, value)
        assert recorded(item, payload) in (zlib.crc32(data), None if not data else -1)
