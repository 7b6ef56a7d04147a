"""What the rest of the project knows of a store: list, stat, ranged reads, in-order writes, create-once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from reshard_service.errors import UnsafeSource


@dataclass(frozen=True, slots=True)
class FileStat:
    """Size and change tag of a file: ``identity`` differs whenever the content may differ (mtime_ns, ETag, ...)."""

    bytes: int
    identity: str
    is_dir: bool = False


@dataclass(frozen=True, slots=True)
class DirEntry:
    """One name in a folder."""

    name: str
    is_dir: bool
    bytes: int


class ByteReader(Protocol):
    """An open file; safe to use from several threads at once."""

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the bytes from ``start``; a short file raises ``SourceCorrupt``."""

    def will_need(self, start: int, length: int) -> None:
        """A hint that these bytes are read soon, so that fetching them may begin."""

    def close(self) -> None: ...


class StreamWriter(Protocol):
    """A file being written in order, invisible until ``close``; ``abort`` leaves nothing behind."""

    def write(self, data: memoryview) -> None: ...

    def close(self) -> None: ...

    def abort(self) -> None: ...


class Storage(Protocol):
    """One root folder (or single file) of a store. Paths are relative to it, ``/``-separated, "" is the root itself."""

    @property
    def uri(self) -> str:
        """The root as the user would write it."""

    @property
    def is_local(self) -> bool:
        """True where files have positional writes, rename and fsync."""

    def child(self, path: str) -> Storage:
        """The same store with a folder beneath as its root."""

    def follow(self, path: str) -> None:
        """This name was found by listing the folder, not in a file: if it is a link, it may lead anywhere.

        Names that come out of a file (an index, ``.metadata``) never may (decision 30).
        """

    def stat(self, path: str) -> FileStat | None:
        """None if nothing is there."""

    def list_dir(self, path: str = "") -> list[DirEntry]:
        """Names in a folder, sorted; empty if it is not a folder."""

    def read_bytes(self, path: str, start: int = 0, length: int | None = None) -> bytes:
        """Bytes ``[start, start + length)``, or to the end; a short file raises ``SourceCorrupt``."""

    def open(self, path: str) -> ByteReader: ...

    def create(self, path: str) -> StreamWriter:
        """Begin a new file (parents are made)."""

    def create_once(self, path: str, data: bytes) -> bool:
        """Write a small file if and only if nothing has that name; False if something has."""

    def remove(self, path: str) -> None:
        """Remove a file or a whole folder; nothing happens if it is not there."""


def contained_path(name: str, *, named_in: str) -> str:
    """``name`` as a relative path that stays inside its folder, or :class:`UnsafeSource`.

    For names that come out of a file (an index, ``.metadata``): never absolute, no ``..``, no control characters.
    """
    parts = name.split("/")
    if (
        not name
        or name.startswith("/")
        or "\\" in name
        or any(part in ("", ".", "..") for part in parts)
        or any(ord(character) < 32 or ord(character) == 127 for character in name)
        or (len(name) > 1 and name[1] == ":")
    ):
        raise UnsafeSource(
            f"{named_in} names the file {name!r}, which is not a plain path inside the checkpoint's folder",
            file=named_in,
            hint="a checkpoint never needs absolute paths or '..'; don't trust this one",
        )
    return name
