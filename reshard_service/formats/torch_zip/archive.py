"""The zip around a ``torch.save``d value: its central directory, read strictly, and where each member's bytes lie.

Only what torch writes is accepted (``caffe2/serialize/inline_container.cc``): every member stored, none encrypted, one
folder's prefix, no two of one name, none reaching into the next or out of the file. The local headers, which a reader
of the central directory could be fooled with, have to agree.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Never

from reshard_service.errors import SourceCorrupt, UnsafeSource, UnsupportedSource
from reshard_service.storage.base import ByteReader, Storage, contained_path

MAX_DIRECTORY_BYTES = 256 << 20
_TAIL_BYTES = 22 + 20 + 56 + 0xFFFF
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_LOCAL_BYTES = 30
_LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # torch.serialization.MAGIC_NUMBER, pickled
_RESAVE = (
    "save it again with torch >= 1.6: python -c \"import torch; torch.save(torch.load('OLD', map_location='cpu', "
    "weights_only=True), 'NEW')\""
)


@dataclass(frozen=True, slots=True)
class Member:
    """One member: where its local header begins, its size, its CRC32 (0 where none was recorded)."""

    name: str
    """Below the archive's prefix."""
    header_at: int
    bytes: int
    crc: int
    limit: int
    """Where the next header or the central directory begins."""


@dataclass(frozen=True, slots=True)
class Archive:
    """The members of one file by name."""

    file: str
    prefix: str
    members: dict[str, Member]
    directory: bytes

    def data_starts(self, storage: Storage, path: str, wanted: Sequence[Member]) -> list[int]:
        """Where the bytes of each member begin, from its local header.

        A header is a read of its own. Where reads are requests over a network, most are spared: where a member begins
        is reckoned from where the next one does, as torch leaves no room behind a member but for its data descriptor.
        That is done only for members with a CRC32, which will tell if it was wrong, and if it is right for the first
        and the last of them.
        """
        reader = storage.open(path)
        try:
            sure = [member for member in wanted if member.crc] if not storage.is_local else []
            reckoned = all(
                self._data_start(reader, member) == _reckoned_start(member) for member in sure[:1] + sure[-1:]
            )
            return [
                _reckoned_start(member) if reckoned and sure and member.crc else self._data_start(reader, member)
                for member in wanted
            ]
        finally:
            reader.close()

    def _data_start(self, reader: ByteReader, member: Member) -> int:
        name = f"{self.prefix}/{member.name}".encode()
        head = bytearray(_LOCAL_BYTES + len(name))
        reader.read_into(member.header_at, memoryview(head))
        signature, flags, method, _, name_bytes, extra_bytes = struct.unpack_from("<4s2xHH12xI2H", head)
        if signature != b"PK\x03\x04" or bytes(head[_LOCAL_BYTES:]) != name or name_bytes != len(name):
            _corrupt(self.file, f"the local header of {member.name!r} contradicts the central directory")
        if method != 0 or flags & ~0x0808:
            _corrupt(self.file, f"the local header of {member.name!r} says it is compressed or encrypted")
        start = member.header_at + _LOCAL_BYTES + len(name) + int(extra_bytes)
        if start + member.bytes > member.limit:
            _corrupt(self.file, f"the member {member.name!r} reaches into what follows it")
        return start


def _reckoned_start(member: Member) -> int:
    wide = member.bytes >= 0xFFFFFFFF or member.header_at >= 0xFFFFFFFF
    return member.limit - (24 if wide else 16) - member.bytes


def read_archive(storage: Storage, path: str, file_bytes: int) -> Archive:
    """The central directory of ``path``.

    Raises :class:`UnsupportedSource` for torch's old formats (with the command that saves them anew) and for compressed
    members, :class:`SourceCorrupt` for what contradicts itself, :class:`UnsafeSource` for names that lead elsewhere.
    """
    file = path or storage.uri
    head = storage.read_bytes(path, 0, min(file_bytes, 512))
    if not head.startswith(b"PK\x03\x04"):
        _refuse_other_formats(head, file)
    tail_at = max(0, file_bytes - _TAIL_BYTES)
    tail = storage.read_bytes(path, tail_at, file_bytes - tail_at)
    at, length, count = _directory_place(tail, tail_at, file)
    if length > MAX_DIRECTORY_BYTES or count * _CENTRAL.size > length:
        _corrupt(file, f"its central directory claims {count} members in {length} bytes")
    directory = tail[at - tail_at : at - tail_at + length] if at >= tail_at else storage.read_bytes(path, at, length)
    return _members(directory, count, at, file)


def _refuse_other_formats(head: bytes, file: str) -> Never:
    if head.startswith(_LEGACY_MAGIC) or head[257:262] == b"ustar":
        raise UnsupportedSource(f"{file!r} is in torch's format from before 1.6", file=file, hint=_RESAVE)
    if head[:1] == b"\x80" and head[1:2] <= b"\x05":
        raise UnsupportedSource(f"{file!r} is a bare pickle, not a torch.save file", file=file, hint=_RESAVE)
    raise SourceCorrupt(f"{file!r} is not a torch.save file: it does not begin like a zip", file=file)


def _directory_place(tail: bytes, tail_at: int, file: str) -> tuple[int, int, int]:
    """Start, length and number of entries of the central directory."""
    end = tail.rfind(b"PK\x05\x06")
    if end < 0 or end + 22 > len(tail):
        _corrupt(file, "it has no end record, so it is cut short")
    disks, here, count, length, at, comment = struct.unpack_from("<I2HIIH", tail, end + 4)
    if end + 22 + comment != len(tail) or disks or here != count:
        _corrupt(file, "its end record does not end it")
    records_at = tail_at + end
    if end >= 20 and tail[end - 20 : end - 16] == b"PK\x06\x07":
        (records_at,) = struct.unpack_from("<Q", tail, end - 12)
        wide = records_at - tail_at
        if wide < 0 or wide + 56 > end - 20 or tail[wide : wide + 4] != b"PK\x06\x06":
            _corrupt(file, "its zip64 end record is not where it should be")
        wide_here, wide_count, wide_length, wide_at = struct.unpack_from("<4Q", tail, wide + 24)
        narrow = ((count, wide_count, 0xFFFF), (length, wide_length, 0xFFFFFFFF), (at, wide_at, 0xFFFFFFFF))
        if wide_here != wide_count or any(small not in (large, most) for small, large, most in narrow):
            _corrupt(file, "its two end records contradict each other")
        at, length, count = wide_at, wide_length, wide_count
    if at + length != records_at:
        _corrupt(file, "its central directory does not lie before its end record")
    return at, length, count


def _members(directory: bytes, count: int, directory_at: int, file: str) -> Archive:
    found: list[tuple[int, str, int, int]] = []
    prefixes: set[str] = set()
    at = 0
    for _ in range(count):
        if len(directory) < at + _CENTRAL.size or directory[at : at + 4] != b"PK\x01\x02":
            _corrupt(file, "its central directory is damaged")
        fields = _CENTRAL.unpack_from(directory, at)
        flags, method, crc, packed, size, name_bytes, extra_bytes, comment_bytes = *fields[3:5], *fields[7:13]
        disk, header_at = fields[13], fields[16]
        begin = at + _CENTRAL.size
        at = begin + name_bytes + extra_bytes + comment_bytes
        if at > len(directory) or disk:
            _corrupt(file, "its central directory is damaged")
        name = _name(directory[begin : begin + name_bytes], file)
        extra = directory[begin + name_bytes : begin + name_bytes + extra_bytes]
        size, packed, header_at = _wide(extra, size, packed, header_at, file)
        if name.endswith("/") and size == 0:
            continue  # a folder's own entry, as zip tools add it
        if method != 0 or flags & ~0x0808:
            raise UnsupportedSource(f"{name!r} in {file!r} is compressed or encrypted", file=file, hint=_RESAVE)
        prefix, slash, inner = contained_path(name, named_in=file).partition("/")
        if not slash or size != packed:
            _corrupt(file, f"its member {name!r} has no folder, or two sizes")
        prefixes.add(prefix)
        found.append((header_at, inner, size, crc))
    if at != len(directory) or len(prefixes) != 1:
        _corrupt(file, "its members do not lie in one folder")
    return Archive(file, prefixes.pop(), _apart(found, directory_at, file), directory)


def _apart(found: list[tuple[int, str, int, int]], directory_at: int, file: str) -> dict[str, Member]:
    """The members by name, each ending before the next begins."""
    found.sort()
    members: dict[str, Member] = {}
    limits = [header_at for header_at, _, _, _ in found[1:]] + [directory_at]
    for (header_at, name, size, crc), limit in zip(found, limits, strict=True):
        if header_at + _LOCAL_BYTES + len(name) + size > limit:
            _corrupt(file, f"its member {name!r} overlaps another or reaches out of the file")
        if name in members:
            raise UnsafeSource(f"{file!r} has two members named {name!r}", file=file, hint="don't trust this file")
        members[name] = Member(name, header_at, size, crc, limit)
    return members


def _name(raw: bytes, file: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        _corrupt(file, "a member's name is not UTF-8")


def _wide(extra: bytes, size: int, packed: int, header_at: int, file: str) -> tuple[int, int, int]:
    """The 64-bit values of the zip64 extra field, which holds just those that did not fit (APPNOTE 4.5.3)."""
    values = [size, packed, header_at]
    missing = [i for i, value in enumerate(values) if value == 0xFFFFFFFF]
    at = 0
    while missing and at + 4 <= len(extra):
        tag, length = struct.unpack_from("<HH", extra, at)
        if tag == 1 and length >= 8 * len(missing) and at + 4 + length <= len(extra):
            for i, value in zip(missing, struct.unpack_from(f"<{len(missing)}Q", extra, at + 4), strict=True):
                values[i] = value
            missing = []
        at += 4 + length
    if missing:
        _corrupt(file, "a zip64 field is missing")
    return values[0], values[1], values[2]


def _corrupt(file: str, what: str) -> Never:
    raise SourceCorrupt(f"{file!r} is damaged: {what}", file=file, hint="copy the file again from its origin")
