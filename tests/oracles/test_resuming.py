"""The oracle on trial: with nothing of ours in between it must agree, and it must notice a wrong checkpoint."""

from __future__ import annotations

import pytest

from tests.oracles.checkpoints import Checkpoints
from tests.oracles.gang import Outcome, Task, run_gangs
from tests.oracles.models import Run

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def _task(name: str, checkpoints: Checkpoints, source: Run, truth: Run, spread: str) -> Task:
    arguments = {
        "model": source.model,
        "spread": spread,
        "initial": str(checkpoints.initial(source.model)),
        "checkpoint": str(checkpoints.of(source)),
        "flat": False,
        "truth": str(checkpoints.truth(truth)),
    }
    return Task(name, Run(source.model, spread).world, "resuming:resume", arguments)


@pytest.fixture(scope="module")
def outcomes(checkpoints: Checkpoints) -> dict[str, Outcome]:
    trained, other = Run("llama", "fsdp2-tp2"), Run("llama", "fsdp3")
    moe = Run("moe", "fsdp2-tp2")
    return run_gangs(
        [
            _task("dense", checkpoints, trained, trained, "tp2"),
            _task("experts", checkpoints, moe, moe, "fsdp4-ep2"),
            _task("wrong", checkpoints, other, trained, "tp2"),
            Task("failing", 2, "resuming:load_elsewhere", {"checkpoint": "/nowhere", "truth": "/nowhere", "form": ""}),
        ]
    )


@pytest.mark.parametrize("name", ["dense", "experts"])
def test_torchs_own_checkpoint_resumes_like_the_full_state(name: str, outcomes: dict[str, Outcome]) -> None:
    for rank in outcomes[name].result():
        assert rank["differences"] == []
        assert rank["after"] == []
        assert rank["losses"] == rank["reference_losses"]


def test_a_checkpoint_of_another_run_is_noticed(outcomes: dict[str, Outcome]) -> None:
    for rank in outcomes["wrong"].result():
        assert ".model.lm_head.weight" in rank["differences"]
        assert ".optim.state.lm_head.weight.exp_avg" in rank["differences"]


def test_a_failing_rank_is_reported_and_does_not_hang_the_gang(outcomes: dict[str, Outcome]) -> None:
    error = outcomes["failing"].error
    assert error is not None
    assert "/nowhere" in error
