"""Shard folders that torch itself writes and reads, one process playing every rank (a fake process group)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement
from torch.testing._internal.distributed.fake_pg import FakeStore

StateDict = dict[str, torch.Tensor]


@contextmanager
def playing(rank: int, sizes: tuple[int, ...]) -> Iterator[DeviceMesh]:
    """A mesh as rank ``rank`` of a world sees it, without any other process."""
    world = 1
    for size in sizes:
        world *= size
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield DeviceMesh("cpu", torch.arange(world).reshape(sizes))
    finally:
        dist.destroy_process_group()


def sharded(full: torch.Tensor, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> torch.Tensor:
    """This rank's DTensor of a tensor that every rank knows."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(full.shape, mesh, placements)
    box = tuple(slice(begin, begin + size) for begin, size in zip(offset, shape, strict=True))
    return DTensor.from_local(
        full[box].clone(), mesh, placements, run_check=False, shape=full.shape, stride=full.stride()
    )


def save(
    full: Mapping[str, torch.Tensor],
    placements: Mapping[str, tuple[Placement, ...]],
    sizes: tuple[int, ...],
    folder: Path,
    files: dict[str, int] | None = None,
) -> None:
    """What ``dcp.save`` with a distributed HuggingFaceStorageWriter leaves behind on these ranks."""
    folder.mkdir(parents=True, exist_ok=True)
    plans = []
    world = 1
    for size in sizes:
        world *= size
    planners = [DefaultSavePlanner() for _ in range(world)]
    for rank, planner in enumerate(planners):
        with playing(rank, sizes) as mesh:
            state: StateDict = {
                name: sharded(tensor, mesh, placements[name]) if name in placements else tensor
                for name, tensor in full.items()
            }
            planner.set_up_planner(state, is_coordinator=rank == 0)
            plans.append(planner.create_local_plan())
    decided, _ = planners[0].create_global_plan(plans)
    writer = HuggingFaceStorageWriter(str(folder), files, save_distributed=True)
    for planner, plan in zip(planners, writer.prepare_global_plan(decided), strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            writer.write_data(planner.finish_plan(plan), planner).wait()


def load(full: Mapping[str, torch.Tensor], folder: Path) -> StateDict:
    """Whole tensors, read by torch's own reader."""
    state = {name: torch.zeros_like(tensor) for name, tensor in full.items()}
    _quietly(lambda: dcp.load(state, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True))
    return state


def load_rank(
    full: Mapping[str, torch.Tensor],
    placements: Mapping[str, tuple[Placement, ...]],
    sizes: tuple[int, ...],
    rank: int,
    folder: Path,
) -> tuple[StateDict, StateDict]:
    """One rank's local tensors as torch loads them into DTensors, and as they should be."""
    with playing(rank, sizes) as mesh:
        wanted = {name: sharded(tensor, mesh, placements[name]) for name, tensor in full.items() if name in placements}
        # Not by an operation on a DTensor: those remember the mesh of the rank that was played before.
        state = {name: sharded(torch.zeros_like(full[name]), mesh, placements[name]) for name in wanted}
        _quietly(lambda: dcp.load(state, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True))
        return (
            {name: tensor.to_local() for name, tensor in state.items()},
            {name: tensor.to_local() for name, tensor in wanted.items()},
        )


def _quietly(work: Callable[[], object]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        work()
