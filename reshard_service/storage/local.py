"""Local files: positional reads without copies, and names that can't lead out of the checkpoint's folder."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import stat
import uuid
from pathlib import Path

from reshard_service.errors import (
    ReshardError,
    SourceCorrupt,
    SourceNotFound,
    StorageFailed,
    TargetFull,
    TargetReadOnly,
    UnsafeSource,
)
from reshard_service.storage.base import DirEntry, FileStat

_libc = ctypes.CDLL(None, use_errno=True)


def target_error(error: OSError, what: str) -> ReshardError:
    """The error of the tree for a failed write: full, read-only, or anything else."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return TargetFull(f"no space left while {what}", hint="free space, or name a target on another disk")
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return TargetReadOnly(f"not allowed while {what}: {error.strerror}")
    return StorageFailed(f"failed while {what}: {error.strerror or error}")


def sync_folder(folder: Path) -> None:
    """Make new names in a folder last through a crash, where the file system supports that."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:
        return  # a folder may be written to without being listed
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and FUSE file systems know no fsync of folders. A failing disk is another matter.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def sync_file_system(folder: Path) -> None:
    """Make everything in a folder last through a crash: one ``syncfs`` for all its files, however many they are."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        syncfs = getattr(_libc, "syncfs", None)
        if syncfs is None:
            os.sync()
        elif syncfs(descriptor):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
    finally:
        os.close(descriptor)


class LocalReader:
    """A local file read with ``pread``: no shared position, so threads need no lock."""

    def __init__(self, path: Path, name: str) -> None:
        self._name = name
        try:
            # O_NONBLOCK is for what is no file: a pipe would wait for a writer for ever.
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError):
            raise SourceNotFound(f"file {str(path)!r} is missing", file=name) from None
        except OSError as error:
            raise StorageFailed(f"can't open {str(path)!r}: {error.strerror}", file=name) from None
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            self.close()
            raise UnsafeSource(f"{str(path)!r} is not a regular file", file=name)
        with contextlib.suppress(OSError):
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    @property
    def size_bytes(self) -> int:
        """Size of the open file now."""
        return os.fstat(self._descriptor).st_size

    def opened_path(self) -> Path | None:
        """Where the open file really lies, whatever its name led through; None where the system can't tell."""
        try:
            return Path(os.readlink(f"/proc/self/fd/{self._descriptor}"))
        except OSError:
            return None

    def expect(self, start: int, length: int) -> None:
        """``SourceCorrupt`` unless ``[start, start + length)`` lies in the file: ask before taking memory for it."""
        if start < 0 or length < 0 or start + length > self.size_bytes:
            raise self._short(self.size_bytes, start, length)

    def _short(self, end: int, start: int, wanted: int) -> SourceCorrupt:
        return SourceCorrupt(
            f"file {self._name!r} ends at byte {end}, before the {wanted} bytes expected at {start}",
            file=self._name,
            hint="the file is truncated or was changed while it was read; copy it again from its origin",
        )

    def read_into(self, start: int, buffer: memoryview) -> None:
        done, wanted = 0, len(buffer)
        if not 0 <= start < 1 << 62:  # beyond what the system call takes, whatever the file
            raise self._short(self.size_bytes, start, wanted)
        while done < wanted:
            try:
                count = os.preadv(self._descriptor, [buffer[done:]], start + done)
            except OSError as error:
                raise StorageFailed(
                    f"reading {wanted} bytes at {start} of {self._name!r} failed: {error.strerror}", file=self._name
                ) from None
            if count == 0:
                raise self._short(start + done, start, wanted)
            done += count

    def will_need(self, start: int, length: int) -> None:
        with contextlib.suppress(OSError):
            os.posix_fadvise(self._descriptor, start, length, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            self.close()


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
            sync_folder(self._path.parent)
        except OSError as error:
            self.abort()
            raise target_error(error, f"finishing {self._path.name!r}") from None

    def close_once(self) -> bool:
        """Like ``close``, but False, and nothing written, if something has the name already.

        A hard link appears whole and only if the name is free, which a file opened with O_EXCL does not: it can be read
        half written, and is left half written by a crash.
        """
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            won = self._link()
            sync_folder(self._path.parent)
        except OSError as error:
            raise target_error(error, f"creating {self._path.name!r}") from None
        finally:
            self.abort()
        return won

    def _link(self) -> bool:
        try:
            os.link(self._temporary, self._path)
        except FileExistsError:
            # On NFS the answer to a link that succeeded can get lost, and the repeated request then fails.
            return os.stat(self._temporary).st_nlink == 2
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                raise
            return self._copy_exclusively()
        return True

    def _copy_exclusively(self) -> bool:
        """For file systems without hard links (exFAT, some FUSE)."""
        try:
            with open(self._path, "xb") as file:
                file.write(self._temporary.read_bytes())
                file.flush()
                os.fsync(file.fileno())
        except FileExistsError:
            return False
        return True

    def abort(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            self._temporary.unlink()


class LocalStorage:
    """A folder, or a single file (then "" is the file itself)."""

    is_local = True

    def __init__(self, root: Path, roots: tuple[Path, ...] | None = None) -> None:
        """``roots`` are the folders that the service allows (real paths); None for no limit but the root itself."""
        self.root = root
        self._roots = roots
        self._resolved = Path(os.path.realpath(root))
        self._followed: set[str] = set()

    def __repr__(self) -> str:
        return f"LocalStorage({str(self.root)!r})"

    @property
    def uri(self) -> str:
        return str(self.root)

    def child(self, path: str) -> LocalStorage:
        return LocalStorage(self.path(path), self._roots)

    def path(self, path: str) -> Path:
        """The absolute path of a name; one that resolves out of the root (and of a Hub cache's blobs) is refused."""
        full = self.root / path if path else self.root
        resolved = Path(os.path.realpath(full))
        inside = resolved == self._resolved or resolved.is_relative_to(self._resolved)
        if not inside and path not in self._followed and not self._hub_blob(resolved):
            raise UnsafeSource(
                f"{path!r} is a link that leads out of {str(self.root)!r}, to {str(resolved)!r}",
                file=path,
                hint="copy the file into the folder if you trust it",
            )
        self._expect_allowed(resolved, path)
        return full

    def follow(self, path: str) -> None:
        self._followed.add(path)

    def _expect_allowed(self, resolved: Path, path: str) -> None:
        if self._roots is not None and not any(resolved.is_relative_to(root) for root in self._roots):
            raise UnsafeSource(f"{path or str(self.root)!r} leads out of the folders that may be used", file=path)

    def _place(self, path: str) -> Path:
        """Where a file is to be written: its folder is checked like any path, the name itself may be a dead link."""
        folder, _, name = path.rpartition("/")
        return self.path(folder) / name if path else self.root

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
        return FileStat(status.st_size, f"{status.st_size}:{status.st_mtime_ns}", is_dir=stat.S_ISDIR(status.st_mode))

    def list_dir(self, path: str = "") -> list[DirEntry]:
        try:
            with os.scandir(self.path(path)) as found:
                entries = [entry for item in found if (entry := _entry(item)) is not None]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise StorageFailed(f"can't list {path or str(self.root)!r}: {error.strerror}") from None
        return sorted(entries, key=lambda entry: entry.name)

    def read_bytes(self, path: str, start: int = 0, length: int | None = None) -> bytes:
        reader = self.open(path)
        try:
            wanted = max(0, reader.size_bytes - start) if length is None else length
            reader.expect(start, wanted)
            buffer = bytearray(wanted)
            reader.read_into(start, memoryview(buffer))
        finally:
            reader.close()
        return bytes(buffer)

    def open(self, path: str) -> LocalReader:
        reader = LocalReader(self.path(path), path or self.root.name)
        if self._roots is not None and (opened := reader.opened_path()) is not None:
            # A link may have been put there between the check and the opening.
            try:
                self._expect_allowed(opened, path)
            except UnsafeSource:
                reader.close()
                raise
        return reader

    def create(self, path: str) -> LocalStreamWriter:
        return LocalStreamWriter(self._place(path))

    def create_once(self, path: str, data: bytes) -> bool:
        full = self._place(path)
        writer = LocalStreamWriter(full)
        try:
            writer.write(memoryview(data))
            return writer.close_once()
        except ReshardError:
            writer.abort()
            raise

    def remove(self, path: str) -> None:
        full = self._place(path)
        try:
            if full.is_dir() and not full.is_symlink():
                shutil.rmtree(full)
            else:
                full.unlink(missing_ok=True)
        except FileNotFoundError:
            return  # somebody else was faster
        except OSError as error:
            raise target_error(error, f"removing {str(full)!r}") from None


def _entry(item: os.DirEntry[str]) -> DirEntry | None:
    """None for a dead link, and for a name that went away since the folder was read."""
    try:
        return DirEntry(item.name, item.is_dir(), item.stat().st_size)
    except FileNotFoundError:
        return None
