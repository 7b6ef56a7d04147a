"""Saves a model whose dims divide by neither mesh axis, as real FSDP2 x TP ranks do. Runs inside a rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module


def save_uneven(folder: str, rows: int, columns: int, dp: int, tp: int) -> dict[str, Any]:
    """A model of one column-parallel layer ``[rows, columns]`` and one plain one; and its truth, gathered."""
    mesh = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(7)
    model = torch.nn.Sequential()
    model.add_module("wide", torch.nn.Linear(columns, rows))
    model.add_module("plain", torch.nn.Linear(8, 12))
    parallelize_module(model, mesh["tp"], {"wide": ColwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    state = get_model_state_dict(model)
    dcp.save({"model": state}, checkpoint_id=folder)
    full = {name: tensor.full_tensor() for name, tensor in state.items()}
    if dist.get_rank() == 0:
        torch.save(full, Path(folder, "truth.pt"))
    local = state["wide.weight"].to_local()
    return {"rows": local.shape[0]}
