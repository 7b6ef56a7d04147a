"""What people and programs see: tables on stdout, progress and errors on stderr, or one JSON document on stdout."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict
from types import TracebackType
from typing import TYPE_CHECKING, Any

from reshard_service.errors import ReshardError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from reshard_service.catalogue import Notice
    from reshard_service.documents.job import TargetDocument


_CONTROLS = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def human_bytes(count: float) -> str:
    """Decimal units, as disks and object stores count: ``3.93 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def print_json(document: dict[str, Any]) -> None:
    """The one document of ``--json``."""
    text = json.dumps(document, indent=2, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # a file's name need not be UTF-8
        text = json.dumps(document, indent=2)
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def say(text: str = "") -> None:
    """A line for people. Names come from files: what would steer the terminal is spelled out."""
    print(_CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", text))


def notice_document(notice: Notice) -> dict[str, Any]:
    """``{code, name, reason, at?}`` (decision 25)."""
    return {key: value for key, value in asdict(notice).items() if value is not None or key == "name"}


def print_notices(notices: Iterable[Notice], title: str) -> None:
    """Notices for people, the first dozen of them."""
    listed = list(notices)
    if not listed:
        return
    say(f"\n{title}")
    for notice in listed[:12]:
        say(f"  {notice.code}: {notice.name + ': ' if notice.name else ''}{notice.reason}")
    if len(listed) > 12:
        say(f"  … and {len(listed) - 12} more (--json lists all)")


def print_error(error: ReshardError, wants_json: bool) -> None:
    """The message on stderr, and with ``--json`` the same as a document on stdout."""
    print(_CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", f"error: {error}"), file=sys.stderr)
    if wants_json:
        print_json({"error": error_document(error)})


def error_document(error: ReshardError) -> dict[str, Any]:
    return {
        "code": error.code,
        "reason": error.message,
        "name": error.tensor,
        "at": error.file,
        "hint": error.hint,
        "exit_code": error.exit_code,
        "retryable": error.retryable,
    }


class ProgressBar:
    """A bar on stderr while a target is written; silent where stderr is no terminal."""

    def __init__(self, *, enabled: bool = True) -> None:
        self._enabled = enabled
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def begin(self, target: TargetDocument, total_bytes: int) -> None:
        self.start(target.uri, total_bytes)

    def start(self, label: str, total_bytes: int) -> None:
        if not self._enabled or not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.fields[phase]:>10}"),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
                console=Console(stderr=True),
            )
            self._progress.start()
        self._task = self._progress.add_task(label, total=total_bytes, phase="planning")

    def phase(self, name: str) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, phase=name)

    def advance(self, count: int) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, count)
