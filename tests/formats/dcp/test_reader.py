"""Opening DCP folders that torch wrote, and folders that something happened to."""

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._extension import ZStandard
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from reshard_service.catalogue import Catalogue, Identity, Section, Storing
from reshard_service.errors import (
    AmbiguousSource,
    CheckpointIncomplete,
    NotACheckpoint,
    SourceCorrupt,
    UnsafeSource,
    UnsupportedSource,
)
from reshard_service.formats.dcp.item import ItemReader
from reshard_service.formats.dcp.reader import open_dcp
from reshard_service.formats.options import OpenOptions
from reshard_service.storage.local import LocalStorage

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

STATE: dict[str, Any] = {
    "model": {
        "embed.weight": torch.arange(40.0).reshape(10, 4),
        "norm.weight": torch.arange(4, dtype=torch.bfloat16),
        "mask": torch.tensor([True, False]),
        "scale": torch.ones(3).to(torch.float8_e4m3fn),
        "count": torch.tensor(7),
        "empty": torch.empty(0, 4),
    },
    "optim": {
        "state": {"embed.weight": {"step": torch.tensor(3.0), "exp_avg": torch.ones(10, 4)}},
        "param_groups": [{"lr": 0.5, "params": ["embed.weight"]}],
    },
    "epoch": 11,
}


def save(folder: Path, state: dict[str, Any] | None = None, **options: Any) -> Path:
    planner = options.pop("planner", None)
    dcp.save(
        STATE if state is None else state,
        storage_writer=FileSystemWriter(folder, **options),
        planner=planner,
        no_dist=True,
    )
    return folder


def opened(folder: Path, **options: Any) -> Catalogue:
    return open_dcp(LocalStorage(folder), OpenOptions(**options))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(tmp_path / "saved")


def edit(folder: Path, change: Any) -> None:
    """Applies ``change`` to the unpickled metadata and writes it back."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_tensors_and_objects_are_listed_with_identity_and_path(saved: Path) -> None:
    catalogue = opened(saved)
    assert catalogue.format == "dcp"
    assert catalogue.producer == "torch"
    assert catalogue.world == 1
    assert not catalogue.notices
    found = {tensor.key: tensor for tensor in catalogue.tensors}
    expected = {f"model.{name}": value for name, value in STATE["model"].items()}
    assert {key: found[key].shape for key in expected} == {key: tuple(value.shape) for key, value in expected.items()}
    assert {found[key].dtype.torch for key in expected} == {str(v.dtype).split(".")[1] for v in expected.values()}
    assert found["optim.state.embed.weight.step"].identity == Identity(Section.OPTIMIZER, "embed.weight", "step")
    assert found["optim.state.embed.weight.step"].path == ("optim", "state", "embed.weight", "step")
    objects = {item.key: item for item in catalogue.objects}
    assert set(objects) == {"epoch", "optim.param_groups.0.lr", "optim.param_groups.0.params"}
    assert objects["epoch"].identity.section is Section.EXTRA
    assert objects["optim.param_groups.0.lr"].path == ("optim", "param_groups", 0, "lr")


def test_every_item_is_where_the_catalogue_says(saved: Path) -> None:
    catalogue = opened(saved)
    chunks = catalogue.chunks
    assert (chunks.storing == Storing.TORCH_ITEM).all()
    assert len(chunks) == len(catalogue.tensors)
    flat = {f"model.{name}": value for name, value in STATE["model"].items()}
    for index, tensor in enumerate(catalogue.tensors):
        (row,) = range(*chunks.rows(index).indices(len(chunks)))
        path, start, length = catalogue.files[chunks.file[row]].path, int(chunks.start[row]), int(chunks.length[row])
        item = catalogue.storage.read_bytes(path, start, length)
        sizes = tuple(chunks.sizes[row, : len(tensor.shape)].tolist())
        place = ItemReader().locate(memoryview(item), tensor.dtype, sizes, item_bytes=length, key=tensor.key, file=path)
        if tensor.key in flat:
            raw = flat[tensor.key].contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            assert item[place.start : place.start + tensor.nbytes] == raw
    for one in catalogue.objects:
        data = catalogue.storage.read_bytes(catalogue.files[one.file].path, one.start, one.length)
        assert data.startswith(b"PK")


def test_a_file_per_item_is_read_as_well(tmp_path: Path) -> None:
    catalogue = opened(save(tmp_path / "ck", single_file_per_rank=False))
    assert len(catalogue.files) == len(catalogue.tensors) + len(catalogue.objects)


def test_zstd_streams_are_named_as_such(tmp_path: Path) -> None:
    catalogue = opened(save(tmp_path / "ck", _extensions=[ZStandard()]))
    assert (catalogue.chunks.storing == Storing.ZSTD_ITEM).all()
    assert {item.transforms for item in catalogue.objects} == {("stream.zstd/1",)}


def test_an_unknown_stream_extension_is_refused_by_name(saved: Path) -> None:
    def encrypt(metadata: Any) -> None:
        for index, place in metadata.storage_data.items():
            if index.fqn == "model.mask":
                place.transform_descriptors = ["stream.rot13/1"]

    edit(saved, encrypt)
    with pytest.raises(
        UnsupportedSource, match=r"'model\.mask' is stored through the stream extension stream\.rot13/1"
    ):
        opened(saved)


@pytest.mark.parametrize("flat", [True, False])
def test_keys_without_paths_raise_the_question(tmp_path: Path, flat: bool) -> None:
    folder = save(tmp_path / "ck", STATE["model"], planner=DefaultSavePlanner(flatten_state_dict=flat))
    if flat:
        assert opened(folder).tensors[0].identity.section is Section.MODEL
        return
    with pytest.raises(AmbiguousSource, match=r"--key-prefix P .* --producer"):
        opened(folder)
    bare = opened(folder, key_prefix="")
    assert {tensor.identity for tensor in bare.tensors} == {Identity(Section.MODEL, name) for name in STATE["model"]}
    assert opened(folder, producer="torchtitan").tensors[0].identity.section is Section.MODEL
    nested = opened(folder, key_prefix="embed")
    assert nested.tensors[0].identity == Identity(Section.MODEL, "weight")


def test_megatron_is_recognised_by_its_own_file(tmp_path: Path) -> None:
    state = {"decoder.w": torch.ones(2), "optimizer.state.exp_avg.decoder.w": torch.ones(2)}
    folder = save(tmp_path / "ck", state, planner=DefaultSavePlanner(flatten_state_dict=False))
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    catalogue = opened(folder)
    assert catalogue.producer == "megatron"
    assert catalogue.tensors[1].identity == Identity(Section.OPTIMIZER, "decoder.w", "exp_avg")


def test_a_dtype_that_is_more_than_its_bytes_is_refused_by_tensor(saved: Path) -> None:
    def quantise(metadata: Any) -> None:
        metadata.state_dict_metadata["model.mask"].properties.dtype = torch.quint8

    edit(saved, quantise)
    with pytest.raises(UnsupportedSource, match="quint8") as caught:
        opened(saved)
    assert caught.value.tensor == "model.mask"


@pytest.mark.parametrize("name", ["../other.distcp", "/etc/passwd", "a/../../b", "./x", "", "a\\b", "C:evil", "a\nb"])
def test_a_path_out_of_the_folder_is_refused(saved: Path, name: str) -> None:
    def lead_out(metadata: Any) -> None:
        next(iter(metadata.storage_data.values())).relative_path = name

    edit(saved, lead_out)
    with pytest.raises(UnsafeSource, match=r"\.metadata names the file"):
        opened(saved)


def test_a_link_out_of_the_folder_is_refused(saved: Path) -> None:
    shutil.move(saved / "__0_0.distcp", saved.parent / "elsewhere")
    os.symlink(saved.parent / "elsewhere", saved / "__0_0.distcp")
    with pytest.raises(UnsafeSource, match="leads out of"):
        opened(saved)


def test_a_truncated_data_file_is_noticed_without_reading_it(saved: Path) -> None:
    size = (saved / "__0_0.distcp").stat().st_size
    os.truncate(saved / "__0_0.distcp", size - 1)
    with pytest.raises(SourceCorrupt, match=rf"of '__0_0\.distcp', which has {size - 1}"):
        opened(saved)


@pytest.mark.parametrize(("offset", "length"), [(-1, 10), (0, -1), (0, 0), ((1 << 63) - 1, 10), (10, (1 << 63) - 1)])
def test_an_item_outside_its_file_is_refused(saved: Path, offset: int, length: int) -> None:
    def move(metadata: Any) -> None:
        place = next(place for index, place in metadata.storage_data.items() if index.fqn == "model.mask")
        place.offset, place.length = offset, length

    edit(saved, move)
    with pytest.raises(SourceCorrupt, match=r"'model\.mask' is said to lie"):
        opened(saved)


def test_two_items_on_the_same_bytes_are_refused(saved: Path) -> None:
    def overlap(metadata: Any) -> None:
        places = {index.fqn: place for index, place in metadata.storage_data.items()}
        places["model.mask"].offset = places["model.count"].offset + 1

    edit(saved, overlap)
    with pytest.raises(SourceCorrupt, match=r"on the same bytes of '__0_0\.distcp'"):
        opened(saved)


def test_missing_data_files_are_counted_and_named(saved: Path) -> None:
    (saved / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointIncomplete, match=r"1 data files, of which 1 are not there, such as '__0_0\.distcp'"):
        opened(saved)


def test_a_save_that_has_not_finished_is_told_from_something_else(saved: Path, tmp_path: Path) -> None:
    (saved / ".metadata").rename(saved / ".metadata.tmp")
    with pytest.raises(CheckpointIncomplete, match="written last"):
        opened(saved)
    (saved / ".metadata.tmp").unlink()
    with pytest.raises(CheckpointIncomplete, match="written last"):
        opened(saved)
    with pytest.raises(NotACheckpoint):
        opened(tmp_path)


def test_files_of_another_save_are_noticed(saved: Path) -> None:
    (saved / "__7_0.distcp").write_bytes(b"stale")
    (notice,) = opened(saved).notices
    assert (notice.code, notice.name) == ("files_ignored", "__7_0.distcp")


def test_the_digest_tells_metadata_apart_and_files_have_identities(saved: Path) -> None:
    before = opened(saved)
    assert before.metadata_bytes == (saved / ".metadata").stat().st_size
    edit(saved, lambda metadata: setattr(metadata.storage_meta, "save_id", "another"))
    assert opened(saved).metadata_digest != before.metadata_digest
    os.utime(saved / "__0_0.distcp", ns=(1, 1))
    assert opened(saved).files[0].identity != before.files[0].identity


def test_an_empty_tensor_keeps_one_row_and_empty_shards_none(saved: Path) -> None:
    def add_empty_shard(metadata: Any) -> None:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

        entry = metadata.state_dict_metadata["model.embed.weight"]
        entry.chunks.append(ChunkStorageMetadata(torch.Size((10, 0)), torch.Size((0, 4))))
        places = {index.fqn: place for index, place in metadata.storage_data.items()}
        del metadata.state_dict_metadata["model.count"]
        metadata.storage_data = {i: p for i, p in metadata.storage_data.items() if i.fqn != "model.count"}
        metadata.storage_data[MetadataIndex("model.embed.weight", (10, 0))] = places["model.count"]

    edit(saved, add_empty_shard)
    catalogue = opened(saved)
    counts = dict(zip((t.key for t in catalogue.tensors), np.diff(catalogue.chunks.first).tolist(), strict=True))
    assert counts["model.embed.weight"] == 1
    assert counts["model.empty"] == 1


def _per_rank(folder: Path, ranks: int) -> None:
    """Turns a folder into that of ``ranks`` ranks which each saved everything without collectives."""
    metadata = (folder / ".metadata").read_bytes()
    for rank in range(ranks):
        shutil.copy(folder / "__0_0.distcp", folder / f"__{rank}_0.distcp") if rank else None
        own = pickle.loads(metadata)
        for place in own.storage_data.values():
            place.relative_path = f"__{rank}_0.distcp"
        (folder / f"__{rank}.metadata").write_bytes(pickle.dumps(own))
    (folder / ".metadata").unlink()


def test_per_rank_metadata_is_united_and_replicas_counted_once(saved: Path) -> None:
    whole = opened(saved)
    _per_rank(saved, 3)
    catalogue = opened(saved)
    assert catalogue.world == 3
    assert [tensor.key for tensor in catalogue.tensors] == [tensor.key for tensor in whole.tensors]
    assert len(catalogue.chunks) == len(whole.chunks)
    assert {entry.path for entry in catalogue.files} == {"__0_0.distcp"}


def test_a_gap_in_the_ranks_is_refused(saved: Path) -> None:
    _per_rank(saved, 3)
    (saved / "__1.metadata").unlink()
    with pytest.raises(CheckpointIncomplete, match=r"2 of 3 ranks; missing: __1\.metadata"):
        opened(saved)


def test_a_missing_last_rank_is_refused_if_the_world_is_said(saved: Path) -> None:
    _per_rank(saved, 3)
    with pytest.raises(CheckpointIncomplete, match=r"3 of 4 ranks; missing: __3\.metadata"):
        opened(saved, world=4)


def test_a_rank_that_never_was_is_no_reason_to_count_to_it(saved: Path) -> None:
    _per_rank(saved, 1)
    (saved / "__0.metadata").rename(saved / "__99999999999999999999.metadata")
    with pytest.raises(CheckpointIncomplete):
        opened(saved)
