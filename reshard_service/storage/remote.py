"""Every store that is not a local folder, through its fsspec driver: stat, listings, create-once, removal.

What drivers do differently, or do too kindly, is evened out here and in the modules beside: listings from a cache,
create-once that each of them reports in its own way, reads past the end that come back short (``ranges``), uploads that
are completed by an error (``uploads``).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from typing import Any

from reshard_service.errors import SourceNotFound, StorageFailed, TargetReadOnly
from reshard_service.storage.base import DirEntry, FileStat, contained_path
from reshard_service.storage.connection import OBJECT_STORES, Connection
from reshard_service.storage.faults import Retry, already_exists
from reshard_service.storage.ranges import (
    RANGE_BYTES,
    FsspecReader,
    expect_length,
    expect_range,
    read_ranges,
    short_file,
)
from reshard_service.storage.uploads import TemporaryNameWriter, UploadWriter

# Drivers that put create-once on the wire (If-None-Match, ifGenerationMatch): the store itself picks the winner.
_CREATE_ONCE = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"})
_READ_ONLY = frozenset({"http", "https"})
_CHANGE_TAGS = ("generation", "ETag", "etag", "VersionId", "version_id", "blob_id")
_CHANGE_TIMES = ("mtime", "modified", "last_modified", "LastModified", "updated", "created")

_create_lock = threading.Lock()


def _renew_after_fork() -> None:
    # A lock that another thread held at the fork would stay held in the child for ever.
    global _create_lock
    _create_lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_after_fork)


class FsspecStorage:
    """A folder (or a single file: then "" is the file itself) of a remote store."""

    is_local = False

    def __init__(
        self,
        uri: str,
        *,
        options: Callable[[], Mapping[str, object]] = dict,
        retry: Retry | None = None,
        make: Callable[..., Any] | None = None,
    ) -> None:
        """``options`` gives the driver's options when it is made; ``make`` replaces the installed driver (tests)."""
        self._uri = uri.rstrip("/")
        self._connection = Connection(uri.split("://", 1)[0], uri, options, retry or Retry(), make)

    def __repr__(self) -> str:
        return f"FsspecStorage({self._uri!r})"

    @property
    def uri(self) -> str:
        return self._uri

    def follow(self, path: str) -> None:
        """Stores that have links resolve them themselves."""

    def child(self, path: str) -> FsspecStorage:
        if not path:
            return self
        child = object.__new__(FsspecStorage)
        child._uri = f"{self._uri}/{contained_path(path, named_in=self._uri)}"
        child._connection = self._connection
        return child

    def _key(self, path: str) -> str:
        if path:
            contained_path(path, named_in=self._uri)
        root = self._connection.key(self._uri)
        return f"{root}/{path}" if path else root

    def _name(self, path: str) -> str:
        return path or self._uri

    def stat(self, path: str) -> FileStat | None:
        name, key = self._name(path), self._key(path)

        def request(filesystem: Any) -> Mapping[str, Any] | None:
            filesystem.invalidate_cache(key)
            try:
                info: Mapping[str, Any] = filesystem.info(key)
            except (FileNotFoundError, NotADirectoryError):
                return None
            return info

        info = self._connection.call(request, f"looking at {name!r}", file=name)
        if info is None:
            return None
        is_dir = info.get("type") == "directory"
        size = info.get("size")
        if not is_dir and not isinstance(size, int):
            raise StorageFailed(f"the store does not tell the size of {name!r}", file=name)
        return FileStat(int(size or 0), _identity(info), is_dir)

    def list_dir(self, path: str = "") -> list[DirEntry]:
        name, key = self._name(path), self._key(path)

        def request(filesystem: Any) -> list[Mapping[str, Any]]:
            filesystem.invalidate_cache(key)
            try:
                found: list[Mapping[str, Any]] = filesystem.ls(key, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return []
            return found

        entries: dict[str, DirEntry] = {}
        for info in self._connection.call(request, f"listing {name!r}", file=name):
            full = str(info["name"]).rstrip("/")
            parent, _, base = full.rpartition("/")
            # A file lists itself, and a "folder" object made by a console lists its own empty name.
            if base and parent.strip("/") == key.strip("/"):
                is_dir = info.get("type") == "directory"
                entries[base] = DirEntry(base, is_dir, int(info.get("size") or 0))
        return [entries[base] for base in sorted(entries)]

    def read_bytes(self, path: str, start: int = 0, length: int | None = None) -> bytes:
        name, key = self._name(path), self._key(path)
        expect_range(start, length or 0, name)
        if length is None:
            stat = self.stat(path)
            if stat is None or stat.is_dir:
                raise SourceNotFound(f"file {name!r} is missing", file=name)
            length = max(0, stat.bytes - start)
        elif length > RANGE_BYTES:
            # The length may come from a file: see that it is there before memory for it is taken.
            stat = self.stat(path)
            if stat is not None and start + length > stat.bytes:
                raise short_file(name, start, length, stat.bytes)
        if length == 0:
            return b""
        if length <= RANGE_BYTES:
            piece = read_ranges(
                self._connection, lambda fs: fs.cat_file(key, start=start, end=start + length), name, start, length
            )
            expect_length(piece, start, length, name)
            return bytes(piece)
        buffer = bytearray(length)
        self.open(path).read_into(start, memoryview(buffer))
        return bytes(buffer)

    def open(self, path: str) -> FsspecReader:
        return FsspecReader(self._connection, self._key(path), self._name(path))

    def create(self, path: str) -> UploadWriter | TemporaryNameWriter:
        self._expect_writable()
        kind = UploadWriter if self._connection.scheme in OBJECT_STORES else TemporaryNameWriter
        return kind(self._connection, self._key(path), self._name(path))

    def create_once(self, path: str, data: bytes) -> bool:
        """As the protocol says, with two limits that a caller must know.

        False may also mean that our own request reached the store although its answer was lost: write something unique
        and compare. Where a store has no conditional writes (sftp, hdfs, …), two processes at the very same moment may
        both see True.
        """
        self._expect_writable()
        name, key = self._name(path), self._key(path)
        scheme = self._connection.scheme

        def request(filesystem: Any) -> bool:
            if scheme in _CREATE_ONCE:
                try:
                    filesystem.pipe_file(key, data, mode="create")
                except Exception as error:
                    if already_exists(error):
                        return False
                    raise
                return True
            with _create_lock:
                filesystem.invalidate_cache(key)
                if filesystem.exists(key):
                    return False
                filesystem.makedirs(key.rpartition("/")[0], exist_ok=True)
                filesystem.pipe_file(key, data)
            return True

        return self._connection.call(request, f"creating {name!r}", file=name, writing=True)

    def remove(self, path: str) -> None:
        self._expect_writable()
        name, key = self._name(path), self._key(path)

        def request(filesystem: Any) -> None:
            filesystem.invalidate_cache(key)
            # Emptied, not removed, if it is a whole bucket: that may not even be ours to make again.
            doomed = [key] if "/" in key.strip("/") else [str(info["name"]) for info in filesystem.ls(key, detail=True)]
            for each in doomed:
                filesystem.rm(each, recursive=True)

        def unless_gone(filesystem: Any) -> None:
            try:
                request(filesystem)
            except FileNotFoundError:
                return

        self._connection.call(unless_gone, f"removing {name!r}", file=name, writing=True)

    def _expect_writable(self) -> None:
        if self._connection.scheme in _READ_ONLY:
            raise TargetReadOnly(f"a {self._connection.scheme}:// store can be read only")


def _identity(info: Mapping[str, Any]) -> str:
    """What changes when the content may have changed: the store's own tag, else the time of the last change."""
    tags = [f"{name}={info[name]}" for name in _CHANGE_TAGS if info.get(name)]
    if not tags:
        tags = [f"{name}={info[name]}" for name in _CHANGE_TIMES if info.get(name)][:1]
    return ":".join([str(info.get("size")), *tags])
