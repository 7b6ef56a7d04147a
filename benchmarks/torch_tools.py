"""What people do today with torch's own tools, one task a process.

    python -m benchmarks.torch_tools TASK SOURCE TARGET

Each is the shortest way that torch's documentation or its users show, and is given what helps it: no gradients, tensors
allocated without being cleared, four ranks where ranks share the work.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint._nested_dict import unflatten_state_dict
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import init_device_mesh

RANKS = 4
_FILE_BYTES = 5_000_000_000


def torch_save_then_safetensors(source: Path, target: Path) -> None:
    """``dcp_to_torch_save``, load that, save it as safetensors."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    target.mkdir()
    whole = target / "whole.pt"
    dcp_to_torch_save(source, whole)
    state = torch.load(whole, weights_only=True)
    whole.unlink()
    _save_files(state.get("model", state), target)


def load_then_safetensors(source: Path, target: Path) -> None:
    """``dcp.load`` of everything into one process, saved as safetensors."""
    target.mkdir()
    state = _empty(FileSystemReader(source))
    dcp.load(state, checkpoint_id=source, no_dist=True)
    _save_files({key.removeprefix("model."): tensor for key, tensor in state.items()}, target)


def safetensors_then_save(source: Path, target: Path) -> None:
    """A Hugging Face folder into one process, saved as DCP."""
    reader = HuggingFaceStorageReader(str(source))
    state = _empty(reader)
    dcp.load(state, storage_reader=reader, no_dist=True)
    dcp.save(state, checkpoint_id=target, no_dist=True)


def reshard_fsdp4(source: Path, target: Path) -> None:
    """Four ranks load what they will hold under FSDP 4, and save it."""
    _with_ranks("fsdp4", source, target)


def reshard_2x2(source: Path, target: Path) -> None:
    """The same for 2 FSDP x 2 TP; from a DCP or from a Hugging Face folder."""
    _with_ranks("2x2", source, target)


def _empty(reader: Any) -> dict[str, torch.Tensor]:
    entries = reader.read_metadata().state_dict_metadata
    return {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def _save_files(state: dict[str, torch.Tensor], target: Path) -> None:
    groups: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in state.items():
        if groups[-1] and size + tensor.nbytes > _FILE_BYTES:
            groups.append({})
            size = 0
        groups[-1][name] = tensor
        size += tensor.nbytes
    for number, group in enumerate(groups, 1):
        path = target / f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        save_file(group, path, metadata={"format": "pt"})


def _with_ranks(layout: str, source: Path, target: Path) -> None:
    import torch.multiprocessing as mp

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, args=(str(Path(folder, "meeting")), layout, source, target), nprocs=RANKS)


def _rank(rank: int, meeting: str, layout: str, source: Path, target: Path) -> None:
    from torch.distributed.tensor import Replicate, Shard, empty

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=RANKS)
    two = layout == "2x2"
    mesh = init_device_mesh("cpu", (2, 2) if two else (RANKS,), mesh_dim_names=("fsdp", "tp") if two else ("fsdp",))
    reader = FileSystemReader(source) if (source / ".metadata").exists() else HuggingFaceStorageReader(str(source))
    metadata = reader.read_metadata()
    state: dict[str, Any] = {}
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue
        fsdp = Shard(0) if entry.size else Replicate()
        column = ".o_proj." in key or ".down_proj." in key
        tp = Replicate() if len(entry.size) < 2 else Shard(1) if column else Shard(0)
        placements = [fsdp, tp] if two else [fsdp]
        state[key] = empty(*entry.size, dtype=entry.properties.dtype, device_mesh=mesh, placements=placements)
    if metadata.planner_data:  # a trainer's state dict is nested; saved flat, its sections would be lost
        state = unflatten_state_dict(state, metadata.planner_data)
    dcp.load(state, storage_reader=reader)
    dcp.save(state, checkpoint_id=target)
    dist.destroy_process_group()


TASKS = {
    task.__name__: task
    for task in (
        torch_save_then_safetensors,
        load_then_safetensors,
        safetensors_then_save,
        reshard_fsdp4,
        reshard_2x2,
    )
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    TASKS[arguments.task](arguments.source, arguments.target)


if __name__ == "__main__":
    main()
