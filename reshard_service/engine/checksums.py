"""Running CRC32s and digests of arrays that pass through in pieces."""

from __future__ import annotations

from dataclasses import dataclass, field

from reshard_service.manifest import Hasher, SegmentRow, digest_bytes, new_hasher
from reshard_service.storage.base import ByteReader

try:
    from isal.isal_zlib import crc32 as crc32
except ImportError:  # platforms without an isal wheel: the same sum, some ten times slower
    from zlib import crc32 as crc32

SEGMENT_BYTES = 64 << 20
"""Largest piece of a stored chunk that has a digest of its own (decision 17)."""


@dataclass(slots=True)
class RunningCrc:
    """CRC32 of an array that arrives front to back; knows nothing once a piece was skipped."""

    at: int = 0
    value: int = 0

    def add(self, start: int, data: memoryview) -> None:
        if start == self.at:
            self.value = crc32(data, self.value)
            self.at += len(data)


@dataclass(slots=True)
class RunningSegments:
    """Digests of the segments of one stored array, which arrives front to back from ``start`` in its file."""

    start: int
    algorithm: str
    segments: list[SegmentRow] = field(default_factory=list)
    _hash: Hasher | None = None
    _filled: int = 0

    @property
    def at(self) -> int:
        """Where the next bytes have to lie in the file."""
        return self.start + self._filled

    def add(self, start: int, data: memoryview) -> None:
        """Take the next bytes, which lie at ``start`` of the file."""
        if start != self.at:
            raise AssertionError(f"bytes at {start} came before those at {self.at}")
        while len(data):
            room = SEGMENT_BYTES - self._filled
            if self._hash is None:
                self._hash = new_hasher(self.algorithm)
            self._hash.update(data[:room])
            self._filled += min(room, len(data))
            data = data[room:]
            if self._filled == SEGMENT_BYTES:
                self._close()

    def finish(self) -> list[SegmentRow]:
        if self._filled:
            self._close()
        return self.segments

    def _close(self) -> None:
        if self._hash is not None:
            self.segments.append((self.start, self._filled, self._hash.hexdigest()))
        self.start += self._filled
        self._hash = None
        self._filled = 0


def segment_of(start: int, data: memoryview, algorithm: str) -> SegmentRow:
    """The digest of bytes that are at hand whole."""
    return start, len(data), digest_bytes(data, algorithm)


def read_digest(reader: ByteReader, start: int, length: int, block: memoryview, algorithm: str) -> str:
    """The digest of stored bytes, read again a ``block`` at a time."""
    hasher = new_hasher(algorithm)
    for at in range(0, length, len(block)):
        piece = block[: min(len(block), length - at)]
        reader.read_into(start + at, piece)
        hasher.update(piece)
    return hasher.hexdigest()
