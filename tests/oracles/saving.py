"""Trains a run for two steps and saves what it holds in every encoding, then goes on training. Runs inside a rank.

Beside each set of checkpoints lies the truth: the gathered state as one ``torch.save`` file, and the losses of the
uninterrupted run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint._extension import ZStandard
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers.distributed.checkpoint import save_optimizer_distributed

from tests.oracles.models import Run
from tests.oracles.training import (
    FULL,
    build,
    full_state,
    optimizer_for,
    save_initial,
    sharded,
    sharded_state,
    train,
)

__all__ = ["save_dtypes", "save_initial", "save_run"]

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8),
    *(torch.bool, torch.complex32, torch.complex64, torch.complex128),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
)


def save_run(model: str, spread: str, initial: str, folder: str, extras: list[str]) -> dict[str, Any]:
    """Everything of one run. ``extras`` names encodings beyond nested and flattened DCP: see :data:`_EXTRAS`."""
    run, root = Run(model, spread), Path(folder)
    network = build(run, initial)
    _check_gathering(network, initial)
    optimizer = optimizer_for(network)
    before = train(run, network, optimizer, range(2))
    nested = sharded_state(run, network, optimizer, flat=False)
    dcp.save(nested, checkpoint_id=root / "nested")
    dcp.save(sharded_state(run, network, optimizer, flat=True), checkpoint_id=root / "flat")
    for extra in extras:
        _EXTRAS[extra](root / extra, network, optimizer, nested)
    full = full_state(network, optimizer)
    if dist.get_rank() == 0:
        # At once: what is not sharded is not copied, and the next steps change it.
        torch.save(full, root / "truth.pt")
    after = train(run, network, optimizer, range(2, 4))
    if dist.get_rank() == 0:
        (root / "losses.json").write_text(json.dumps(after), encoding="utf-8")
    return {"losses": before + after}


def save_dtypes(folder: str) -> None:
    """One tensor of every dtype that torch's DCP can save, sharded unevenly; odd shapes and strides beside them."""
    root, rank, mesh = Path(folder), dist.get_rank(), init_device_mesh("cpu", (dist.get_world_size(),))
    full = dict(_tensors_of_all_dtypes())
    state: dict[str, Any] = {key: sharded(tensor, mesh, 0) for key, tensor in full.items() if tensor.ndim}
    state |= {key: tensor for key, tensor in full.items() if not tensor.ndim}
    # A transposed view keeps its strides in the file: rows of the payload are columns of the tensor.
    turned = sharded(full["turned"], mesh, 0)
    state["turned"] = DTensor.from_local(
        turned.to_local().t().contiguous().t(), mesh, turned.placements, shape=turned.shape, stride=turned.stride()
    )
    dcp.save({"model": state}, checkpoint_id=root / "nested")
    if rank == 0:
        torch.save({"model": full}, root / "truth.pt")


def _tensors_of_all_dtypes() -> Iterator[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    for dtype in DTYPES:
        numbers = torch.randint(0, 2 if dtype == torch.bool else 256, (7, 5 * dtype.itemsize), generator=generator)
        yield f"plain.{str(dtype).removeprefix('torch.')}", numbers.to(torch.uint8).view(dtype)
    yield "few.rows", torch.arange(8.0).reshape(1, 8)
    yield "no.rows", torch.empty(0, 4)
    yield "no.columns", torch.empty(5, 0, dtype=torch.int64)
    yield "scalar.float", torch.tensor(1.5)
    yield "scalar.int", torch.tensor(7, dtype=torch.int32)
    yield "scalar.bool", torch.tensor(True)
    yield "three.dims", torch.arange(5 * 3 * 2, dtype=torch.bfloat16).reshape(5, 3, 2)
    yield "turned", torch.arange(28, dtype=torch.float16).reshape(7, 4)


def _check_gathering(network: Any, initial: str) -> None:
    """The truth is only as good as torch's gathering: prove it on weights that never were sharded."""
    gathered = get_model_state_dict(network, options=FULL)
    if dist.get_rank() == 0:
        for name, tensor in load_file(Path(initial, "model.safetensors")).items():
            assert torch.equal(gathered[name], tensor), f"torch gathers {name} wrongly"


def _zstd(folder: Path, network: Any, optimizer: Any, nested: dict[str, Any]) -> None:
    dcp.save(nested, storage_writer=FileSystemWriter(folder, _extensions=[ZStandard()]))


def _per_rank_metadata(folder: Path, network: Any, optimizer: Any, nested: dict[str, Any]) -> None:
    dcp.save(nested, checkpoint_id=folder, use_collectives=False)


def _file_per_item(folder: Path, network: Any, optimizer: Any, nested: dict[str, Any]) -> None:
    dcp.save(nested, storage_writer=FileSystemWriter(folder, single_file_per_rank=False))


def _torch_hf_writer(folder: Path, network: Any, optimizer: Any, nested: dict[str, Any]) -> None:
    dcp.save(nested["model"], storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    if dist.get_rank() == 0:
        network.config.save_pretrained(folder)


def _transformers_model(folder: Path, network: Any, optimizer: Any, nested: dict[str, Any]) -> None:
    network.save_pretrained(folder, distributed_checkpoint=True)


def _transformers_optimizer(folder: Path, network: Any, optimizer: Any, nested: dict[str, Any]) -> None:
    save_optimizer_distributed(network, optimizer, str(folder))


def _transformers_gathered(folder: Path, network: Any, optimizer: Any, nested: dict[str, Any]) -> None:
    network.save_pretrained(folder, save_original_format=False)


def _titan(folder: Path, network: Any, optimizer: Any, nested: dict[str, Any]) -> None:
    """torchtitan's form: bare names, flattened optimizer, training state beside them, some of it per rank."""
    rank = dist.get_rank()
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    dcp.save(
        {
            **get_model_state_dict(network),
            "optimizer": get_optimizer_state_dict(network, optimizer, options=options),
            "lr_scheduler": {"last_epoch": 2},
            "train_state": {"step": torch.tensor(2), "ntokens_seen": torch.tensor(192)},
            "dataloader": {f"dp_rank_{rank}": json.dumps({"position": 24 * rank}).encode()},
        },
        checkpoint_id=folder,
    )


_EXTRAS = {
    "zstd": _zstd,
    "per-rank-metadata": _per_rank_metadata,
    "file-per-item": _file_per_item,
    "torch-hf": _torch_hf_writer,
    "transformers": _transformers_model,
    "transformers-optimizer": _transformers_optimizer,
    "transformers-gathered": _transformers_gathered,
    "titan": _titan,
}
