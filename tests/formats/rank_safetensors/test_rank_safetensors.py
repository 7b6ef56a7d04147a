"""Rank-local files: what each rank holds in memory, out and back in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from reshard_service.catalogue import Catalogue
from reshard_service.errors import (
    AmbiguousSource,
    CheckpointIncomplete,
    GeometryWrong,
    LayoutInvalid,
    NotACheckpoint,
    ReshardError,
    SourceCorrupt,
    UsageError,
)
from reshard_service.formats.options import OpenOptions, WriteOptions
from reshard_service.formats.rank_safetensors.layout_file import LAYOUT_NAME, parse_layout_file
from reshard_service.formats.rank_safetensors.reader import open_rank_safetensors
from reshard_service.formats.rank_safetensors.writer import design_rank_safetensors
from reshard_service.formats.safetensors.reader import open_safetensors
from reshard_service.layouts.layout import Layout
from reshard_service.layouts.shorthand import parse_layout
from reshard_service.storage.local import LocalStorage
from tests.formats.dcp_safetensors.test_writer import layout_with
from tests.formats.materialise import materialise, select, tensor_bytes

FULL = {
    "experts.gate_up_proj": torch.arange(2 * 8 * 3, dtype=torch.float32).reshape(2, 8, 3),
    "q.weight": torch.arange(44, dtype=torch.bfloat16).reshape(11, 4),
    "o.weight": torch.arange(30, dtype=torch.float16).reshape(3, 10),
    "norm.weight": torch.arange(5, dtype=torch.float64),
    "scale": torch.tensor(3.0),
    "flags": torch.tensor([True, False, True]),
    "none": torch.zeros(0, 3),
    "optimizer.state.q.weight.exp_avg": torch.arange(44, dtype=torch.float32).reshape(11, 4) * 2,
    "optimizer.state.q.weight.row": torch.arange(11, dtype=torch.float32),
    "optimizer.state.q.weight.step": torch.tensor(9.0),
}
RULES = [
    ("**.gate_up_proj", {"tp": "strided(1,2)"}),
    ("q.weight", {"tp": "shard(0)"}),
    ("o.weight", {"tp": "shard(1)"}),
]


@pytest.fixture
def source(tmp_path: Path) -> Catalogue:
    (tmp_path / "source").mkdir()
    save_file(FULL, tmp_path / "source" / "model.safetensors")
    return open_safetensors(LocalStorage(tmp_path / "source"), OpenOptions())


def tp2() -> Layout:
    return layout_with([("tp", 2)], RULES)


def converted(
    source: Catalogue, layout: Layout, folder: Path, names: Sequence[str] | None = None, **options: int
) -> Path:
    selection = select(source, names)
    materialise(design_rank_safetensors(selection, layout, WriteOptions(**options)), selection, folder)  # type: ignore[arg-type]
    return folder


def opened(path: Path, **options: object) -> Catalogue:
    return open_rank_safetensors(LocalStorage(path), OpenOptions(**options))  # type: ignore[arg-type]


def assert_holds_the_truth(catalogue: Catalogue, names: Sequence[str] = tuple(FULL)) -> None:
    assert {tensor.key for tensor in catalogue.tensors} == set(names)
    for i, tensor in enumerate(catalogue.tensors):
        truth = FULL[tensor.key]
        assert tensor.shape == tuple(truth.shape)
        assert tensor_bytes(catalogue, i).tobytes() == bytes(truth.reshape(-1).view(torch.uint8).numpy())


def test_each_rank_gets_what_it_holds_in_memory(source: Catalogue, tmp_path: Path) -> None:
    folder = converted(source, tp2(), tmp_path / "out")
    assert sorted(path.name for path in folder.glob("*.safetensors")) == [
        "model-rank-0-part-0.safetensors",
        "model-rank-1-part-0.safetensors",
    ]
    for rank in range(2):
        held = load_file(folder / f"model-rank-{rank}-part-0.safetensors")
        gate, up = FULL["experts.gate_up_proj"].chunk(2, dim=1)
        packed = torch.cat([gate.chunk(2, dim=1)[rank], up.chunk(2, dim=1)[rank]], dim=1)
        assert torch.equal(held["experts.gate_up_proj"], packed)
        assert torch.equal(held["q.weight"], FULL["q.weight"].chunk(2)[rank])
        assert torch.equal(held["o.weight"], FULL["o.weight"].chunk(2, dim=1)[rank])
        assert torch.equal(
            held["optimizer.state.q.weight.exp_avg"], FULL["optimizer.state.q.weight.exp_avg"].chunk(2)[rank]
        )
        for name in ("norm.weight", "scale", "flags", "none", "optimizer.state.q.weight.row"):
            assert torch.equal(held[name], FULL[name])


def test_what_was_written_is_read_back_bit_for_bit(source: Catalogue, tmp_path: Path) -> None:
    for number, layout in enumerate((tp2(), parse_layout("fsdp=4"), parse_layout("dp_replicate=2,fsdp=3"))):
        folder = converted(source, layout, tmp_path / f"out{number}")
        catalogue = opened(folder)
        assert catalogue.format == "rank-safetensors"
        assert catalogue.world == layout.world
        assert_holds_the_truth(catalogue)
        assert_holds_the_truth(opened(folder, layout=layout))


def test_the_optimizer_alone_is_read_back(source: Catalogue, tmp_path: Path) -> None:
    names = [name for name in FULL if name.startswith("optimizer.")]
    folder = converted(source, parse_layout("fsdp=2"), tmp_path / "out", names)
    told = parse_layout_file((folder / LAYOUT_NAME).read_bytes())
    assert told.parameters == {"q.weight": (11, 4)}
    assert_holds_the_truth(opened(folder), names)


def test_parts_keep_to_the_limit(source: Catalogue, tmp_path: Path) -> None:
    folder = converted(source, tp2(), tmp_path / "out", max_shard_bytes=100)
    files = list(folder.glob("model-rank-1-part-*.safetensors"))
    assert len(files) > 2
    for path in files:
        held = load_file(path)
        assert sum(tensor.nbytes for tensor in held.values()) <= 100 or len(held) == 1
    assert_holds_the_truth(opened(folder))
    (folder / "model-rank-1-part-0.safetensors").unlink()
    with pytest.raises(CheckpointIncomplete, match="model-rank-1-part-0"):
        opened(folder)


def test_a_missing_rank_or_last_part_is_refused(source: Catalogue, tmp_path: Path) -> None:
    folder = converted(source, tp2(), tmp_path / "out", max_shard_bytes=100)
    last = sorted(folder.glob("model-rank-1-part-*.safetensors"))[-1]
    last.rename(tmp_path / "aside")
    with pytest.raises(CheckpointIncomplete, match="rank 1 has no local tensor"):
        opened(folder)
    for path in folder.glob("model-rank-1-*"):
        path.unlink()
    with pytest.raises(CheckpointIncomplete, match="model-rank-1-part-0"):
        opened(folder)


def test_a_rank_beyond_the_layout_is_refused(source: Catalogue, tmp_path: Path) -> None:
    folder = converted(source, tp2(), tmp_path / "out")
    (folder / "model-rank-2-part-0.safetensors").write_bytes((folder / "model-rank-1-part-0.safetensors").read_bytes())
    with pytest.raises(SourceCorrupt, match="rank 2"):
        opened(folder)


def test_without_a_layout_file_the_layout_must_be_said_and_shapes_follow_from_it(
    source: Catalogue, tmp_path: Path
) -> None:
    model = [name for name in FULL if not name.startswith("optimizer.")]
    folder = converted(source, tp2(), tmp_path / "out", model)
    (folder / LAYOUT_NAME).unlink()
    with pytest.raises(AmbiguousSource, match="--source-layout"):
        opened(folder)
    assert_holds_the_truth(opened(folder, layout=tp2()), model)
    with pytest.raises(CheckpointIncomplete, match="model-rank-2"):
        opened(folder, layout=parse_layout("fsdp=3"))


def test_a_wrong_layout_is_refused_by_tensor_name(source: Catalogue, tmp_path: Path) -> None:
    folder = converted(source, tp2(), tmp_path / "out")
    wrong = layout_with(
        [("tp", 2)], [*RULES[1:], ("**.gate_up_proj", {"tp": "shard(1)"}), ("norm.weight", {"tp": "shard(0)"})]
    )
    with pytest.raises(AmbiguousSource, match="--source-layout"):
        opened(folder, layout=wrong)
    document = json.loads((folder / LAYOUT_NAME).read_text())
    document["shapes"]["o.weight"] = [3, 12]
    (folder / LAYOUT_NAME).write_text(json.dumps(document))
    with pytest.raises(GeometryWrong, match=r"'o\.weight' has shape \[3, 5\] on rank 0"):
        opened(folder)
    (folder / LAYOUT_NAME).unlink()
    (folder / "model-rank-0-part-0.safetensors").unlink()
    save_file({"q.weight": torch.zeros(1, 4)}, folder / "model-rank-0-part-0.safetensors")
    save_file({"q.weight": torch.zeros(5, 4)}, folder / "model-rank-1-part-0.safetensors")
    with pytest.raises(LayoutInvalid, match=r"'q\.weight' has local shapes"):
        opened(folder, layout=tp2())


@pytest.mark.parametrize("name", ["q.weight", "extra"])
def test_tensors_and_the_layout_file_must_name_the_same(source: Catalogue, tmp_path: Path, name: str) -> None:
    folder = converted(source, tp2(), tmp_path / "out")
    document = json.loads((folder / LAYOUT_NAME).read_text())
    if name == "extra":
        document["shapes"][name] = [1]
    else:
        del document["shapes"][name]
    (folder / LAYOUT_NAME).write_text(json.dumps(document))
    with pytest.raises(CheckpointIncomplete, match=name):
        opened(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"world": 3},
        {"shapes": None},
        {"shapes": {"q.weight": [-1]}},
        {"shapes": {"q.weight": [1 << 70]}},
        {"shapes": {"q.weight": [1] * 100}},
        {"layout": None},
        {"layout": {"version": 1, "mesh": {"axes": [["tp", 0]]}}},
        {"bound": [["a"]]},
        {"other": 1},
    ],
)
def test_a_broken_layout_file_is_refused(source: Catalogue, tmp_path: Path, change: dict[str, object]) -> None:
    folder = converted(source, tp2(), tmp_path / "out")
    document = json.loads((folder / LAYOUT_NAME).read_text()) | change
    (folder / LAYOUT_NAME).write_text(json.dumps(document))
    with pytest.raises(ReshardError) as refused:
        opened(folder)
    assert refused.value.exit_code == 3


def test_a_layout_is_required(source: Catalogue) -> None:
    with pytest.raises(UsageError, match="--layout"):
        design_rank_safetensors(select(source), None, WriteOptions())


def test_a_folder_without_rank_files_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(NotACheckpoint):
        opened(tmp_path)
