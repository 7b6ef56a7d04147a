"""Files written to remote stores in order, invisible until they are whole.

fsspec's own idiom, ``with fs.open(path, "wb")``, completes the upload when the block is left by an exception, and again
when a forgotten file object is collected: both leave a partial object under the final name. The writers here complete
an upload in ``close`` and nowhere else.
"""

from __future__ import annotations

import contextlib
import os
import threading
import uuid
from typing import Any

from reshard_service.storage.connection import Connection

PART_BYTES = 6 << 20
_PARTS_OF_A_SIZE = 1250
_SENDING_TOGETHER = 3
"""For the whole process: a part on its way exists about four times, in the driver, its SDK and the event loop."""

_sending = threading.BoundedSemaphore(_SENDING_TOGETHER)


def _renew_after_fork() -> None:
    # What another thread held at the fork would stay held in the child for ever.
    global _sending
    _sending = threading.BoundedSemaphore(_SENDING_TOGETHER)


os.register_at_fork(after_in_child=_renew_after_fork)


def part_bytes(index: int) -> int:
    """Size of the part with this number: doubling in steps, so that 10,000 parts (S3's limit) reach 1.8 TiB."""
    return PART_BYTES << (index // _PARTS_OF_A_SIZE)


class UploadWriter:
    """An object in an object store: one request if it fits into one part, else an upload by parts.

    Costs one part of memory, and three more while one is sent. Parts are 6 MiB for objects up to 7.5 GB.
    """

    def __init__(self, connection: Connection, key: str, name: str) -> None:
        self._connection = connection
        self._key = key
        self._name = name
        self._head: bytearray | None = bytearray()
        self._file: Any = None
        self._part = 0
        self._room = part_bytes(0)

    def write(self, data: memoryview) -> None:
        try:
            self._write(data)
        except Exception as error:
            raise self._connection.translated(error, f"writing {self._name!r}", file=self._name, writing=True) from None

    def _write(self, data: memoryview) -> None:
        data = data.cast("B") if data.format != "B" or data.ndim != 1 else data
        while len(data):
            piece, data = data[: self._room], data[self._room :]
            if self._head is not None:
                self._head += piece
            else:
                self._file.write(piece)
            self._room -= len(piece)
            if self._room == 0:
                self._finish_part()

    def _finish_part(self) -> None:
        if self._head is not None:
            # More than a part as block size: parts are sent here and not whenever the driver thinks fit.
            self._file = self._connection.filesystem().open(
                self._key, "wb", block_size=2 * part_bytes(0), autocommit=False
            )
            # Otherwise garbage collection of an abandoned file would complete the upload.
            self._file._unclosable = True
            self._file.write(self._head)
            self._head = None
        self._file.blocksize = part_bytes(self._part)
        with _sending:
            self._file.flush()
        self._part += 1
        self._room = part_bytes(self._part)
        self._file.blocksize = 2 * self._room

    def close(self) -> None:
        what = f"finishing {self._name!r}"
        if self._head is not None:
            data, self._head = bytes(self._head), None
            with _sending:
                self._connection.call(
                    lambda filesystem: filesystem.pipe_file(self._key, data), what, file=self._name, writing=True
                )
            return
        if self._file is None:
            return
        try:
            self._file._unclosable = False
            with _sending:
                self._file.close()
            self._file.commit()
        except Exception as error:
            self.abort()
            raise self._connection.translated(error, what, file=self._name, writing=True) from None
        self._file = None

    def abort(self) -> None:
        self._head = None
        file, self._file = self._file, None
        if file is None:
            return
        # An upload that can't be ended now is left to the bucket's lifecycle rule (docs/safety.md).
        with contextlib.suppress(Exception):
            self._connection.retry.call(file.discard)
        file.closed = True


class TemporaryNameWriter:
    """A file in a store with folders and renames: written under a hidden name beside its own."""

    def __init__(self, connection: Connection, key: str, name: str) -> None:
        self._connection = connection
        self._key = key
        self._name = name
        folder, _, base = key.rpartition("/")
        self._temporary = f"{folder}/.{base}.{uuid.uuid4().hex[:8]}.part"

        def begin(filesystem: Any) -> Any:
            filesystem.makedirs(folder, exist_ok=True)
            return filesystem.open(self._temporary, "wb")

        self._file = connection.call(begin, f"creating {name!r}", file=name, writing=True)

    def write(self, data: memoryview) -> None:
        try:
            self._file.write(data)
        except Exception as error:
            raise self._connection.translated(error, f"writing {self._name!r}", file=self._name, writing=True) from None

    def close(self) -> None:
        try:
            self._file.close()
            self._connection.filesystem().mv(self._temporary, self._key)
        except Exception as error:
            self.abort()
            raise self._connection.translated(
                error, f"finishing {self._name!r}", file=self._name, writing=True
            ) from None

    def abort(self) -> None:
        with contextlib.suppress(Exception):
            self._file.close()
        with contextlib.suppress(Exception):
            self._connection.filesystem().rm(self._temporary)
