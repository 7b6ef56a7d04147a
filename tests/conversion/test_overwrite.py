"""What lies at a target already: never touched, recognised as this very result, or replaced whole (decision 19)."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from reshard_service.engine import files as files_module
from reshard_service.errors import (
    ReshardError,
    TargetError,
    TargetExists,
    TargetFull,
    TargetReadOnly,
    UriRefused,
    UsageError,
)
from tests.engine.checkpoints import (
    assert_equal,
    compare,
    contents,
    filled,
    read,
    run,
    save_dcp,
    save_safetensors,
    tiny_budget,
)

STATE = {"w": filled((50, 30), torch.float32, 1), "v": filled((9, 5), torch.bfloat16, 2)}
OTHER = {"w": filled((50, 30), torch.float32, 7), "v": filled((9, 5), torch.bfloat16, 8)}

JOBS: dict[str, tuple[str, str, str | None]] = {
    "folder": ("out", "dcp", "fsdp=2"),
    "shards": ("out", "safetensors", None),
    "file": ("out.safetensors", "safetensors", None),
}


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


@pytest.fixture(params=JOBS)
def job(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def convert(job: str, source: Path, place: Path, **options: Any) -> str:
    name, format, layout = JOBS[job]
    return run(source, place / name, format, layout, **options).targets[0].status


def test_never_leaves_alone_what_lies_there(job: str, source: Path, place: Path) -> None:
    assert convert(job, source, place) == "written"
    before = contents(place)
    with pytest.raises(TargetExists):
        convert(job, source, place)
    assert contents(place) == before


def test_same_is_free_the_second_time_and_only_then(job: str, source: Path, place: Path, tmp_path: Path) -> None:
    assert convert(job, source, place, overwrite="same") == "written"
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    assert convert(job, source, place, overwrite="same", verify="none") == "same"
    other = save_safetensors(OTHER, tmp_path / "other")
    with pytest.raises(TargetExists, match="not the result of this conversion"):
        convert(job, other, place, overwrite="same")
    with pytest.raises(TargetExists, match="not the result of this conversion"):
        convert(job, source, place, overwrite="same", dtype="fp16")
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before


@pytest.mark.parametrize("damage", ["file gone", "file shorter", "manifest gone", "manifest damaged"])
def test_same_is_an_error_where_the_result_is_damaged(damage: str, job: str, source: Path, place: Path) -> None:
    convert(job, source, place)
    [manifest] = [path for path in place.rglob("*") if path.name.endswith(("reshard.manifest.json", ".reshard.json"))]
    data = max((path for path in place.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    if damage == "file gone" and job != "file":
        data.unlink()
    elif damage.startswith("file"):
        os.truncate(data, 100)
    elif damage == "manifest gone":
        manifest.unlink()
    else:
        manifest.write_text("{")
    before = contents(place)
    with pytest.raises(TargetExists):
        convert(job, source, place, overwrite="same")
    assert contents(place) == before


def test_always_replaces_the_whole_of_an_older_larger_world(source: Path, place: Path, tmp_path: Path) -> None:
    run(save_safetensors(OTHER, tmp_path / "other"), place / "out", "dcp", "fsdp=9")
    assert convert("folder", source, place, overwrite="always") == "written"
    run(source, tmp_path / "fresh" / "out", "dcp", "fsdp=2")
    assert contents(place) == contents(tmp_path / "fresh")


def test_always_replaces_checkpoints_that_others_wrote(job: str, source: Path, place: Path, tmp_path: Path) -> None:
    name, format, _ = JOBS[job]
    if job == "file":
        save_safetensors(OTHER, tmp_path / "other")
        shutil.copy(tmp_path / "other" / "model.safetensors", place / name)
    else:
        save_dcp({"model": OTHER}, place / name)  # type: ignore[dict-item]
        (place / name / "sub").mkdir()
    assert convert(job, source, place, overwrite="always") == "written"
    assert compare(source, place / name).same
    assert sorted(path.name for path in place.iterdir()) == [
        name,
        *(["out.safetensors.reshard.json"] * (job == "file")),
    ]
    if format == "safetensors":
        assert_equal(read(place / name, format, {}), STATE)


def test_always_replaces_a_result_with_itself(job: str, source: Path, place: Path) -> None:
    convert(job, source, place)
    before = contents(place)
    assert convert(job, source, place, overwrite="always") == "written"
    assert contents(place) == before


@pytest.mark.parametrize("kind", ["folder of texts", "text file", "run folder", "damaged manifest"])
def test_always_replaces_nothing_but_checkpoints(kind: str, job: str, source: Path, place: Path) -> None:
    there = place / JOBS[job][0]
    if kind == "text file":
        there.write_text("precious")
    elif kind == "run folder":
        for step in (1, 2):
            save_dcp({"model": OTHER}, there / f"step-{step}")  # type: ignore[dict-item]
    else:
        there.mkdir()
        (there / "mine.txt").write_text("precious")
        if kind == "damaged manifest":
            (there / "reshard.manifest.json").write_text('{"version": 1')
    before = contents(place)
    with pytest.raises(TargetExists):
        convert(job, source, place, overwrite="always")
    assert contents(place) == before


@pytest.mark.parametrize("overwrite", ["never", "same", "always"])
def test_an_empty_folder_made_beforehand_is_filled(overwrite: str, source: Path, place: Path) -> None:
    (place / "out").mkdir()
    assert convert("folder", source, place, overwrite=overwrite) == "written"
    assert compare(source, place / "out").same
    assert [path.name for path in place.iterdir()] == ["out"]


def test_a_manifest_without_its_file_is_replaced(source: Path, place: Path) -> None:
    (place / "out.safetensors.reshard.json").write_text("stale")
    convert("file", source, place)
    assert b"stale" not in (place / "out.safetensors.reshard.json").read_bytes()
    assert sorted(path.name for path in place.iterdir()) == ["out.safetensors", "out.safetensors.reshard.json"]


def test_a_folder_is_not_taken_for_a_file_of_its_name(source: Path, place: Path) -> None:
    (place / "out.safetensors").mkdir()
    with pytest.raises(TargetExists):
        convert("file", source, place)


def test_what_appears_while_the_conversion_runs_is_not_touched(
    job: str, source: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, _, _ = JOBS[job]
    from reshard_service.engine.source import Source

    whole = Source.check_unchanged

    def check(self: Source) -> None:
        (place / name).write_text("somebody else's")
        whole(self)

    monkeypatch.setattr(Source, "check_unchanged", check)
    with pytest.raises(TargetExists, match="appeared while"):
        convert(job, source, place)
    assert (place / name).read_text() == "somebody else's"
    assert [path.name for path in place.iterdir() if ".reshard-" not in path.name] == [name]
    monkeypatch.undo()
    (place / name).unlink()
    report = run(source, place / name, *JOBS[job][1:])  # type: ignore[arg-type]
    assert report.targets[0].adopted_files > 0


# --- where a target may not be ------------------------------------------------------------------------------


def test_source_and_target_lie_apart(source: Path, tmp_path: Path) -> None:
    for target in (source, source / "out", tmp_path, source / "out.safetensors", source / "model.safetensors"):
        with pytest.raises(UsageError, match="lie in one another"):
            run(source, target, "safetensors")
    with pytest.raises(UsageError, match="lie in one another"):
        run(source / "model.safetensors", source / "model.safetensors", "safetensors")
    assert [path.name for path in source.iterdir()] == ["model.safetensors"]
    run(source / "model.safetensors", source / "beside.safetensors", "safetensors")


def test_the_current_folder_is_no_target(source: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    for target in (".", str(place), "../place"):
        with pytest.raises(UsageError, match="folder you are in"):
            run(source, target, "safetensors")
    run(source, "out.safetensors", "safetensors")
    run(source, "sub/out", "safetensors")
    assert sorted(path.name for path in place.iterdir()) == ["out.safetensors", "out.safetensors.reshard.json", "sub"]


def test_a_link_to_a_checkpoint_is_replaced_where_it_leads(source: Path, place: Path, tmp_path: Path) -> None:
    convert("folder", save_safetensors(OTHER, tmp_path / "other"), place)
    (tmp_path / "link").symlink_to(place / "out")
    with pytest.raises(TargetExists):
        run(source, tmp_path / "link", "dcp", "fsdp=2")
    run(source, tmp_path / "link", "dcp", "fsdp=2", overwrite="always")
    assert (tmp_path / "link").is_symlink()
    assert compare(source, place / "out").same
    assert [path.name for path in place.iterdir()] == ["out"]


@pytest.mark.parametrize("uri", ["memory://x.safetensors", "s3://x.safetensors"])
def test_a_file_needs_a_place_in_a_store(uri: str, source: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    with pytest.raises(UriRefused):
        run(source, uri, "safetensors")
    assert list(place.iterdir()) == []


def test_a_file_uri_names_the_same_file_as_its_path(source: Path, place: Path) -> None:
    run(source, f"file://{place}/with%20space.safetensors", "safetensors")
    assert sorted(path.name for path in place.iterdir()) == [
        "with space.safetensors",
        "with space.safetensors.reshard.json",
    ]
    run(source, f"file://{place}/a%20folder", "safetensors")
    assert (place / "a folder" / "model.safetensors").is_file()


@pytest.mark.faults
def test_a_place_that_can_not_be_written_is_reported(job: str, source: Path, place: Path) -> None:
    (place / "file").write_text("no folder")
    with pytest.raises(ReshardError) as caught:
        convert(job, source, place / "file")
    assert caught.value.exit_code == 4
    assert [path.name for path in place.iterdir()] == ["file"]


# --- small disks --------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KB."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs root to mount a small tmpfs")
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mounted)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"can't mount a tmpfs here: {done.stderr.strip()}")
    yield mounted
    subprocess.run(["umount", str(mounted)], check=True)


@pytest.mark.faults
@pytest.mark.privileged
@pytest.mark.parametrize("fallocate", [True, False], ids=["noticed at once", "noticed late"])
def test_a_disk_that_is_too_small_is_reported_and_works_once_there_is_room(
    fallocate: bool, job: str, tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_safetensors({"w": filled((200, 200), torch.float32, 1)}, tmp_path / "in")
    if not fallocate:
        monkeypatch.setattr(files_module, "_libc", object())
    (disk / "ballast").write_bytes(bytes(150_000))
    with pytest.raises(TargetFull):
        convert(job, source, disk)
    assert [path.name for path in disk.iterdir() if ".reshard-" not in path.name] == ["ballast"]
    (disk / "ballast").unlink()
    convert(job, source, disk)
    assert compare(source, disk / JOBS[job][0]).same
    assert [path for path in disk.iterdir() if ".reshard-" in path.name] == []


@pytest.mark.faults
@pytest.mark.privileged
def test_a_read_only_disk_is_reported(job: str, source: Path, disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(TargetReadOnly):
        convert(job, source, disk)


@pytest.mark.faults
@pytest.mark.privileged
def test_a_mount_point_is_refused_before_the_work(source: Path, disk: Path) -> None:
    with pytest.raises(TargetError, match="is mounted"):
        run(source, disk, "dcp")
    assert list(disk.iterdir()) == []
    assert [path.name for path in disk.parent.iterdir() if path.name.startswith(".")] == []
