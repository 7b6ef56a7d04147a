"""What is measured: each case one conversion, and the ways that exist to do it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_TWO_BY_TWO = str(_HERE.parent / "examples" / "layouts" / "fsdp2-tp2-llama.yaml")


@dataclass(frozen=True, slots=True)
class Case:
    """One conversion of one of the checkpoints. ``promised`` is the wall time we aim at, in times of ``cp``."""

    name: str
    title: str
    model: str
    kind: str
    """Format of the source."""
    options: tuple[str, ...]
    promised: float
    torch: tuple[str, ...]
    """Tasks of ``torch_tools`` that do the same."""

    @property
    def source(self) -> str:
        return f"{self.model}-{self.kind}"

    def ours(self, source: Path, target: Path) -> list[str]:
        return [sys.executable, "-m", "reshard_service.cli", "convert", str(source), str(target), *self.options]

    def copy(self, source: Path, target: Path) -> list[str]:
        """``cp`` of the source: the floor for anything that reads and writes all its bytes (decision 32)."""
        plain = ["cp", "-r"] if sys.platform == "darwin" else ["cp", "-r", "--reflink=never"]
        return [*plain, str(source), str(target)]

    def theirs(self, task: str, source: Path, target: Path) -> list[str]:
        return [sys.executable, "-m", "benchmarks.torch_tools", task, str(source), str(target)]

    def diff(self, source: Path, target: Path) -> list[str]:
        return [sys.executable, "-m", "reshard_service.cli", "diff", str(source), str(target), "--part", "all"]


CASES = (
    Case(
        "gather",
        "DCP of 8 FSDP ranks → safetensors",
        "weights",
        "dcp",
        ("--to", "safetensors"),
        1.0,
        ("load_then_safetensors", "torch_save_then_safetensors"),
    ),
    Case(
        "rows",
        "DCP of 8 FSDP ranks → DCP of 4",
        "weights",
        "dcp",
        ("--to", "dcp", "--layout", "fsdp=4"),
        1.0,
        ("reshard_fsdp4",),
    ),
    Case(
        "columns",
        "DCP of 8 FSDP ranks → DCP of 2 FSDP × 2 TP",
        "weights",
        "dcp",
        ("--to", "dcp", "--layout", _TWO_BY_TWO),
        1.25,
        ("reshard_2x2",),
    ),
    Case(
        "scatter",
        "safetensors → DCP of 2 FSDP × 2 TP",
        "weights",
        "safetensors",
        ("--to", "dcp", "--layout", _TWO_BY_TWO),
        1.25,
        ("reshard_2x2",),
    ),
    Case(
        "training",
        "model and AdamW moments, DCP of 8 FSDP ranks → DCP of 2 FSDP × 2 TP",
        "training",
        "dcp",
        ("--to", "dcp", "--layout", _TWO_BY_TWO),
        1.25,
        ("reshard_2x2",),
    ),
    Case(
        "experts",
        "many experts, DCP of 8 ranks → safetensors",
        "experts",
        "dcp",
        ("--to", "safetensors"),
        2.0,
        ("load_then_safetensors",),
    ),
    Case(
        "experts-back",
        "many experts, safetensors → DCP of 1 rank",
        "experts",
        "safetensors",
        ("--to", "dcp"),
        2.0,
        ("safetensors_then_save",),
    ),
    Case(
        "experts-rows",
        "many experts, safetensors → DCP of 4 FSDP ranks, four chunks each",
        "experts",
        "safetensors",
        ("--to", "dcp", "--layout", "fsdp=4"),
        2.0,
        ("reshard_fsdp4",),
    ),
)
