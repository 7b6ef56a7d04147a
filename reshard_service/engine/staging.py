"""A local target in the making: a staging folder beside it, receipts of what is finished, one rename to commit.

Staging belongs to (plan, target), not to an attempt (decision 15): ``.<name>.reshard-<plan>/``. An attempt writes
``<file>.e<epoch>``; a finished file is synced, renamed to its own name there and gets a receipt. The next attempt takes
over whatever has a receipt and never another attempt's unfinished files.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path

from reshard_service.engine.checksums import read_digest
from reshard_service.engine.claims import Claims
from reshard_service.engine.rename import rename_no_replace
from reshard_service.errors import TargetReadOnly
from reshard_service.formats.target import OutputFile
from reshard_service.manifest import MANIFEST_NAME, SegmentRow
from reshard_service.storage.local import LocalReader, sync_file_system, target_error

_BLOCK = 4 << 20
_RECEIPTS = ".receipts"
_CLAIMS = ".claims"


class Staging:
    """The staging folder of one (plan, target) pair and this attempt's epoch in it."""

    def __init__(self, target: Path, plan_digest: str, *, single_file: bool) -> None:
        self.target = target
        self.single_file = single_file
        self.folder = target.parent / f".{target.name}.reshard-{plan_digest[:12]}"
        self._claims = Claims(self.folder / _CLAIMS)

    def begin(self) -> None:
        """Make the folder, claim it, and clear away what interrupted attempts left unfinished."""
        try:
            (self.folder / _RECEIPTS).mkdir(parents=True, exist_ok=True)
            self._claims.take(repr(str(self.target)))
            for stale in self.folder.rglob("*.e[0-9]*"):
                stale.unlink(missing_ok=True)
        except OSError as error:
            fault = target_error(error, f"creating the staging folder {str(self.folder)!r}")
            if isinstance(fault, TargetReadOnly):
                fault.hint = "name a target in a folder you may write to"
            raise fault from None

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
                receipt = json.loads((self.folder / _RECEIPTS / f"{number}.json").read_bytes())
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
            receipt = self.folder / _RECEIPTS / f"{number}.json"
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
        """Make the target visible, whole, in one rename. ``replace``: what lies there goes, once the new one stands."""
        self._claims.check()
        try:
            for extra in (_RECEIPTS, _CLAIMS):
                shutil.rmtree(self.folder / extra, ignore_errors=True)
            sync_file_system(self.folder)
            aside = self._move_aside() if replace else None
            if self.single_file:
                # The file before its manifest: a file that appeared meanwhile must not get a manifest of ours.
                manifest = self.target.with_name(f"{self.target.name}.reshard.json")
                if aside is not None:
                    manifest.unlink(missing_ok=True)
                rename_no_replace(self.folder / self.target.name, self.target)
                os.replace(self.folder / MANIFEST_NAME, manifest)
                shutil.rmtree(self.folder, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    self.target.rmdir()  # an empty folder made beforehand is no target to protect
                rename_no_replace(self.folder, self.target)
            if aside is not None:
                shutil.rmtree(aside, ignore_errors=True) if aside.is_dir() else aside.unlink(missing_ok=True)
        except OSError as error:
            raise target_error(error, f"committing {str(self.target)!r}") from None

    def _move_aside(self) -> Path | None:
        if not os.path.lexists(self.target):
            return None
        aside = self.target.with_name(f".{self.target.name}.replaced-{os.getpid()}")
        os.rename(self.target, aside)
        return aside

    def abandon(self) -> bool:
        """After a failure: drop this attempt's unfinished files; True if finished ones remain for the next attempt."""
        for unfinished in self.folder.rglob(f"*.e{self._claims.epoch}"):
            unfinished.unlink(missing_ok=True)
        if any((self.folder / _RECEIPTS).glob("*.json")):
            return True
        shutil.rmtree(self.folder, ignore_errors=True)
        return False

    def remove(self) -> None:
        """Drop everything: the source was refused, so nothing here can be of use."""
        shutil.rmtree(self.folder, ignore_errors=True)
