"""Per-rank torch.save files joined under a layout: pieces cut by torch's own DTensor, and by hand."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.testing._internal.distributed.fake_pg import FakeStore

from reshard_service.catalogue import Catalogue, Section
from reshard_service.documents.layout import LayoutDocument
from reshard_service.errors import (
    AmbiguousSource,
    CheckpointIncomplete,
    GeometryWrong,
    LayoutInvalid,
    SourceCorrupt,
    UnsupportedSource,
)
from reshard_service.formats.options import OpenOptions
from reshard_service.formats.torch_zip.ranks import open_torch_ranks, rank_of_file
from reshard_service.formats.torch_zip.reader import open_torch
from reshard_service.layouts.layout import Layout, layout_from_document
from reshard_service.layouts.shorthand import parse_layout
from reshard_service.storage.local import LocalStorage
from tests.formats.torch_zip.contents import same, tensor_of

WHOLE = {
    "embed.weight": torch.arange(10 * 4, dtype=torch.float32).reshape(10, 4),
    "up.weight": torch.arange(7 * 6, dtype=torch.bfloat16).reshape(7, 6),
    "down.weight": torch.arange(6 * 8, dtype=torch.float32).reshape(6, 8),
    "norm.weight": torch.arange(1, dtype=torch.float32),
    "scale": torch.tensor(3.5),
}
TP = LayoutDocument.model_validate(
    {
        "version": 1,
        "mesh": {"axes": [["fsdp", 2], ["tp", 2]]},
        "rules": [
            {"match": "up.weight", "placements": {"tp": "shard(0)"}},
            {"match": "down.weight", "placements": {"tp": "shard(1)"}},
        ],
    }
)


def open_ranks(folder: Path, layout: Layout | None, **options: object) -> Catalogue:
    names = sorted(path.name for path in folder.iterdir())
    return open_torch_ranks(LocalStorage(folder), OpenOptions(layout=layout, **options), names)


def cut(value: torch.Tensor, ranks: int, rank: int) -> torch.Tensor:
    """Rank's piece of dim 0 as torch.chunk cuts it, empty where there are fewer pieces than ranks."""
    pieces = value.chunk(ranks)
    return (pieces[rank] if rank < len(pieces) else value[:0]).clone()


def save_ranks(folder: Path, pieces: object, world: int, name: str = "model_rank{}.bin") -> None:
    for rank in range(world):
        torch.save(pieces(rank), folder / name.format(rank))


def sharded(rank: int) -> dict[str, torch.Tensor]:
    return {key: cut(value, 4, rank) if value.dim() else value for key, value in WHOLE.items()}


@pytest.mark.parametrize(
    ("name", "rank"),
    [
        ("pytorch_model_fsdp_0_rank3.bin", 3),
        ("pytorch_model_fsdp_rank12.bin", 12),
        ("mp_rank_03_model_states.pt", 3),
        ("rank7.pt", 7),
        ("model.rank_2.pt", 2),
        ("model-rank-4.pt", 4),
        ("frank3.pt", None),
        ("model.pt", None),
        ("ranking.pt", None),
    ],
)
def test_names_tell_ranks(name: str, rank: int | None) -> None:
    assert rank_of_file(name) == rank


def test_plain_pieces_are_joined_uneven_and_empty_ones_too(tmp_path: Path) -> None:
    save_ranks(tmp_path, sharded, 4)
    catalogue = open_ranks(tmp_path, parse_layout("fsdp=4"))
    assert {tensor.key: tensor.shape for tensor in catalogue.tensors} == {
        key: tuple(value.shape) for key, value in WHOLE.items()
    }
    assert all(same(tensor_of(catalogue, key, tmp_path), value) for key, value in WHOLE.items())
    assert catalogue.world == 4


def test_optimizer_slots_are_cut_like_their_parameter_or_held_by_all(tmp_path: Path) -> None:
    slots = {"step": torch.tensor(3.0), "exp_avg": torch.arange(40.0).reshape(10, 4), "row_var": torch.arange(10.0)}

    def pieces(rank: int) -> dict[str, object]:
        local = {"step": slots["step"], "exp_avg": cut(slots["exp_avg"], 2, rank), "row_var": slots["row_var"]}
        return {"model": {"w": cut(slots["exp_avg"], 2, rank)}, "optimizer": {"state": {"w": local}}}

    save_ranks(tmp_path, pieces, 2)
    catalogue = open_ranks(tmp_path, parse_layout("fsdp=2"))
    for name, value in slots.items():
        assert same(tensor_of(catalogue, f"optimizer.state.w.{name}", tmp_path), value)
    assert {tensor.identity.section for tensor in catalogue.tensors} == {Section.MODEL, Section.OPTIMIZER}


@pytest.fixture
def fake_ranks() -> Iterator[None]:
    """Leaves no process group behind."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def piece_of(mesh: object, placements: list[Placement], value: torch.Tensor) -> DTensor:
    shape, offset = compute_local_shape_and_global_offset(value.shape, mesh, placements)
    box = tuple(slice(begin, begin + size) for begin, size in zip(offset, shape, strict=True))
    return DTensor.from_local(
        value[box].clone(), mesh, placements, run_check=False, shape=value.shape, stride=value.stride()
    )


@pytest.mark.usefixtures("fake_ranks")
@pytest.mark.filterwarnings("ignore")
def test_dtensors_of_a_two_dimensional_mesh_are_joined(tmp_path: Path) -> None:
    for rank in range(4):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
        state = {
            "embed.weight": piece_of(mesh, [Shard(0), Replicate()], WHOLE["embed.weight"]),
            "down.weight": torch.nn.Parameter(piece_of(mesh, [Shard(0), Shard(1)], WHOLE["down.weight"])),
            "scale": piece_of(mesh, [Replicate(), Replicate()], WHOLE["scale"]),
        }
        torch.save(state, tmp_path / f"model_rank{rank}.bin")
        dist.destroy_process_group()
    catalogue = open_ranks(tmp_path, layout_from_document(TP))
    for key in ("embed.weight", "down.weight", "scale"):
        assert same(tensor_of(catalogue, key, tmp_path), WHOLE[key])
    with pytest.raises(UnsupportedSource, match=r"one rank's piece.*--source-layout"):
        open_torch(LocalStorage(tmp_path), OpenOptions(), "model_rank1.bin")
    with pytest.raises(GeometryWrong, match=r"down\.weight"):
        open_ranks(tmp_path, parse_layout("dp_replicate=2,fsdp=2"))


def test_without_a_layout_the_question_is_asked(tmp_path: Path) -> None:
    save_ranks(tmp_path, sharded, 4)
    with pytest.raises(AmbiguousSource, match="--source-layout"):
        open_ranks(tmp_path, None)


def test_a_missing_rank_a_surplus_rank_and_two_of_one_rank_are_refused(tmp_path: Path) -> None:
    save_ranks(tmp_path, sharded, 4)
    with pytest.raises(AmbiguousSource, match="rank 3"):
        open_ranks(tmp_path, parse_layout("fsdp=2"))
    (tmp_path / "model_rank2.bin").rename(tmp_path / "other_rank1.bin")
    with pytest.raises(AmbiguousSource, match="of rank 1"):
        open_ranks(tmp_path, parse_layout("fsdp=4"))
    (tmp_path / "other_rank1.bin").unlink()
    with pytest.raises(CheckpointIncomplete, match="rank 2"):
        open_ranks(tmp_path, parse_layout("fsdp=4"))


def test_a_tensor_that_one_rank_lacks_or_has_in_another_type_is_refused(tmp_path: Path) -> None:
    save_ranks(tmp_path, sharded, 4)
    torch.save({key: value for key, value in sharded(1).items() if key != "up.weight"}, tmp_path / "model_rank1.bin")
    with pytest.raises(CheckpointIncomplete, match=r"up\.weight"):
        open_ranks(tmp_path, parse_layout("fsdp=4"))
    torch.save(sharded(1) | {"up.weight": cut(WHOLE["up.weight"], 4, 1).half()}, tmp_path / "model_rank1.bin")
    with pytest.raises(SourceCorrupt, match=r"up\.weight.*BF16.*F16"):
        open_ranks(tmp_path, parse_layout("fsdp=4"))


def test_shapes_that_no_whole_has_under_the_layout_are_refused(tmp_path: Path) -> None:
    save_ranks(tmp_path, lambda rank: {"w": torch.ones(2 + rank % 2, 3)}, 4)
    with pytest.raises(LayoutInvalid, match="'w'"):
        open_ranks(tmp_path, parse_layout("fsdp=4"))


def test_replicas_whose_bytes_differ_are_refused(tmp_path: Path) -> None:
    save_ranks(tmp_path, lambda rank: {"experts.w": torch.full((2, 2), float(rank))}, 2)
    with pytest.raises(LayoutInvalid, match=r"rank0.*rank1.*experts\.w"):
        open_ranks(tmp_path, parse_layout("dp_replicate=2"))
    joined = open_ranks(tmp_path, parse_layout("fsdp=2"))
    assert same(tensor_of(joined, "experts.w", tmp_path), torch.tensor([[0.0, 0]] * 2 + [[1.0, 1]] * 2))


def test_packed_pieces_go_back_to_their_places(tmp_path: Path) -> None:
    document = LayoutDocument.model_validate(
        {
            "version": 1,
            "mesh": {"axes": [["tp", 2]]},
            "rules": [{"match": "gate_up", "placements": {"tp": "strided(0,2)"}}],
        }
    )
    whole = torch.arange(8 * 3.0).reshape(8, 3)
    gate, up = whole.chunk(2)
    save_ranks(tmp_path, lambda rank: {"gate_up": torch.cat([gate.chunk(2)[rank], up.chunk(2)[rank]])}, 2)
    catalogue = open_ranks(tmp_path, layout_from_document(document))
    assert same(tensor_of(catalogue, "gate_up", tmp_path), whole)


def test_whole_copies_in_every_ranks_file_are_not_joined_into_a_larger_model(tmp_path: Path) -> None:
    save_ranks(tmp_path, lambda rank: {"w": WHOLE["embed.weight"], "norm": WHOLE["norm.weight"]}, 2)
    with pytest.raises(AmbiguousSource, match="name one of them"):
        open_ranks(tmp_path, parse_layout("fsdp=2"))
    catalogue = open_ranks(tmp_path, parse_layout("dp_replicate=2"))
    assert same(tensor_of(catalogue, "w", tmp_path), WHOLE["embed.weight"])
