"""Local files: positional reads without copies, and names that can't lead out of the checkpoint's folder."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from pathlib import Path

from reshard_service.errors import (
    ReshardError,
    SourceCorrupt,
    StorageFailed,
    TargetFull,
    TargetReadOnly,
    UnsafeSource,
)
from reshard_service.storage.base import DirEntry, FileStat


def target_error(error: OSError, what: str) -> ReshardError:
    """The error of the tree for a failed write: full, read-only, or anything else."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return TargetFull(f"no space left while {what}", hint="free space, or name a target on another disk")
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return TargetReadOnly(f"not allowed while {what}: {error.strerror}")
    return StorageFailed(f"failed while {what}: {error.strerror or error}")


class LocalReader:
    """A local file read with ``pread``: no shared position, so threads need no lock."""

    def __init__(self, path: Path, name: str) -> None:
        self._name = name
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise StorageFailed(f"can't open {str(path)!r}: {error.strerror}", file=name) from None
        with contextlib.suppress(OSError):
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def read_into(self, start: int, buffer: memoryview) -> None:
        done, wanted = 0, len(buffer)
        while done < wanted:
            try:
                count = os.preadv(self._descriptor, [buffer[done:]], start + done)
            except OSError as error:
                raise StorageFailed(
                    f"reading {wanted} bytes at {start} of {self._name!r} failed: {error.strerror}", file=self._name
                ) from None
            if count == 0:
                raise SourceCorrupt(
                    f"file {self._name!r} ends at byte {start + done}, before the {wanted} bytes expected at {start}",
                    file=self._name,
                    hint="the file is truncated or was changed while it was read; copy it again from its origin",
                )
            done += count

    def done_with(self, start: int, length: int) -> None:
        with contextlib.suppress(OSError):
            os.posix_fadvise(self._descriptor, start, length, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        os.close(self._descriptor)


class LocalStreamWriter:
    """Written under a temporary name beside the final one; fsync and rename on ``close``."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._temporary, "wb")  # noqa: SIM115 - closed in close() or abort()
        except OSError as error:
            raise target_error(error, f"creating {path.name!r}") from None

    def write(self, data: memoryview) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            raise target_error(error, f"writing {self._path.name!r}") from None

    def close(self) -> None:
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._temporary, self._path)
        except OSError as error:
            self.abort()
            raise target_error(error, f"finishing {self._path.name!r}") from None

    def abort(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            self._temporary.unlink()


class LocalStorage:
    """A folder, or a single file (then "" is the file itself)."""

    is_local = True

    def __init__(self, root: Path) -> None:
        self.root = root
        self._resolved = Path(os.path.realpath(root))

    @property
    def uri(self) -> str:
        return str(self.root)

    def child(self, path: str) -> LocalStorage:
        return LocalStorage(self.path(path))

    def path(self, path: str) -> Path:
        """The absolute path of a name; one that resolves out of the root (and of a Hub cache's blobs) is refused."""
        full = self.root / path if path else self.root
        resolved = Path(os.path.realpath(full))
        if resolved != self._resolved and not resolved.is_relative_to(self._resolved) and not self._hub_blob(resolved):
            raise UnsafeSource(
                f"{path!r} is a link that leads out of {str(self.root)!r}, to {str(resolved)!r}",
                file=path,
                hint="copy the file into the folder if you trust it",
            )
        return full

    def _hub_blob(self, resolved: Path) -> bool:
        """A Hugging Face cache keeps ``snapshots/<revision>/<name>`` as links into ``blobs/`` of the same model."""
        for parent in (self._resolved, *self._resolved.parents):
            if parent.parent.name == "snapshots":
                return resolved.parent == parent.parent.parent / "blobs"
        return False

    def stat(self, path: str) -> FileStat | None:
        try:
            status = os.stat(self.path(path))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise StorageFailed(f"can't look at {path or str(self.root)!r}: {error.strerror}") from None
        is_dir = os.path.isdir(self.path(path))
        return FileStat(status.st_size, f"{status.st_size}:{status.st_mtime_ns}", is_dir)

    def list_dir(self, path: str = "") -> list[DirEntry]:
        try:
            with os.scandir(self.root / path) as found:
                entries = [
                    DirEntry(entry.name, entry.is_dir(), entry.stat().st_size)
                    for entry in found
                    if entry.is_dir() or os.path.exists(entry.path)
                ]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise StorageFailed(f"can't list {path or str(self.root)!r}: {error.strerror}") from None
        return sorted(entries, key=lambda entry: entry.name)

    def read_bytes(self, path: str, start: int = 0, length: int | None = None) -> bytes:
        if length is None:
            status = self.stat(path)
            if status is None:
                raise SourceCorrupt(f"file {path!r} is missing", file=path)
            length = max(0, status.bytes - start)
        buffer = bytearray(length)
        reader = self.open(path)
        try:
            reader.read_into(start, memoryview(buffer))
        finally:
            reader.close()
        return bytes(buffer)

    def open(self, path: str) -> LocalReader:
        return LocalReader(self.path(path), path or self.root.name)

    def create(self, path: str) -> LocalStreamWriter:
        return LocalStreamWriter(self.root / path if path else self.root)

    def create_once(self, path: str, data: bytes) -> bool:
        full = self.root / path if path else self.root
        try:
            full.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(full, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            return False
        except OSError as error:
            raise target_error(error, f"creating {path!r}") from None
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return True

    def remove(self, path: str) -> None:
        full = self.root / path if path else self.root
        if full.is_dir() and not full.is_symlink():
            shutil.rmtree(full, ignore_errors=True)
        else:
            with contextlib.suppress(FileNotFoundError):
                full.unlink()
