"""Finding the raw bytes of a tensor inside one DCP item: a ``torch.save`` zip whose members are all stored.

torch (2.13, ``caffe2/serialize/inline_container.cc``) writes the members ``data.pkl``, ``.format_version``,
``.storage_alignment``, ``byteorder``, ``data/0``, ``version``, ``.data/serialization_id``; older ones fewer, in another
order. Sizes and CRCs stand in data descriptors *behind* each member, so the walk below finds a member's end by reading
it (the pickle), by searching its descriptor (the short ones), or from what ``.metadata`` promises (the payload).
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, replace
from math import prod
from threading import Lock

from reshard_service.dtypes import DType
from reshard_service.errors import GeometryWrong, ReshardError, SourceCorrupt, UnsupportedSource
from reshard_service.formats.dcp.data_pickle import StoredArray, read_array_pickle

HEAD_BYTES = 4096
"""How much of an item :meth:`ItemReader.locate` wants to see; torch 2.13 needs 704."""

AFTER_BYTES = 24
"""How much :func:`checksum` wants to see after the payload."""

_LOCAL = struct.Struct("<4xHHHHHIIIHH")
_LOCAL_SIGNATURE = b"PK\x03\x04"
_DESCRIPTOR_SIGNATURE = b"PK\x07\x08"
_RESAVE = "the file is damaged or was not written by torch; copy it again from its origin"
_VARIANTS_PER_SHAPE = 8
_SHAPES = 16384


@dataclass(frozen=True, slots=True)
class Payload:
    """Where the array lies in its item."""

    start: int
    """First byte of the storage, counted from the item's first byte."""
    strides: tuple[int, ...] | None
    """In elements; None where the array is row-major and contiguous."""
    storage_offset_bytes: int
    """The array's first element lies this far behind ``start``."""
    storage_bytes: int
    """What the recorded CRC32 covers: the whole storage, which may be more than the array."""
    crc32: int | None
    """CRC32 of the storage where the header before it carries one; otherwise ask :func:`checksum`."""

    @property
    def is_plain(self) -> bool:
        """True where the storage is the array and nothing else."""
        return self.strides is None and self.storage_offset_bytes == 0


class ItemReader:
    """Locates payloads; remembers exact heads, so that items of equal shape and type cost one comparison.

    Safe to use from several threads.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[str, tuple[int, ...]], tuple[tuple[int, bytes, Payload], ...]] = {}
        self._lock = Lock()

    def locate(
        self, head: memoryview, dtype: DType, sizes: tuple[int, ...], *, item_bytes: int, key: str, file: str
    ) -> Payload:
        """The payload of the item that begins with ``head``: its first ``HEAD_BYTES``, or all of it if it is shorter.

        ``dtype`` and ``sizes`` are what the checkpoint's metadata says of it: other sizes are :class:`GeometryWrong`,
        another type or a damaged item :class:`SourceCorrupt`, a tensor that is more than its bytes
        :class:`UnsupportedSource`. ``item_bytes`` is the item's length on disk.
        """
        for length, expected, payload in self._seen.get((dtype.name, sizes), ()):
            if bytes(head[:length]) == expected and payload.start + payload.storage_bytes <= item_bytes:
                return payload
        try:
            payload, read = _walk(bytes(head[:HEAD_BYTES]), dtype, sizes, item_bytes)
        except ReshardError as error:
            error.tensor, error.file = key, file
            raise
        if read == payload.start:  # otherwise the description lies behind the payload, which differs from item to item
            self._remember(dtype, sizes, bytes(head[:read]), payload)
        return payload

    def _remember(self, dtype: DType, sizes: tuple[int, ...], head: bytes, payload: Payload) -> None:
        with self._lock:
            if len(self._seen) >= _SHAPES:
                self._seen.clear()
            at = (dtype.name, sizes)
            self._seen[at] = ((len(head), head, payload), *self._seen.get(at, ())[: _VARIANTS_PER_SHAPE - 1])


def checksum(after_payload: memoryview, nbytes: int) -> int | None:
    """The CRC32 of a storage of ``nbytes`` as recorded right after it (``AFTER_BYTES`` bytes, or what the item has).

    None where the writer recorded none: torch under ``set_crc32_options(False)`` writes zeros. Raises
    :class:`SourceCorrupt` where no zip record follows, or one of another length.
    """
    after = bytes(after_payload[:AFTER_BYTES])
    if after.startswith((_LOCAL_SIGNATURE, b"PK\x01\x02")):
        return None  # no descriptor: sizes and CRC stood in the header before the payload
    body = (
        after[4:] if after.startswith(_DESCRIPTOR_SIGNATURE) else after
    )  # the signature is optional (APPNOTE 4.3.9.3)
    for form in ("<III", "<IQQ"):
        if len(body) >= struct.calcsize(form):
            crc, packed, size = struct.unpack_from(form, body)
            if packed == size == nbytes:
                return int(crc) or None
    raise SourceCorrupt(f"a payload of {nbytes} bytes is not followed by the zip record that closes it", hint=_RESAVE)


@dataclass(frozen=True, slots=True)
class _Member:
    """A local file header: the member's name below the archive's prefix, where its data starts, what is known of it."""

    prefix: str
    name: str
    start: int
    described: bool
    """A data descriptor with size and CRC follows the data."""
    size: int | None
    """None where only the descriptor tells it."""
    crc: int


def _walk(head: bytes, dtype: DType, sizes: tuple[int, ...], item_bytes: int) -> tuple[Payload, int]:
    """Read members until both ``data.pkl`` and the payload's header are seen; also says how far that was."""
    array: StoredArray | None = None
    found: dict[str, _Member] = {}
    prefix: str | None = None
    expected_bytes = prod(sizes) * dtype.itemsize
    at = read = 0
    while True:
        member = _member(head, at, item_bytes)
        if prefix is None:
            prefix = member.prefix
        if member.prefix != prefix:
            raise SourceCorrupt(
                f"zip members of two archives, {prefix!r} and {member.prefix!r}, in one item", hint=_RESAVE
            )
        if member.name.startswith("data/"):
            found[member.name] = member
            end = read = member.start
            skip = expected_bytes if member.size is None else member.size
        elif member.name == "data.pkl":
            array, end = read_array_pickle(head, member.start)
            read, skip = end, 0
            _check_pickle(head, member, end)
        else:
            end, skip = _end_of_short(head, member), 0
            if member.name == "byteorder" and head[member.start : end] != b"little":
                raise UnsupportedSource(
                    "the tensor was saved on a big-endian machine", hint="load it there and save it as safetensors"
                )
        if array is not None and (payload := found.get(f"data/{array.storage_key}")) is not None:
            return _payload(array, payload, dtype, sizes, item_bytes), read
        at = _after(head, member, end + skip)


def _member(head: bytes, at: int, item_bytes: int) -> _Member:
    if len(head) < at + 30:
        if item_bytes > len(head):
            raise UnsupportedSource(
                f"the tensor's description does not lie in the first {HEAD_BYTES} bytes of its item"
            )
        raise SourceCorrupt("a stored item ends before its payload", hint=_RESAVE)
    if head[at : at + 4] != _LOCAL_SIGNATURE:
        what = "a stored item is not a torch.save zip" if at == 0 else "a stored item has no tensor payload"
        raise SourceCorrupt(what, hint=_RESAVE)
    _, flags, method, _, _, crc, packed, size, name_length, extra_length = _LOCAL.unpack_from(head, at)
    start = at + 30 + name_length + extra_length
    if start > len(head):
        raise SourceCorrupt("a zip header inside a stored item is longer than the item", hint=_RESAVE)
    if method != 0 or flags & ~0x0808:
        raise UnsupportedSource(
            f"a stored item holds a compressed or encrypted member (method {method}, flags {flags:#x})"
        )
    try:
        prefix, slash, name = head[at + 30 : at + 30 + name_length].decode("utf-8").partition("/")
    except UnicodeDecodeError:
        slash = ""
    if not slash or not name:
        raise SourceCorrupt("a zip member of a stored item has a broken name", hint=_RESAVE)
    if size == 0xFFFFFFFF or packed == 0xFFFFFFFF:
        size, packed = _zip64_sizes(head[at + 30 + name_length : start], size, packed)
    if size != packed:
        raise SourceCorrupt("a zip member of a stored item has two sizes", hint=_RESAVE)
    described = bool(flags & 0x08)
    return _Member(prefix, name, start, described, None if described and size == 0 else size, crc)


def _zip64_sizes(extra: bytes, size: int, packed: int) -> tuple[int, int]:
    at = 0
    while at + 4 <= len(extra):
        tag, length = struct.unpack_from("<HH", extra, at)
        if tag == 1 and length >= 16 and at + 4 + length <= len(extra):
            return struct.unpack_from("<QQ", extra, at + 4)
        at += 4 + length
    raise SourceCorrupt("a zip64 header inside a stored item is broken", hint=_RESAVE)


def _end_of_short(head: bytes, member: _Member) -> int:
    """Where a member ends that is neither pickle nor payload (a few bytes each in every torch)."""
    if member.size is not None:
        return member.start + member.size
    at = member.start
    while (at := head.find(_DESCRIPTOR_SIGNATURE, at)) >= 0:
        if head[at + 8 : at + 12] == (at - member.start).to_bytes(4, "little"):
            return at
        at += 1
    raise SourceCorrupt(f"the end of {member.name!r} in a stored item can't be found", hint=_RESAVE)


def _check_pickle(head: bytes, member: _Member, end: int) -> None:
    size, crc = member.size, member.crc
    if size is None:
        if head[end : end + 4] != _DESCRIPTOR_SIGNATURE or len(head) < end + 16:
            raise SourceCorrupt("data.pkl is not followed by its data descriptor", hint=_RESAVE)
        crc, _, size = struct.unpack_from("<III", head, end + 4)
    if size != end - member.start:
        raise SourceCorrupt(f"data.pkl is {end - member.start} bytes long, its record says {size}", hint=_RESAVE)
    if crc and crc != zlib.crc32(head[member.start : end]):
        raise SourceCorrupt("data.pkl does not match its CRC32", hint=_RESAVE)


def _after(head: bytes, member: _Member, end: int) -> int:
    """Where the next header starts."""
    if member.described and head[end : end + 4] == _DESCRIPTOR_SIGNATURE:
        # 64-bit sizes where the member is that large or lies that far into a file (miniz, mz_zip_writer_add_mem_ex_v2).
        wide = head[end + 16 : end + 20] != _LOCAL_SIGNATURE and head[end + 24 : end + 28] == _LOCAL_SIGNATURE
        return end + (24 if wide else 16)
    return end


def _payload(array: StoredArray, member: _Member, dtype: DType, sizes: tuple[int, ...], item_bytes: int) -> Payload:
    if array.torch_dtype != dtype.torch:
        raise SourceCorrupt(
            f"the stored item is of type torch.{array.torch_dtype}, the metadata says {dtype.name}", hint=_RESAVE
        )
    if array.sizes != sizes:
        raise GeometryWrong(
            f"the stored item has shape {array.sizes}, the metadata says {sizes}",
            hint="torch 2.13 records wrong chunks for uneven FSDP x TP shards; try --repair with --source-layout",
        )
    place = place_in_storage(array, dtype)
    storage_bytes = array.storage_bytes
    if member.start + storage_bytes > item_bytes:
        raise SourceCorrupt(
            f"a stored item of {item_bytes} bytes can't hold its storage of {storage_bytes} bytes", hint=_RESAVE
        )
    if member.size not in (None, storage_bytes):
        raise SourceCorrupt(
            f"the zip member of a storage of {storage_bytes} bytes has {member.size} bytes", hint=_RESAVE
        )
    crc = None if member.described or (member.crc == 0 and storage_bytes) else member.crc
    return replace(place, start=member.start, crc32=crc)


def place_in_storage(array: StoredArray, dtype: DType) -> Payload:
    """Where an array lies in its storage, as if that began at 0; :class:`SourceCorrupt` if it reaches out of it."""
    sizes = array.sizes
    reach = array.offset + sum((size - 1) * stride for size, stride in zip(sizes, array.strides, strict=True)) + 1
    if 0 in sizes:
        return Payload(0, None, 0, array.storage_bytes, None)
    if reach * dtype.itemsize > array.storage_bytes:
        raise SourceCorrupt(f"the stored array reaches beyond its storage of {array.storage_bytes} bytes", hint=_RESAVE)
    strides = _strides_unless_contiguous(sizes, array.strides)
    return Payload(0, strides, array.offset * dtype.itemsize, array.storage_bytes, None)


def _strides_unless_contiguous(sizes: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...] | None:
    """None for row-major; the stride of a dim of one element means nothing and is made what row-major has."""
    row_major, step = [0] * len(sizes), 1
    for dim in range(len(sizes) - 1, -1, -1):
        row_major[dim] = step
        step *= sizes[dim]
    used = tuple(row if size == 1 else stride for size, stride, row in zip(sizes, strides, row_major, strict=True))
    return None if used == tuple(row_major) else used
