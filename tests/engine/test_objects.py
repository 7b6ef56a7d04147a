"""Targets in a store without rename: the same bytes, a marker that comes last, and nothing left when it fails."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from reshard_service.engine.claims import this_process
from reshard_service.engine.object_claims import CLAIM_NAME
from reshard_service.engine.source import Source
from reshard_service.engine.targets import ObjectTarget
from reshard_service.errors import ReshardError, SourceChanged, StorageFailed, TargetBusy, TargetExists
from reshard_service.storage.remote import FsspecStorage
from reshard_service.storage.uploads import TemporaryNameWriter, UploadWriter
from tests.engine.checkpoints import (
    COLUMNS,
    PACKED,
    compare,
    contents,
    filled,
    model,
    run,
    save_dcp,
    save_safetensors,
    save_zstd_dcp,
    tiny_budget,
)

STATE = {
    "w": filled((50, 30), torch.float32, 1),
    "v": filled((9, 5), torch.bfloat16, 2),
    "none": torch.zeros(0, 3),
    "step": filled((), torch.float32, 3),
}
OLD = {"w": filled((60, 30), torch.float32, 4), "old": filled((7,), torch.int8, 5)}

JOBS: dict[str, tuple[str, str, object]] = {
    "dcp": ("out", "dcp", "fsdp=3"),
    "safetensors": ("out", "safetensors", None),
    "file": ("out.safetensors", "safetensors", None),
    "dcp-safetensors": ("out", "dcp-safetensors", "fsdp=2"),
    "rank-safetensors": ("out", "rank-safetensors", PACKED),
}


@pytest.fixture
def store() -> str:
    """A folder of the process-wide memory store that no other test uses."""
    return f"memory://{uuid.uuid4().hex}"


@pytest.fixture(autouse=True)
def _small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reshard_service.conversion.prepare.default_budget", lambda *_, **__: tiny_budget(4))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_safetensors(STATE, tmp_path / "in")


def objects(uri: str) -> dict[str, bytes]:
    filesystem = fsspec.filesystem("memory")
    root = filesystem._strip_protocol(uri)
    return {path.removeprefix(f"{root}/"): filesystem.cat_file(path) for path in filesystem.find(root)}


def convert(job: str, source: Path | str, store: str, **options: Any) -> str:
    name, format, layout = JOBS[job]
    return run(source, f"{store}/{name}", format, layout, producer="plain", **options).targets[0].status


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("save", [save_safetensors, save_dcp, save_zstd_dcp], ids=["safetensors", "dcp", "zstd"])
def test_objects_are_byte_for_byte_the_files_of_a_local_target(
    save: Callable[[dict[str, torch.Tensor], Path], Path], job: str, store: str, tmp_path: Path
) -> None:
    source = save(model(), tmp_path / "in")
    (tmp_path / "place").mkdir()
    convert(job, source, str(tmp_path / "place"), verify="full")
    convert(job, source, store, verify="full")
    assert objects(store) == contents(tmp_path / "place")


@pytest.mark.parametrize("target", [("safetensors", None), ("dcp", COLUMNS)], ids=["gathered", "columns"])
@pytest.mark.parametrize("job", JOBS)
def test_objects_are_sources_like_files(
    job: str, target: tuple[str, object], source: Path, store: str, tmp_path: Path
) -> None:
    convert(job, source, store)
    name = JOBS[job][0]
    run(f"{store}/{name}", tmp_path / "back", *target, producer="plain")
    assert compare(tmp_path / "back", source).same


def test_only_objects_without_tensors_are_copied_too(store: str, tmp_path: Path) -> None:
    source = save_dcp({"model": STATE, "epoch": 3, "notes": {"a": [1, 2]}}, tmp_path / "in")  # type: ignore[dict-item]
    for target in (f"{store}/out", str(tmp_path / "out")):
        run(source, target, "dcp", exclude=["w", "v", "none", "step"], part="all")
    assert objects(f"{store}/out") == contents(tmp_path / "out")


def test_the_marker_comes_after_everything_else(source: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    whole = FsspecStorage.create
    monkeypatch.setattr(FsspecStorage, "create", lambda self, path: (order.append(path), whole(self, path))[1])
    convert("dcp", source, store)
    assert order[-2:] == ["reshard.manifest.json", ".metadata"]
    order.clear()
    run(source, f"{store}/shards", "safetensors", max_shard_size="5KB")
    assert order[-2:] == ["reshard.manifest.json", "model.safetensors.index.json"]


# --- what lies there already --------------------------------------------------------------------------------


@pytest.mark.parametrize("job", JOBS)
def test_overwriting_means_the_same_as_on_a_disk(job: str, source: Path, store: str, tmp_path: Path) -> None:
    old = save_safetensors(OLD, tmp_path / "old")
    name, format, _ = JOBS[job]
    wide = {"dcp": "fsdp=7", "dcp-safetensors": "fsdp=5", "rank-safetensors": "fsdp=6"}.get(format)
    run(old, f"{store}/{name}", format, wide)
    if job != "file":
        fsspec.filesystem("memory").pipe_file(f"{store}/{name}/sub/stale.distcp", b"of an older world")
    before = objects(store)
    with pytest.raises(TargetExists):
        convert(job, source, store)
    with pytest.raises(TargetExists):
        convert(job, source, store, overwrite="same")
    assert objects(store) == before
    assert convert(job, source, store, overwrite="always") == "written"
    fresh = f"memory://{uuid.uuid4().hex}"
    convert(job, source, fresh)
    assert objects(store) == objects(fresh)
    assert convert(job, source, store, overwrite="same") == "same"


def test_nothing_but_a_checkpoint_is_replaced(source: Path, store: str) -> None:
    fsspec.filesystem("memory").pipe_file(f"{store}/out/mine.txt", b"precious")
    for overwrite in ("never", "same", "always"):
        with pytest.raises(TargetExists):
            convert("dcp", source, store, overwrite=overwrite)
    assert objects(store) == {"out/mine.txt": b"precious"}


def test_one_file_is_replaced_among_others(source: Path, store: str) -> None:
    convert("file", source, store)
    before = objects(store)
    fsspec.filesystem("memory").pipe_file(f"{store}/other.safetensors", b"another")
    convert("file", source, store, overwrite="always")
    assert objects(store) == before | {"other.safetensors": b"another"}


# --- claims -------------------------------------------------------------------------------------------------


def claim_for(job: str, source: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The claim that the conversion holds while it runs."""
    name = JOBS[job][0]
    held: list[bytes] = []
    whole = Source.check_unchanged
    path = f"out.safetensors{CLAIM_NAME}" if job == "file" else f"{name}/{CLAIM_NAME}"
    with monkeypatch.context() as patch:
        patch.setattr(Source, "check_unchanged", lambda self: (held.append(objects(store)[path]), whole(self))[1])
        convert(job, source, store)
    fsspec.filesystem("memory").rm(f"{store}", recursive=True)
    found: dict[str, Any] = json.loads(held[0])
    return found


@pytest.mark.parametrize("job", ["dcp", "file"])
def test_a_claim_of_another_plan_or_a_living_process_is_respected(
    job: str, source: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = claim_for(job, source, store, monkeypatch)
    assert claim == {"plan": claim["plan"], "attempt": claim["attempt"], **this_process()}
    path = f"{store}/out.safetensors{CLAIM_NAME}" if job == "file" else f"{store}/out/{CLAIM_NAME}"
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        started = json.loads(
            subprocess.run(
                [
                    sys.executable,
                    "-c",
                    "import json, sys; from reshard_service.engine import claims; "
                    "print(json.dumps(claims._started(int(sys.argv[1]))))",
                    str(other.pid),
                ],
                capture_output=True,
                check=True,
            ).stdout
        )
        living = claim | {"pid": other.pid, "started": started}
        for held in (claim | {"plan": "another"}, living):
            fsspec.filesystem("memory").pipe_file(path, json.dumps(held).encode())
            before = objects(store)
            with pytest.raises(TargetBusy):
                convert(job, source, store)
            assert objects(store) == before
        other.kill()
        other.wait()
    assert convert(job, source, store) == "written"
    assert not any(name.endswith(CLAIM_NAME) for name in objects(store))


def test_whoever_was_taken_over_stops_and_removes_nothing(
    source: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Source.check_unchanged

    def taken_over(self: Source) -> None:
        fsspec.filesystem("memory").pipe_file(f"{store}/out/{CLAIM_NAME}", b'{"plan": "x"}')
        whole(self)

    monkeypatch.setattr(Source, "check_unchanged", taken_over)
    with pytest.raises(TargetBusy, match="newer attempt"):
        convert("dcp", source, store)
    assert sorted(objects(store)) == [f"out/{CLAIM_NAME}", *(f"out/__{rank}_0.distcp" for rank in range(3))]


@pytest.mark.faults
@pytest.mark.parametrize("overwrite", ["never", "same", "always"])
@pytest.mark.parametrize("moment", ["check_unchanged", "manifest", "marker"])
@pytest.mark.parametrize("job", ["dcp", "file"])
def test_after_a_kill_the_same_command_goes_on(
    job: str, moment: str, overwrite: str, source: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed process can't clean up: its claim and objects stay."""

    class Killed(BaseException):
        pass

    def kill(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(ObjectTarget, "fail", lambda self, error: None)
        if moment == "check_unchanged":
            patch.setattr(Source, "check_unchanged", kill)
        else:
            wanted = (".metadata",) if moment == "marker" else ("reshard.manifest.json", "out.safetensors.reshard.json")
            whole = ObjectTarget.write_small
            patch.setattr(
                ObjectTarget,
                "write_small",
                lambda self, path, data: (kill if path in wanted else whole)(self, path, data),
            )
        if (job, moment) == ("file", "marker"):
            patch.setattr("reshard_service.engine.object_claims.ObjectClaim.release", kill)
        with pytest.raises(Killed):
            convert(job, source, store, overwrite=overwrite)
    assert any(name.endswith(CLAIM_NAME) for name in objects(store))
    if (job, moment) == ("file", "marker"):
        if overwrite == "never":
            with pytest.raises(TargetExists):
                convert(job, source, store)
            return
        assert convert(job, source, store, overwrite=overwrite) == ("same" if overwrite == "same" else "written")
        return
    with pytest.raises(TargetExists):
        run(source, f"{store}/{JOBS[job][0]}", JOBS[job][1], JOBS[job][2], dtype="fp16")
    assert convert(job, source, store, overwrite=overwrite) == "written"
    fresh = f"memory://{uuid.uuid4().hex}"
    convert(job, source, fresh)
    assert objects(store) == objects(fresh)


# --- failures -----------------------------------------------------------------------------------------------


@contextmanager
def failing(number: int) -> Iterator[list[str]]:
    """The call of that number to the store fails; gives the calls made so far."""
    calls: list[str] = []

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            if len(calls) == number:
                raise StorageFailed(f"{name} failed")
            return call(*arguments, **options)

        return counting

    with pytest.MonkeyPatch.context() as patch:
        for owner, names in (
            (FsspecStorage, ("create", "create_once", "read_bytes", "stat", "list_dir", "open", "remove")),
            (UploadWriter, ("write", "close")),
            (TemporaryNameWriter, ("write", "close")),
        ):
            for name in names:
                patch.setattr(owner, name, counted(name, getattr(owner, name)))
        yield calls


@pytest.mark.faults
@pytest.mark.parametrize("job", ["dcp", "file"])
def test_after_any_failure_nothing_is_there_and_the_same_command_succeeds(
    job: str, source: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reshard_service.conversion.prepare.default_budget", lambda *_, **__: tiny_budget(1))
    convert(job, source, f"{store}/undisturbed")
    expected = objects(f"{store}/undisturbed")
    failed: set[str] = set()
    for number in range(1, 1000):
        place = f"{store}/{number}"
        with failing(number) as calls:
            error: ReshardError | None = None
            try:
                convert(job, source, place)
            except ReshardError as caught:
                error = caught
        if len(calls) < number:
            break
        name = calls[number - 1]
        failed.add(name)
        if error is not None:
            assert error.exit_code == 4
            assert objects(place) == {}, (number, name)
            assert convert(job, source, place) == "written"
        left = {path: data for path, data in objects(place).items() if not path.endswith(CLAIM_NAME)}
        assert left == expected, (number, name)
        assert error is not None or name == "remove"
    assert failed >= {"create", "create_once", "read_bytes", "close", "write", "open"}


@pytest.mark.faults
def test_a_refused_source_leaves_nothing(source: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(self: Source) -> None:
        raise SourceChanged("changed")

    monkeypatch.setattr(Source, "check_unchanged", changed)
    for job in JOBS:
        with pytest.raises(SourceChanged):
            convert(job, source, store)
        assert objects(store) == {}


@pytest.mark.faults
def test_what_can_not_be_removed_stays_claimed_for_the_next_attempt(
    source: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise StorageFailed("the network is down")

    with monkeypatch.context() as patch:
        patch.setattr(Source, "check_unchanged", stop)
        patch.setattr(FsspecStorage, "remove", stop)
        with pytest.raises(StorageFailed, match="network is down"):
            convert("dcp", source, store)
    assert len(objects(store)) == 4
    assert convert("dcp", source, store) == "written"
    assert len(objects(store)) == 5
