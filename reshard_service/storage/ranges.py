"""Exact ranged reads of remote files: all the bytes or an error, and a bound on what is on its way."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from reshard_service.errors import SourceCorrupt, StorageFailed
from reshard_service.storage.connection import Connection
from reshard_service.storage.faults import causes, status_of

T = TypeVar("T")

RANGE_BYTES = 8 << 20
"""One request reads at most this much: large enough for throughput, small enough to repeat (measured on S3)."""
_RANGES_TOGETHER = 4
_BYTES_IN_FLIGHT = 32 << 20
"""For the whole process. A driver hands each range over as new bytes, which it first collects piece by piece: up to
twice this comes on top of the callers' buffers."""


class _ByteBudget:
    """How many bytes may be on their way from remote stores to this process at once."""

    def __init__(self, limit_bytes: int) -> None:
        self._free = limit_bytes
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, amount: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._free >= amount)
            self._free -= amount
        try:
            yield
        finally:
            with self._changed:
                self._free += amount
                self._changed.notify_all()


_in_flight = _ByteBudget(_BYTES_IN_FLIGHT)


def _renew_after_fork() -> None:
    # What another thread had taken at the fork would stay taken in the child for ever.
    global _in_flight
    _in_flight = _ByteBudget(_BYTES_IN_FLIGHT)


os.register_at_fork(after_in_child=_renew_after_fork)


class FsspecReader:
    """A remote file read by ranges; every call is independent, so threads need no lock."""

    def __init__(self, connection: Connection, key: str, name: str) -> None:
        self._connection = connection
        self._key = key
        self._name = name

    def read_into(self, start: int, buffer: memoryview) -> None:
        expect_range(start, len(buffer), self._name)
        done = 0
        while done < len(buffer):
            size = min(len(buffer) - done, RANGE_BYTES * _RANGES_TOGETHER)
            self._read_together(start + done, buffer[done : done + size])
            done += size

    def _read_together(self, start: int, buffer: memoryview) -> None:
        starts = list(range(start, start + len(buffer), RANGE_BYTES))
        ends = [min(at + RANGE_BYTES, start + len(buffer)) for at in starts]

        def request(filesystem: Any) -> list[bytes]:
            if len(starts) == 1:
                return [filesystem.cat_file(self._key, start=starts[0], end=ends[0])]
            # The default of on_error hands errors back as if they were data.
            pieces: list[bytes] = filesystem.cat_ranges([self._key] * len(starts), starts, ends, on_error="raise")
            return pieces

        with _in_flight.taken(len(buffer)):
            pieces = read_ranges(self._connection, request, self._name, starts[0], len(buffer))
            for at, end, piece in zip(starts, ends, pieces, strict=True):
                expect_length(piece, at, end - at, self._name)
                buffer[at - start : end - start] = piece

    def will_need(self, start: int, length: int) -> None:
        """Nothing of a remote file is kept here."""

    def close(self) -> None:
        """Nothing is held open."""


def read_ranges(connection: Connection, request: Callable[[Any], T], name: str, start: int, length: int) -> T:
    """``request``'s answer, a range that starts beyond the end of the file being what it is: a short file."""

    def asked(filesystem: Any) -> T:
        try:
            return request(filesystem)
        except Exception as error:
            if any(status_of(cause)[0] == 416 for cause in causes(error)):
                raise short_file(name, start, length, None) from None
            raise

    return connection.call(asked, f"reading {length} bytes at {start} of {name!r}", file=name)


def expect_length(piece: bytes, start: int, length: int, name: str) -> None:
    """Drivers return what there is: less past the end of a file, more where a server ignores ranges."""
    if len(piece) < length:
        raise short_file(name, start, length, start + len(piece))
    if len(piece) > length:
        raise StorageFailed(
            f"the server answered {len(piece)} bytes where {length} at {start} of {name!r} were asked for",
            file=name,
            hint="it ignores ranged reads; copy the checkpoint to a store that has them",
        )


def expect_range(start: int, length: int, name: str) -> None:
    """Drivers take a negative start as counted from the end, which no caller of ours means."""
    if start < 0 or length < 0:
        raise SourceCorrupt(f"{length} bytes at {start} of {name!r} were asked for, which can't be", file=name)


def short_file(name: str, start: int, length: int, end: int | None) -> SourceCorrupt:
    where = f"at byte {end}, " if end is not None else ""
    return SourceCorrupt(
        f"file {name!r} ends {where}before the {length} bytes expected at {start}",
        file=name,
        hint="the file is truncated or was changed while it was read; copy it again from its origin",
    )
