"""Pickles no checkpoint needs, each under the name of its trick."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path


def _text(text: str) -> bytes:
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _global(module: str, name: str) -> bytes:
    return _text(module) + _text(name) + b"\x93"


def planted(marker: Path) -> dict[str, bytes]:
    """Pickles that would make the file ``marker``, or take a machine down, if anything performed them."""
    touch = _text(f"touch {marker}")
    system = _global("posix", "system")
    head = b"\x80\x04"
    return {
        "reduce": head + system + touch + b"\x85R.",
        "reduce protocol 0 global": b"cposix\nsystem\n" + touch + b"\x85R.",
        "newobj": head + _global("subprocess", "Popen") + touch + b"\x85\x81.",
        "newobj_ex": head + _global("subprocess", "Popen") + b")}\x92.",
        "inst": b"(" + touch + b"iposix\nsystem\n.",
        "obj": b"(" + system + touch + b"o.",
        "dotted name": head + _global("torch.serialization", "os.system") + touch + b"\x85R.",
        "dotted through an allowed module": head + _global("torch", "serialization.os.system") + touch + b"\x85R.",
        "getattr": head + _global("builtins", "getattr") + _global("os", "system") + b".",
        "eval": head + _global("builtins", "eval") + _text(f"open({str(marker)!r}, 'w')") + b"\x85R.",
        "extension registry": head + b"\x82\x01.",
        "extension registry, four bytes": head + b"\x84\x01\x00\x00\x00.",
        "persistent id": head + b"K\x01Q.",
        "persistent id, text": b"Psomething\n.",
        "build on a class": head + _global("torch", "Size") + b"}" + _text("__reduce__") + b"Nsb.",
        "build on a dict": head + b"}}b.",
        "slot state on a class": head
        + _global("torch.distributed.checkpoint.metadata", "Metadata")
        + b"N}"
        + _text("__setstate__")
        + b"Ns\x86b.",
        "reduce on a string": head + _text("posix.system") + touch + b"\x85R.",
        "reduce on a made instance": head + _global("torch.distributed.checkpoint.metadata", "Metadata") + b")\x81)R.",
        "out of band buffer": b"\x80\x05\x97.",
        "nested pickle": head + _global("pickle", "loads") + b"C\x02N.\x85R.",
        "operator": head + _global("operator", "methodcaller") + _text("unlink") + b"\x85R.",
        "torch hub": head + _global("torch.hub", "load") + _text("x") + b"\x85R.",
        "torch load": head + _global("torch", "load") + touch + b"\x85R.",
    }


def bombs() -> dict[str, bytes]:
    """Small pickles that would cost gigabytes, hours, or the C stack."""
    shared = b"\x80\x04K\x00\x85\x94" + b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86\x94" for i in range(60))
    return {
        "memo index": b"\x80\x02Nr\xff\xff\xff\x7f.",
        "memo index through put": b"Np2147483647\n.",
        "string longer than the file": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b"x.",
        "bytes longer than the file": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b"x.",
        "bytearray": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"x.",
        "frame longer than the file": b"\x80\x04\x95" + struct.pack("<Q", 1 << 40) + b"N.",
        "huge number": b"\x80\x04\x8b" + struct.pack("<i", 1 << 30) + b"\x01.",
        "deep tuples": b"\x80\x04)" + b"\x85" * 200_000 + b".",
        "deep tuple as a key": b"\x80\x04})" + b"\x85" * 100_000 + b"Ns.",
        "shared tuples as a key": shared.replace(b"\x80\x04", b"\x80\x04}", 1) + b"Ns.",
        "colliding numbers as keys": b"\x80\x04}("
        + b"".join(b"\x8a\x10" + (n * ((1 << 61) - 1)).to_bytes(16, "little") + b"N" for n in range(200_000))
        + b"u.",
        "marks only": b"\x80\x04" + b"(" * 500_000 + b".",
    }


def truncations(data: bytes) -> list[bytes]:
    """The pickle cut at many places."""
    return [data[:at] for at in range(0, len(data), max(1, len(data) // 97))]


def harmless() -> bytes:
    """A pickle of plain values."""
    return pickle.dumps({"a": [1, 2.5, None, True, b"x"], "b": ("c", ("d",)), 3: 1 << 40})
