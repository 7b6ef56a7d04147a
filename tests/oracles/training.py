"""A few steps of real training, inside a rank."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.distributed import DistributedConfig

# transformers' own step before torch saves or loads: what a checkpoint for its models has to agree with.
from transformers.distributed.checkpoint import _redistribute_state_dict

from tests.oracles.models import MODELS, Run

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
_BATCH, _LENGTH = 12, 8
State = dict[str, Any]


def save_initial(model: str, folder: str) -> None:
    """A folder with config and random weights under their runtime names."""
    values = dict(MODELS[model])
    torch.manual_seed(17)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, save_original_format=False)


def build(run: Run, initial: str) -> Any:
    """The model of ``initial``, sharded by transformers."""
    return AutoModelForCausalLM.from_pretrained(
        initial,
        distributed_config=DistributedConfig(**run.sizes),
        # The grouped kernels want rows of 16 bytes, which odd shards don't have.
        experts_implementation="eager" if run.model == "moe" else None,
    )


def optimizer_for(model: Any, learning_rate: float = 0.003) -> torch.optim.AdamW:
    """AdamW with two groups, as everybody trains: matrices decay, norms don't."""
    parameters = list(model.parameters())
    return torch.optim.AdamW(
        [
            {"params": [parameter for parameter in parameters if parameter.ndim > 1], "weight_decay": 0.1},
            {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
        ],
        lr=learning_rate,
        betas=(0.9, 0.95),
    )


def train(run: Run, model: Any, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    """One batch a step, the same rows whatever the spread; returns the loss over the whole batch before each step."""
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        rows = torch.randint(0, model.config.vocab_size, (_BATCH, _LENGTH), generator=generator)
        mine = rows.chunk(run.replicas_and_shards)[dist.get_rank() // run.sizes.get("tp_size", 1)]
        loss = model(input_ids=mine, labels=mine).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / dist.get_world_size())
    return losses


def sharded_state(run: Run, model: Any, optimizer: torch.optim.Optimizer, flat: bool) -> State:
    """What the ranks hand to torch's DCP: ``{"model": …, "optim": …}``."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    state = {
        "model": get_model_state_dict(model),
        "optim": get_optimizer_state_dict(model, optimizer, options=options),
    }
    return _redistribute_state_dict(state) if run.asks_for_plain_shards else state


def full_state(model: Any, optimizer: torch.optim.Optimizer) -> State:
    """The gathered state, on rank 0 only."""
    return {
        "model": get_model_state_dict(model, options=FULL),
        "optim": get_optimizer_state_dict(model, optimizer, options=FULL),
    }


def sharded(full: torch.Tensor, mesh: DeviceMesh, dim: int) -> DTensor:
    """``full`` split along a dim as ``torch.chunk`` does; nothing is sent, since gloo can't send every dtype."""
    pieces = full.chunk(mesh.size(), dim)
    empty = full.narrow(dim, 0, 0)
    piece = pieces[mesh.get_local_rank()] if mesh.get_local_rank() < len(pieces) else empty
    return DTensor.from_local(piece.clone(), mesh, [Shard(dim)], shape=full.shape, stride=full.stride())


def bits(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor of any dtype, row-major."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
