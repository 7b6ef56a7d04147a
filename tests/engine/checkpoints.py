"""Small checkpoints written and read by torch and safetensors, for an engine that must not change a bit of them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, HuggingFaceStorageReader
from torch.distributed.checkpoint._extension import ZStandard
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.tensor import Shard

from reshard_service.conversion import JobReport, convert, open_source
from reshard_service.documents.job import SourceDocument, job_document
from reshard_service.planning.budget import Budget
from reshard_service.verify.diff import Diff, diff
from tests.formats.dcp_safetensors import saving

State = dict[str, torch.Tensor]

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e8m0fnu,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint64,
    torch.uint32,
    torch.uint16,
    torch.uint8,
    torch.bool,
    torch.complex64,
)
"""Every type that torch, its DCP and safetensors have in common, packed ones aside."""

PACKED = {
    "version": 1,
    "mesh": {"axes": [["fsdp", 2], ["tp", 2]]},
    "rules": [
        {"match": "**.gate_up", "placements": {"fsdp": "replicate", "tp": "strided(0,2)"}},
        {"match": "**.down", "placements": {"fsdp": "shard(0)", "tp": "shard(1)"}},
    ],
}
"""A layout with packed shards (memory view), column shards, plain rows and replicas."""
COLUMNS = {
    "version": 1,
    "mesh": {"axes": [["tp", 3]]},
    "rules": [{"match": "**.{down,wide}", "placements": {"tp": "shard(1)"}}],
}


def filled(shape: Sequence[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Random bits, NaNs of every kind among them; bools are 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    size = prod(shape) * dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(tuple(shape)) if size else torch.empty(tuple(shape), dtype=dtype)


def model() -> State:
    """Tensors of every dtype and of awkward shapes: no dims, no elements, odd sizes, larger than a tiny buffer."""
    state = {
        "layers.0.gate_up": filled((44, 37), torch.bfloat16, 1),
        "layers.0.down": filled((37, 45), torch.float32, 2),
        "layers.0.wide": filled((3, 2500), torch.int16, 3),
        "layers.1.gate_up": filled((44, 37), torch.bfloat16, 4),
        "layers.1.down": filled((37, 45), torch.float32, 5),
        "layers.1.wide": filled((3, 2500), torch.int16, 6),
        "cube": filled((5, 7, 3, 11), torch.uint8, 7),
        "norm": filled((5,), torch.float16, 8),
        "scale": filled((), torch.float32, 9),
        "flag": filled((), torch.bool, 10),
        "none": filled((0, 7), torch.float32, 11),
        "none.inside": filled((3, 0), torch.int64, 12),
    }
    for number, dtype in enumerate(DTYPES):
        state[f"types.{number:02}"] = filled((3, 5), dtype, 100 + number)
    return state


def tiny_budget(threads: int = 1) -> Budget:
    """Buffers of a few pages: nearly every tensor takes several rounds."""
    return Budget(threads=threads, staging_bytes=12 << 10, output_bytes=16 << 10)


# --- writing sources ----------------------------------------------------------------------------------------


def save_safetensors(state: Mapping[str, torch.Tensor], folder: Path) -> Path:
    folder.mkdir(parents=True)
    save_file(dict(state), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def save_sharded_safetensors(state: Mapping[str, torch.Tensor], folder: Path) -> Path:
    """Three files and an index, as transformers lays them out."""
    folder.mkdir(parents=True)
    weight_map = {}
    for number in range(3):
        name = f"model-{number + 1:05d}-of-00003.safetensors"
        held = {key: state[key] for key in sorted(state)[number::3]}
        save_file(held, folder / name)
        weight_map |= dict.fromkeys(held, name)
    total = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def save_dcp(state: Mapping[str, torch.Tensor], folder: Path, writer: FileSystemWriter | None = None) -> Path:
    """``dcp.save`` of one rank."""
    with quiet():
        dcp.save(dict(state), storage_writer=writer or FileSystemWriter(str(folder)), no_dist=True)
    return folder


def save_zstd_dcp(state: Mapping[str, torch.Tensor], folder: Path) -> Path:
    return save_dcp(state, folder, FileSystemWriter(str(folder), _extensions=[ZStandard()]))


def save_strided_dcp(state: Mapping[str, torch.Tensor], folder: Path) -> Path:
    """Items whose arrays lie transposed in their storages."""
    turned = {key: _transposed(tensor) for key, tensor in state.items()}
    assert any(not tensor.is_contiguous() for tensor in turned.values())
    return save_dcp(turned, folder)


def _transposed(tensor: torch.Tensor) -> torch.Tensor:
    order = list(range(tensor.ndim))[::-1]
    return tensor.permute(order).contiguous().permute(order) if tensor.ndim > 1 else tensor


def save_dcp_of_ranks(state: Mapping[str, torch.Tensor], folder: Path) -> Path:
    """What ``dcp.save`` on a mesh of 2 x 2 ranks leaves behind, one process playing each of them."""
    sizes, placements = (2, 2), _placements(state)
    planners = [DefaultSavePlanner() for _ in range(4)]
    plans = []
    for rank, planner in enumerate(planners):
        with saving.playing(rank, sizes) as mesh:
            local = {
                name: saving.sharded(tensor, mesh, placements[name]) if name in placements else tensor
                for name, tensor in state.items()
            }
            planner.set_up_planner(local, is_coordinator=rank == 0)
            plans.append(planner.create_local_plan())
    decided, metadata = planners[0].create_global_plan(plans)
    writer = FileSystemWriter(str(folder))
    folder.mkdir(parents=True)
    writer.set_up_storage_writer(True)
    results = []
    with quiet():
        for planner, plan in zip(planners, writer.prepare_global_plan(decided), strict=True):
            results.append(writer.write_data(planner.finish_plan(plan), planner).wait())
        writer.finish(metadata, results)
    return folder


def save_torch_hf(state: Mapping[str, torch.Tensor], folder: Path) -> Path:
    """Shard folders of torch's HuggingFaceStorageWriter."""
    with quiet():
        saving.save(state, _placements(state), (2, 2), folder)
    return folder


def _placements(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[Shard, Shard]]:
    # Dims that both axes divide: torch itself mis-saves the others.
    dims = {"layers.0.gate_up": (0, 0), "layers.1.gate_up": (0, 0), "layers.0.wide": (1, 1), "layers.1.wide": (1, 1)}
    return {name: (Shard(first), Shard(second)) for name, (first, second) in dims.items() if name in state}


def save_torch(state: Mapping[str, torch.Tensor], folder: Path) -> Path:
    folder.mkdir(parents=True)
    torch.save(dict(state), folder / "weights.pt")
    return folder / "weights.pt"


SOURCES: dict[str, Callable[[Mapping[str, torch.Tensor], Path], Path]] = {
    "safetensors": save_safetensors,
    "safetensors-sharded": save_sharded_safetensors,
    "dcp": save_dcp,
    "dcp-of-ranks": save_dcp_of_ranks,
    "dcp-zstd": save_zstd_dcp,
    "dcp-strided": save_strided_dcp,
    "torch-hf": save_torch_hf,
    "torch": save_torch,
}


# --- reading targets ----------------------------------------------------------------------------------------


def read(path: Path, format: str, like: Mapping[str, torch.Tensor]) -> State:
    """Whole tensors of a target, by the format's own library; ``like`` tells torch what to ask for."""
    if format == "safetensors":
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        return {key: tensor for file in files for key, tensor in load_file(file).items()}
    wanted = {key: torch.zeros_like(tensor, memory_format=torch.contiguous_format) for key, tensor in like.items()}
    reader = FileSystemReader(str(path)) if format == "dcp" else HuggingFaceStorageReader(str(path))
    with quiet():
        dcp.load(wanted, storage_reader=reader, no_dist=True)
    return wanted


@contextmanager
def quiet() -> Iterator[None]:
    """torch warns of what it is told not to do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def assert_equal(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """The same names, types, shapes and bits."""
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert bits(found[name]) == bits(tensor), name


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""


# --- our side -----------------------------------------------------------------------------------------------


def run(source: Path | str, target: Path | str, format: str, layout: object = None, **options: Any) -> JobReport:
    """A conversion of the whole source, in this process. ``producer`` and ``threads`` are not options of the target."""
    origin = {"uri": str(source), "producer": options.pop("producer", None)}
    threads = options.pop("threads", None)
    destination = {"uri": str(target), "format": format, "layout": layout, **options}
    return convert(job_document({"source": origin, "targets": [destination], "options": {"threads": threads}}))


def compare(a: Path | str, b: Path | str, **options: Any) -> Diff:
    return diff(*(open_source(SourceDocument(uri=str(uri))) for uri in (a, b)), **options)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
