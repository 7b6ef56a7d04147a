"""Reading ``.metadata``: torch's own, old ones, enormous ones, and ones that are not what they should be."""

import pathlib
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from reshard_service.errors import (
    CheckpointIncomplete,
    CoverageError,
    ReshardError,
    SourceCorrupt,
    UnsafeSource,
)
from reshard_service.formats.dcp import metadata as metadata_module
from reshard_service.formats.dcp.joining import join_metadata
from reshard_service.formats.dcp.metadata import SCANNED_BYTES, DcpMetadata, read_metadata_file
from reshard_service.formats.pickles.child import ChildLimits
from reshard_service.storage.local import LocalStorage
from tests.formats.pickles.planted import bombs, planted

ITEM = 4096


def sharded(
    tensors: int = 3, ranks: int = 4, columns: int = 5, dtype: torch.dtype = torch.bfloat16, prefix: str = "model."
) -> Metadata:
    """What torch writes for ``tensors`` matrices split by rows over ``ranks``, and one step counter."""
    names = [f"{prefix}layers.{number}.weight" for number in range(tensors)]
    entries: dict[str, Any] = {
        name: TensorStorageMetadata(
            TensorProperties(dtype=dtype),
            torch.Size((ranks * 2, columns)),
            [ChunkStorageMetadata(torch.Size((2 * r, 0)), torch.Size((2, columns))) for r in range(ranks)],
        )
        for name in names
    }
    entries["step"] = BytesStorageMetadata()
    storage: dict[Any, Any] = {MetadataIndex("step"): _StorageInfo("__0_0.distcp", tensors * ITEM, 1261)}
    for rank in reversed(range(ranks)):
        for number, name in enumerate(names):
            place = _StorageInfo(f"__{rank}_0.distcp", number * ITEM, ITEM)
            storage[MetadataIndex(name, (2 * rank, 0), rank)] = place
    paths = {name: ("model", name.removeprefix("model.")) for name in names} | {"step": ("step",)}
    return Metadata(entries, paths, storage, StorageMeta(pathlib.PosixPath("/somewhere"), "id"), "1.0.0")


def read(folder: Path, metadata: object, protocol: int = 4) -> DcpMetadata:
    data = metadata if isinstance(metadata, bytes) else pickle.dumps(metadata, protocol)
    (folder / ".metadata").write_bytes(data)
    return join_metadata([read_metadata_file(LocalStorage(folder), ".metadata")])


def check_sharded(found: DcpMetadata, tensors: int = 3, ranks: int = 4, columns: int = 5) -> None:
    assert found.keys == tuple(f"model.layers.{number}.weight" for number in range(tensors))
    assert set(found.dtypes) == {"bfloat16"}
    assert set(found.shapes) == {(ranks * 2, columns)}
    assert found.first.tolist() == [ranks * number for number in range(tensors + 1)]
    for number in range(tensors):
        rows = slice(number * ranks, (number + 1) * ranks)
        assert found.offsets[rows].tolist() == [[2 * r, 0] for r in range(ranks)]
        assert found.sizes[rows].tolist() == [[2, columns]] * ranks
        assert [found.files[file] for file in found.file[rows]] == [f"__{r}_0.distcp" for r in range(ranks)]
        assert set(found.start[rows].tolist()) == {number * ITEM}
        assert set(found.length[rows].tolist()) == {ITEM}
    (step,) = found.objects
    assert (step.key, found.files[step.file], step.start, step.length) == ("step", "__0_0.distcp", tensors * ITEM, 1261)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_torch_pickles_is_read_whole(tmp_path: Path, protocol: int) -> None:
    found = read(tmp_path, sharded(), protocol)
    check_sharded(found)
    assert found.paths is not None
    assert found.paths["model.layers.0.weight"] == ("model", "layers.0.weight")
    assert found.version == "1.0.0"


def test_a_large_file_is_read_by_a_child_with_the_same_result(tmp_path: Path) -> None:
    ranks = 2000
    found = read(tmp_path, sharded(ranks=ranks))
    assert found.bytes > SCANNED_BYTES
    check_sharded(found, ranks=ranks)


def test_the_digest_covers_the_bytes_wherever_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = read(tmp_path, sharded())
    monkeypatch.setattr(metadata_module, "SCANNED_BYTES", 0)
    there = read(tmp_path, sharded())
    assert here.digest == there.digest
    assert np.array_equal(here.start, there.start)
    assert here.paths == there.paths


def test_reading_imports_no_torch(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(sharded(ranks=2000)))
    program = (
        "import sys; from pathlib import Path\n"
        "from reshard_service.storage.local import LocalStorage\n"
        "from reshard_service.formats.dcp.metadata import read_metadata_file\n"
        "read_metadata_file(LocalStorage(Path(sys.argv[1])), '.metadata')\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)


def test_the_child_needs_nothing_but_the_standard_library() -> None:
    program = (
        "import sys; sys.path.append(sys.argv[1])\n"
        "import reshard_service.formats.dcp.metadata_columns\n"
        "print([name for name in ('numpy', 'pydantic', 'fsspec', 'torch') if name in sys.modules])\n"
    )
    root = str(Path(metadata_module.__file__).parents[3])
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program, root], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_dtype_of_torch_keeps_its_name(tmp_path: Path) -> None:
    dtypes = [value for value in vars(torch).values() if isinstance(value, torch.dtype)]
    assert len(dtypes) > 40
    for dtype in set(dtypes):
        found = read(tmp_path, sharded(tensors=1, ranks=1, dtype=dtype))
        assert f"torch.{found.dtypes[0]}" == str(dtype)


def test_zero_dims_empty_tensors_and_mixed_ranks_are_read(tmp_path: Path) -> None:
    shapes = {"scalar": (), "vector": (3,), "empty": (0, 4), "cube": (2, 3, 4)}
    entries = {
        name: TensorStorageMetadata(
            TensorProperties(dtype=torch.float32),
            torch.Size(shape),
            [ChunkStorageMetadata(torch.Size([0] * len(shape)), torch.Size(shape))],
        )
        for name, shape in shapes.items()
    }
    storage = {
        MetadataIndex(name, [0] * len(shape)): _StorageInfo("__0_0.distcp", 5000 * i, 5000)
        for i, (name, shape) in enumerate(shapes.items())
    }
    found = read(tmp_path, Metadata(entries, None, storage))
    assert dict(zip(found.keys, found.shapes, strict=True)) == shapes
    assert found.offsets.shape == (4, 3)
    assert found.sizes.tolist() == [[1, 1, 1], [3, 1, 1], [0, 4, 1], [2, 3, 4]]
    assert found.paths is None
    assert found.version is None


def test_fields_that_old_torch_did_not_write_may_lack(tmp_path: Path) -> None:
    metadata = sharded()
    for name in ("version", "storage_meta", "planner_data"):
        del metadata.__dict__[name]
    for info in metadata.storage_data.values():
        info.__dict__.pop("transform_descriptors")
    found = read(tmp_path, metadata)
    check_sharded(found)
    assert found.paths is None


def test_names_of_torch_1_and_2_are_known(tmp_path: Path) -> None:
    data = pickle.dumps(sharded(), 2)
    old = data.replace(
        b"ctorch.distributed.checkpoint.metadata\nTensorProperties\n",
        b"ctorch.distributed._shard.sharded_tensor.metadata\nTensorProperties\n",
    ).replace(
        b"ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\n",
        b"ctorch.distributed._shard.sharded_tensor.metadata\nMEM_FORMAT_ENCODING\n",
    )
    assert old != data
    check_sharded(read(tmp_path, old))


def test_a_custom_planners_data_is_noted_not_read(tmp_path: Path) -> None:
    found = read(tmp_path, replace(sharded(), planner_data=[("anything",)]))
    assert found.paths is None
    assert found.planner == "list"


def test_instances_in_another_order_or_shared_are_sorted_out(tmp_path: Path) -> None:
    """A field before the others that mentions the same indices makes them get their state in another order."""
    metadata = sharded()
    fields = {"cached": list(reversed(metadata.storage_data)), "extra": MetadataIndex("unused", (0, 0))}
    metadata.__dict__.update(fields)
    metadata.__dict__ = {name: metadata.__dict__[name] for name in (*fields, *list(metadata.__dict__)[:-2])}
    found = read(tmp_path, metadata)
    check_sharded(found)
    assert set(found.other_fields) == {"cached", "extra"}


def test_chunks_listed_twice_alike_count_once(tmp_path: Path) -> None:
    metadata = sharded()
    for entry in metadata.state_dict_metadata.values():
        if isinstance(entry, TensorStorageMetadata):
            entry.chunks.extend(list(entry.chunks))
    check_sharded(read(tmp_path, metadata))


def test_a_checkpoint_of_objects_alone_is_read(tmp_path: Path) -> None:
    place = _StorageInfo("__0_0.distcp", 0, 1261)
    found = read(
        tmp_path,
        Metadata({"epoch": BytesStorageMetadata()}, {"epoch": ("epoch",)}, {MetadataIndex("epoch"): place}),
    )
    assert found.keys == ()
    assert [one.key for one in found.objects] == ["epoch"]


def test_a_path_that_does_not_spell_its_key_is_damage(tmp_path: Path) -> None:
    metadata = sharded()
    metadata.planner_data["model.layers.1.weight"] = ("modem", "layers.1.weight")
    with pytest.raises(SourceCorrupt, match=r"'model\.layers\.1\.weight'.*'modem\.layers\.1\.weight'"):
        read(tmp_path, metadata)


@pytest.mark.parametrize("trick", planted(Path("unused")))
@pytest.mark.parametrize("where", ["here", "in the child"])
def test_a_planted_payload_never_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trick: str, where: str) -> None:
    marker = tmp_path / "ran"
    if where == "in the child":
        monkeypatch.setattr(metadata_module, "SCANNED_BYTES", 0)
    with pytest.raises((UnsafeSource, SourceCorrupt)) as caught:
        read(tmp_path, planted(marker)[trick])
    assert not marker.exists()
    assert caught.value.file == ".metadata"


@pytest.mark.parametrize("where", ["here", "in the child"])
def test_a_payload_inside_real_metadata_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return eval, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    if where == "in the child":
        monkeypatch.setattr(metadata_module, "SCANNED_BYTES", 0)
    with pytest.raises(UnsafeSource, match=r"wants to import 'builtins\.eval'"):
        read(tmp_path, replace(sharded(), planner_data={"x": Payload()}))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("bomb", bombs())
def test_a_bomb_is_refused_in_the_child_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bomb: str) -> None:
    monkeypatch.setattr(metadata_module, "SCANNED_BYTES", 0)
    limits = ChildLimits(memory_bytes=512 << 20, cpu_seconds=1)
    monkeypatch.setattr(ChildLimits, "for_pickle", lambda nbytes: limits)
    with pytest.raises((UnsafeSource, SourceCorrupt)):
        read(tmp_path, bombs()[bomb])


def test_a_child_that_runs_out_of_memory_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata_module, "SCANNED_BYTES", 0)
    limits = ChildLimits(memory_bytes=64 << 20, cpu_seconds=20)
    monkeypatch.setattr(ChildLimits, "for_pickle", lambda nbytes: limits)
    with pytest.raises(UnsafeSource, match="more than 64 MiB of memory or 20 s"):
        read(tmp_path, sharded(ranks=20_000))


@pytest.mark.parametrize("where", ["here", "in the child"])
def test_truncated_metadata_is_corrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    cuts = 40
    if where == "in the child":
        monkeypatch.setattr(metadata_module, "SCANNED_BYTES", 0)
        cuts = 4
    data = pickle.dumps(sharded())
    for at in range(0, len(data), len(data) // cuts):
        with pytest.raises(SourceCorrupt):
            read(tmp_path, data[:at])
    with pytest.raises(SourceCorrupt):
        read(tmp_path, data + b"N.")


def tensor(metadata: Metadata, number: int = 1) -> Any:
    return metadata.state_dict_metadata[f"model.layers.{number}.weight"]


def _reach_out(metadata: Metadata) -> None:
    tensor(metadata).chunks[2] = ChunkStorageMetadata(torch.Size((4, 0)), torch.Size((5, 5)))


def _wrap_around(metadata: Metadata) -> None:
    chunk = tensor(metadata).chunks[2]
    chunk.offsets, chunk.sizes = (4, 0), ((1 << 63) - 1, 5)


def _negative(metadata: Metadata) -> None:
    tensor(metadata).chunks[2].sizes = (-2, 5)


def _beyond_64_bits(metadata: Metadata) -> None:
    tensor(metadata).chunks[2].sizes = (1 << 70, 5)


def _fraction(metadata: Metadata) -> None:
    tensor(metadata).chunks[2].sizes = (2.0, 5)


def _absurd_shape(metadata: Metadata) -> None:
    tensor(metadata).size = (1 << 40, 1 << 40)


def _negative_shape(metadata: Metadata) -> None:
    tensor(metadata).size = (-8, 5)


def _many_dims(metadata: Metadata) -> None:
    entry = tensor(metadata)
    entry.size = (1,) * 100
    entry.chunks = [ChunkStorageMetadata((0,) * 100, (1,) * 100)]


def _other_dims(metadata: Metadata) -> None:
    tensor(metadata).chunks[2].offsets = (4, 0, 0)


def _lose_a_place(metadata: Metadata) -> None:
    metadata.storage_data = {i: p for i, p in metadata.storage_data.items() if i.index != 2}


def _lose_a_chunk(metadata: Metadata) -> None:
    del tensor(metadata).chunks[2]


def _lose_an_object(metadata: Metadata) -> None:
    metadata.storage_data = {i: p for i, p in metadata.storage_data.items() if i.fqn != "step"}


def _unknown_key(metadata: Metadata) -> None:
    del metadata.state_dict_metadata["step"]


def _same_offset(metadata: Metadata) -> None:
    tensor(metadata).chunks[2] = ChunkStorageMetadata(torch.Size((2, 0)), torch.Size((1, 5)))


def _name_that_is_no_text(metadata: Metadata) -> None:
    metadata.state_dict_metadata[3] = BytesStorageMetadata()  # type: ignore[index]


def _name_that_is_no_utf8(metadata: Metadata) -> None:
    metadata.state_dict_metadata["a\udc80"] = BytesStorageMetadata()
    metadata.storage_data[MetadataIndex("a\udc80")] = _StorageInfo("__0_0.distcp", 0, 1)


def _path_that_is_no_text(metadata: Metadata) -> None:
    metadata.storage_data[MetadataIndex("step")].relative_path = 7


def _no_dict(metadata: Metadata) -> None:
    metadata.state_dict_metadata = []  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (_reach_out, CoverageError, "reaches out of its shape"),
        (_wrap_around, CoverageError, "reaches out of its shape"),
        (_negative, CoverageError, "reaches out of its shape"),
        (_beyond_64_bits, SourceCorrupt, "OverflowError"),
        (_fraction, SourceCorrupt, "TypeError"),
        (_absurd_shape, UnsafeSource, "impossible shape"),
        (_negative_shape, UnsafeSource, "impossible shape"),
        (_many_dims, UnsafeSource, "impossible shape"),
        (_other_dims, SourceCorrupt, "differ in number"),
        (_lose_a_place, CheckpointIncomplete, "but not where it is stored"),
        (_lose_a_chunk, SourceCorrupt, r"chunk at \[4, 0\] that it does not have"),
        (_lose_an_object, CheckpointIncomplete, "'step' but not where"),
        (_unknown_key, SourceCorrupt, "where 'step' is stored, but not what it is"),
        (_same_offset, CoverageError, "different sizes begin at the same offset"),
        (_name_that_is_no_text, SourceCorrupt, "not a string"),
        (_name_that_is_no_utf8, SourceCorrupt, "not valid UTF-8"),
        (_path_that_is_no_text, SourceCorrupt, "not a string"),
        (_no_dict, SourceCorrupt, "not dicts"),
    ],
)
def test_metadata_that_contradicts_itself_is_refused(
    tmp_path: Path, damage: Callable[[Metadata], None], error: type[ReshardError], words: str
) -> None:
    metadata = sharded()
    damage(metadata)
    with pytest.raises(error, match=words):
        read(tmp_path, metadata)


def test_a_pickle_of_something_else_is_no_metadata(tmp_path: Path) -> None:
    with pytest.raises(SourceCorrupt, match="holds no Metadata"):
        read(tmp_path, pickle.dumps({"a": 1}))


def _written_by(rank: int, metadata: Metadata) -> Metadata:
    """What ``use_collectives=False`` leaves in ``__{rank}.metadata``: the rank's own chunks, replicas included."""
    mine = {i: place for i, place in metadata.storage_data.items() if place.relative_path == f"__{rank}_0.distcp"}
    entries: dict[str, Any] = {}
    for index in mine:
        whole: Any = metadata.state_dict_metadata[index.fqn]
        if isinstance(whole, BytesStorageMetadata):
            entries[index.fqn] = whole
            continue
        chunks = [chunk for chunk in whole.chunks if chunk.offsets == index.offset]
        entries[index.fqn] = TensorStorageMetadata(whole.properties, whole.size, chunks)
    paths = {key: path for key, path in metadata.planner_data.items() if key in entries}
    return Metadata(entries, paths, mine, metadata.storage_meta, "1.0.0")


def read_ranks(folder: Path, ranks: list[Metadata]) -> DcpMetadata:
    for rank, metadata in enumerate(ranks):
        (folder / f"__{rank}.metadata").write_bytes(pickle.dumps(metadata))
    storage = LocalStorage(folder)
    return join_metadata([read_metadata_file(storage, f"__{rank}.metadata") for rank in range(len(ranks))])


def test_per_rank_files_are_read_as_one(tmp_path: Path) -> None:
    whole = sharded()
    check_sharded(read_ranks(tmp_path, [_written_by(rank, whole) for rank in range(4)]))


def test_replicas_of_several_ranks_count_once_from_the_lowest(tmp_path: Path) -> None:
    parts = []
    for rank in range(3):
        metadata = sharded(tensors=2, ranks=1)
        for place in metadata.storage_data.values():
            place.relative_path = f"__{rank}_0.distcp"
        parts.append(metadata)
    found = read_ranks(tmp_path, parts)
    check_sharded(found, tensors=2, ranks=1)
    assert found.files == ("__0_0.distcp",)


def test_ranks_that_disagree_about_a_tensor_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceCorrupt, match=r"bfloat16\[2, 5\] in '__0.metadata' and bfloat16\[2, 6\]"):
        read_ranks(tmp_path, [sharded(ranks=1), sharded(ranks=1, columns=6)])


@settings(max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_any_mutation_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    mutated = bytearray(pickle.dumps(sharded(tensors=2, ranks=2), data.draw(st.sampled_from([2, 4]))))
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.integers(0, len(mutated) - 1))
        match data.draw(st.sampled_from(["set", "delete", "insert"])):
            case "set":
                mutated[at] = data.draw(st.integers(0, 255))
            case "delete":
                del mutated[at : at + data.draw(st.integers(1, 8))]
            case _:
                mutated[at:at] = data.draw(st.binary(min_size=1, max_size=8))
        if not mutated:
            break
    try:
        read(tmp_path, bytes(mutated))
    except ReshardError as error:
        assert error.exit_code == 3  # noqa: PT017 - an error is allowed, not expected


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_any_mutation_is_read_or_refused_in_the_child(tmp_path: Path, data: st.DataObject) -> None:
    mutated = bytearray(pickle.dumps(sharded(ranks=1500)))
    for _ in range(data.draw(st.integers(1, 5))):
        mutated[data.draw(st.integers(0, len(mutated) - 1))] = data.draw(st.integers(0, 255))
    try:
        read(tmp_path, bytes(mutated))
    except ReshardError as error:
        assert error.exit_code == 3  # noqa: PT017 - an error is allowed, not expected
