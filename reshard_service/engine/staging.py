"""A local target in the making: a staging folder beside it, receipts of what is finished, one rename to commit.

Staging belongs to (plan, target), not to an attempt (decision 15): ``.<name>.reshard-<plan>/``. An attempt writes
``<file>.e<epoch>``; a finished file is synced, renamed to its own name there and gets a receipt. The next attempt takes
over whatever has a receipt and never another attempt's unfinished files.

Claims and receipts lie in the folder until the commit. They then wait beside it, where they keep other attempts away
until the folder has its final name; found there later, they tell of a process that died while it committed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from reshard_service.engine.checksums import read_digest
from reshard_service.engine.claims import Claims
from reshard_service.engine.interrupts import uninterrupted
from reshard_service.engine.rename import rename_no_replace, replace_by, replaced_name
from reshard_service.errors import ReshardError, TargetBusy, TargetError, TargetReadOnly
from reshard_service.formats.target import OutputFile
from reshard_service.manifest import MANIFEST_NAME, SegmentRow, manifest_path
from reshard_service.storage.local import LocalReader, sync_file_system, sync_folder, target_error

_BLOCK = 4 << 20
_STATE = ".reshard"
_RECEIPTS = "receipts"
_CLAIMS = "claims"
_UNFINISHED = re.compile(r".+\.e[0-9]+")


class Staging:
    """The staging folder of one (plan, target) pair and this attempt's epoch in it."""

    def __init__(self, target: Path, plan_digest: str, *, single_file: bool) -> None:
        # Links are followed: the folder beside has to be on the file system of the real place.
        self.target = Path(os.path.realpath(target))
        self.single_file = single_file
        self.folder = self.target.with_name(f".{self.target.name}.reshard-{plan_digest[:12]}")
        self._beside = self.folder.with_name(f"{self.folder.name}.committing")
        self._state = self.folder / _STATE
        self._claims = Claims(self._state / _CLAIMS)
        self._is_committed = False

    def begin(self) -> None:
        """Make the folder, claim it, and clear away what interrupted attempts left unfinished."""
        if os.path.ismount(self.target):
            raise TargetError(
                f"{str(self.target)!r} is where a file system is mounted, which no rename can put in place",
                hint="name a folder inside it",
            )
        try:
            self._recover()
            self._claims.take(repr(str(self.target)))
            if self._beside.exists():
                shutil.rmtree(self._state, ignore_errors=True)
                raise TargetBusy(f"another process is just now committing {str(self.target)!r}", hint="wait for it")
            (self._state / _RECEIPTS).mkdir(exist_ok=True)
            for found in self.folder.rglob("*.e*"):
                if _UNFINISHED.fullmatch(found.name):
                    found.unlink(missing_ok=True)
        except OSError as error:
            fault = target_error(error, f"creating the staging folder {str(self.folder)!r}")
            if isinstance(fault, TargetReadOnly):
                fault.hint = "name a target in a folder you may write to"
            raise fault from None

    def clear_rubbish(self) -> None:
        """Remove what a process left that was killed while it committed; nothing while one is at it."""
        with contextlib.suppress(ReshardError, OSError):
            self._recover()

    def _recover(self) -> None:
        """After a process that died while it committed: what it left may be the new checkpoint or the replaced one."""
        if self._beside.is_dir():
            Claims(self._beside / _CLAIMS).take(repr(str(self.target)))
            shutil.rmtree(self.folder, ignore_errors=True)
            shutil.rmtree(self._beside, ignore_errors=True)

    @property
    def scratch(self) -> Path:
        """A folder for temporary files that never becomes part of the target."""
        return self._state

    def working_name(self, file: OutputFile) -> str:
        """Name of a file while this attempt writes it."""
        return f"{file.path}.e{self._claims.epoch}"

    def receipts(
        self, files: tuple[OutputFile, ...], claimed: list[int], algorithm: str
    ) -> dict[int, list[SegmentRow]]:
        """Files that an earlier attempt finished, with their digests, which are checked against what lies there.

        ``claimed[i]`` is how many bytes of file ``i`` have to have a digest.
        """
        found = {}
        for number, file in enumerate(files):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                receipt = json.loads((self._state / _RECEIPTS / f"{number}.json").read_bytes())
                segments = [(int(s), int(n), str(d)) for s, n, d in receipt["segments"]]
                if receipt["path"] == file.path and self._holds(file, segments, claimed[number], algorithm):
                    found[number] = segments
        return found

    def _holds(self, file: OutputFile, segments: list[SegmentRow], claimed: int, algorithm: str) -> bool:
        path = self.folder / file.path
        if path.stat().st_size != file.bytes or sum(length for _, length, _ in segments) != claimed:
            return False
        block = memoryview(bytearray(_BLOCK))
        reader = LocalReader(path, file.path)
        try:
            return all(read_digest(reader, start, n, block, algorithm) == digest for start, n, digest in segments)
        finally:
            reader.close()

    def finish(self, number: int, file: OutputFile, segments: list[SegmentRow]) -> None:
        """A file is complete: give it its name, then its receipt.

        Nothing is made durable here, which for hundreds of files would take longer than the copying: the next attempt
        reads a file again before it believes a receipt, and the commit syncs everything.
        """
        self._claims.check()
        try:
            os.replace(self.folder / self.working_name(file), self.folder / file.path)
            receipt = self._state / _RECEIPTS / f"{number}.json"
            unfinished = receipt.with_suffix(f".e{self._claims.epoch}")
            unfinished.write_bytes(json.dumps({"path": file.path, "segments": segments}).encode())
            os.replace(unfinished, receipt)
        except OSError as error:
            raise target_error(error, f"finishing {file.path!r}") from None

    def write_small(self, path: str, data: bytes) -> None:
        """A side file or closing file, whole."""
        try:
            (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
            self._write(self.folder / path, data)
        except OSError as error:
            raise target_error(error, f"writing {path!r}") from None

    def _write(self, path: Path, data: bytes) -> None:
        temporary = path.with_name(f"{path.name}.e{self._claims.epoch}")
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

    def commit(self, *, replace: bool) -> None:
        """Make the target visible, whole, in one rename. ``replace``: what lies there goes, once the new one stands.

        Whatever fails is undone, so that afterwards the target is what it was.
        """
        self._claims.check()
        try:
            sync_file_system(self.folder)
            with uninterrupted(), contextlib.ExitStack() as undo:
                self._put_state_beside(undo)
                if self.single_file:
                    self._commit_file(undo, replace=replace)
                else:
                    self._commit_folder(undo, replace=replace)
                sync_folder(self.target.parent)
                undo.pop_all()
                self._is_committed = True
        except OSError as error:
            raise target_error(error, f"committing {str(self.target)!r}") from None
        with uninterrupted():  # it is done; what is left here now is rubbish
            for rubbish in (self.folder, replaced_name(self.folder), self._beside):
                shutil.rmtree(rubbish, ignore_errors=True)

    def _put_state_beside(self, undo: contextlib.ExitStack) -> None:
        os.rename(self._state, self._beside)
        self._claims.moved(self._beside / _CLAIMS)

        def take_back() -> None:
            with contextlib.suppress(OSError):
                os.rename(self._beside, self._state)
                self._claims.moved(self._state / _CLAIMS)

        undo.callback(take_back)

    def _commit_folder(self, undo: contextlib.ExitStack, *, replace: bool) -> None:
        if not replace:
            with contextlib.suppress(OSError):
                self.target.rmdir()  # an empty folder made beforehand is no target to protect
                undo.callback(self.target.mkdir)
        _put(self.folder, self.target, undo, replace=replace)

    def _commit_file(self, undo: contextlib.ExitStack, *, replace: bool) -> None:
        """The file and its manifest can't appear in one step: an old file never stands beside a new manifest."""
        manifest = self.target.with_name(manifest_path(True, self.target.name))
        if os.path.lexists(manifest):
            _put(manifest, self.folder / ".old-manifest", undo, replace=True)
        steps = [(self.folder / MANIFEST_NAME, manifest), (self.folder / self.target.name, self.target)]
        for made, place in reversed(steps) if replace else steps:
            _put(made, place, undo, replace=replace)

    def abandon(self) -> bool:
        """After a failure: drop this attempt's unfinished files; True if finished ones remain for the next attempt."""
        if self._is_committed or not self._claims.are_held:
            return False
        for unfinished in self.folder.rglob(f"*.e{self._claims.epoch}"):
            unfinished.unlink(missing_ok=True)
        if any((self._state / _RECEIPTS).glob("*.json")):
            return True
        shutil.rmtree(self.folder, ignore_errors=True)
        return False

    def remove(self) -> None:
        """Drop everything: the source was refused, so nothing here can be of use."""
        if not self._is_committed and self._claims.are_held:
            shutil.rmtree(self.folder, ignore_errors=True)


def _put(made: Path, place: Path, undo: contextlib.ExitStack, *, replace: bool) -> None:
    """Give ``made`` its name. With ``replace`` what has that name gets the name of ``made``."""
    if replace and os.path.lexists(place):
        replace_by(made, place)
        undo.callback(_quietly, replace_by, made, place)
    else:
        rename_no_replace(made, place)
        undo.callback(_quietly, os.rename, place, made)


def _quietly(rename: Callable[[Path, Path], None], first: Path, second: Path) -> None:
    with contextlib.suppress(OSError):
        rename(first, second)
