"""Local output files: space taken up front, whole pages past the page cache, the rest through it."""

from __future__ import annotations

import ctypes
import errno
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from reshard_service.engine.buffers import PAGE, Buffer
from reshard_service.engine.mover import RunSink
from reshard_service.formats.target import OutputFile
from reshard_service.manifest import SegmentRow
from reshard_service.storage.local import target_error

DIRECT_BYTES = 64 << 10
"""Shorter runs go through the page cache: a direct write waits for the disk, which many small ones can't afford."""

SYNC_BYTES = 64 << 20
"""Smaller files are not synced one by one but together, before the commit."""

OPEN_FILES = 256
"""A layout of a thousand ranks has a thousand files in the making, more than a process may have open."""

_libc = ctypes.CDLL(None, use_errno=True)


def reserve(descriptor: int, size: int) -> None:
    """Make a file ``size`` bytes long, with its blocks taken where the file system can, so that a full disk shows."""
    fallocate = getattr(_libc, "fallocate", None)
    if fallocate is not None and size > 0:
        failed = fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size))
        if not failed:
            return
        code = ctypes.get_errno()
        if code not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise OSError(code, os.strerror(code))
    os.ftruncate(descriptor, size)


def takes_direct_writes(folder: Path) -> bool:
    """Whether files here accept O_DIRECT: tried, since file systems differ and some only say so (decision 32)."""
    if not hasattr(os, "O_DIRECT"):
        return False
    probe = folder / ".direct-probe"
    buffer = Buffer(PAGE)
    try:
        descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT | os.O_CLOEXEC, 0o600)
        try:
            return os.pwrite(descriptor, buffer.view, 0) == PAGE
        finally:
            os.close(descriptor)
    except OSError:
        return False
    finally:
        buffer.close()
        probe.unlink(missing_ok=True)


@dataclass(slots=True)
class _Open:
    """An output file in the making. Its descriptors come and go."""

    missing: int
    """Bytes still to come."""
    cached: int = -1
    direct: int | None = None
    users: int = 0
    """Threads that are using the descriptors now."""
    is_created: bool = False
    segments: list[SegmentRow] = field(default_factory=list)


class OutputFiles:
    """The files of one attempt, written by several threads in place; one is finished when its last byte came."""

    def __init__(
        self,
        folder: Path,
        names: Callable[[int], str],
        files: tuple[OutputFile, ...],
        claimed_bytes: list[int],
        finished: Callable[[int, list[SegmentRow]], None],
    ) -> None:
        """``names(i)`` is the temporary name of file ``i``; ``claimed_bytes[i]`` how much will be written.

        ``finished(i, segments)`` is called once per file, closed, with its digests in file order.
        """
        self._folder = folder
        self._names = names
        self._files = files
        self._claimed = claimed_bytes
        self._finished = finished
        self._direct = takes_direct_writes(folder)
        self._making: dict[int, _Open] = {}
        self._open: OrderedDict[int, _Open] = OrderedDict()
        """Those with descriptors, the longest unused first."""
        self._lock = Lock()

    @contextmanager
    def _descriptors_of(self, file: int) -> Iterator[_Open]:
        """The file, held open; it is made when it is first asked for."""
        with self._lock:
            opened = self._state_of(file)
            if opened.cached < 0:
                self._open_descriptors(file, opened)
            self._open[file] = opened
            self._open.move_to_end(file)
            opened.users += 1
            if len(self._open) > OPEN_FILES:
                self._close_longest_unused()
        try:
            yield opened
        finally:
            with self._lock:
                opened.users -= 1

    def _state_of(self, file: int) -> _Open:
        known = self._making.get(file)
        if known is None:
            known = self._making[file] = _Open(self._claimed[file])
        return known

    def _close_longest_unused(self) -> None:
        for file, opened in self._open.items():
            if opened.users == 0:
                del self._open[file]
                self._close(opened)
                return

    def _open_descriptors(self, file: int, opened: _Open) -> None:
        path = self._folder / self._names(file)
        flags = os.O_WRONLY | os.O_CLOEXEC
        try:
            if not opened.is_created:
                path.parent.mkdir(parents=True, exist_ok=True)
            opened.cached = os.open(path, flags if opened.is_created else flags | os.O_CREAT | os.O_TRUNC, 0o666)
            try:
                if not opened.is_created:
                    reserve(opened.cached, self._files[file].bytes)
                    opened.is_created = True
                opened.direct = os.open(path, flags | os.O_DIRECT) if self._direct else None
            except OSError:
                self._close(opened)
                raise
        except OSError as error:
            raise target_error(error, f"creating {self._files[file].path!r}") from None

    def create_empty(self, file: int) -> None:
        """Finish a file that nothing will be written to."""
        self.count(file, 0)

    def put(self, file: int, start: int, data: memoryview, *, direct: bool) -> None:
        """Write bytes at their final place; ``direct`` data is whole, aligned pages in aligned memory."""
        with self._descriptors_of(file) as opened:
            descriptor = opened.direct if direct and opened.direct is not None else opened.cached
            try:
                while len(data):
                    count = os.pwrite(descriptor, data, start)
                    if direct and count % PAGE:
                        descriptor = opened.cached
                    data, start = data[count:], start + count
            except OSError as error:
                raise target_error(error, f"writing {self._files[file].path!r}") from None

    @property
    def direct(self) -> bool:
        return self._direct

    def note(self, file: int, segments: list[SegmentRow]) -> None:
        """Keep digests of bytes that are being written."""
        with self._lock:
            self._state_of(file).segments.extend(segments)

    def count(self, file: int, written: int) -> None:
        """``written`` more bytes of the file are in place; the last ones finish it."""
        with self._lock:
            opened = self._state_of(file)
            opened.missing -= written
            if opened.missing > 0:
                return
        with self._descriptors_of(file):
            try:
                if self._files[file].bytes >= SYNC_BYTES:
                    os.fsync(opened.cached)
            except OSError as error:
                raise target_error(error, f"syncing {self._files[file].path!r}") from None
        with self._lock:
            self._open.pop(file, None)
            self._close(opened)
            segments, opened.segments = sorted(opened.segments), []
        self._finished(file, segments)

    @staticmethod
    def _close(opened: _Open) -> None:
        for descriptor in (opened.cached, opened.direct):
            if descriptor is not None and descriptor >= 0:
                os.close(descriptor)
        opened.cached, opened.direct = -1, None

    def close(self) -> None:
        """Close what is still open, finished or not."""
        with self._lock:
            for opened in self._open.values():
                self._close(opened)
            self._open.clear()


class LocalSink(RunSink):
    """One thread's way into the output files: joins runs, so that all but a file's edges go in whole pages."""

    def __init__(self, files: OutputFiles) -> None:
        self._files = files
        self._rest: dict[int, tuple[int, bytes]] = {}
        """Per file the start of a page that waits for the run that continues it, and where it goes."""

    def write(self, file: int, start: int, buffer: Buffer, at: int, length: int) -> None:
        if not self._files.direct:
            self._files.put(file, start, buffer.view[at : at + length], direct=False)
            self._files.count(file, length)
            return
        waiting = self._rest.pop(file, None)
        if waiting is not None:
            rest_start, rest = waiting
            if rest_start + len(rest) == start:
                buffer.view[at - len(rest) : at] = rest
                start, at, length = rest_start, at - len(rest), length + len(rest)
            else:
                self._put_rest(file, rest_start, rest)
        lead = min(-start % PAGE, length)
        if lead:
            self._files.put(file, start, buffer.view[at : at + lead], direct=False)
        pages = (length - lead) // PAGE * PAGE
        if pages:
            whole = buffer.view[at + lead : at + lead + pages]
            self._files.put(file, start + lead, whole, direct=pages >= DIRECT_BYTES)
        rest_length = length - lead - pages
        if rest_length:
            end = at + length
            self._rest[file] = (start + length - rest_length, bytes(buffer.view[end - rest_length : end]))
        self._files.count(file, length - rest_length)

    def _put_rest(self, file: int, start: int, rest: bytes) -> None:
        self._files.put(file, start, memoryview(rest), direct=False)
        self._files.count(file, len(rest))

    def add_segments(self, file: int, segments: list[SegmentRow]) -> None:
        self._files.note(file, segments)

    def end_batch(self) -> None:
        rests, self._rest = self._rest, {}
        for file, (start, rest) in rests.items():
            self._put_rest(file, start, rest)
