"""``.metadata`` written by us and loaded by torch."""

import pickle
import pickletools

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from reshard_service.catalogue import ByteObject, Identity, Path, Section, Tensor, build_chunks
from reshard_service.dtypes import all_dtypes, by_name
from reshard_service.errors import CannotHold
from reshard_service.formats.dcp.metadata_pickle import metadata_pickle
from reshard_service.formats.pickles.scan import scan
from reshard_service.formats.target import ObjectCopy

IDENTITY = Identity(Section.MODEL, "any")


def tensor(key: str, dtype: str, shape: tuple[int, ...], path: Path | None = None) -> Tensor:
    return Tensor(key, IDENTITY, by_name(dtype), shape, path or (key,))


def byte_object(key: str, path: Path, file: int, start: int, transforms: tuple[str, ...] = ()) -> ObjectCopy:
    return ObjectCopy(ByteObject(key, IDENTITY, path, 99, 98, 7, transforms), file, start)


BIG = 1 << 33
TENSORS = (
    tensor("model.layers.0.w", "BF16", (6, 4), ("model", "layers.0.w")),
    tensor("optim.state.w.step", "F32", (), ("optim", "state", "w", "step")),
    # Names that are also words or classes of the format itself, and numbers of every width.
    tensor("version", "BF16", (300,), ("Size", 0, "version", -3, 70000)),
    tensor("chünk", "F8_E4M3", (2, 1, 1, 1, BIG), ("chünk",)),
)
CHUNKS = build_chunks(
    4,
    [0, 0, 1, 2, 2, 3],
    [(0, 0), (3, 0), (), (0,), (290,), (0, 0, 0, 0, 0)],
    [(3, 4), (3, 4), (), (290,), (10,), (2, 1, 1, 1, BIG)],
    [0, 1, 1, 0, 1, 1],
    [0, 0, 5000, 70_000, 3 << 40, 9],
    [100, 200, 300, 400, 70_000, 2 * BIG],
)
FILES = ["__0_0.distcp", "version"]
OBJECTS = (
    byte_object("optim.param_groups.0.lr", ("optim", "param_groups", 0, "lr"), 1, 77),
    byte_object("packed", ("packed",), 0, 3 << 33, ("stream.zstd/1",)),
)


def as_torch_would(metadata: Metadata) -> Metadata:
    def properties(dtype: torch.dtype) -> TensorProperties:
        return TensorProperties(dtype=dtype)

    def chunk(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))

    metadata.state_dict_metadata = {
        "model.layers.0.w": TensorStorageMetadata(
            properties(torch.bfloat16), torch.Size((6, 4)), [chunk((0, 0), (3, 4)), chunk((3, 0), (3, 4))]
        ),
        "optim.state.w.step": TensorStorageMetadata(properties(torch.float32), torch.Size(()), [chunk((), ())]),
        "version": TensorStorageMetadata(
            properties(torch.bfloat16), torch.Size((300,)), [chunk((0,), (290,)), chunk((290,), (10,))]
        ),
        "chünk": TensorStorageMetadata(
            properties(torch.float8_e4m3fn), torch.Size((2, 1, 1, 1, BIG)), [chunk((0,) * 5, (2, 1, 1, 1, BIG))]
        ),
        "optim.param_groups.0.lr": BytesStorageMetadata(),
        "packed": BytesStorageMetadata(),
    }
    metadata.planner_data = {
        "model.layers.0.w": ("model", "layers.0.w"),
        "optim.state.w.step": ("optim", "state", "w", "step"),
        "version": ("Size", 0, "version", -3, 70000),
        "chünk": ("chünk",),
        "optim.param_groups.0.lr": ("optim", "param_groups", 0, "lr"),
        "packed": ("packed",),
    }
    metadata.storage_data = {
        MetadataIndex("optim.param_groups.0.lr"): _StorageInfo("version", 77, 7),
        MetadataIndex("packed"): _StorageInfo("__0_0.distcp", 3 << 33, 7, ["stream.zstd/1"]),
        MetadataIndex("optim.state.w.step", (), 0): _StorageInfo("version", 5000, 300),
        MetadataIndex("version", (0,), 0): _StorageInfo("__0_0.distcp", 70_000, 400),
        MetadataIndex("version", (290,), 1): _StorageInfo("version", 3 << 40, 70_000),
        MetadataIndex("model.layers.0.w", (0, 0), 0): _StorageInfo("__0_0.distcp", 0, 100),
        MetadataIndex("model.layers.0.w", (3, 0), 1): _StorageInfo("version", 0, 200),
        MetadataIndex("chünk", (0,) * 5, 0): _StorageInfo("version", 9, 2 * BIG),
    }
    return metadata


def test_torch_loads_the_very_objects_it_would_have_written() -> None:
    loaded = pickle.loads(metadata_pickle(TENSORS, CHUNKS, FILES, OBJECTS))
    expected = as_torch_would(Metadata({}, version="1.0.0"))
    assert loaded == expected
    # Equality of dataclasses passes over the index hint and over the classes of plain containers.
    hints = {(index.fqn, index.offset): index.index for index in loaded.storage_data}
    assert hints == {(index.fqn, index.offset): index.index for index in expected.storage_data}
    assert all(isinstance(index.offset, torch.Size) for index in loaded.storage_data if index.offset is not None)
    for mine, theirs in zip(loaded.state_dict_metadata.values(), expected.state_dict_metadata.values(), strict=True):
        if isinstance(theirs, TensorStorageMetadata):
            assert isinstance(mine.size, torch.Size)
            assert mine.properties.__getstate__() == theirs.properties.__getstate__()


def test_torch_can_pickle_again_what_it_loaded() -> None:
    loaded = pickle.loads(metadata_pickle(TENSORS, CHUNKS, FILES, OBJECTS))
    assert pickle.loads(pickle.dumps(loaded)) == loaded


@pytest.mark.parametrize("dtype", [dtype for dtype in all_dtypes() if dtype.torch is not None], ids=str)
def test_every_type_of_torch_is_named(dtype: object) -> None:
    chunks = build_chunks(1, [0], [(0,)], [(2,)], [0], [0], [1])
    loaded = pickle.loads(metadata_pickle([tensor("a", str(dtype), (2,))], chunks, ["f"]))
    name = by_name(str(dtype)).torch
    assert loaded.state_dict_metadata["a"].properties.dtype is getattr(torch, name or "")


def test_a_type_that_torch_does_not_have_is_refused_by_name() -> None:
    chunks = build_chunks(1, [0], [(0,)], [(2,)], [0], [0], [1])
    with pytest.raises(CannotHold, match="F6_E2M3"):
        metadata_pickle([tensor("a", "F6_E2M3", (2,))], chunks, ["f"])


def test_an_empty_checkpoint_is_written_too() -> None:
    loaded = pickle.loads(metadata_pickle([], build_chunks(0, [], [], [], [], [], []), []))
    assert (loaded.state_dict_metadata, loaded.planner_data, loaded.storage_data) == ({}, {}, {})


def test_the_pickle_is_plain_enough_for_our_own_scan_and_for_old_protocols() -> None:
    data = metadata_pickle(TENSORS, CHUNKS, FILES, OBJECTS)
    assert scan(data, file=".metadata") > 100
    assert max(opcode.proto for opcode, _, _ in pickletools.genops(data)) == 2


def test_thousands_of_tensors_keep_their_names_apart() -> None:
    count = 2000
    tensors = [tensor(f"layers.{i}", "F32", (i,) * (i % 3), ("m", f"layers.{i}")) for i in range(count)]
    shapes = [one.shape for one in tensors]
    chunks = build_chunks(
        count, range(count), [(0,) * len(shape) for shape in shapes], shapes, [i % 7 for i in range(count)],
        range(count), np.arange(count) * 3,
    )  # fmt: skip
    loaded = pickle.loads(metadata_pickle(tensors, chunks, [f"__{i}_0.distcp" for i in range(7)]))
    for i, one in enumerate(tensors):
        assert loaded.state_dict_metadata[one.key].chunks[0].sizes == torch.Size(one.shape)
        info = loaded.storage_data[MetadataIndex(one.key, (0,) * len(one.shape))]
        assert (info.relative_path, info.offset, info.length) == (f"__{i % 7}_0.distcp", i, 3 * i)
        assert loaded.planner_data[one.key] == one.path
