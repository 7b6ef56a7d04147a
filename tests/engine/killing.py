"""A program that kills the command line at its n-th call to the disk, for n = 1, 2, …, and looks at what is left.

Without torch, so that each run is a quick fork: ``python -m tests.engine.killing WORK.json`` prints a JSON list with
one entry a run. The work: ``arguments`` of ``reshard``, whose target lies in ``folder``/place; ``signal``; ``old``, a
folder that is copied to that place before each run, or null; ``step``, every how many calls.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import reshard_service.conversion.prepare as prepare
from reshard_service.cli import main
from reshard_service.engine import rename as rename_module
from reshard_service.engine import staging as staging_module
from reshard_service.planning.budget import Budget

_CALLS = ("pwrite", "preadv", "rename", "replace", "fsync", "link", "mkdir", "unlink", "rmdir")


def _install(at: int, signal: int, count: list[int]) -> None:
    """From now on the ``at``-th of these calls is preceded by a signal to this process."""

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any, **options: Any) -> Any:
            count[0] += 1
            if count[0] == at:
                os.kill(os.getpid(), signal)
            return call(*arguments, **options)

        return counting

    for name in _CALLS:
        setattr(os, name, counted(getattr(os, name)))
    rename_module._renameat2 = counted(rename_module._renameat2)
    staging_module.sync_file_system = counted(staging_module.sync_file_system)


def _run(arguments: list[str], output: Path, at: int = 0, signal: int = 0) -> dict[str, Any]:
    """``reshard`` in a forked process: how it ended, what it printed, and how many calls it made."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        count = [0]
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(output / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        sys.argv = ["reshard", *arguments]
        _install(at, signal, count)
        try:
            main()
        except SystemExit as exit:
            sys.stdout.flush()
            sys.stderr.flush()
            os.write(writer, json.dumps({"code": exit.code, "calls": count[0]}).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as answer:
        told = answer.read()
    _, status = os.waitpid(child, 0)
    ended = json.loads(told) if told else {"code": -os.WTERMSIG(status) if os.WIFSIGNALED(status) else 99, "calls": -1}
    return ended | {name: (output / name).read_text(encoding="utf-8") for name in ("out", "err")}


def _contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_bytes().hex()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


def work(folder: Path, arguments: list[str], signal: int, old: str | None, step: int) -> list[dict[str, Any]]:
    place = folder / "place"
    found: list[dict[str, Any]] = []

    def fresh() -> None:
        shutil.rmtree(place, ignore_errors=True)
        if old is None:
            place.mkdir(parents=True)
        else:
            shutil.copytree(old, place)

    fresh()
    before = _contents(place)
    undisturbed = _run(arguments, folder)
    after = _contents(place)
    for at in range(1, 10_000, step):
        fresh()
        hit = _run(arguments, folder, at, signal)
        left = _contents(place)
        again = _run(arguments, folder)
        found.append(
            {
                "at": at,
                "code": hit["code"],
                "calls": hit["calls"],
                "out": hit["out"],
                "err": hit["err"],
                "visible": {path: data for path, data in left.items() if ".reshard-" not in path},
                "staging": any(".reshard-" in path for path in left),
                "again": again["code"],
                "again_out": again["out"],
                "again_err": again["err"],
                "found": _contents(place),
            }
        )
        if 0 <= hit["calls"] < at:
            break
    return [{"before": before, "after": after, "code": undisturbed["code"], "err": undisturbed["err"]}, *found]


if __name__ == "__main__":
    prepare.default_budget = lambda *_, **__: Budget(1, 12 << 10, 16 << 10)
    given = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print(json.dumps(work(Path(given.pop("folder")), **given)))
