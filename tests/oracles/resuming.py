"""Resumes from a checkpoint with torch's own loader, and from the truth by another route. Runs inside a rank.

Nothing here knows how the checkpoint was made: it may be ours or torch's own, which is how the oracle itself is tested.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.placement_types import _StridedShard
from transformers.distributed.checkpoint import _redistribute_state_dict, load_optimizer_distributed

from tests.oracles.models import Run
from tests.oracles.training import bits, build, full_state, optimizer_for, sharded, sharded_state, train

# What the source did not use: a lost param_groups entry then shows.
_OTHER_LEARNING_RATE = 0.5


class _RecordingReader(FileSystemReader):
    """torch's reader, remembering what each rank reads from where."""

    reads: list[tuple[str, tuple[int, ...], str, int, int, bool]]
    """Key, chunk offset, file, position in the file, bytes of the chunk wanted, whether the chunk is read whole."""

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Any:
        self.reads = []
        for item in plan.items:
            if item.type != LoadItemType.TENSOR:
                continue
            place = self.storage_data[item.storage_index]
            tensor = planner.metadata.state_dict_metadata[item.storage_index.fqn]  # type: ignore[attr-defined]
            offset = tuple(item.storage_index.offset or ())
            [chunk] = [chunk for chunk in tensor.chunks if tuple(chunk.offsets) == offset]
            whole = tuple(item.lengths) == tuple(chunk.sizes)
            self.reads.append(
                (item.storage_index.fqn, offset, place.relative_path, place.offset, prod(item.lengths), whole)
            )
        return super().read_data(plan, planner)


def resume(model: str, spread: str, initial: str, checkpoint: str, flat: bool, truth: str) -> dict[str, Any]:
    """Loads ``checkpoint`` into a run with plain ``dcp.load``, and the truth into a second one; trains both two steps.

    ``differences`` names what is not bit-equal on this rank after loading, ``after`` what is not after training.
    """
    run = Run(model, spread)
    network = build(run, initial)
    optimizer = optimizer_for(network, _OTHER_LEARNING_RATE)
    held = {
        "model": get_model_state_dict(network),
        "optim": get_optimizer_state_dict(
            network, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=flat)
        ),
    }
    wanted = _redistribute_state_dict(held) if run.asks_for_plain_shards else held
    reader = _RecordingReader(checkpoint)
    dcp.load(wanted, storage_reader=reader)
    loaded = _redistribute_state_dict(wanted, reference_state_dict=held) if run.asks_for_plain_shards else wanted
    set_model_state_dict(network, loaded["model"])
    set_optimizer_state_dict(
        network, optimizer, loaded["optim"], options=StateDictOptions(flatten_optimizer_state_dict=flat)
    )
    reference, reference_optimizer = _from_truth(run, initial, truth)
    differences = _differences(run, (network, optimizer), (reference, reference_optimizer))
    return {
        "differences": differences,
        "reads": reader.reads,
        "losses": train(run, network, optimizer, range(2, 4)),
        "reference_losses": train(run, reference, reference_optimizer, range(2, 4)),
        "after": _differences(run, (network, optimizer), (reference, reference_optimizer)),
    }


def resume_transformers(
    model: str, spread: str, initial: str, checkpoint: str, optimizer_checkpoint: str, truth: str
) -> dict[str, Any]:
    """The same through transformers' own loaders: ``from_pretrained`` of a distributed folder, and its optimizer."""
    run = Run(model, spread)
    network = build(run, checkpoint)
    optimizer = optimizer_for(network, _OTHER_LEARNING_RATE)
    load_optimizer_distributed(network, optimizer, optimizer_checkpoint)
    reference, reference_optimizer = _from_truth(run, initial, truth)
    return {
        "differences": _differences(run, (network, optimizer), (reference, reference_optimizer)),
        "losses": train(run, network, optimizer, range(2, 4)),
        "reference_losses": train(run, reference, reference_optimizer, range(2, 4)),
    }


def load_elsewhere(checkpoint: str, truth: str, form: str) -> dict[str, Any]:
    """Loads every tensor of the truth into DTensors of a layout nobody planned for, with plain ``dcp.load``.

    Tensors are split along their last dim over all ranks. ``form`` is ``nested``, ``flat`` (keys of torch's two
    optimizer encodings below ``optim``), ``titan`` (bare names, ``optimizer.state…``) or ``model`` (bare names alone).
    """
    expected = _flatten(torch.load(truth, weights_only=True, map_location="cpu"), form)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    asked = {key: sharded(value, mesh, value.ndim - 1) if value.ndim else value for key, value in expected.items()}
    wanted = {key: _scrambled(value) for key, value in asked.items()}
    reader = _hugging_face_reader(checkpoint) if form == "model" else FileSystemReader(checkpoint)
    dcp.load(wanted, storage_reader=reader)
    differences = [key for key, value in asked.items() if not _same(wanted[key], value)]
    return {"differences": differences, "compared": len(expected)}


def _scrambled(value: Any) -> Any:
    """The same tensor with other bits."""
    if isinstance(value, DTensor):
        piece = _scrambled(value.to_local())
        return DTensor.from_local(piece, value.device_mesh, value.placements, shape=value.shape, stride=value.stride())
    other = torch.empty_like(value)
    if value.numel():
        other.reshape(-1).view(torch.uint8)[:] = ~value.contiguous().reshape(-1).view(torch.uint8) & 1
    return other


def _hugging_face_reader(checkpoint: str) -> Any:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    return HuggingFaceStorageReader(checkpoint)


def _flatten(truth: dict[str, Any], form: str) -> dict[str, torch.Tensor]:
    """The truth's tensors under the flat keys that a DCP of ``form`` has for them."""
    model, optimizer = {"nested": ("model.", "optim."), "flat": ("model.", "optim."), "titan": ("", "optimizer.")}.get(
        form, ("", None)
    )
    flat = {model + name: tensor for name, tensor in truth["model"].items()}
    if optimizer is not None and "optim" in truth:
        for name, slots in truth["optim"]["state"].items():
            flat |= {f"{optimizer}state.{name}.{slot}": tensor for slot, tensor in slots.items()}
    return flat


def _from_truth(run: Run, initial: str, truth: str) -> tuple[Any, torch.optim.Optimizer]:
    """The independent route: every rank has the full state, and torch distributes it to the shards."""
    full = torch.load(Path(truth), weights_only=True, map_location="cpu")
    network = build(run, initial)
    optimizer = optimizer_for(network, _OTHER_LEARNING_RATE)
    model_state = get_model_state_dict(network)
    set_model_state_dict(network, {name: _distributed(full["model"][name], held) for name, held in model_state.items()})
    optimizer_state = get_optimizer_state_dict(network, optimizer)
    states = {
        name: {slot: _distributed(full["optim"]["state"][name][slot], held) for slot, held in slots.items()}
        for name, slots in optimizer_state["state"].items()
    }
    set_optimizer_state_dict(network, optimizer, {"state": states, "param_groups": full["optim"]["param_groups"]})
    gathered = full_state(network, optimizer)
    if dist.get_rank() == 0:
        expected = _leaves(full, "")
        for key, value in _leaves(gathered, "").items():
            assert _same(value, expected[key]), f"torch distributes {key} wrongly: {value} is not {expected[key]}"
    return network, optimizer


def _distributed(full: torch.Tensor, like: Any) -> Any:
    """``full`` with the placements of ``like``; by way of plain shards, since torch distributes only those unevenly."""
    if not isinstance(like, DTensor):
        return full.clone()
    plain = [
        Shard(placement.dim) if isinstance(placement, _StridedShard) else placement for placement in like.placements
    ]
    return distribute_tensor(full, like.device_mesh, plain).redistribute(placements=like.placements)


def _differences(run: Run, ours: tuple[Any, Any], reference: tuple[Any, Any]) -> list[str]:
    """Keys whose local tensors, or values of a parameter group, differ in any bit."""
    mine, theirs = (
        _leaves(sharded_state(run, network, optimizer, flat=False), "") for network, optimizer in (ours, reference)
    )
    different = sorted(mine.keys() ^ theirs.keys())
    for key in sorted(mine.keys() & theirs.keys()):
        if not _same(mine[key], theirs[key]):
            different.append(key)
    return different


def _same(a: Any, b: Any) -> bool:
    """Equal in every bit, for what this rank holds."""
    if isinstance(a, DTensor):
        return a.placements == b.placements and _same(a.to_local(), b.to_local())
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)
    return bool(a == b)


def _leaves(value: Any, key: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for name, item in value.items() for k, v in _leaves(item, f"{key}.{name}").items()}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return {k: v for i, item in enumerate(value) for k, v in _leaves(item, f"{key}.{i}").items()}
    return {key: value.contiguous().detach() if isinstance(value, torch.Tensor) else value}
