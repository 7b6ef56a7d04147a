"""The bytes around a payload that make it a DCP item: a small ``torch.save`` zip of our own.

Members, all stored: ``data.pkl``, ``byteorder``, ``version``, then ``data/0`` with a data descriptor (its CRC32 is
known only when the payload has streamed by), central directory, end records. The local header of ``data/0`` carries an
extra field that pads the head to a multiple of 64, as torch does, and the zip comment pads the whole item to one, so
that items laid back to back from an aligned start keep every payload 64-byte aligned. torch finds members through the
central directory (``caffe2/serialize/inline_container.cc``) and needs no more members than these.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field
from math import prod

import numpy as np

from reshard_service.catalogue import Int64s
from reshard_service.dtypes import DType
from reshard_service.errors import CannotHold
from reshard_service.formats.dcp.data_pickle import TYPED_STORAGES

ALIGNMENT = 64
_ZIP64_FROM = 0xFFFF0000
"""Payloads of this many bytes or more get 64-bit fields: what lies behind them is then near or beyond 4 GiB."""

_STORAGE_CLASS = {name: cls for cls, name in TYPED_STORAGES.items()}
_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_END = struct.Struct("<4sHHHHIIH")
_CRC = struct.Struct("<I")
_DESCRIPTOR_CRC, _CENTRAL_CRC = 4, 16
"""Where a CRC32 lies in a data descriptor and in an entry of the central directory (APPNOTE 4.3.9, 4.3.12)."""
_UTF8, _DESCRIBED = 0x0800, 0x0008
_PKL, _ORDER, _VERSION, _DATA = b"archive/data.pkl", b"archive/byteorder", b"archive/version", b"archive/data/0"
_LITTLE, _FORMAT = b"little", b"3\n"  # 3 = the archive format torch writes since 1.6 (kProducedFileFormatVersion)


@dataclass(frozen=True, slots=True)
class _Fixed:
    """What all items of one (dtype, rank, zip64 or not) share."""

    pickle: bytes
    """``data.pkl`` with zeros where the numbers go."""
    holes: tuple[int, ...]
    """Where the 8-byte numbers go: storage length, then sizes, then strides."""
    elements: bool
    """The storage's length counts elements (a typed storage), not bytes."""
    after_pickle: bytes
    """Everything between ``data.pkl`` and the payload."""
    after_pickle_headers: tuple[int, ...]
    """Where the members after ``data.pkl`` begin in the item."""
    head_bytes: int
    zip64: bool

    @property
    def least_tail(self) -> int:
        names = len(_PKL) + len(_ORDER) + len(_VERSION) + len(_DATA)
        return (24 + 20 if self.zip64 else 16) + 4 * _CENTRAL.size + names + _END.size + (76 if self.zip64 else 0)


_SHAPES_KEPT = 4096


@dataclass(frozen=True, slots=True)
class _Shaped:
    """What all items of one (dtype, shape) share: everything but the payload and its CRC32."""

    head: bytes
    tail: bytes
    """With zeros where the CRC32 goes."""
    crc_at: tuple[int, int]
    """Where it goes in the tail: into the data descriptor and into the directory."""


@dataclass(slots=True)
class TorchItemFraming:
    """The framing of ``.distcp`` items; see :class:`reshard_service.formats.target.Framing`. Threads may share one."""

    _fixed: dict[tuple[str, int, bool], _Fixed] = field(default_factory=dict)
    _shapes: dict[tuple[str, tuple[int, ...]], _Shaped] = field(default_factory=dict)
    """Shapes repeat from layer to layer."""

    def head(self, dtype: DType, sizes: tuple[int, ...]) -> bytes:
        return self._shape(dtype, sizes).head

    def tail(self, dtype: DType, sizes: tuple[int, ...], crc: int) -> bytes:
        shaped = self._shape(dtype, sizes)
        tail = bytearray(shaped.tail)
        for at in shaped.crc_at:
            _CRC.pack_into(tail, at, crc)
        return bytes(tail)

    def _shape(self, dtype: DType, sizes: tuple[int, ...]) -> _Shaped:
        at = (dtype.name, sizes)
        known = self._shapes.get(at)
        if known is None:
            known = _make_shaped(self._of(dtype, len(sizes), prod(sizes) * dtype.itemsize), dtype, sizes)
            if len(self._shapes) >= _SHAPES_KEPT:
                self._shapes.clear()
            self._shapes[at] = known
        return known

    def item_lengths(self, dtype: DType, rank: int, nbytes: Int64s) -> tuple[Int64s, Int64s]:
        """Of items with payloads of ``nbytes`` each: bytes before the payload, and bytes in all."""
        small, large = self._of(dtype, rank, 0), self._of(dtype, rank, _ZIP64_FROM)
        wide = nbytes >= _ZIP64_FROM
        head = np.where(wide, large.head_bytes, small.head_bytes).astype(np.int64)
        total = head + nbytes + np.where(wide, large.least_tail, small.least_tail)
        return head, -(-total // ALIGNMENT) * ALIGNMENT

    def _of(self, dtype: DType, rank: int, nbytes: int) -> _Fixed:
        at = (dtype.name, rank, nbytes >= _ZIP64_FROM)
        fixed = self._fixed.get(at)
        if fixed is None:
            fixed = self._fixed[at] = _make_fixed(dtype, rank, at[2])
        return fixed


def _make_fixed(dtype: DType, rank: int, zip64: bool) -> _Fixed:
    pickle, holes, elements = _pickle_with_holes(dtype, rank)
    order_at = _LOCAL.size + len(_PKL) + len(pickle)
    order = _local(_ORDER, zlib.crc32(_LITTLE), len(_LITTLE)) + _LITTLE
    version_at = order_at + len(order)
    version = _local(_VERSION, zlib.crc32(_FORMAT), len(_FORMAT)) + _FORMAT
    data_at = version_at + len(version)
    # With a data descriptor the header's sizes are zero; a zip64 field then says that the descriptor is the wide one.
    extra = struct.pack("<HHQQ", 1, 16, 0, 0) if zip64 else b""
    unpadded = data_at + _LOCAL.size + len(_DATA) + len(extra) + 4
    padding = -unpadded % ALIGNMENT
    extra += struct.pack("<2sH", b"FB", padding) + b"\x00" * padding  # "FB" is torch's own id for such padding
    size = 0xFFFFFFFF if zip64 else 0
    data = _LOCAL.pack(
        b"PK\x03\x04", 45 if zip64 else 0, _UTF8 | _DESCRIBED, 0, 0, 0, 0, size, size, len(_DATA), len(extra)
    )
    after = b"".join((order, version, data, _DATA, extra))
    return _Fixed(pickle, holes, elements, after, (order_at, version_at, data_at), unpadded + padding, zip64)


def _make_shaped(fixed: _Fixed, dtype: DType, sizes: tuple[int, ...]) -> _Shaped:
    nbytes = prod(sizes) * dtype.itemsize
    pickle = _filled(fixed, dtype, sizes)
    pickle_crc = zlib.crc32(pickle)
    order_at, version_at, data_at = fixed.after_pickle_headers
    descriptor = struct.pack("<4sIQQ" if fixed.zip64 else "<4sIII", b"PK\x07\x08", 0, nbytes, nbytes)
    others = b"".join(
        (
            _central(_PKL, 0, pickle_crc, len(pickle)),
            _central(_ORDER, order_at, zlib.crc32(_LITTLE), len(_LITTLE)),
            _central(_VERSION, version_at, zlib.crc32(_FORMAT), len(_FORMAT)),
        )
    )
    data = _central(_DATA, data_at, 0, nbytes, _DESCRIBED)
    padding = -(fixed.head_bytes + nbytes + fixed.least_tail) % ALIGNMENT
    end = _end(fixed.head_bytes + nbytes + len(descriptor), len(others) + len(data), fixed.zip64, padding)
    return _Shaped(
        b"".join((_local(_PKL, pickle_crc, len(pickle)), pickle, fixed.after_pickle)),
        b"".join((descriptor, others, data, end)),
        (_DESCRIPTOR_CRC, len(descriptor) + len(others) + _CENTRAL_CRC),
    )


def _pickle_with_holes(dtype: DType, rank: int) -> tuple[bytes, tuple[int, ...], bool]:
    """Protocol 2, every number as LONG1 of eight bytes, so that only the rank decides the length."""
    if dtype.torch is None:
        raise CannotHold(f"torch has no element type for {dtype.name}", hint="write safetensors instead")
    out = bytearray(b"\x80\x02")
    holes: list[int] = []

    def number() -> None:
        out.extend(b"\x8a\x08")
        holes.append(len(out))
        out.extend(bytes(8))

    def numbers() -> None:
        out.extend(b"(")
        for _ in range(rank):
            number()
        out.extend(b"t")

    storage = _STORAGE_CLASS.get(dtype.torch)
    out += b"ctorch._utils\n_rebuild_tensor_v2\n" if storage else b"ctorch._utils\n_rebuild_tensor_v3\n"
    out += b"((X\x07\x00\x00\x00storage"
    out += f"ctorch\n{storage}\n".encode() if storage else b"ctorch.storage\nUntypedStorage\n"
    out += b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    number()
    out += b"tQK\x00"
    numbers()
    numbers()
    out += b"\x89ccollections\nOrderedDict\n)R"
    if not storage:
        out += f"ctorch\n{dtype.torch}\n".encode()
    out += b"tR."
    return bytes(out), tuple(holes), storage is not None


def _filled(fixed: _Fixed, dtype: DType, sizes: tuple[int, ...]) -> bytes:
    """The pickle with its numbers; strides as torch makes them for a contiguous tensor, empty ones included."""
    count = prod(sizes)
    strides = [1] * len(sizes)
    for dim in range(len(sizes) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * max(sizes[dim + 1], 1)
    pickle = bytearray(fixed.pickle)
    length = count if fixed.elements else count * dtype.itemsize
    for hole, value in zip(fixed.holes, (length, *sizes, *strides), strict=True):
        struct.pack_into("<q", pickle, hole, value)
    return bytes(pickle)


def _local(name: bytes, crc: int, size: int) -> bytes:
    return _LOCAL.pack(b"PK\x03\x04", 0, _UTF8, 0, 0, 0, crc, size, size, len(name), 0) + name


def _central(name: bytes, at: int, crc: int, size: int, flags: int = 0) -> bytes:
    wide = size >= _ZIP64_FROM
    extra = struct.pack("<HHQQ", 1, 16, size, size) if wide else b""
    shown = 0xFFFFFFFF if wide else size
    needed = 45 if wide else 0
    fields = (needed, needed, _UTF8 | flags, 0, 0, 0, crc, shown, shown, len(name), len(extra), 0, 0, 0, 0, at)
    return _CENTRAL.pack(b"PK\x01\x02", *fields) + name + extra


def _end(directory_at: int, directory_bytes: int, zip64: bool, padding: int) -> bytes:
    wide = b""
    if zip64:
        wide = struct.pack(
            "<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, 4, 4, directory_bytes, directory_at
        ) + struct.pack("<4sIQI", b"PK\x06\x07", 0, directory_at + directory_bytes, 1)
    shown = 0xFFFFFFFF if zip64 else directory_at
    return wide + _END.pack(b"PK\x05\x06", 0, 0, 4, 4, directory_bytes, shown, padding) + b"\x00" * padding
