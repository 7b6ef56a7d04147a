"""Conversions against ``cp`` of the same bytes and against torch's own tools, in turn, from a cold and a warm cache.

    make bench ARGS="--quick"         (or: python -m benchmarks [--cases gather columns …] [--json FILE])

Makes its own checkpoints, once, under ``--folder`` (at full size 18 GB, and 8 GB more while it runs). In each round
every contender runs once, one after another, each in a process of its own and each followed by ``sync``; a ratio is
that of two runs of the same round, and the table has the median of the rounds. Every output is compared with its
source once, tensor by tensor. What a shared machine does to one number it does to its neighbours: trust the ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.cases import CASES, Case
from benchmarks.measuring import MeasurementFailed, Run, make_cold, make_warm, run
from benchmarks.models import models

HEADING = f"{'':44}{'wall s':>8}{'× cp':>7}{'(range)':>15}{'CPU s':>8}{'peak MB':>9}"
PROMISED_PEAK_BYTES = 200_000_000
_OURS = "import reshard_service.cli.app, reshard_service.cli.commands_convert, reshard_service.conversion.run"
_THEIRS = "import benchmarks.torch_tools"


@dataclass(slots=True)
class Contender:
    """One way to do a case, and its runs, one per round it took part in."""

    name: str
    command: list[str]
    start: list[str]
    """Loads the program and does nothing: from a cold cache the checkpoint is measured, not the program's own files."""
    runs: list[Run] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)

    @property
    def figures(self) -> dict[str, object]:
        return {
            "name": self.name,
            "wall_seconds": [round(run.wall_seconds, 3) for run in self.runs],
            "cpu_seconds": [round(run.cpu_seconds, 3) for run in self.runs],
            "peak_bytes": max(run.peak_bytes for run in self.runs),
            "times_cp": [round(ratio, 3) for ratio in self.ratios],
            "times_cp_median": round(statistics.median(self.ratios), 3),
        }

    def __str__(self) -> str:
        wall = statistics.median(run.wall_seconds for run in self.runs)
        cpu = statistics.median(run.cpu_seconds for run in self.runs)
        spread = f"{min(self.ratios):.2f}-{max(self.ratios):.2f}"
        peak = max(run.peak_bytes for run in self.runs) / 1e6
        return f"  {self.name:42}{wall:8.2f}{statistics.median(self.ratios):7.2f}{spread:>15}{cpu:8.1f}{peak:9.0f}"


class Bench:
    """The folder of checkpoints, and what is run on it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder: Path = options.folder / ("quick" if options.quick else f"scale-{options.scale:g}")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.target = self.folder / "output"
        self.log = self.folder / "log"
        self.models = models(options.quick, options.scale)
        self._compared: set[tuple[str, str]] = set()

    def source(self, case: Case) -> Path:
        """The case's checkpoint, made if it is not there."""
        path = self.folder / case.source
        if not path.exists():
            print(f"making {case.source} …", file=sys.stderr, flush=True)
            making = path.with_name(f"{case.source}.part")
            shutil.rmtree(making, ignore_errors=True)
            size = ["--quick"] if self.options.quick else []
            size += ["--scale", str(self.options.scale)]
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.saving", str(making), case.kind, case.model]
            subprocess.run([*command, *size], check=True)
            making.rename(path)
        return path

    def measure(self, case: Case, cache: str) -> list[Contender]:
        """All rounds of one case from one state of the cache."""
        source = self.source(case)
        contenders = [
            Contender("cp -r, sync", case.copy(source, self.target), ["cp", "--version"]),
            Contender("reshard convert", case.ours(source, self.target), [sys.executable, "-c", _OURS]),
            *(
                Contender(f"torch: {task}", case.theirs(task, source, self.target), [sys.executable, "-c", _THEIRS])
                for task in case.torch
            ),
        ]
        for number in range(self.options.rounds):
            taking_part = contenders[: 2 if number >= self.options.torch_rounds else None]
            for contender in taking_part:
                self._prepare(contender, source, cache)
                contender.runs.append(run(contender.command, self.log))
                self._compare(case, contender, source)
                shutil.rmtree(self.target, ignore_errors=True)
            for contender in taking_part:
                contender.ratios.append(contender.runs[-1].wall_seconds / contenders[0].runs[-1].wall_seconds)
        return [contender for contender in contenders if contender.runs]

    def _prepare(self, contender: Contender, source: Path, cache: str) -> None:
        shutil.rmtree(self.target, ignore_errors=True)
        (make_cold if cache == "cold" else make_warm)(source)
        subprocess.run(contender.start, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)

    def _compare(self, case: Case, contender: Contender, source: Path) -> None:
        if contender.command[0] == "cp" or (case.name, contender.name) in self._compared:
            return
        self._compared.add((case.name, contender.name))
        done = subprocess.run(case.diff(source, self.target), capture_output=True, text=True, check=False)
        if done.returncode:
            raise MeasurementFailed(
                f"{case.name}: the output of {contender.name} is not its source\n{done.stdout}{done.stderr}"
            )


def load() -> str:
    """What else the machine does: load, and the share of the last 10 s in which something waited for CPU or disk."""
    words = [f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"]
    for resource in ("cpu", "io"):
        with contextlib.suppress(OSError, IndexError):
            stalled = Path(f"/proc/pressure/{resource}").read_text().split()[1].removeprefix("avg10=")
            words.append(f"{resource} waited for {float(stalled):.0f} %")
    return ", ".join(words)


def main() -> int:
    options = _options()
    bench = Bench(options)
    cases = [case for case in CASES if not options.cases or case.name in options.cases]
    results = []
    kept = True
    for case in cases:
        size = sum(path.stat().st_size for path in bench.source(case).iterdir())
        tensors = bench.models[case.model].tensors
        for cache in options.caches:
            before = load()
            what = f"{case.title}: {tensors:,} tensors, {size / 1e9:.2f} GB, {cache}"
            print(f"\n{what}  [{before}]\n{HEADING}", flush=True)
            contenders = bench.measure(case, cache)
            for contender in contenders:
                print(contender, flush=True)
            ours = contenders[1]
            kept &= cache == "warm" or statistics.median(ours.ratios) <= case.promised
            kept &= max(run.peak_bytes for run in ours.runs) <= PROMISED_PEAK_BYTES
            results.append(
                {
                    "case": case.name,
                    "cache": cache,
                    "bytes": size,
                    "load": before,
                    "promised_times_cp": case.promised,
                    "contenders": [contender.figures for contender in contenders],
                }
            )
    if options.json:
        options.json.write_text(json.dumps({"results": results}, indent=1), encoding="utf-8")
    if options.quick:
        print("\nso small that starting takes longest: nothing to conclude from these figures")
        return 0
    print(f"\npromises (cold, and {PROMISED_PEAK_BYTES // 10**6} MB): {'kept' if kept else 'NOT all kept'}")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES], help="default: all")
    parser.add_argument("--quick", action="store_true", help="tiny checkpoints: does it run at all?")
    parser.add_argument("--scale", type=float, default=1.0, help="of the checkpoints; 1.0 is 4.0, 6.1 and 1.8 GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--torch-rounds", type=int, default=1, help="rounds that torch's tools take part in")
    parser.add_argument("--caches", nargs="+", choices=("cold", "warm"), default=["cold", "warm"])
    parser.add_argument("--folder", type=Path, default=Path(".bench"), help="where the checkpoints are made and kept")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()
