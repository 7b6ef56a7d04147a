"""Gangs of real ranks: one process imports torch and transformers once, then forks a gloo gang per task.

Importing them costs seconds, a fork costs milliseconds; so ``run_gangs`` starts one program for a whole list of tasks.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_TASK_SECONDS = 300


@dataclass(frozen=True, slots=True)
class Task:
    """``function`` (``module:name`` below this package) called on ``world`` ranks with JSON-able arguments."""

    name: str
    world: int
    function: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What each rank returned, or why the gang failed."""

    ranks: list[Any]
    error: str | None = None

    def result(self) -> list[Any]:
        """Each rank's return value; an AssertionError with the ranks' tracebacks if one failed."""
        assert self.error is None, self.error
        return self.ranks


def run_gangs(tasks: Sequence[Task]) -> dict[str, Outcome]:
    """Runs the tasks one after the other, in one new process; one that fails does not stop the others."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder, "work.json")
        work.write_text(
            json.dumps([[task.name, task.world, task.function, task.arguments] for task in tasks]), encoding="utf-8"
        )
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "ignore",
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "OMP_NUM_THREADS": "1",
        }
        if Path("/sys/class/net/lo").exists():
            environment["GLOO_SOCKET_IFNAME"] = "lo"
        command = [sys.executable, "-m", "tests.oracles.gang", str(work)]
        finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert finished.returncode == 0, f"the gangs' program failed:\n{finished.stderr[-4000:]}"
        report = json.loads(Path(folder, "report.json").read_text(encoding="utf-8"))
    return {name: Outcome(ranks, error) for name, (ranks, error) in report.items()}


def _run_rank(rank: int, world: int, folder: Path, function: Callable[..., Any], arguments: dict[str, Any]) -> int:
    """A forked rank's whole life; returns its exit status."""
    import torch.distributed as dist

    log = os.open(folder / f"log-{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
        answer = json.dumps(function(**arguments))
        dist.barrier()
        dist.destroy_process_group()
        (folder / f"answer-{rank}").write_text(answer, encoding="utf-8")
    except BaseException:
        (folder / f"error-{rank}").write_text(traceback.format_exc(), encoding="utf-8")
        return 1
    return 0


def _run_task(world: int, function: Callable[..., Any], arguments: dict[str, Any]) -> Outcome:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        alive: dict[int, int] = {}
        for rank in range(world):
            child = os.fork()
            if child == 0:
                os._exit(_run_rank(rank, world, folder, function, arguments))
            alive[child] = rank
        deadline = time.monotonic() + _TASK_SECONDS
        failed = False
        while alive:
            child, status = os.waitpid(-1, os.WNOHANG)
            if child:
                del alive[child]
                failed = failed or status != 0
            else:
                time.sleep(0.005)
            if (failed or time.monotonic() > deadline) and alive:
                # The others would wait for the lost rank until gloo gives up.
                failed = True
                for other in alive:
                    os.kill(other, 9)
        if failed:
            errors = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("error-*"))]
            logs = [path.read_text(encoding="utf-8", errors="replace")[-1000:] for path in sorted(folder.glob("log-*"))]
            return Outcome([], "\n".join(errors[:1] or ["a rank died or the gang took too long", *logs]))
        answers = [(folder / f"answer-{rank}").read_text(encoding="utf-8") for rank in range(world)]
        return Outcome([json.loads(answer) for answer in answers])


def _main(work: Path) -> None:
    import torch
    import transformers.models.llama.modeling_llama
    import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401

    torch.set_num_threads(1)
    report = {}
    for name, world, function, arguments in json.loads(work.read_text(encoding="utf-8")):
        module, _, attribute = function.partition(":")
        function_ = getattr(importlib.import_module(f"tests.oracles.{module}"), attribute)
        outcome = _run_task(world, function_, arguments)
        report[name] = (outcome.ranks, outcome.error)
    (work.parent / "report.json").write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
