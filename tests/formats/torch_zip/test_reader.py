"""State dicts that torch saved, opened without torch, and files no torch would write."""

import io
import struct
import zipfile
import zlib
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.serialization import set_crc32_options

from reshard_service.catalogue import Catalogue, Identity, Section
from reshard_service.dtypes import all_dtypes
from reshard_service.errors import (
    NameCollision,
    ReshardError,
    SourceCorrupt,
    SourceNotFound,
    UnsafeSource,
    UnsupportedSource,
)
from reshard_service.formats.options import OpenOptions
from reshard_service.formats.torch_zip.reader import open_torch
from reshard_service.storage.local import LocalStorage
from tests.formats.torch_zip.contents import same, tensor_of


def open_file(path: Path, **options: object) -> Catalogue:
    return open_torch(LocalStorage(path.parent), OpenOptions(**options), path.name)


def saved(folder: Path, value: object, **options: object) -> Path:
    path = folder / "model.pt"
    torch.save(value, path, **options)
    return path


def keys(catalogue: Catalogue) -> list[str]:
    return [tensor.key for tensor in catalogue.tensors]


def test_a_models_state_dict_is_read_bit_for_bit(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2, bias=False))
    state = model.state_dict()
    catalogue = open_file(saved(tmp_path, state))
    assert keys(catalogue) == list(state)
    assert [tensor.identity for tensor in catalogue.tensors] == [Identity(Section.MODEL, key) for key in state]
    assert all(same(tensor_of(catalogue, key, tmp_path), value) for key, value in state.items())
    assert catalogue.notices == ()
    assert catalogue.format == "torch"


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_every_type_of_torch_is_read(tmp_path: Path) -> None:
    state = {}
    for dtype in all_dtypes():
        if dtype.torch is not None:
            raw = torch.tensor([i % 2 for i in range(6 * dtype.itemsize)], dtype=torch.uint8)
            state[dtype.name] = raw.view(getattr(torch, dtype.torch)).reshape(2, 3)
    state |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "last": torch.tensor([1])}
    catalogue = open_file(saved(tmp_path, state))
    assert all(same(tensor_of(catalogue, key, tmp_path), value) for key, value in state.items())


def test_nested_training_state_gets_sections_and_names_what_it_leaves_behind(tmp_path: Path) -> None:
    exp_avg = torch.ones(2, 2)
    state = {
        "model": OrderedDict({"a.weight": torch.zeros(2, 2)}),
        "optimizer": {
            "state": {"a.weight": {"step": torch.tensor(1.0), "exp_avg": exp_avg}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": ["a.weight"]}],
        },
        "history": [{"loss": torch.tensor(3.0)}, {"loss": torch.tensor(2.0)}],
        "epoch": 3,
        "when": [1, 2, [3]],
    }
    catalogue = open_file(saved(tmp_path, state))
    found = {tensor.key: (tensor.identity, tensor.path) for tensor in catalogue.tensors}
    assert found["model.a.weight"] == (Identity(Section.MODEL, "a.weight"), ("model", "a.weight"))
    assert found["optimizer.state.a.weight.exp_avg"] == (
        Identity(Section.OPTIMIZER, "a.weight", "exp_avg"),
        ("optimizer", "state", "a.weight", "exp_avg"),
    )
    assert found["history.1.loss"][0].section is Section.EXTRA
    assert found["history.1.loss"][1] == ("history", 1, "loss")
    [notice] = catalogue.notices
    assert notice.code == "values_not_carried"
    assert notice.reason.startswith("5 values")
    assert "optimizer.param_groups.0.lr" in notice.reason


@pytest.mark.parametrize(
    ("outer", "section"),
    [("model_state_dict", "model"), ("module", "model"), ("optimizer_state_dict", "optimizer"), ("ema", "extra")],
)
def test_usual_names_of_sections_are_known(outer: str, section: str, tmp_path: Path) -> None:
    inner = {"state": {"w": {"exp_avg": torch.ones(2)}}} if section == "optimizer" else {"w": torch.ones(2)}
    catalogue = open_file(saved(tmp_path, {outer: inner}))
    assert [tensor.identity.section.value for tensor in catalogue.tensors] == [section]
    assert [tensor.identity.fqn for tensor in catalogue.tensors] == ["w" if section != "extra" else "ema.w"]


def test_a_key_prefix_says_where_the_model_lies(tmp_path: Path) -> None:
    state = {"ema": {"net": {"w": torch.ones(2)}}, "w": torch.zeros(2)}
    catalogue = open_file(saved(tmp_path, state), key_prefix="ema.net")
    assert {tensor.key: tensor.identity for tensor in catalogue.tensors} == {
        "ema.net.w": Identity(Section.MODEL, "w"),
        "w": Identity(Section.EXTRA, "w"),
    }


def test_tied_tensors_and_views_share_their_bytes(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(6, 4)
    state = {"a": base, "tied": base, "rows": base[2:4], "row": base[5]}
    catalogue = open_file(saved(tmp_path, state))
    assert all(same(tensor_of(catalogue, key, tmp_path), value) for key, value in state.items())
    assert catalogue.chunks.start[0] == catalogue.chunks.start[1]
    raw = base.numpy().tobytes()
    assert catalogue.chunks.crc is not None
    assert catalogue.chunks.crc.tolist() == [zlib.crc32(raw)] * 2 + [-1, -1]
    assert catalogue.metadata_bytes == catalogue.files[0].bytes - len(raw)


def test_another_order_of_dims_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedSource, match=r"b\.c.*contiguous"):
        open_file(saved(tmp_path, {"a": torch.ones(2), "b": {"c": torch.ones(2, 3).t()}}))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "quantised"),
        (lambda: torch.eye(2).to_sparse(), "sparse"),
        (lambda: torch.ones(2, dtype=torch.complex64).conj(), "conjugate"),
        (lambda: torch.empty(2, device="meta"), "meta"),
    ],
)
def test_what_is_more_than_its_bytes_is_refused_by_name(make: object, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedSource, match=rf"(?s){reason}.*a\.b"):
        open_file(saved(tmp_path, {"a": {"b": make()}}))


def test_parameters_modules_flags_and_other_protocols_make_no_difference(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    parameter.marked = True
    for protocol in (2, 4):
        catalogue = open_file(saved(tmp_path, {"p": parameter}, pickle_protocol=protocol))
        assert same(tensor_of(catalogue, "p", tmp_path), parameter)


def test_harmless_values_of_training_scripts_are_listed_not_refused(tmp_path: Path) -> None:
    state = {
        "w": torch.ones(2), "args": Namespace(lr=0.1), "best": np.float64(0.5), "curve": np.arange(3),
        "root": Path("x"), "size": torch.Size((1, 2)), "on": torch.device("cpu"), "type": torch.float16, "tags": {"a"},
    }  # fmt: skip
    catalogue = open_file(saved(tmp_path, state))
    assert keys(catalogue) == ["w"]
    assert catalogue.notices[0].reason.startswith("8 values")


def test_a_planted_call_is_named_and_never_runs(tmp_path: Path) -> None:
    class Planted:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (eval, ("open('/proc/self/nothing')",))

    with pytest.raises(UnsafeSource, match="eval"):
        open_file(saved(tmp_path, {"w": torch.ones(2), "x": Planted()}))


def test_two_values_of_one_key_collide(tmp_path: Path) -> None:
    with pytest.raises(NameCollision, match=r"a\.b"):
        open_file(saved(tmp_path, {"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}))


def test_without_crc_nothing_is_known_beforehand(tmp_path: Path) -> None:
    set_crc32_options(False)
    try:
        path = saved(tmp_path, {"w": torch.ones(3)})
    finally:
        set_crc32_options(True)
    catalogue = open_file(path)
    assert catalogue.chunks.crc is not None
    assert catalogue.chunks.crc.tolist() == [-1]
    assert same(tensor_of(catalogue, "w", tmp_path), torch.ones(3))


@pytest.mark.parametrize("value", [torch.ones(3), 7, "text", None])
def test_a_file_without_a_dict_is_no_state_dict(value: object, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedSource, match="no state dict"):
        open_file(saved(tmp_path, value))


def test_old_formats_are_refused_with_the_command_that_saves_them_anew(tmp_path: Path) -> None:
    path = saved(tmp_path, {"w": torch.ones(3)}, _use_new_zipfile_serialization=False)
    with pytest.raises(UnsupportedSource, match=r"before 1\.6.*torch\.save\(torch\.load"):
        open_file(path)
    path.write_bytes(b"\x80\x04N.")
    with pytest.raises(UnsupportedSource, match="bare pickle"):
        open_file(path)


def test_a_torchscript_archive_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("model/data.pkl", b"\x80\x02}.")
        archive.writestr("model/constants.pkl", b"\x80\x02).")
    with pytest.raises(UnsupportedSource, match="TorchScript"):
        open_file(tmp_path / "model.pt")


def test_a_missing_file_and_a_foreign_zip_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFound):
        open_file(tmp_path / "model.pt")
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("a/b", b"x")
    with pytest.raises(UnsupportedSource, match=r"torch\.save did not write"):
        open_file(tmp_path / "model.pt")


STATE = {"a": torch.arange(6.0).reshape(2, 3), "b": {"c": torch.arange(4, dtype=torch.int64)}, "n": 3}


def original() -> bytes:
    file = io.BytesIO()
    torch.save(STATE, file)
    return file.getvalue()


ORIGINAL = original()


def rewritten(
    folder: Path, change: object = None, compress: bool = False, extra: tuple[str, bytes] | None = None
) -> Path:
    """The same members zipped by Python, some of them changed: ``change`` maps names to new ones."""
    path = folder / "model.pt"
    with zipfile.ZipFile(io.BytesIO(ORIGINAL)) as source, zipfile.ZipFile(path, "w") as target:
        for info in source.infolist():
            name = (change or {}).get(info.filename, info.filename)
            method = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
            target.writestr(name, source.read(info), compress_type=method)
        if extra:
            target.writestr(*extra)
    return path


def test_a_file_zipped_again_by_another_tool_is_read(tmp_path: Path) -> None:
    path = rewritten(tmp_path, extra=("archive/folder/", b""))
    catalogue = open_file(path)
    assert same(tensor_of(catalogue, "a", tmp_path), STATE["a"])


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"compress": True}, UnsupportedSource),
        ({"change": {"archive/version": "archive/../version"}}, UnsafeSource),
        ({"change": {"archive/version": "/version"}}, UnsafeSource),
        ({"extra": ("archive/data/0", b"other")}, UnsafeSource),
        ({"extra": ("other/data/9", b"")}, SourceCorrupt),
        ({"change": {"archive/data/0": "archive/data/7"}}, SourceCorrupt),
    ],
    ids=["compressed", "dots", "absolute", "double", "two folders", "missing storage"],
)
def test_zips_that_no_torch_writes_are_refused(arguments: dict[str, object], error: type, tmp_path: Path) -> None:
    with pytest.raises(error):
        open_file(rewritten(tmp_path, **arguments))


@pytest.mark.parametrize("cut", [1, 30, 200, len(ORIGINAL) // 2, len(ORIGINAL) - 10])
def test_a_truncated_file_is_corrupt(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(ORIGINAL[:-cut])
    with pytest.raises(SourceCorrupt):
        open_file(path)


def test_a_directory_that_contradicts_the_local_headers_is_corrupt(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    data = bytearray(ORIGINAL)
    at = data.index(b"archive/data/0")
    data[at : at + 14] = b"archive/data/1"
    path.write_bytes(data)
    with pytest.raises(SourceCorrupt, match="contradicts"):
        open_file(path)


def test_a_storage_of_another_size_than_its_member_is_corrupt(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    data = bytearray(ORIGINAL)
    entry = data.index(b"PK\x01\x02", data.rindex(b"archive/data/0") - 60)
    assert struct.unpack_from("<II", data, entry + 20) == (24, 24)
    struct.pack_into("<II", data, entry + 20, 20, 20)
    path.write_bytes(data)
    with pytest.raises(SourceCorrupt, match=r"24 bytes.*20 bytes"):
        open_file(path)


class FarAway(LocalStorage):
    """A local folder that counts its reads and says that it is remote."""

    is_local = False
    reads = 0

    def open(self, path: str) -> object:
        reader = super().open(path)
        read = reader.read_into

        def counted(start: int, buffer: memoryview) -> None:
            type(self).reads += 1
            read(start, buffer)

        reader.read_into = counted
        return reader


def test_over_a_network_local_headers_are_not_fetched_one_by_one(tmp_path: Path) -> None:
    state = {f"layers.{i}": torch.full((i + 1, 3), float(i)) for i in range(50)} | {"empty": torch.empty(0)}
    path = saved(tmp_path, state)
    near = open_file(path)
    FarAway.reads = 0
    far = open_torch(FarAway(tmp_path), OpenOptions(), path.name)
    assert FarAway.reads < 12
    assert (far.chunks.start == near.chunks.start).all()


def test_the_root_may_be_the_file_itself(tmp_path: Path) -> None:
    path = saved(tmp_path, STATE)
    catalogue = open_torch(LocalStorage(path), OpenOptions())
    assert keys(catalogue) == ["a", "b.c"]
    assert catalogue.files[0].path == ""


def test_a_dict_shared_beyond_reason_is_refused(tmp_path: Path) -> None:
    value: dict[str, object] = {"w": torch.ones(1)}
    for _ in range(30):
        value = {"a": value, "b": value}
    with pytest.raises(UnsafeSource, match="shares"):
        open_file(saved(tmp_path, value))


def test_a_dict_within_itself_is_refused(tmp_path: Path) -> None:
    value: dict[str, object] = {"w": torch.ones(1)}
    value["again"] = [value]
    with pytest.raises(UnsafeSource, match="nests"):
        open_file(saved(tmp_path, value))


_EDIT = st.tuples(st.integers(0, 2), st.integers(0, len(ORIGINAL)), st.binary(min_size=1, max_size=8))


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(_EDIT, min_size=1, max_size=4))
def test_a_mutated_file_is_refused_or_opened_never_worse(edits: list[tuple[int, int, bytes]], tmp_path: Path) -> None:
    data = bytearray(ORIGINAL)
    for kind, at, piece in edits:
        if kind == 0:
            data[at : at + len(piece)] = piece
        elif kind == 1:
            data[at:at] = piece
        else:
            del data[at : at + len(piece)]
    path = tmp_path / "mutated.pt"
    path.write_bytes(data)
    try:
        catalogue = open_file(path)
    except ReshardError:
        return
    chunks = catalogue.chunks
    assert (chunks.start >= 0).all()
    assert (chunks.start + chunks.length <= len(data)).all()


def test_a_flipped_bit_in_the_pickle_fails_its_checksum(tmp_path: Path) -> None:
    path = saved(tmp_path, {"first.weight": torch.ones(2), "second.weight": torch.zeros(3)})
    content = path.read_bytes()
    path.write_bytes(content.replace(b"second.weight", b"third_.weight"))
    with pytest.raises(SourceCorrupt, match=r"'data\.pkl'.*CRC32"):
        open_file(path)
