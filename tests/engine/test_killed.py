"""Processes that are killed or interrupted at every call to the disk, then the same command again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.checkpoints import filled, run, save_safetensors, save_zstd_dcp
from tests.oracles.gang import ROOT

pytestmark = [pytest.mark.faults, pytest.mark.slow]

STATE = {
    "w": filled((50, 30), torch.float32, 1),
    "v": filled((9, 5), torch.bfloat16, 2),
    "u": filled((40, 31), torch.int16, 6),
    "none": torch.zeros(0, 3),
    "step": filled((), torch.float32, 3),
}
OLD = {"w": filled((60, 30), torch.float32, 4), "old": filled((7,), torch.int8, 5)}

FOLDER, FILE = ("out", "dcp", "fsdp=3"), ("out.safetensors", "safetensors", None)


def killed(
    folder: Path, target: tuple[str, str, str | None], how: int, *, replace: bool = False, step: int = 1
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    name, format, layout = target
    source = save_zstd_dcp(STATE, folder / "in") if format == "dcp" else save_safetensors(STATE, folder / "in")
    arguments = ["convert", str(source), str(folder / "place" / name), "--to", format, "--producer", "plain", "--json"]
    arguments += ["--layout", layout] if layout else []
    old = None
    if replace:
        old = folder / "old"
        run(save_safetensors(OLD, folder / "older"), old / name, format, "fsdp=5" if layout else None)
        arguments += ["--overwrite", "always"]
    work = {"folder": str(folder), "arguments": arguments, "signal": how, "old": old and str(old), "step": step}
    (folder / "work.json").write_text(json.dumps(work), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.killing", str(folder / "work.json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, *others = json.loads(done.stdout)
    assert first["code"] == 0, first["err"]
    assert len(others) > 20 / step
    assert any(one["code"] != 0 for one in others)
    return first, others


@pytest.mark.parametrize("replace", [False, True], ids=["fresh", "replacing"])
@pytest.mark.parametrize("target", [FOLDER, FILE], ids=["folder", "file"])
def test_after_kill_9_at_any_moment_the_same_command_gives_the_same_bytes(
    target: tuple[str, str, str | None], replace: bool, tmp_path: Path
) -> None:
    first, others = killed(tmp_path, target, signal.SIGKILL, replace=replace, step=2 if target is FOLDER else 1)
    name = target[0]
    manifest = f"{name}.reshard.json"
    for one in others:
        visible = one["visible"]
        if target is FILE:
            # The file and its manifest can't appear at once: never is one of them beside the other's older self.
            assert visible.get(name) in (first["before"].get(name), first["after"][name]), one["at"]
            if name in visible and manifest in visible:
                assert visible in (first["before"], first["after"]), one["at"]
        else:
            assert visible in (first["before"], first["after"]), one["at"]
        if visible == first["after"] and not replace:
            assert one["again"] == 4, one["again_err"]
            assert json.loads(one["again_out"])["error"]["code"] == "target_exists"
        elif one["again"] != 0:
            # Killed between the file and its manifest.
            assert (target, name in visible, manifest in visible) == (FILE, True, False), one["again_err"]
            continue
        assert one["found"] == first["after"], (one["at"], sorted(one["found"]))


def test_files_that_a_killed_run_had_finished_are_adopted(tmp_path: Path) -> None:
    _, others = killed(tmp_path, FOLDER, signal.SIGKILL, step=5)
    adopted = {json.loads(one["again_out"])["targets"][0]["adopted_files"] for one in others if one["again"] == 0}
    assert adopted >= {0, 1, 2}


def _interrupted(others: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [one for one in others if one["code"] != 0]


@pytest.mark.parametrize("target", [FOLDER, FILE], ids=["folder", "file"])
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_says_so_with_exit_code_5_and_shows_nothing(
    how: int, target: tuple[str, str, str | None], tmp_path: Path
) -> None:
    first, others = killed(tmp_path, target, how, replace=True, step=4 if target is FOLDER else 2)
    for one in others:
        assert "Traceback" not in one["err"], one["err"]
        document = json.loads(one["out"])
        if one["code"] == 0:
            assert one["visible"] == first["after"]
            continue
        assert one["code"] == 5, one["err"]
        assert document["error"]["code"] == "cancelled"
        assert "cancelled" in one["err"]
        assert one["visible"] == first["before"], one["at"]
        assert one["again"] == 0
    for one in others:
        assert one["found"] == first["after"], one["at"]
