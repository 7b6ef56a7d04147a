"""Wrong chunk geometry as torch 2.13 really writes it: 7 rows over 3 data-parallel times 2 tensor-parallel ranks."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from reshard_service.catalogue import Catalogue
from reshard_service.errors import CheckpointIncomplete, GeometryWrong, UsageError
from reshard_service.formats.dcp.item import ItemReader
from reshard_service.formats.dcp.reader import open_dcp
from reshard_service.formats.options import OpenOptions
from reshard_service.layouts.layout import Layout
from reshard_service.layouts.shorthand import parse_layout
from reshard_service.storage.local import LocalStorage
from tests.oracles.gang import Task, run_gangs
from tests.oracles.sharing import once

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

DOCUMENT = """
version: 1
mesh: {axes: [[fsdp, 3], [tp, 2]]}
rules:
  - match: "wide.*"
    placements: {tp: shard(0)}
"""


def _save(root: Path) -> None:
    arguments = {"folder": str(root / "saved"), "rows": 7, "columns": 100, "dp": 3, "tp": 2}
    run_gangs([Task("uneven", 6, "uneven:save_uneven", arguments)])["uneven"].result()


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory, worker: str) -> Path:
    return once(tmp_path_factory, worker, "uneven", _save) / "saved"


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    document = tmp_path / "layout.yaml"
    document.write_text(DOCUMENT, encoding="utf-8")
    return parse_layout(str(document))


def tensor_of(catalogue: Catalogue, key: str) -> torch.Tensor:
    """A float32 tensor put together from the items' payloads."""
    index = next(i for i, tensor in enumerate(catalogue.tensors) if tensor.key == key)
    tensor, chunks = catalogue.tensors[index], catalogue.chunks
    whole = np.full(tensor.shape, np.nan, dtype=np.float32)
    for row in range(*chunks.rows(index).indices(len(chunks))):
        dims = len(tensor.shape)
        offsets, sizes = chunks.offsets[row, :dims].tolist(), tuple(chunks.sizes[row, :dims].tolist())
        file, start, length = catalogue.files[chunks.file[row]].path, int(chunks.start[row]), int(chunks.length[row])
        item = catalogue.storage.read_bytes(file, start, length)
        payload = ItemReader().locate(
            memoryview(item), tensor.dtype, sizes, item_bytes=length, key=tensor.key, file=file
        )
        values = np.frombuffer(item, np.float32, int(np.prod(sizes)), payload.start).reshape(sizes)
        whole[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))] = values
    return torch.from_numpy(whole)


@pytest.mark.distributed
def test_torch_itself_can_not_load_what_it_saved(uneven: Path) -> None:
    """Should this begin to fail, torch has mended its geometry: keep the fixture for checkpoints already written."""
    state = {"model": {"wide.weight": torch.empty(7, 100)}}
    with pytest.raises(CheckpointException, match="mismatch sizes"):
        dcp.load(state, checkpoint_id=uneven, no_dist=True)


@pytest.mark.distributed
def test_wrong_geometry_is_refused_naming_tensor_and_file(uneven: Path) -> None:
    with pytest.raises(GeometryWrong, match=r"'model\.wide\.weight' in '__[45]_0\.distcp'.*--repair") as caught:
        open_dcp(LocalStorage(uneven), OpenOptions())
    assert caught.value.tensor == "model.wide.weight"
    assert caught.value.file in ("__4_0.distcp", "__5_0.distcp")


@pytest.mark.distributed
def test_repair_needs_the_layout(uneven: Path) -> None:
    with pytest.raises(UsageError, match="--source-layout"):
        open_dcp(LocalStorage(uneven), OpenOptions(repair=True))


@pytest.mark.distributed
def test_repair_recovers_every_bit_from_the_layout(uneven: Path, layout: Layout) -> None:
    catalogue = open_dcp(LocalStorage(uneven), OpenOptions(repair=True, layout=layout))
    truth = torch.load(uneven / "truth.pt", weights_only=True)
    assert {tensor.identity.fqn for tensor in catalogue.tensors} == set(truth)
    for tensor in catalogue.tensors:
        assert torch.equal(tensor_of(catalogue, tensor.key), truth[tensor.identity.fqn]), tensor.key
    repaired = {notice.name for notice in catalogue.notices if notice.code == "geometry_repaired"}
    assert repaired == {"model.wide.weight", "model.wide.bias"}


@pytest.mark.distributed
@pytest.mark.parametrize("spec", ["fsdp=6", "fsdp=3", "fsdp=8"])
def test_repair_with_another_layout_is_refused(uneven: Path, spec: str) -> None:
    with pytest.raises(GeometryWrong, match=r"does not explain|is expected at"):
        open_dcp(LocalStorage(uneven), OpenOptions(repair=True, layout=parse_layout(spec)))


@pytest.mark.distributed
def test_repair_notices_a_part_that_was_never_stored(uneven: Path, layout: Layout, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(uneven, folder)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    lost = next(i for i in metadata.storage_data if i.fqn == "model.wide.weight" and tuple(i.offset) == (7, 0))
    del metadata.storage_data[lost]
    chunks = metadata.state_dict_metadata["model.wide.weight"].chunks
    chunks[:] = [chunk for chunk in chunks if tuple(chunk.offsets) != (7, 0)]
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(GeometryWrong, match="1 of the 5 parts"):
        open_dcp(LocalStorage(folder), OpenOptions(repair=True, layout=layout))


@pytest.mark.distributed
def test_a_missing_rank_file_is_named(uneven: Path, layout: Layout, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(uneven, folder)
    (folder / "__3_0.distcp").unlink()
    with pytest.raises(CheckpointIncomplete, match=r"__3_0\.distcp"):
        open_dcp(LocalStorage(folder), OpenOptions(repair=True, layout=layout))


@pytest.mark.distributed
def test_a_sound_tensor_is_left_alone_whatever_layout_is_given(uneven: Path, tmp_path: Path) -> None:
    """With tp as the slow axis, ranks 1 and 2 would swap rows of equal number: a repair must not touch them."""
    document = tmp_path / "swapped.yaml"
    document.write_text(DOCUMENT.replace("[[fsdp, 3], [tp, 2]]", "[[tp, 2], [fsdp, 3]]"), encoding="utf-8")
    folder = tmp_path / "copy"
    shutil.copytree(uneven, folder)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for key in [key for key in metadata.state_dict_metadata if "wide" in key]:
        del metadata.state_dict_metadata[key]
    metadata.storage_data = {i: place for i, place in metadata.storage_data.items() if "wide" not in i.fqn}
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    catalogue = open_dcp(LocalStorage(folder), OpenOptions(repair=True, layout=parse_layout(str(document))))
    truth = torch.load(uneven / "truth.pt", weights_only=True)
    assert torch.equal(tensor_of(catalogue, "model.plain.weight"), truth["plain.weight"])


def test_repair_leaves_a_sound_checkpoint_alone(tmp_path: Path) -> None:
    dcp.save({"model": {"weight": torch.arange(12.0).reshape(4, 3)}}, checkpoint_id=tmp_path / "ck", no_dist=True)
    plain = open_dcp(LocalStorage(tmp_path / "ck"), OpenOptions())
    mended = open_dcp(LocalStorage(tmp_path / "ck"), OpenOptions(repair=True, layout=parse_layout("fsdp=1")))
    assert np.array_equal(plain.chunks.sizes, mended.chunks.sizes)
    assert not mended.notices
