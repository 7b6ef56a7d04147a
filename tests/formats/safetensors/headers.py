"""Attack headers, each with the rule it breaks: kept beside the parser they attack."""

from __future__ import annotations

import json
import struct
from typing import Any

ENTRY: dict[str, Any] = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def spell(header: Any, payload: bytes = b"\0" * 8, *, length: int | None = None) -> bytes:
    """A file's bytes from a header given as JSON value or as raw bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + payload


def one(**changes: Any) -> bytes:
    """A file with one tensor ``a``, some fields of its entry changed (None: left out)."""
    entry = {key: value for key, value in {**ENTRY, **changes}.items() if value is not None}
    return spell({"a": entry})


def two(first: list[int], second: list[int], payload: int = 8) -> bytes:
    """A file with two tensors of U8 at these offsets."""
    return spell(
        {
            "a": {"dtype": "U8", "shape": [first[1] - first[0]], "data_offsets": first},
            "b": {"dtype": "U8", "shape": [second[1] - second[0]], "data_offsets": second},
        },
        b"\0" * payload,
    )


ATTACKS: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "source_corrupt"),
    "seven bytes": (b"\0" * 7, "source_corrupt"),
    "header length beyond the file": (spell({"a": ENTRY}, length=1 << 20), "source_corrupt"),
    "header length of 2^64 - 1": (spell({"a": ENTRY}, length=(1 << 64) - 1), "source_corrupt"),
    "header length zero": (spell(b""), "source_corrupt"),
    "header cut short": (spell({"a": ENTRY}, length=20), "source_corrupt"),
    "space before the brace": (spell(b" " + json.dumps({"a": ENTRY}).encode()), "source_corrupt"),
    "byte order mark": (spell(b"\xef\xbb\xbf" + json.dumps({"a": ENTRY}).encode()), "source_corrupt"),
    "UTF-16": (spell(json.dumps({"a": ENTRY}).encode("utf-16-le")), "source_corrupt"),
    "an array": (spell(b"[]"), "source_corrupt"),
    "not UTF-8": (spell(b'{"\xff\xfe":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'), "source_corrupt"),
    "trailing garbage in the header": (spell(json.dumps({"a": ENTRY}).encode() + b"x"), "source_corrupt"),
    "NUL padding": (spell(json.dumps({"a": ENTRY}).encode() + b"\0\0"), "source_corrupt"),
    "duplicate tensor": (
        spell(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],'
              b'"data_offsets":[0,8]}}'),
        "source_corrupt",
    ),
    "duplicate field": (
        spell(b'{"a":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}}'),
        "source_corrupt",
    ),
    "duplicate metadata": (
        spell(b'{"__metadata__":{"x":"1","x":"2"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'),
        "source_corrupt",
    ),
    "metadata that is no string": (spell({"__metadata__": {"x": 1}, "a": ENTRY}), "source_corrupt"),
    "metadata that is a list": (spell({"__metadata__": [], "a": ENTRY}), "source_corrupt"),
    "metadata that looks like a tensor": (spell({"__metadata__": ENTRY, "a": ENTRY}), "source_corrupt"),
    "deep nesting": (spell(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "unsafe_source"),
    "number of five thousand digits": (spell(b'{"a":' + b"9" * 5000 + b"}"), "source_corrupt"),
    "NaN": (spell(b'{"a":NaN}'), "source_corrupt"),
    "entry that is a number": (spell({"a": 1}), "source_corrupt"),
    "extra field": (one(strides=[1]), "source_corrupt"),
    "missing dtype": (one(dtype=None), "source_corrupt"),
    "missing shape": (one(shape=None), "source_corrupt"),
    "missing offsets": (one(data_offsets=None), "source_corrupt"),
    "unknown dtype": (one(dtype="F128"), "unsupported_source"),
    "dtype that safetensors lacks": (one(dtype="C128", shape=[1], data_offsets=[0, 16]), "unsupported_source"),
    "dtype that is a list": (one(dtype=["F32"]), "unsupported_source"),
    "negative size": (one(shape=[-2]), "source_corrupt"),
    "fractional size": (one(shape=[2.0]), "source_corrupt"),
    "boolean size": (one(shape=[True, 2]), "source_corrupt"),
    "size as text": (one(shape=["2"]), "source_corrupt"),
    "shape that is a number": (one(shape=2), "source_corrupt"),
    "size of 2^64": (one(shape=[0, 1 << 64], data_offsets=[0, 0]), "source_corrupt"),
    "product beyond 2^64": (one(shape=[1 << 40, 1 << 40]), "source_corrupt"),
    "a thousand dims": (one(shape=[1] * 1000 + [2]), "source_corrupt"),
    "shape smaller than the bytes": (one(shape=[1]), "source_corrupt"),
    "offsets reversed": (one(shape=[0], data_offsets=[8, 0]), "source_corrupt"),
    "negative offset": (one(data_offsets=[-8, 0]), "source_corrupt"),
    "offset beyond the file": (one(shape=[4], data_offsets=[0, 16]), "source_corrupt"),
    "offset of 2^63": (one(shape=[1 << 61], data_offsets=[0, 1 << 63]), "source_corrupt"),
    "three offsets": (one(data_offsets=[0, 8, 8]), "source_corrupt"),
    "fractional offset": (one(data_offsets=[0.0, 8]), "source_corrupt"),
    "hole at the start": (two([1, 4], [4, 8]), "source_corrupt"),
    "hole in the middle": (two([0, 3], [4, 8]), "source_corrupt"),
    "overlap": (two([0, 5], [4, 8]), "source_corrupt"),
    "the same bytes twice": (two([0, 8], [0, 8]), "source_corrupt"),
    "trailing bytes": (two([0, 4], [4, 7]), "source_corrupt"),
    "missing bytes": (two([0, 4], [4, 8], payload=7), "source_corrupt"),
    "empty name": (spell({"": ENTRY}), "unsafe_source"),
    "NUL in a name": (spell({"a\0b": ENTRY}), "unsafe_source"),
    "escape sequence in a name": (spell({"a\x1b[2J": ENTRY}), "unsafe_source"),
    "line feed in a name": (spell({"a\nb": ENTRY}), "unsafe_source"),
    "lone surrogate in a name": (spell(b'{"\\ud800":' + json.dumps(ENTRY).encode() + b"}"), "unsafe_source"),
    "name of two kilobytes": (spell({"é" * 1024: ENTRY}), "unsafe_source"),
    "row of F4 that ends within a byte": (
        one(dtype="F4", shape=[2, 3], data_offsets=[0, 3]),
        "unsupported_source",
    ),
}  # fmt: skip
