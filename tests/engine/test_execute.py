"""A run of a plan: threads that fail or are told to stop, what watchers see, and what a report says."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reshard_service.catalogue import Catalogue
from reshard_service.conversion import open_source
from reshard_service.documents.job import SourceDocument
from reshard_service.engine import execute as execute_module
from reshard_service.engine.execute import Execution, execute
from reshard_service.engine.mover import Mover
from reshard_service.engine.targets import LocalTarget
from reshard_service.errors import Cancelled, CoverageError, StorageFailed
from reshard_service.formats.dcp.writer import design_dcp
from reshard_service.formats.options import WriteOptions
from reshard_service.formats.target import Selection
from reshard_service.layouts.shorthand import parse_layout
from reshard_service.planning.batches import Batch
from reshard_service.planning.plan import Plan, make_plan, require_sound
from tests.engine.checkpoints import compare, filled, run, save_safetensors, tiny_budget

STATE = {f"layers.{n}.w": filled((40, 30), torch.float32, n) for n in range(12)}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_safetensors(STATE, tmp_path / "in")


def planned(source: Path, layout: str = "fsdp=4") -> Plan:
    catalogue: Catalogue = open_source(SourceDocument(uri=str(source)))
    selection = Selection(catalogue, catalogue.tensors, np.arange(len(catalogue.tensors), dtype=np.int64))
    plan = make_plan(catalogue, design_dcp(selection, parse_layout(layout), WriteOptions()), budget=tiny_budget(4))
    require_sound(plan)
    return plan


def executed(plan: Plan, target: Path, threads: int = 4, **options: Any) -> Execution:
    return execute(plan, LocalTarget(target, plan.digest, False, False), tiny_budget(threads), **options)


def test_watchers_see_every_phase_and_every_byte(source: Path, tmp_path: Path) -> None:
    plan, phases, lock = planned(source), [], threading.Lock()
    written = [0]

    def progress(count: int) -> None:
        with lock:
            written[0] += count

    done = executed(plan, tmp_path / "out", phase=phases.append, progress=progress)
    assert phases == ["copying", "verifying", "committing"]
    assert written[0] == plan.design.data_bytes
    assert done.written_bytes == sum(p.stat().st_size for p in (tmp_path / "out").iterdir()) - _manifest_bytes(tmp_path)
    assert done.adopted_files == 0
    assert done.read_bytes >= plan.read_bytes
    assert compare(source, tmp_path / "out").same


def _manifest_bytes(tmp_path: Path) -> int:
    return (tmp_path / "out" / "reshard.manifest.json").stat().st_size


@pytest.mark.parametrize("threads", [1, 2, 5, 16])
def test_any_number_of_threads_does_every_batch_once(
    threads: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, done = planned(source), []
    whole = Mover.run
    monkeypatch.setattr(Mover, "run", lambda self, batch: (done.append(id(batch)), whole(self, batch))[1])
    executed(plan, tmp_path / "out", threads)
    assert sorted(done) == sorted(id(batch) for batch in plan.batches)
    assert compare(source, tmp_path / "out").same


@pytest.mark.faults
@pytest.mark.parametrize("failing", ["__init__", "run"])
def test_an_error_in_one_thread_stops_all_and_is_the_error_of_the_run(
    failing: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(source)
    whole: Callable[..., Any] = getattr(Mover, failing)
    calls: list[int] = []

    def fail_second(self: Mover, *arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise StorageFailed("the second one failed")
        return whole(self, *arguments, **options)

    monkeypatch.setattr(Mover, failing, fail_second)
    before = threading.active_count()
    with pytest.raises(StorageFailed, match="the second one failed"):
        executed(plan, tmp_path / "out")
    assert threading.active_count() == before
    assert not (tmp_path / "out").exists()


@pytest.mark.faults
@pytest.mark.parametrize("after", [0, 1, 7, 30])
def test_a_run_that_is_cancelled_shows_nothing_and_goes_on_later(after: int, source: Path, tmp_path: Path) -> None:
    plan, asked = planned(source), [0]

    def cancelled() -> bool:
        asked[0] += 1
        return asked[0] > after

    with pytest.raises(Cancelled):
        executed(plan, tmp_path / "out", cancelled=cancelled)
    assert not (tmp_path / "out").exists()
    executed(plan, tmp_path / "out")
    assert compare(source, tmp_path / "out").same
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.faults
def test_an_interrupt_of_the_main_thread_waits_for_the_others(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, begun = planned(source), threading.Event()
    whole = Mover.run

    def run_one(self: Mover, batch: Batch) -> None:
        begun.set()
        whole(self, batch)

    class Interrupting(threading.Thread):
        def join(self, timeout: float | None = None) -> None:
            if timeout is not None:
                begun.wait()
                raise KeyboardInterrupt
            super().join()

    monkeypatch.setattr(Mover, "run", run_one)
    monkeypatch.setattr(execute_module.threading, "Thread", Interrupting)
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        executed(plan, tmp_path / "out")
    assert threading.active_count() == before
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    executed(plan, tmp_path / "out")
    assert compare(source, tmp_path / "out").same


def test_a_plan_with_problems_is_not_carried_out(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **options: Any) -> Plan:
        from dataclasses import replace

        from reshard_service.catalogue import Notice

        return replace(make_plan(*arguments, **options), problems=(Notice("coverage", "a gap", "layers.0.w"),))

    monkeypatch.setattr("reshard_service.conversion.prepare.make_plan", broken)
    with pytest.raises(CoverageError, match=r"layers\.0\.w.*a gap"):
        run(source, tmp_path / "out", "dcp")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
