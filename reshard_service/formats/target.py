"""What a format's writer hands to planning: where every byte of the target will lie, before any byte moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from reshard_service.catalogue import ByteObject, Catalogue, Chunks, Int64s, Notice, Tensor
from reshard_service.dtypes import DType


@dataclass(frozen=True, slots=True)
class Selection:
    """What is to be written, in the order in which it should lie.

    ``tensors`` carry their target key, path, dtype and shape; ``sources[i]`` is the index of tensor ``i`` in the source
    catalogue. ``objects`` carry target key and path; their file, start and length still speak of the source.
    """

    source: Catalogue = field(repr=False)
    tensors: tuple[Tensor, ...]
    sources: Int64s
    objects: tuple[ByteObject, ...] = ()


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One data file of the target: relative path and final size."""

    path: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Literal:
    """Bytes known at planning time, such as a safetensors header."""

    file: int
    start: int
    data: bytes


@dataclass(frozen=True, slots=True)
class ObjectCopy:
    """Opaque bytes of the source that go unchanged into the target."""

    source: ByteObject
    file: int
    start: int


@dataclass(frozen=True, slots=True)
class ClosingFile:
    """A small file written when all data files are complete; made late because it can be large."""

    path: str
    make: Callable[[], bytes]


class Framing(Protocol):
    """Bytes around each chunk of a format that wraps its payloads (DCP's zip items)."""

    def head(self, dtype: DType, sizes: tuple[int, ...]) -> bytes:
        """What stands before the payload; its length depends on dtype, rank and byte size only."""

    def tail(self, dtype: DType, sizes: tuple[int, ...], crc: int) -> bytes:
        """What stands after the payload; ``crc`` is the CRC32 of the payload."""


@dataclass(frozen=True, slots=True)
class Design:
    """The target, computed.

    ``chunks`` means the same as in a catalogue: for a framed format ``start`` and ``length`` cover head, payload and
    tail. Bytes of a file that nothing claims are zero. ``closing`` is in writing order and its last file is the marker
    that makes the checkpoint visible to its readers; a format without one has none.
    """

    format: str
    tensors: tuple[Tensor, ...]
    sources: Int64s
    chunks: Chunks = field(repr=False)
    files: tuple[OutputFile, ...]
    literals: tuple[Literal, ...] = ()
    objects: tuple[ObjectCopy, ...] = ()
    closing: tuple[ClosingFile, ...] = ()
    framing: Framing | None = None
    world: int | None = None
    left_out: tuple[str, ...] = ()
    """Keys of objects that were asked for and that this format can't hold (decision 4)."""
    notices: tuple[Notice, ...] = ()

    @property
    def data_bytes(self) -> int:
        """Size of all data files, headers and framing included."""
        return sum(file.bytes for file in self.files)
