"""The multi-process checkpoints that all end-to-end tests share, and where each of them lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.oracles.gang import Task, run_gangs
from tests.oracles.models import MODELS, TRAINED, Run

_EXTRAS = {
    "llama-fsdp4": ["zstd", "per-rank-metadata", "file-per-item", "titan"],
    "llama-fsdp3": ["torch-hf"],
    "llama-tied-fsdp4": ["transformers", "transformers-gathered"],
    "moe-fsdp2-tp2": ["transformers", "transformers-optimizer", "transformers-gathered"],
    "moe-fsdp4-ep2": ["transformers", "transformers-optimizer"],
}


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """A folder of checkpoints made by :func:`make_checkpoints`."""

    root: Path

    def initial(self, model: str) -> Path:
        """transformers folder of the untrained model: config and weights."""
        return self.root / f"initial-{model}"

    def of(self, run: Run, form: str = "nested") -> Path:
        """A checkpoint: ``nested`` or ``flat`` DCP of model and optimizer, or one of the run's extras."""
        return self.root / run.name / form

    def truth(self, run: Run) -> Path:
        """``torch.save`` file ``{"model": {fqn: tensor}, "optim": {"state": …, "param_groups": …}}``, gathered."""
        return self.root / run.name / "truth.pt"

    @property
    def of_all_dtypes(self) -> Path:
        """DCP ``{"model": …}`` of three ranks with every dtype, empty shards, scalars and odd strides."""
        return self.root / "dtypes" / "nested"

    @property
    def truth_of_all_dtypes(self) -> Path:
        return self.root / "dtypes" / "truth.pt"

    def losses(self, run: Run) -> Path:
        """JSON list: the losses of the next two steps, uninterrupted."""
        return self.root / run.name / "losses.json"


def make_checkpoints(root: Path) -> None:
    """Trains every run and saves it in every form: about 40 s on two cores."""
    checkpoints = Checkpoints(root)
    tasks = [
        Task(f"initial-{model}", 1, "saving:save_initial", {"model": model, "folder": str(checkpoints.initial(model))})
        for model in MODELS
    ]
    (root / "dtypes").mkdir(exist_ok=True)
    for run in TRAINED:
        (root / run.name).mkdir(exist_ok=True)
        arguments = {
            "model": run.model,
            "spread": run.spread,
            "initial": str(checkpoints.initial(run.model)),
            "folder": str(root / run.name),
            "extras": _EXTRAS.get(run.name, []),
        }
        tasks.append(Task(run.name, run.world, "saving:save_run", arguments))
    tasks.append(Task("dtypes", 3, "saving:save_dtypes", {"folder": str(root / "dtypes")}))
    for outcome in run_gangs(tasks).values():
        outcome.result()
