"""The catalogue: every tensor of one checkpoint, and where each rectangle of it lies, byte for byte.

Made from metadata alone. Tensors are Python values (tens of thousands); chunks are numpy columns (a million of them fit
in a few hundred MB). All positions and lengths are bytes unless a name says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from math import prod

import numpy as np
from numpy.typing import NDArray

from reshard_service.dtypes import DType
from reshard_service.storage.base import Storage

Int64s = NDArray[np.int64]
Int32s = NDArray[np.int32]
UInt8s = NDArray[np.uint8]
Path = tuple[str | int, ...]
"""Where a leaf sits in the nested state dict; an int is a list index (torch's ``planner_data``)."""


class Section(StrEnum):
    """Which part of the training state a tensor or object belongs to (decision 1)."""

    MODEL = "model"
    OPTIMIZER = "optimizer"
    EXTRA = "extra"


class Storing(IntEnum):
    """How the bytes ``[start, start + length)`` of a file hold an array."""

    RAW = 0
    """They are the array, row-major."""
    TORCH_ITEM = 1
    """They are one ``torch.save`` zip whose only storage holds the array; its place is found while reading."""
    ZSTD_ITEM = 2
    """The same zip behind torch's ``stream.zstd/1`` extension: no random access."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What a tensor *is*, whatever its stored key looks like: matched across formats by this."""

    section: Section
    fqn: str
    slot: str | None = None
    """Optimizer state slot such as ``exp_avg``; None for a parameter or buffer."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One logical tensor: its stored key, identity, element type and global shape in stored elements."""

    key: str
    identity: Identity
    dtype: DType
    shape: tuple[int, ...]
    path: Path

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class ByteObject:
    """A non-tensor leaf: opaque bytes that are never unpickled (decision 4)."""

    key: str
    identity: Identity
    path: Path
    file: int
    start: int
    length: int
    transforms: tuple[str, ...] = ()
    """Stream extensions around the bytes, as torch's ``transform_descriptors`` names them."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One data file: path relative to the checkpoint's root, size, and what tells a changed file (decision 18)."""

    path: str
    bytes: int
    identity: str


@dataclass(frozen=True, slots=True)
class Chunks:
    """All chunks of a checkpoint as columns, grouped by tensor.

    Row ``i`` for ``first[t] <= i < first[t + 1]`` is a rectangle of tensor ``t``: global ``offsets[i]`` and
    ``sizes[i]`` in stored elements, padded to the catalogue's largest rank with 0 and 1. It lies in ``file[i]`` at
    ``start[i]`` (``length[i]`` bytes on disk, zip framing included). Where a stored array holds several rectangles (a
    packed or strided shard of one rank), each row carries the rectangle's place ``local`` in the array and the array's
    sizes ``stored``; rows of one array share ``(file, start)``. ``crc[i]`` is the CRC32 of the array's bytes, -1 if
    not known beforehand.
    """

    first: Int64s
    offsets: Int64s
    sizes: Int64s
    file: Int32s
    start: Int64s
    length: Int64s
    storing: UInt8s
    crc: Int64s | None = None
    local: Int64s | None = None
    stored: Int64s | None = None

    def __len__(self) -> int:
        return len(self.start)

    @property
    def rank(self) -> int:
        """Number of columns of ``offsets``: the largest tensor rank."""
        return int(self.offsets.shape[1])

    def rows(self, tensor: int) -> slice:
        """The rows of tensor ``tensor``."""
        return slice(int(self.first[tensor]), int(self.first[tensor + 1]))

    def tensor_of_row(self) -> Int64s:
        """For each row the index of its tensor."""
        return np.repeat(np.arange(len(self.first) - 1, dtype=np.int64), np.diff(self.first))

    def nbytes_of_rows(self, itemsizes: Int64s) -> Int64s:
        """Payload bytes of each row, given each tensor's element size."""
        volumes: Int64s = self.sizes.prod(axis=1)
        return volumes * np.repeat(itemsizes, np.diff(self.first))


@dataclass(frozen=True, slots=True)
class Notice:
    """Something a user should know that is no error: ``{code, name, reason, at?}`` in every JSON document."""

    code: str
    reason: str
    name: str | None = None
    at: str | None = None


@dataclass(frozen=True, slots=True)
class Catalogue:
    """One checkpoint. ``metadata_digest`` covers every metadata byte that the catalogue was made from."""

    uri: str
    storage: Storage = field(repr=False)
    format: str
    tensors: tuple[Tensor, ...]
    chunks: Chunks = field(repr=False)
    files: tuple[FileEntry, ...]
    objects: tuple[ByteObject, ...] = ()
    producer: str | None = None
    metadata_digest: str = ""
    metadata_bytes: int = 0
    """Size of the metadata files and headers, which count as on-disk bytes but not as payload."""
    side_files: tuple[str, ...] = ()
    """Config, tokenizer and code files beside the weights, relative to the root."""
    notices: tuple[Notice, ...] = ()
    world: int | None = None
    """How many ranks wrote it, where the format tells."""

    @property
    def payload_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def file_bytes(self) -> int:
        """Bytes on disk of the data files."""
        return sum(entry.bytes for entry in self.files)

    def itemsizes(self) -> Int64s:
        return np.array([tensor.dtype.itemsize for tensor in self.tensors], dtype=np.int64)


def build_chunks(
    tensors: int,
    tensor: Sequence[int] | Int64s,
    offsets: Sequence[Sequence[int]],
    sizes: Sequence[Sequence[int]],
    file: Sequence[int],
    start: Sequence[int],
    length: Sequence[int],
    storing: Storing | Sequence[int] = Storing.RAW,
    crc: Sequence[int] | None = None,
    local: Sequence[Sequence[int]] | None = None,
    stored: Sequence[Sequence[int]] | None = None,
) -> Chunks:
    """Columns from plain per-chunk lists in any order; the result is grouped by tensor, original order within."""
    tensor_column = np.asarray(tensor, dtype=np.int64)
    order = np.argsort(tensor_column, kind="stable")
    rank = max((len(row) for row in sizes), default=0)

    def padded(rows: Sequence[Sequence[int]], fill: int) -> Int64s:
        table = np.full((len(rows), rank), fill, dtype=np.int64)
        for width in {len(row) for row in rows}:
            at = [i for i, row in enumerate(rows) if len(row) == width]
            if width:
                table[at, :width] = np.array([rows[i] for i in at], dtype=np.int64)
        return table[order]

    kinds = (
        np.full(len(tensor_column), int(storing), dtype=np.uint8)
        if isinstance(storing, Storing)
        else np.asarray(storing, dtype=np.uint8)[order]
    )
    counts = np.bincount(tensor_column, minlength=tensors) if len(tensor_column) else np.zeros(tensors, dtype=np.int64)
    return Chunks(
        first=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        offsets=padded(offsets, 0),
        sizes=padded(sizes, 1),
        file=np.asarray(file, dtype=np.int32)[order],
        start=np.asarray(start, dtype=np.int64)[order],
        length=np.asarray(length, dtype=np.int64)[order],
        storing=kinds,
        crc=None if crc is None else np.asarray(crc, dtype=np.int64)[order],
        local=None if local is None else padded(local, 0),
        stored=None if stored is None else padded(stored, 1),
    )
