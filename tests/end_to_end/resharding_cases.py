"""Which checkpoint becomes which layout, and the one gang program that judges all of them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.oracles.checkpoints import Checkpoints
from tests.oracles.command import reshard
from tests.oracles.gang import Task, run_gangs
from tests.oracles.models import Run


@dataclass(frozen=True, slots=True)
class Case:
    """``form`` of what ``model`` saved as ``source``, to be resumed as ``target``."""

    model: str
    source: str
    form: str
    target: str
    elsewhere: bool = False
    """Also load the result into a layout that it was not cut for."""

    @property
    def name(self) -> str:
        return f"{self.model}-{self.source}-{self.form}-to-{self.target}"

    @property
    def saved(self) -> Run:
        return Run(self.model, self.source)

    @property
    def resumed(self) -> Run:
        return Run(self.model, self.target)


CASES = (
    # transformers' own proof, the other way round: one source, every kind of target.
    Case("moe", "fsdp2-tp2", "nested", "fsdp4", elsewhere=True),
    Case("moe", "fsdp2-tp2", "flat", "tp4", elsewhere=True),
    Case("moe", "fsdp2-tp2", "nested", "fsdp4-ep2", elsewhere=True),
    Case("moe", "fsdp2-tp2", "flat", "fsdp2-tp2-ep4"),
    Case("moe", "fsdp2-tp2", "nested", "fsdp3"),
    Case("moe", "fsdp4-ep2", "flat", "fsdp2-tp2"),
    Case("moe", "fsdp4-ep2", "nested", "fsdp3"),
    Case("llama", "fsdp4", "nested", "fsdp2-tp2", elsewhere=True),
    Case("llama", "fsdp4", "per-rank-metadata", "fsdp3"),
    Case("llama", "fsdp4", "zstd", "hsdp2x2"),
    Case("llama", "fsdp4", "file-per-item", "tp2"),
    Case("llama", "fsdp3", "nested", "tp4"),
    Case("llama", "hsdp2x2", "flat", "fsdp3"),
    Case("llama", "tp2", "nested", "fsdp2-tp2"),
    Case("llama", "fsdp2-tp2", "flat", "hsdp2x2"),
    Case("llama", "fsdp2-tp2", "nested", "fsdp4"),
    Case("llama-tied", "fsdp4", "nested", "fsdp2-tp2"),
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one case. ``ranks`` is what every rank of :func:`tests.oracles.resuming.resume` returned."""

    conversion_failed: str | None
    ranks: list[dict[str, Any]]
    resume_failed: str | None
    elsewhere: list[dict[str, Any]]
    elsewhere_failed: str | None

    def resumed(self) -> list[dict[str, Any]]:
        assert self.conversion_failed is None, self.conversion_failed
        assert self.resume_failed is None, self.resume_failed
        return self.ranks

    def loaded_elsewhere(self) -> list[dict[str, Any]]:
        assert self.conversion_failed is None, self.conversion_failed
        assert self.elsewhere_failed is None, self.elsewhere_failed
        return self.elsewhere


def judge_all(checkpoints: Checkpoints, folder: Path) -> None:
    """Converts every case into ``folder/<name>``, resumes it in one program of gangs, writes ``verdicts.json``."""
    failed: dict[str, str] = {}
    tasks = []
    for case in CASES:
        target = folder / case.name
        done = reshard(
            "convert", checkpoints.of(case.saved, case.form), target, "--to", "dcp", "--layout", case.resumed.layout
        )
        if done.code:
            failed[case.name] = str(done)
            continue
        truth = str(checkpoints.truth(case.saved))
        tasks.append(
            Task(
                case.name,
                case.resumed.world,
                "resuming:resume",
                {
                    "model": case.model,
                    "spread": case.target,
                    "initial": str(checkpoints.initial(case.model)),
                    "checkpoint": str(target),
                    "flat": case.form == "flat",
                    "truth": truth,
                },
            )
        )
        if case.elsewhere:
            arguments = {"checkpoint": str(target), "truth": truth, "form": "nested"}
            tasks.append(Task(f"{case.name} elsewhere", 3, "resuming:load_elsewhere", arguments))
    outcomes = run_gangs(tasks)
    verdicts = {}
    for case in CASES:
        outcome, other = outcomes.get(case.name), outcomes.get(f"{case.name} elsewhere")
        verdicts[case.name] = asdict(
            Verdict(
                conversion_failed=failed.get(case.name),
                ranks=outcome.ranks if outcome else [],
                resume_failed=outcome.error if outcome else "never run",
                elsewhere=other.ranks if other else [],
                elsewhere_failed=other.error if other else "never run",
            )
        )
    (folder / "verdicts.json").write_text(json.dumps(verdicts), encoding="utf-8")


def read_verdicts(folder: Path) -> dict[str, Verdict]:
    return {name: Verdict(**fields) for name, fields in json.loads((folder / "verdicts.json").read_text()).items()}
