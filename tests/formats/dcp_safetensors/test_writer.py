"""Designed shard folders, loaded by torch's own HuggingFaceStorageReader into whole tensors and DTensors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import Replicate, Shard

from reshard_service.catalogue import Catalogue
from reshard_service.formats.dcp_safetensors.reader import open_dcp_safetensors
from reshard_service.formats.dcp_safetensors.writer import design_dcp_safetensors
from reshard_service.formats.options import OpenOptions, WriteOptions
from reshard_service.formats.safetensors.reader import open_safetensors
from reshard_service.layouts.layout import Layout
from reshard_service.layouts.shorthand import parse_layout
from reshard_service.storage.local import LocalStorage
from tests.formats.dcp_safetensors.saving import load, load_rank, save
from tests.formats.materialise import materialise, select, tensor_bytes

FULL = {
    "w": torch.arange(44, dtype=torch.float32).reshape(11, 4),
    "cols": torch.arange(30, dtype=torch.bfloat16).reshape(3, 10),
    "norm": torch.arange(5, dtype=torch.float64),
    "step": torch.tensor(3.0),
    "tiny": torch.arange(2, dtype=torch.uint8).reshape(2, 1),
    "flags": torch.tensor([True, False, True]),
    "empty": torch.zeros(0, 3),
    "packed": torch.arange(48, dtype=torch.int16).reshape(8, 6),
    "optimizer.state.w.exp_avg": torch.arange(44, dtype=torch.float32).reshape(11, 4) * 2,
    "optimizer.state.w.step": torch.tensor(9.0),
}


@pytest.fixture
def source(tmp_path: Path) -> Catalogue:
    (tmp_path / "source").mkdir()
    save_file(FULL, tmp_path / "source" / "model.safetensors")
    return open_safetensors(LocalStorage(tmp_path / "source"), OpenOptions())


def layout_with(axes: Sequence[tuple[str, int]], rules: Sequence[tuple[str, dict[str, str]]]) -> Layout:
    from reshard_service.documents.layout import layout_document
    from reshard_service.layouts.layout import layout_from_document

    return layout_from_document(
        layout_document(
            {
                "version": 1,
                "mesh": {"axes": [list(axis) for axis in axes]},
                "rules": [{"match": match, "placements": placements} for match, placements in rules],
            }
        )
    )


def converted(source: Catalogue, layout: Layout | None, folder: Path) -> Path:
    selection = select(source)
    materialise(design_dcp_safetensors(selection, layout, WriteOptions()), selection, folder)
    return folder


@pytest.mark.parametrize("spec", [None, "fsdp=4", "fsdp=3", "dp_replicate=2,fsdp=2", "fsdp=13"])
def test_torch_loads_whole_tensors_of_any_layout(source: Catalogue, tmp_path: Path, spec: str | None) -> None:
    layout = None if spec is None else parse_layout(spec)
    folder = converted(source, layout, tmp_path / "out")
    loaded = load(FULL, folder)
    assert all(torch.equal(loaded[name], FULL[name]) for name in FULL)
    again = open_dcp_safetensors(LocalStorage(folder), OpenOptions(world=1 if layout is None else layout.world))
    assert again.notices == ()
    for i, tensor in enumerate(again.tensors):
        truth = FULL[tensor.key].reshape(-1).view(torch.uint8).numpy()
        assert tensor_bytes(again, i).tobytes() == bytes(truth)


def test_torch_loads_into_dtensors_of_the_same_and_of_another_mesh(source: Catalogue, tmp_path: Path) -> None:
    layout = layout_with([("fsdp", 2), ("tp", 2)], [("cols", {"tp": "shard(1)"}), ("w", {"tp": "shard(0)"})])
    folder = converted(source, layout, tmp_path / "out")
    placements = {
        "w": (Shard(0),),
        "cols": (Shard(1),),
        "norm": (Replicate(),),
        "tiny": (Shard(0),),
        "optimizer.state.w.exp_avg": (Shard(0),),
    }
    for sizes, world in (((4,), 4), ((3,), 3)):
        for rank in range(world):
            loaded, wanted = load_rank(FULL, placements, sizes, rank, folder)
            assert all(torch.equal(loaded[name], wanted[name]) for name in wanted)


def test_a_file_looks_as_torchs_writer_would_make_it(source: Catalogue, tmp_path: Path) -> None:
    ours = converted(source, parse_layout("fsdp=2"), tmp_path / "ours")
    theirs = tmp_path / "theirs"
    save(FULL, {name: (Shard(0),) for name in FULL if FULL[name].dim()}, (2,), theirs)
    assert sorted(path.name for path in ours.iterdir()) == sorted(path.name for path in theirs.iterdir())
    for name in sorted(path.name for path in ours.iterdir()):
        with safe_open(ours / name, "pt") as a, safe_open(theirs / name, "pt") as b:
            assert a.metadata().keys() == b.metadata().keys()
            assert {**a.metadata(), "DCP_SHARDING_INFO": ""} == {**b.metadata(), "DCP_SHARDING_INFO": ""}
            infos = [json.loads(file.metadata()["DCP_SHARDING_INFO"]) for file in (a, b)]
            for key in infos[1]:
                if 0 in b.get_slice(key).get_shape() or not FULL[key].dim():
                    continue
                assert infos[0][key] == infos[1][key]
                assert torch.equal(a.get_tensor(key), b.get_tensor(key))


def test_two_chunks_of_one_tensor_on_a_rank_lie_in_two_files(source: Catalogue, tmp_path: Path) -> None:
    layout = layout_with([("tp", 2)], [("packed", {"tp": "strided(0,4)"})])
    folder = converted(source, layout, tmp_path / "out")
    names = {path.name for path in folder.iterdir()}
    assert names == {
        f"shard-{rank:05d}-model-{file:05d}-of-00004.safetensors" for rank in (1, 2) for file in (1, 2, 3, 4)
    }
    loaded = load(FULL, folder)
    assert all(torch.equal(loaded[name], FULL[name]) for name in FULL)


def test_a_rank_that_owns_nothing_still_has_a_file(source: Catalogue, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    selection = select(source, ["tiny"])
    materialise(design_dcp_safetensors(selection, parse_layout("fsdp=4"), WriteOptions()), selection, folder)
    assert len(list(folder.iterdir())) == 4
    assert torch.equal(load({"tiny": FULL["tiny"]}, folder)["tiny"], FULL["tiny"])


def test_types_that_torchs_reader_does_not_know_are_noticed(tmp_path: Path) -> None:
    from tests.formats.safetensors.headers import spell

    entry = {"dtype": "F8_E8M0", "shape": [8], "data_offsets": [0, 8]}
    (tmp_path / "model.safetensors").write_bytes(spell({"scale": entry}))
    selection = select(open_safetensors(LocalStorage(tmp_path), OpenOptions()))
    design = design_dcp_safetensors(selection, None, WriteOptions())
    assert [notice.code for notice in design.notices] == ["torch_cannot_read"]
