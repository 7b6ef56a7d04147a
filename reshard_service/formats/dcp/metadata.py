"""Reading DCP metadata files: safely, whatever is in them, and a million chunks in seconds."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
import xxhash

from reshard_service.catalogue import Int32s, Int64s, Path
from reshard_service.errors import CheckpointIncomplete, SourceCorrupt, UnsafeSource
from reshard_service.formats.dcp.metadata_columns import Columns, load_columns
from reshard_service.formats.dcp.metadata_standins import ForbiddenGlobal
from reshard_service.formats.pickles.child import ChildLimits, receive_exactly, run_child
from reshard_service.formats.pickles.load import forbidden_global
from reshard_service.formats.pickles.scan import scan
from reshard_service.storage.base import Storage

SCANNED_BYTES = 256 << 10
"""Up to this size it is scanned and loaded here (0.3 s per MB), beyond it in a child (0.1 s, then 30 ms per MB)."""

MOST_BYTES = 1 << 30
_WINDOW = 4 << 20


@dataclass(frozen=True, slots=True)
class MetadataFile:
    """One metadata pickle, laid out but not yet tied together; see ``metadata_columns.Columns`` for the columns."""

    name: str
    digest: str
    bytes: int
    texts: tuple[str, ...] = field(repr=False)
    transforms: tuple[tuple[str, ...], ...]
    columns: dict[str, Int64s] = field(repr=False)
    paths: dict[str, Path] | None = field(repr=False)
    planner: str | None
    version: str | None
    other_fields: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StoredObject:
    """A byte object and where it lies; ``file`` and ``transforms`` index the metadata's lists."""

    key: str
    file: int
    start: int
    length: int
    transforms: int


@dataclass(frozen=True, slots=True)
class DcpMetadata:
    """Everything that a DCP folder's metadata says, chunks tied to their items.

    Chunk rows are grouped by tensor (``first``, as in ``catalogue.Chunks``) and sorted by offset; ``offsets`` and
    ``sizes`` are padded to the largest rank with 0 and 1. Zero-volume chunks are still in.
    """

    keys: tuple[str, ...] = field(repr=False)
    dtypes: tuple[str, ...] = field(repr=False)
    """torch's name for each tensor's element type."""
    shapes: tuple[tuple[int, ...], ...] = field(repr=False)
    first: Int64s = field(repr=False)
    offsets: Int64s = field(repr=False)
    sizes: Int64s = field(repr=False)
    file: Int32s = field(repr=False)
    start: Int64s = field(repr=False)
    length: Int64s = field(repr=False)
    transforms: Int32s = field(repr=False)
    files: tuple[str, ...]
    transform_lists: tuple[tuple[str, ...], ...]
    objects: tuple[StoredObject, ...] = field(repr=False)
    paths: dict[str, Path] | None = field(repr=False)
    """The default planner's path of each key; None where another planner wrote, or none that says."""
    planner: str | None
    version: str | None
    other_fields: tuple[str, ...]
    digest: str
    bytes: int


def read_metadata_file(storage: Storage, name: str) -> MetadataFile:
    """Read and lay out one metadata pickle; nothing in it is performed. Memory: seven times its size, in a child."""
    status = storage.stat(name)
    if status is None:
        raise CheckpointIncomplete(f"metadata file {name!r} is not there", file=name)
    if status.bytes > MOST_BYTES:
        raise UnsafeSource(f"{name!r} has {status.bytes} bytes; at most {MOST_BYTES} are read", file=name)
    digest = xxhash.xxh3_128()
    if status.bytes <= SCANNED_BYTES:
        data = storage.read_bytes(name)
        digest.update(data)
        header, columns = _load_here(data, name)
    else:

        def receive(answer: dict[str, Any], stream: IO[bytes]) -> tuple[dict[str, Any], dict[str, Int64s]]:
            return answer, _receive_columns(answer, stream, status.bytes, name)

        header, columns = run_child(
            ("reshard_service.formats.dcp.metadata_columns", "child_main"),
            ChildLimits.for_pickle(status.bytes),
            _windows(storage, name, status.bytes, digest),
            receive,
            file=name,
        )
    texts = tuple(header["texts"])
    _require_utf8(texts, name)
    paths = header["paths"]
    return MetadataFile(
        name=name,
        digest=digest.hexdigest(),
        bytes=status.bytes,
        texts=texts,
        transforms=tuple(tuple(names) for names in header["transforms"]),
        columns=columns,
        paths=None if paths is None else {key: tuple(path) for key, path in paths.items()},
        planner=header["planner"],
        version=header["version"],
        other_fields=tuple(header["other_fields"]),
    )


def _load_here(data: bytes, name: str) -> tuple[dict[str, Any], dict[str, Int64s]]:
    scan(data, file=name)
    try:
        found = load_columns(io.BytesIO(data))
    except ForbiddenGlobal as error:
        raise forbidden_global(str(error), name) from None
    except Exception as error:
        raise SourceCorrupt(
            f"{name!r} is no metadata that torch writes: {type(error).__name__}: {str(error)[:400]}", file=name
        ) from None
    columns = {key: np.array(column, dtype=np.int64) for key, column in found.columns.items()}
    return found.header(), columns


def _windows(storage: Storage, name: str, nbytes: int, digest: Any) -> Iterator[memoryview]:
    reader = storage.open(name)
    try:
        buffer = memoryview(bytearray(min(_WINDOW, nbytes)))
        for start in range(0, nbytes, _WINDOW):
            window = buffer[: min(_WINDOW, nbytes - start)]
            reader.read_into(start, window)
            digest.update(window)
            yield window
    finally:
        reader.close()


def _receive_columns(answer: dict[str, Any], stream: IO[bytes], nbytes: int, name: str) -> dict[str, Int64s]:
    columns: dict[str, Int64s] = {}
    for column in Columns.NAMES:
        typecode, count = answer["columns"][column]
        if count > nbytes:  # each value took at least a byte
            raise UnsafeSource(f"{name!r} claims {count} numbers in {nbytes} bytes", file=name)
        received = np.empty(count, dtype=typecode)  # array and numpy use the same letters for C's integers
        receive_exactly(stream, received.view(np.uint8).data, file=name)
        columns[column] = received.astype(np.int64, copy=False)
    return columns


def _require_utf8(texts: Sequence[str], name: str) -> None:
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        bad = next(text for text in texts if any(0xD800 <= ord(character) < 0xE000 for character in text))
        raise SourceCorrupt(f"{name!r} holds the name {bad!r}, which is not valid UTF-8", file=name) from None
