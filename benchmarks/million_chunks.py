"""Open and plan a DCP checkpoint of a million chunks: how long, and how much memory?

    python benchmarks/million_chunks.py [--tensors 12500] [--chunks 80] [--rounds 3]

Makes the ``.metadata`` with torch's own classes and torch's own way of pickling (a process of its own, so that nothing
measured has torch in it) beside sparse data files of the right sizes, then opens it and plans it in a fresh process a
round. Memory is the sum over the process and the child that unpickles, sampled every 20 ms. Promised: 10 s
(median of the rounds) and 1.5 GB (each round).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROWS, COLUMNS, ITEM_OVERHEAD = 300, 4096, 1577
PROMISED_SECONDS, PROMISED_BYTES = 10.0, 1_500_000_000

TWO_D = """
version: 1
mesh: {{axes: [[fsdp, {fsdp}], [tp, 2]]}}
rules: [{{match: "**.up_proj.weight", placements: {{tp: shard(1)}}}}]
"""


def make(folder: Path, tensors: int, chunks: int) -> None:
    """One FSDP save of ``tensors`` bf16 matrices over ``chunks`` ranks, data files all holes."""
    import gc
    import pickle
    import uuid

    import torch
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorProperties,
        TensorStorageMetadata,
    )

    gc.disable()
    item = ROWS * COLUMNS * 2 + ITEM_OVERHEAD
    names = [f"layers.{t // 10}.mlp.experts.{t % 10}.up_proj.weight" for t in range(tensors)]
    entries = {
        f"model.{name}": TensorStorageMetadata(
            TensorProperties(dtype=torch.bfloat16),
            torch.Size((chunks * ROWS, COLUMNS)),
            [ChunkStorageMetadata(torch.Size((r * ROWS, 0)), torch.Size((ROWS, COLUMNS))) for r in range(chunks)],
        )
        for name in names
    }
    files = [f"__{r}_0.distcp" for r in range(chunks)]
    storage = {
        MetadataIndex(f"model.{name}", (r * ROWS, 0), r): _StorageInfo(files[r], t * item, item)
        for r in range(chunks)
        for t, name in enumerate(names)
    }
    paths = {f"model.{name}": ("model", name) for name in names}
    meta = StorageMeta(folder, uuid.uuid4().hex)
    with open(folder / ".metadata", "wb") as file:
        pickle.dump(Metadata(entries, paths, storage, meta, "1.0.0"), file)
    for r in range(chunks):
        with open(folder / f"__{r}_0.distcp", "wb") as file:
            file.truncate(tensors * item)


def measure(folder: Path, target: str, layout: str | None) -> None:
    """Open and plan; prints seconds of each."""
    from reshard_service.conversion.prepare import open_source, prepare_target
    from reshard_service.documents.job import JobDocument

    started = time.perf_counter()
    wanted = {"uri": str(folder.parent / "target"), "format": target, "part": "model"}
    if layout is not None:
        wanted["layout"] = layout
    job = JobDocument.model_validate({"version": 1, "source": {"uri": str(folder)}, "targets": [wanted]})
    catalogue = open_source(job.source)
    opened = time.perf_counter()
    plan = prepare_target(job, job.targets[0], catalogue).plan
    planned = time.perf_counter()
    if plan.problems:
        raise SystemExit(f"the plan has problems: {plan.problems[0]}")
    figures = {"open": opened - started, "plan": planned - opened, "chunks": len(catalogue.chunks)}
    print(json.dumps(figures | {"target_chunks": len(plan.design.chunks)}))


def _resident_bytes(pid: int) -> int:
    """Of a process and its children, now."""
    try:
        status = Path(f"/proc/{pid}/statm").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return 0
    resident = int(status.split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resident + sum(_resident_bytes(int(child)) for child in children.split())


def _watched(command: list[str]) -> tuple[dict[str, float], float, int]:
    """What the command printed, its wall time, and the most its process tree held."""
    started = time.perf_counter()
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            peak = max(peak, _resident_bytes(process.pid))
            time.sleep(0.02)
        assert process.stdout is not None
        printed = process.stdout.read()
    if process.returncode:
        raise SystemExit(process.returncode)
    return json.loads(printed), time.perf_counter() - started, peak


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tensors", type=int, default=12500)
    parser.add_argument("--chunks", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to make the data (default: a temporary folder)")
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        kind, folder, *rest = arguments.step
        if kind == "make":
            make(Path(folder), arguments.tensors, arguments.chunks)
        else:
            measure(Path(folder), rest[0], rest[1] if len(rest) > 1 else None)
        return 0
    me = [sys.executable, __file__, "--tensors", str(arguments.tensors), "--chunks", str(arguments.chunks), "--step"]
    base = Path(tempfile.mkdtemp(prefix="million-chunks-", dir=arguments.folder))
    kept = True
    try:
        folder = base / "checkpoint"
        folder.mkdir()
        subprocess.run([*me, "make", str(folder)], check=True)
        size = (folder / ".metadata").stat().st_size
        print(f"{arguments.tensors * arguments.chunks} chunks, .metadata of {size / 1e6:.0f} MB")
        print(f"{'target':28}{'open s':>8}{'plan s':>8}{'wall s':>8}{'peak GB':>9}")
        rows = max(1, arguments.chunks * 3 // 4)
        columns = base / "2-D.yaml"
        columns.write_text(TWO_D.format(fsdp=rows), encoding="utf-8")
        targets = [["dcp", f"fsdp={rows}"], ["dcp", str(columns)], ["safetensors"]]
        for target in targets:
            walls = []
            title = " ".join(target).replace(str(columns), f"fsdp={rows},tp=2 (2-D)")
            for _ in range(arguments.rounds):
                figures, wall, peak = _watched([*me, "measure", str(folder), *target])
                print(
                    f"{title:28}{figures['open']:8.2f}{figures['plan']:8.2f}{wall:8.2f}{peak / 1e9:9.2f}",
                    flush=True,
                )
                walls.append(wall)
                kept &= peak <= PROMISED_BYTES
            kept &= statistics.median(walls) <= PROMISED_SECONDS
    finally:
        shutil.rmtree(base, ignore_errors=True)
    print(f"promised {PROMISED_SECONDS:.0f} s and {PROMISED_BYTES / 1e9:.1f} GB: {'kept' if kept else 'NOT kept'}")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
