"""Makes the checkpoints that are measured, with torch's and safetensors' own writers. Run as a process of its own.

    python -m benchmarks.saving FOLDER KIND MODEL [--quick] [--scale X]

The DCP checkpoints are what eight ranks save, but one process plays the ranks one after another: torch's *fake* process
group gives each its mesh and its shards, torch's planner and ``FileSystemWriter`` do the rest, and no more than one
rank's bytes are in memory. Values are random bytes that depend on tensor and rank alone, so that a model saved in
another format holds the same.
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.models import Model, expert_of, models

RANKS = 8
_FILE_BYTES = 1_000_000_000


def fill(tensor: torch.Tensor, name: str, rank: int) -> None:
    """Random bytes. For bf16 and fp32 alike some are NaN or huge, which is no matter to those who move bytes."""
    numbers = np.random.Generator(np.random.SFC64([zlib.crc32(name.encode()), rank]))
    whole = tensor.reshape(-1).view(torch.uint8).numpy()
    words = len(whole) // 8
    whole[: words * 8].view(np.uint64)[:] = numbers.integers(0, 2**64, words, dtype=np.uint64)
    whole[words * 8 :] = 7


def rows_of(shape: tuple[int, ...], rank: int) -> tuple[int, int]:
    """FSDP's rows of one rank."""
    each = -(-shape[0] // RANKS)
    return min(rank * each, shape[0]), min((rank + 1) * each, shape[0])


def stored(model: Model) -> Iterator[tuple[tuple[str, ...], str, tuple[int, ...], torch.dtype]]:
    """Path in the state dict, name, shape and type of every tensor."""
    for name, shape in model.shapes.items():
        yield ("model", name), name, shape, torch.bfloat16
    for name, shape in model.shapes.items() if model.moments else ():
        for slot in ("exp_avg", "exp_avg_sq"):
            yield ("optim", "state", name, slot), f"{name}.{slot}", shape, torch.float32
        yield ("optim", "state", name, "step"), f"{name}.step", (), torch.float32


def state_of_rank(model: Model, rank: int) -> tuple[dict[str, Any], list[tuple[torch.Tensor, str, int]]]:
    """What a rank holds, and which memory has to be filled with what: experts whole, 1/8 of them; all else sharded."""
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("fsdp",))
    state: dict[str, Any] = {}
    local: list[tuple[torch.Tensor, str, int]] = []
    count = 1 + max((expert_of(name) or 0 for name in model.shapes), default=0)
    for path, name, shape, dtype in stored(model):
        expert = expert_of(name)
        leaf: torch.Tensor
        if expert is not None:
            if expert * RANKS // count != rank:
                continue
            leaf = torch.empty(shape, dtype=dtype)
            local.append((leaf, name, 0))
        elif not shape:
            leaf = torch.full((), 1000.0)
        else:
            first, stop = rows_of(shape, rank)
            shard = torch.empty((stop - first, *shape[1:]), dtype=dtype)
            local.append((shard, name, rank))
            stride = tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))
            leaf = DTensor.from_local(shard, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride)
        inner = state
        for part in path[:-1]:
            inner = inner.setdefault(part, {})
        inner[path[-1]] = leaf
    return state, local


def save_dcp(model: Model, folder: Path) -> None:
    """As ``dcp.save`` does it, with the ranks in a row: local plans, the global plan, the files, ``.metadata``."""
    planners, plans, memory = [], [], []
    writers = []
    for rank in range(RANKS):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=RANKS)
        state, local = state_of_rank(model, rank)
        writer, planner = FileSystemWriter(folder), DefaultSavePlanner()
        writer.set_up_storage_writer(is_coordinator=rank == 0)
        planner.set_up_planner(state, writer.storage_meta(), is_coordinator=rank == 0)
        plans.append(writer.prepare_local_plan(planner.create_local_plan()))
        planners.append(planner)
        writers.append(writer)
        memory.append(local)
        dist.destroy_process_group()
    plans, metadata = planners[0].create_global_plan(plans)
    plans = writers[0].prepare_global_plan(plans)
    results = []
    for rank, plan in enumerate(plans):
        for tensor, name, seed in memory[rank]:
            fill(tensor, name, seed)
        results.append(writers[rank].write_data(planners[rank].finish_plan(plan), planners[rank]).wait())
        memory[rank] = []
        planners[rank].state_dict = {}
    writers[0].finish(metadata, results)


def save_safetensors(model: Model, folder: Path) -> None:
    """A folder as on the Hub: files of about a GB and an index."""
    folder.mkdir(parents=True, exist_ok=True)
    groups: list[list[tuple[str, tuple[int, ...], torch.dtype]]] = [[]]
    size = 0
    for _, name, shape, dtype in stored(model):
        nbytes = prod(shape) * dtype.itemsize
        if size + nbytes > _FILE_BYTES and groups[-1]:
            groups.append([])
            size = 0
        groups[-1].append((name, shape, dtype))
        size += nbytes
    index: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        path = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = {}
        for name, shape, dtype in group:
            tensors[name] = torch.empty(shape, dtype=dtype)
            if expert_of(name) is not None:
                fill(tensors[name], name, 0)
                continue
            for rank in range(RANKS):
                first, stop = rows_of(shape, rank)
                if stop > first:
                    fill(tensors[name][first:stop], name, rank)
        save_file(tensors, folder / path, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, path)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": model.bytes}, "weight_map": index}), encoding="utf-8"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("kind", choices=("dcp", "safetensors"))
    parser.add_argument("model")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--scale", type=float, default=1.0)
    arguments = parser.parse_args()
    model = models(arguments.quick, arguments.scale)[arguments.model]
    (save_dcp if arguments.kind == "dcp" else save_safetensors)(model, arguments.folder)


if __name__ == "__main__":
    main()
