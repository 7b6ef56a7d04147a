"""Who may write a staging folder: numbered claims that are created once, the highest number holds (decision 20)."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

from reshard_service.errors import TargetBusy
from reshard_service.storage.local import LocalStorage


class Claims:
    """Claims in one folder. A claim of a process that runs on this host is respected; any other is taken over."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.epoch = 0

    def take(self, what: str) -> None:
        """Hold the next epoch, or :class:`TargetBusy` while another process of this host is at work."""
        self._folder.mkdir(parents=True, exist_ok=True)
        while True:
            holder = max(self._highest(), 0)
            if holder and (other := self._living(holder)) is not None:
                raise TargetBusy(
                    f"process {other} on this host is already writing {what}",
                    hint="wait for it; if you stop it, the next run goes on where it was",
                )
            # Created whole: a claim that can be read half written looks like one that nobody holds.
            if LocalStorage(self._folder).create_once(str(holder + 1), json.dumps(this_process()).encode()):
                self.epoch = holder + 1
                return

    @property
    def are_held(self) -> bool:
        """Whether this attempt holds the target: it took a claim, and no newer attempt has taken over."""
        return self.epoch > 0 and self._highest() == self.epoch

    def moved(self, folder: Path) -> None:
        """The claims lie in another folder now."""
        self._folder = folder

    def check(self) -> None:
        """Raise :class:`TargetBusy` if a newer attempt has taken over: this one must write nothing more."""
        if not self.are_held:
            raise TargetBusy("a newer attempt took over this target; this one stops", hint="follow the newer attempt")

    def _highest(self) -> int:
        try:
            return max((int(claim.name) for claim in self._folder.iterdir() if claim.name.isdigit()), default=0)
        except FileNotFoundError:
            return -1

    def _living(self, epoch: int) -> int | None:
        try:
            return living_process(json.loads((self._folder / str(epoch)).read_text()))
        except (OSError, ValueError):
            return None


def this_process() -> dict[str, Any]:
    """What a claim says of its holder."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}


def living_process(claim: object) -> int | None:
    """The holder's number if a claim's holder is another process of this host that still runs."""
    try:
        host, pid, started = (claim[key] for key in ("host", "pid", "started"))  # type: ignore[index]
        if host != socket.gethostname() or int(pid) == os.getpid() or started is None:
            return None
    except (ValueError, KeyError, TypeError):
        return None
    return int(pid) if _started(int(pid)) == started else None


def _started(pid: int) -> str | None:
    """When a process began, as the kernel counts (field 22 of its ``stat``); None if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
