"""A target appears whole or not at all, and what lies there already is safe: exit code 4 for everything in its way."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.oracles.checkpoints import Checkpoints
from tests.oracles.command import reshard, visible
from tests.oracles.models import Run

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.faults]

SOURCE = Run("llama", "fsdp4")
SHARDED = ("--to", "dcp", "--layout", "fsdp=2")


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _identities(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_an_existing_folder_is_left_alone(checkpoints: Checkpoints, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine.txt").write_text("precious", encoding="utf-8")
    reshard("convert", checkpoints.of(SOURCE), target, *SHARDED).refused(4, "target_exists", "--overwrite")
    assert _contents(target) == {"mine.txt": b"precious"}
    assert visible(tmp_path) == ["target"]


def test_an_existing_file_is_left_alone(checkpoints: Checkpoints, tmp_path: Path) -> None:
    target = tmp_path / "weights.safetensors"
    target.write_bytes(b"precious")
    reshard("convert", checkpoints.of(SOURCE), target).refused(4, "target_exists")
    assert target.read_bytes() == b"precious"
    assert visible(tmp_path) == ["weights.safetensors"]


def test_overwrite_same_does_nothing_the_second_time(checkpoints: Checkpoints, tmp_path: Path) -> None:
    target = tmp_path / "target"
    again = ("convert", checkpoints.of(SOURCE), target, *SHARDED, "--overwrite", "same")
    reshard(*again).succeeded()
    before = _identities(target)
    reshard(*again).succeeded()
    assert _identities(target) == before
    other = ("convert", checkpoints.of(SOURCE), target, "--to", "dcp", "--layout", "fsdp=3", "--overwrite", "same")
    reshard(*other).refused(4, "target_exists")
    reshard("convert", checkpoints.of(SOURCE, "flat"), *again[2:]).refused(4, "target_exists")
    assert _identities(target) == before


def test_overwrite_same_of_one_file_does_nothing_the_second_time(checkpoints: Checkpoints, tmp_path: Path) -> None:
    target = tmp_path / "weights.safetensors"
    again = ("convert", checkpoints.of(SOURCE), target, "--overwrite", "same")
    reshard(*again).succeeded()
    before = _identities(tmp_path)
    reshard(*again).succeeded()
    assert _identities(tmp_path) == before


def test_overwrite_always_replaces_a_checkpoint_and_nothing_else(checkpoints: Checkpoints, tmp_path: Path) -> None:
    target, other = tmp_path / "target", tmp_path / "documents"
    reshard("convert", checkpoints.of(SOURCE), target, "--to", "dcp", "--layout", "fsdp=8").succeeded()
    reshard("convert", checkpoints.of(SOURCE), target, *SHARDED, "--overwrite", "always").succeeded()
    assert sorted(path.name for path in target.glob("*.distcp")) == ["__0_0.distcp", "__1_0.distcp"]
    reshard("verify", target).succeeded()
    other.mkdir()
    (other / "mine.txt").write_text("precious", encoding="utf-8")
    reshard("convert", checkpoints.of(SOURCE), other, *SHARDED, "--overwrite", "always").refused(4, "target_exists")
    assert _contents(other) == {"mine.txt": b"precious"}
    assert visible(tmp_path) == ["documents", "target"]


def test_the_same_conversion_gives_the_same_bytes(checkpoints: Checkpoints, tmp_path: Path) -> None:
    for name in ("one", "two"):
        reshard("convert", checkpoints.of(SOURCE), tmp_path / name, *SHARDED).succeeded()
    assert _contents(tmp_path / "one") == _contents(tmp_path / "two")


def test_a_flipped_bit_in_what_we_wrote_is_found_by_verify(checkpoints: Checkpoints, tmp_path: Path) -> None:
    target = tmp_path / "weights.safetensors"
    reshard("convert", checkpoints.of(SOURCE), target).succeeded()
    reshard("verify", target).succeeded()
    data = bytearray(target.read_bytes())
    data[-100] ^= 1
    target.write_bytes(data)
    reshard("verify", target).refused(1, "weights.safetensors")


def test_a_lost_or_added_file_is_found_by_verify(checkpoints: Checkpoints, tmp_path: Path) -> None:
    target = tmp_path / "target"
    reshard("convert", checkpoints.of(SOURCE), target, *SHARDED).succeeded()
    (target / "__1_0.distcp").unlink()
    reshard("verify", target).refused(1, "__1_0.distcp")


def test_diff_names_the_tensor_that_differs(checkpoints: Checkpoints, tmp_path: Path) -> None:
    target = tmp_path / "weights.safetensors"
    reshard("convert", checkpoints.of(SOURCE), target).succeeded()
    data = bytearray(target.read_bytes())
    data[-1] ^= 1
    target.write_bytes(data)
    done = reshard("diff", checkpoints.of(SOURCE), target, "--json")
    done.refused(1)
    assert done.document["same"] is False
    assert len(done.document["different"]) == 1


def test_a_source_that_changes_while_it_is_read_is_refused(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from reshard_service.cli import main
    from reshard_service.storage.local import LocalReader

    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(checkpoints.of(SOURCE), source)
    out.mkdir()
    whole = LocalReader.read_into
    changed: list[Path] = []

    def read_into(self: LocalReader, start: int, buffer: memoryview) -> None:
        whole(self, start, buffer)
        if not changed and self._name.endswith("__1_0.distcp"):
            # A trainer that saves into the same folder again: same size, other content.
            changed.append(source / "__1_0.distcp")
            later = changed[0].stat().st_mtime_ns + 10**9
            os.utime(changed[0], ns=(later, later))

    monkeypatch.setattr(LocalReader, "read_into", read_into)
    monkeypatch.setattr("sys.argv", ["reshard", "convert", str(source), str(out / "w.safetensors"), "--part", "model"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert changed, "nothing was read through LocalReader"
    assert stopped.value.code == 3
    assert "source_changed" in capsys.readouterr().err
    assert visible(out) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs root to mount a small tmpfs")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mounted)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"can't mount a tmpfs here: {done.stderr.strip()}")
    yield mounted
    subprocess.run(["umount", str(mounted)], check=True)


@pytest.mark.privileged
def test_a_full_disk_is_reported_and_nothing_appears(checkpoints: Checkpoints, small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(800_000))
    reshard("convert", checkpoints.of(SOURCE), small_disk / "target", *SHARDED).refused(4, "target_full")
    assert visible(small_disk) == ["ballast"]
    (small_disk / "ballast").unlink()
    reshard("convert", checkpoints.of(SOURCE), small_disk / "target", *SHARDED).succeeded()
    reshard("verify", small_disk / "target").succeeded()


@pytest.mark.privileged
def test_a_read_only_target_is_reported(checkpoints: Checkpoints, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for target in (("target", *SHARDED), ("weights.safetensors",)):
        reshard("convert", checkpoints.of(SOURCE), small_disk / target[0], *target[1:]).refused(4, "target_read_only")
    assert visible(small_disk) == []


def test_a_target_folder_that_does_not_exist_is_reported_or_made(checkpoints: Checkpoints, tmp_path: Path) -> None:
    target = tmp_path / "not" / "there" / "weights.safetensors"
    done = reshard("convert", checkpoints.of(SOURCE), target)
    if done.code:
        done.refused(4, "not")
    else:
        assert target.is_file()
