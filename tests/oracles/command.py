"""The command line as a user runs it: a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.oracles.gang import ROOT


@dataclass(frozen=True, slots=True)
class Finished:
    """How a run of ``reshard`` ended."""

    arguments: tuple[str, ...]
    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The one JSON document of ``--json``."""
        return json.loads(self.out)

    def succeeded(self) -> Finished:
        """Itself, if it did."""
        assert self.code == 0, self
        return self

    def refused(self, exit_code: int, *words: str) -> None:
        """Fails unless the run ended with this exit code, a message holding ``words``, and no traceback."""
        assert self.code == exit_code, self
        assert "Traceback" not in self.err + self.out, self
        for word in words:
            assert word in self.err + self.out, self

    def __str__(self) -> str:
        return f"reshard {' '.join(self.arguments)} -> {self.code}\n{self.out[-2000:]}\n{self.err[-4000:]}"

    __repr__ = __str__


def reshard(*arguments: str | Path, environment: Mapping[str, str] | None = None) -> Finished:
    """Runs ``reshard`` with these arguments and waits for it."""
    words = tuple(str(argument) for argument in arguments)
    # A terminal as wide as its longest line, so that messages are not folded; no colours.
    settings = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "4000", "NO_COLOR": "1"} | dict(environment or {})
    done = subprocess.run(
        [sys.executable, "-m", "reshard_service.cli", *words],
        env=settings,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return Finished(words, done.returncode, done.stdout, done.stderr)


def visible(folder: Path) -> list[str]:
    """What a reader sees in a folder: everything but resumable staging (a sibling ``.<name>.reshard-…``)."""
    return sorted(path.name for path in folder.iterdir() if ".reshard-" not in path.name)
