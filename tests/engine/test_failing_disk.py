"""Every system call that a conversion makes fails once: nothing shows at the target, and the command then works."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from reshard_service.engine import rename as rename_module
from reshard_service.engine import staging as staging_module
from reshard_service.errors import ReshardError
from tests.engine.checkpoints import contents, filled, run, save_safetensors, save_zstd_dcp, tiny_budget

pytestmark = pytest.mark.faults

_CALLS = ("pwrite", "preadv", "rename", "replace", "fsync", "link", "mkdir")


class Calls:
    """Counts the calls that touch the disk; the one numbered ``failing`` ends with ``code``."""

    def __init__(self, failing: int, code: int) -> None:
        self.failing, self.code = failing, code
        self.count = 0
        self.failed: str | None = None

    def __call__(self, name: str, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        self.count += 1
        if self.count == self.failing:
            self.failed = name
            raise OSError(self.code, os.strerror(self.code))
        return call(*arguments, **options)


@contextmanager
def failing(number: int, code: int) -> Iterator[Calls]:
    calls = Calls(number, code)

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments, **options: calls(name, call, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        for name in _CALLS:
            patch.setattr(os, name, counted(name, getattr(os, name)))
        patch.setattr(rename_module, "_renameat2", counted("renameat2", rename_module._renameat2))
        patch.setattr(staging_module, "sync_file_system", counted("syncfs", staging_module.sync_file_system))
        yield calls


def visible(folder: Path) -> dict[str, bytes]:
    return {path: data for path, data in contents(folder).items() if ".reshard-" not in path}


@pytest.fixture(autouse=True)
def _small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reshard_service.conversion.prepare.default_budget", lambda *_, **__: tiny_budget())


STATE = {
    "w": filled((50, 30), torch.float32, 1),
    "v": filled((9, 5), torch.bfloat16, 2),
    "none": torch.zeros(0, 3),
    "step": filled((), torch.float32, 3),
}
OLD = {"w": filled((60, 30), torch.float32, 4), "old": filled((7,), torch.int8, 5)}

JOBS: dict[str, tuple[str, str, object, dict[str, Any]]] = {
    "a folder": ("out", "dcp", "fsdp=3", {}),
    "one file": ("out.safetensors", "safetensors", None, {}),
    "a folder that replaces another": ("out", "dcp", "fsdp=2", {"overwrite": "always"}),
    "a file that replaces another": ("out.safetensors", "safetensors", None, {"overwrite": "always"}),
}


def prepare(job: str, folder: Path) -> tuple[Path, dict[str, bytes]]:
    """Source, and what lies where the target will be; gives the source and what is visible there."""
    name, format, _, options = JOBS[job]
    source = save_zstd_dcp(STATE, folder / "in") if format == "dcp" else save_safetensors(STATE, folder / "in")
    (folder / "place").mkdir()
    if options:
        run(
            save_safetensors(OLD, folder / "old"),
            folder / "place" / name,
            format,
            "fsdp=5" if format == "dcp" else None,
        )
    return source, visible(folder / "place")


def write_old(source: Path, target: Path, format: str) -> None:
    run(source, target, format, "fsdp=5" if format == "dcp" else None)


def error_of(call: Callable[[Path], None], folder: Path) -> ReshardError | None:
    try:
        call(folder)
    except ReshardError as error:
        return error
    return None


@pytest.mark.parametrize("exchange", [True, False], ids=["renameat2", "plain rename"])
@pytest.mark.parametrize("job", JOBS)
def test_after_any_failure_the_target_is_what_it_was_and_the_same_command_succeeds(
    job: str, exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(rename_module, "_renameat2", lambda *_: False)
    name, format, layout, options = JOBS[job]

    def convert(folder: Path) -> None:
        run(folder / "in", folder / "place" / name, format, layout, producer="plain", **options)

    prepare(job, tmp_path / "undisturbed")
    convert(tmp_path / "undisturbed")
    expected = contents(tmp_path / "undisturbed" / "place")
    failed: set[str] = set()
    for number in range(1, 2000):
        folder = tmp_path / str(number)
        # The same source for all, so that plans, and so manifests, are the same.
        (folder / "place").mkdir(parents=True)
        os.symlink(tmp_path / "undisturbed" / "in", folder / "in")
        if options:
            old = tmp_path / "undisturbed" / "old"
            write_old(old, folder / "place" / name, format)
        before = visible(folder / "place")
        with failing(number, (errno.EIO, errno.ENOSPC, errno.EACCES)[number % 3]) as calls:
            error = error_of(convert, folder)
        assert error is None or (error.exit_code == 4 and error.code != "internal"), error
        assert calls.failed is not None or calls.count < number
        if calls.failed is None:
            break
        failed.add(calls.failed)
        now = visible(folder / "place")
        if now != before:  # what failed was of no consequence
            assert now == contents(folder / "place"), calls.failed
        else:
            convert(folder)
        found = contents(folder / "place")
        assert found == expected, (number, calls.failed)
    else:
        raise AssertionError("it never got through")
    assert failed >= {"pwrite", "preadv", "replace", "mkdir", "syncfs", "fsync"}
    assert "renameat2" in failed or not exchange
