"""Byte objects are carried unread, but the CRC32s that torch recorded in them are there to be checked."""

from __future__ import annotations

import struct
import zlib

_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_DESCRIPTOR = b"PK\x07\x08"


def damaged_member(item: bytes) -> str | None:
    """The first member of a ``torch.save`` zip that contradicts its CRC32; None if none does, or if it is no such zip.

    Nothing is concluded from what can't be followed (another zip writer, no CRC32 recorded): objects may be anything.
    """
    at = 0
    while item.startswith(b"PK\x03\x04", at) and len(item) >= at + _LOCAL.size:
        _, _, flags, method, _, _, crc, packed, size, name_bytes, extra_bytes = _LOCAL.unpack_from(item, at)
        start = at + _LOCAL.size + name_bytes + extra_bytes
        name = item[at + _LOCAL.size : at + _LOCAL.size + name_bytes]
        if method != 0:
            return None
        if flags & 8 and size == 0:
            end = _end(item, start)
            if end is None:
                return None
            crc = int.from_bytes(item[end + 4 : end + 8], "little")
            # The sizes are 4 or 8 bytes each (miniz, mz_zip_writer_add_mem_ex_v2).
            after = next((end + wide for wide in (16, 24) if item.startswith(b"PK", end + wide)), len(item))
        elif packed == size and start + size <= len(item):
            end = after = start + size
        else:
            return None
        if crc and zlib.crc32(item[start:end]) != crc:
            return name.decode("utf-8", "replace")
        at = after
    return None


def _end(item: bytes, start: int) -> int | None:
    """Where the member ends that begins at ``start``: before the data descriptor that tells just this size."""
    at = item.find(_DESCRIPTOR, start)
    while at >= 0:
        if item[at + 8 : at + 12] == (at - start).to_bytes(4, "little"):
            return at
        at = item.find(_DESCRIPTOR, at + 1)
    return None
