"""Who may write the objects of a target: one claim object, created once, that names the plan and the process."""

from __future__ import annotations

import json
import uuid
from typing import Any

from reshard_service.engine.claims import living_process, this_process
from reshard_service.errors import ReshardError, TargetBusy
from reshard_service.storage.base import Storage

CLAIM_NAME = ".reshard-claim.json"


def claim_path(single_file: str | None) -> str:
    """Where the claim lies: in the target's folder, or beside a single file."""
    return CLAIM_NAME if single_file is None else f"{single_file}{CLAIM_NAME}"


def claimed_plan(storage: Storage, single_file: str | None) -> str | None:
    """The plan that a claim at the target names; None without a claim."""
    path = claim_path(single_file)
    if storage.stat(path) is None:
        return None
    plan = _parsed(storage.read_bytes(path)).get("plan")
    return plan if isinstance(plan, str) else ""


class ObjectClaim:
    """One attempt's claim. A dead attempt at the same plan is taken over, since it writes the same bytes."""

    def __init__(self, storage: Storage, single_file: str | None, plan_digest: str) -> None:
        self._storage = storage
        self._path = claim_path(single_file)
        self._plan = plan_digest
        self._mine = json.dumps({"plan": plan_digest, "attempt": uuid.uuid4().hex, **this_process()}).encode()
        self.is_held = False

    def take(self) -> None:
        """Hold the target, or :class:`TargetBusy`."""
        if not self._storage.create_once(self._path, self._mine):
            found = self._storage.read_bytes(self._path)
            if found != self._mine:  # else only the answer to our own request was lost
                self._require_abandoned(_parsed(found))
                write_object(self._storage, self._path, self._mine)
        self.is_held = True
        self.check()

    def _require_abandoned(self, found: dict[str, Any]) -> None:
        if found.get("plan") != self._plan:
            raise TargetBusy(
                f"another conversion has claimed {self._storage.uri!r}",
                file=self._path,
                hint="wait for it, or remove the claim object if it is dead",
            )
        if (other := living_process(found)) is not None:
            raise TargetBusy(
                f"process {other} on this host is already writing {self._storage.uri!r}", hint="wait for it"
            )

    def check(self) -> None:
        """Raise :class:`TargetBusy` if another attempt has taken over: this one must write nothing more."""
        if not self.is_held or self._storage.read_bytes(self._path) != self._mine:
            self.is_held = False
            raise TargetBusy(
                f"a newer attempt took over {self._storage.uri!r}; this one stops", hint="follow the newer attempt"
            )

    def release(self) -> None:
        self._storage.remove(self._path)
        self.is_held = False


def write_object(storage: Storage, path: str, data: bytes) -> None:
    """A small object, whole or not at all; one of that name is replaced."""
    stream = storage.create(path)
    try:
        stream.write(memoryview(data))
        stream.close()
    except BaseException:
        stream.abort()
        raise


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError, ReshardError):
        return {}
    return found if isinstance(found, dict) else {}
