"""Staging: whose it is, what is adopted from an interrupted attempt, and what must not be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reshard_service.engine.claims import Claims
from reshard_service.engine.mover import Mover
from reshard_service.engine.staging import Staging
from reshard_service.errors import StorageFailed, TargetBusy
from tests.engine.checkpoints import compare, contents, filled, run, save_safetensors, tiny_budget
from tests.oracles.gang import ROOT

STATE = {"w": filled((50, 30), torch.float32, 1), "v": filled((9, 5), torch.bfloat16, 2)}

_SLOW = """
import sys
from reshard_service.cli import main
from reshard_service.engine.source import Source
whole = Source.check_unchanged
def check(self):
    print("copied", flush=True)
    sys.stdin.readline()
    whole(self)
Source.check_unchanged = check
sys.argv = ["reshard", *sys.argv[1:]]
main()
"""


@pytest.fixture(autouse=True)
def _small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reshard_service.conversion.prepare.default_budget", lambda *_, **__: tiny_budget())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_safetensors(STATE, tmp_path / "in")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


def interrupted(source: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A conversion that fails when everything is copied; gives its staging folder."""

    def stop(self: object) -> None:
        raise StorageFailed("stopped here")

    with monkeypatch.context() as patch:
        patch.setattr("reshard_service.engine.source.Source.check_unchanged", stop)
        with pytest.raises(StorageFailed, match=r"finished files wait in .*the same command goes on"):
            run(source, target, "dcp", "fsdp=3")
    [staging] = [path for path in target.parent.iterdir() if ".reshard-" in path.name]
    return staging


@pytest.mark.faults
@pytest.mark.parametrize("target", ["out", "out.safetensors"])
def test_a_second_run_is_refused_while_the_first_lives(target: str, source: Path, place: Path) -> None:
    options = ["--to", "dcp", "--layout", "fsdp=2"] if target == "out" else []
    command = [sys.executable, "-c", _SLOW, "convert", str(source), str(place / target), *options]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        assert first.stdin is not None
        assert first.stdout.readline() == b"copied\n"
        before = contents(place)
        for overwrite in ("never", "same", "always"):
            with pytest.raises(TargetBusy, match=f"process {first.pid} "):
                run(
                    source,
                    place / target,
                    "dcp" if options else "safetensors",
                    "fsdp=2" if options else None,
                    overwrite=overwrite,
                )
        assert contents(place) == before
        first.stdin.write(b"\n")
        first.stdin.close()
        assert first.wait() == 0
    assert compare(source, place / target).same
    assert not any(".reshard-" in path.name for path in place.iterdir())


def test_a_process_that_is_committing_keeps_others_away(source: Path, place: Path, tmp_path: Path) -> None:
    staging = Staging(place / "out", "0" * 32, single_file=False)
    holder = "import sys; from pathlib import Path; from reshard_service.engine.claims import Claims\n"
    holder += "Claims(Path(sys.argv[1])).take('it'); print('held', flush=True); sys.stdin.read()"
    beside = staging.folder.with_name(f"{staging.folder.name}.committing")
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(beside / "claims")],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        staging.folder.mkdir()
        (staging.folder / "data").write_text("theirs")
        with pytest.raises(TargetBusy):
            staging.begin()
        staging.clear_rubbish()
        assert not staging.abandon()
        staging.remove()
        assert (staging.folder / "data").read_text() == "theirs"
        other.kill()
    staging.begin()
    assert not beside.exists()
    assert not (staging.folder / "data").exists()
    staging.remove()
    assert list(place.iterdir()) == []


def test_finished_files_are_not_copied_again(source: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(source, place / "out", monkeypatch)

    def never(self: object, batch: object) -> None:
        raise AssertionError("something was copied")

    monkeypatch.setattr(Mover, "_flush", never)
    monkeypatch.setattr(Mover, "run", lambda self, batch: list(self._steps(batch)) and never(self, batch))
    report = run(source, place / "out", "dcp", "fsdp=3")
    assert report.targets[0].adopted_files == 3
    assert compare(source, place / "out").same


@pytest.mark.faults
@pytest.mark.parametrize(
    "damage", ["bit", "shorter", "gone", "receipt gone", "receipt damaged", "receipt of another", "digest left out"]
)
def test_only_what_is_still_as_its_receipt_says_is_adopted(
    damage: str, source: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging = interrupted(source, place / "out", monkeypatch)
    data, receipt = staging / "__1_0.distcp", staging / ".reshard" / "receipts" / "1.json"
    assert data.is_file()
    told = json.loads(receipt.read_bytes())
    if damage == "bit":
        content = bytearray(data.read_bytes())
        content[-700] ^= 4
        data.write_bytes(content)
    elif damage == "shorter":
        os.truncate(data, data.stat().st_size - 1)
    elif damage == "gone":
        data.unlink()
    elif damage == "receipt gone":
        receipt.unlink()
    elif damage == "receipt damaged":
        receipt.write_bytes(receipt.read_bytes()[:-5])
    elif damage == "receipt of another":
        receipt.write_text(json.dumps(told | {"path": "__0_0.distcp"}))
    else:
        receipt.write_text(json.dumps(told | {"segments": told["segments"][:-1]}))
    report = run(source, place / "out", "dcp", "fsdp=3")
    assert report.targets[0].adopted_files == 2
    assert [path.name for path in place.iterdir()] == ["out"]
    fresh = place.parent / "fresh"
    run(source, fresh / "out", "dcp", "fsdp=3")
    assert contents(place) == contents(fresh)


def test_another_plan_has_staging_of_its_own(source: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staging = interrupted(source, place / "out", monkeypatch)
    run(source, place / "out", "dcp", "fsdp=2")
    assert compare(source, place / "out").same
    assert sorted(path.name for path in place.iterdir()) == [staging.name, "out"]


@pytest.mark.parametrize(
    "name", ["x.e2.safetensors", "a*[b]?.safetensors", "müßig \u2603.safetensors", "-x.safetensors"]
)
def test_awkward_names_are_names_like_any_other(
    name: str, source: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: object) -> None:
        raise StorageFailed("stopped here")

    with monkeypatch.context() as patch:
        patch.setattr("reshard_service.engine.source.Source.check_unchanged", stop)
        with pytest.raises(StorageFailed):
            run(source, place / name, "safetensors")
    assert run(source, place / name, "safetensors").targets[0].adopted_files == 1
    assert sorted(path.name for path in place.iterdir()) == sorted([name, f"{name}.reshard.json"])


def test_an_attempt_that_was_taken_over_touches_nothing_more(source: Path, place: Path) -> None:
    first, second = (Staging(place / "out", "0" * 32, single_file=False) for _ in range(2))
    first.begin()
    second.begin()  # of the same process, which knows that it gave the first up
    (second.folder / "data.e2").write_text("unfinished")
    with pytest.raises(TargetBusy):
        first.commit(replace=False)
    assert not first.abandon()
    first.remove()
    assert (second.folder / "data.e2").is_file()
    second.remove()
    assert list(place.iterdir()) == []


def test_a_failed_attempt_without_finished_files_leaves_nothing(
    source: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise StorageFailed("stopped here")

    monkeypatch.setattr(Claims, "check", stop)
    with pytest.raises(StorageFailed):
        run(source, place / "out", "dcp", "fsdp=3")
    assert list(place.iterdir()) == []
