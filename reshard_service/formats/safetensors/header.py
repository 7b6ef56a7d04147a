"""The header of a safetensors file, parsed more strictly than the library does, and built.

Layout of a file: 8 bytes little-endian N, N bytes of JSON (may end in spaces), then the tensors' bytes without holes
(huggingface/safetensors README, "Format"). Version 0.8 of the library lets through what we refuse: a header that does
not begin with ``{``, duplicate keys (the last wins), unknown fields, empty names, control characters in names.
Shapes count values in the file and stored elements here; they differ for the sub-byte types only.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np
import xxhash

from reshard_service.catalogue import Int64s
from reshard_service.dtypes import DType, all_dtypes
from reshard_service.errors import CannotHold, SourceCorrupt, UnsafeSource, UnsupportedSource
from reshard_service.formats.strict_json import Pairs, parse_json, paused_gc, unique_pairs
from reshard_service.storage.base import Storage

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""The library's own limit: a larger header would load nowhere."""
MAX_TENSORS = 2_000_000
MAX_NAME_BYTES = 1024
MAX_DIMS = 64
"""What torch and numpy can hold."""
MAX_DIM = 2**62
ALIGNMENT = 8
"""The payload starts at a multiple of this, as the library writes it."""

_FIRST_READ_BYTES = 65_536
_DEFAULT_METADATA = {"format": "pt"}
_spelled = json.JSONEncoder(ensure_ascii=False).encode
_KNOWN = {dtype.name: dtype for dtype in all_dtypes() if dtype.in_safetensors}
_FIELDS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, slots=True)
class Header:
    """One file's tensors in the order in which they lie; ``starts`` count from the file's first byte."""

    names: tuple[str, ...]
    dtypes: tuple[DType, ...]
    shapes: tuple[tuple[int, ...], ...]
    starts: Int64s = field(repr=False)
    lengths: Int64s = field(repr=False)
    metadata: Mapping[str, str]
    data_start: int
    file_bytes: int
    digest: str
    identity: str = ""
    """The file's change tag when the header was read."""


def read_header(storage: Storage, path: str, *, max_tensors: int = MAX_TENSORS) -> Header:
    """Parse and check the header of the file ``path`` ("" is a storage that is itself the file)."""
    name = path or storage.uri
    status = storage.stat(path)
    if status is None or status.is_dir:
        raise SourceCorrupt(f"file {name!r} is missing", file=name)
    reader = storage.open(path)
    try:
        first = bytearray(min(status.bytes, _FIRST_READ_BYTES))
        reader.read_into(0, memoryview(first))
        whole = LENGTH_BYTES + header_length(bytes(first[:LENGTH_BYTES]), status.bytes, file=name)
        if whole > len(first):
            known = len(first)
            first.extend(bytes(whole - known))
            reader.read_into(known, memoryview(first)[known:])
    finally:
        reader.close()
    header = parse_header(bytes(first[:whole]), status.bytes, file=name, max_tensors=max_tensors)
    return replace(header, identity=status.identity)


def header_length(prefix: bytes, file_bytes: int, *, file: str) -> int:
    """N of the 8-byte prefix, checked against the library's limit and the file's size."""
    if len(prefix) < LENGTH_BYTES:
        raise SourceCorrupt(f"file {file!r} has {file_bytes} bytes, too few for a safetensors header", file=file)
    (length,) = struct.unpack("<Q", prefix[:LENGTH_BYTES])
    if length > file_bytes - LENGTH_BYTES:
        raise SourceCorrupt(
            f"header length {length} reaches beyond the end of {file!r} ({file_bytes} bytes)",
            file=file,
            hint="the file is truncated or no safetensors file",
        )
    if length > MAX_HEADER_BYTES:
        raise UnsafeSource(f"header length {length} is above the format's limit of {MAX_HEADER_BYTES}", file=file)
    return int(length)


def parse_header(data: bytes, file_bytes: int, *, file: str, max_tensors: int = MAX_TENSORS) -> Header:
    """The checked header that ``data`` (length prefix and JSON) spells for a file of ``file_bytes`` bytes."""
    length = header_length(data, file_bytes, file=file)
    text = data[LENGTH_BYTES : LENGTH_BYTES + length]
    if text[:1] != b"{":
        raise SourceCorrupt(f"header of {file!r} does not begin with '{{'", file=file)
    table = parse_json(text, file=file, what="header", hook=_object)
    if type(table) is tuple:  # a header whose three tensors bear the names of the three fields
        table = dict(zip(("dtype", "shape", "data_offsets"), table, strict=True))
    metadata = _metadata(table.pop("__metadata__", None), file)
    if len(table) > max_tensors:
        raise UnsafeSource(f"header of {file!r} lists {len(table)} tensors; at most {max_tensors} are read", file=file)
    with paused_gc():
        return _checked(table, metadata, LENGTH_BYTES + length, file_bytes, file, xxhash.xxh3_128_hexdigest(text))


def _object(pairs: Pairs) -> Any:
    """A tensor's entry in the usual field order becomes a small tuple (JSON itself yields none), others a dict."""
    if len(pairs) == 3:
        (a, dtype), (b, shape), (c, offsets) = pairs
        if a == "dtype" and b == "shape" and c == "data_offsets":
            return (dtype, shape, offsets)
    return unique_pairs(pairs)


def _metadata(value: Any, file: str) -> dict[str, str]:
    if value is None:
        return {}
    if type(value) is tuple:
        value = dict(zip(("dtype", "shape", "data_offsets"), value, strict=True))
    if not isinstance(value, dict) or not all(type(entry) is str for entry in value.values()):
        raise SourceCorrupt(f"__metadata__ of {file!r} is not a map of strings to strings", file=file)
    return value


def _checked(
    table: dict[str, Any], metadata: dict[str, str], data_start: int, file_bytes: int, file: str, digest: str
) -> Header:
    names, dtypes, shapes = [], [], []
    begins = np.empty(len(table), dtype=np.int64)
    ends = np.empty(len(table), dtype=np.int64)
    data_bytes = file_bytes - data_start
    for i, (name, entry) in enumerate(table.items()):
        fault = name_fault(name)
        if fault is not None:
            raise UnsafeSource(f"tensor name {name[:60]!r} in {file!r} {fault}", file=file)
        if type(entry) is not tuple:
            if type(entry) is not dict or entry.keys() != _FIELDS:
                raise SourceCorrupt(
                    f"entry of tensor {name!r} in {file!r} must have exactly dtype, shape and data_offsets",
                    tensor=name,
                    file=file,
                )
            entry = (entry["dtype"], entry["shape"], entry["data_offsets"])
        dtype_name, shape, offsets = entry
        dtype = _KNOWN.get(dtype_name) if type(dtype_name) is str else None
        if dtype is None:
            raise UnsupportedSource(
                f"tensor {name!r} in {file!r} has the unknown dtype {str(dtype_name)[:50]!r}", tensor=name, file=file
            )
        nbytes, dims = _geometry(name, dtype, shape, file)
        if (
            type(offsets) is not list
            or len(offsets) != 2
            or type(offsets[0]) is not int
            or type(offsets[1]) is not int
            or not 0 <= offsets[0] <= offsets[1] <= data_bytes
        ):
            raise SourceCorrupt(
                f"data_offsets {str(offsets)[:60]} of tensor {name!r} do not lie within the {data_bytes} payload bytes "
                f"of {file!r}",
                tensor=name,
                file=file,
            )
        if offsets[1] - offsets[0] != nbytes:
            raise SourceCorrupt(
                f"tensor {name!r} in {file!r} has {offsets[1] - offsets[0]} bytes, but its shape {str(shape)[:60]} of "
                f"{dtype} takes {nbytes}",
                tensor=name,
                file=file,
            )
        names.append(name)
        dtypes.append(dtype)
        shapes.append(dims)
        begins[i], ends[i] = offsets
    order = np.lexsort((ends, begins))
    begins, ends = begins[order], ends[order]
    _check_tiling(names, order, begins, ends, data_bytes, file)
    return Header(
        names=tuple(names[i] for i in order),
        dtypes=tuple(dtypes[i] for i in order),
        shapes=tuple(shapes[i] for i in order),
        starts=begins + data_start,
        lengths=ends - begins,
        metadata=metadata,
        data_start=data_start,
        file_bytes=file_bytes,
        digest=digest,
    )


def name_fault(name: str) -> str | None:
    """Why no framework gives this name (and logs, terminals or C strings would show another), or None."""
    if name and len(name) <= MAX_NAME_BYTES // 4 and name.isprintable():
        return None
    try:
        encoded = name.encode("utf-8")
    except UnicodeEncodeError:
        return "is not valid Unicode"
    if not name:
        return "is empty"
    if len(encoded) > MAX_NAME_BYTES:
        return f"is longer than {MAX_NAME_BYTES} bytes"
    if any(ord(character) < 32 or 127 <= ord(character) < 160 for character in name):
        return "has control characters"
    return None


def _geometry(name: str, dtype: DType, shape: Any, file: str) -> tuple[int, tuple[int, ...]]:
    """Bytes, and the shape in stored elements."""
    if type(shape) is not list or len(shape) > MAX_DIMS:
        raise SourceCorrupt(f"shape of tensor {name!r} in {file!r} is no list of at most {MAX_DIMS} sizes", tensor=name)
    for size in shape:
        if type(size) is not int or not 0 <= size <= MAX_DIM:
            raise SourceCorrupt(f"shape {str(shape)[:60]} of tensor {name!r} in {file!r} is impossible", tensor=name)
    if dtype.values_per_element > 1:
        values = shape[-1] if shape else 1
        if values % dtype.values_per_element:
            raise UnsupportedSource(
                f"rows of tensor {name!r} ({shape} of {dtype}) in {file!r} do not end at a byte", tensor=name, file=file
            )
        shape = [*shape[:-1], values // dtype.values_per_element]
    return prod(shape) * dtype.itemsize, tuple(shape)


def _check_tiling(names: list[str], order: Int64s, begins: Int64s, ends: Int64s, data_bytes: int, file: str) -> None:
    """Every payload byte belongs to exactly one tensor."""
    before = np.concatenate([[0], ends])
    after = np.concatenate([begins, [data_bytes]])
    wrong = np.flatnonzero(before != after)
    if not len(wrong):
        return
    at = int(wrong[0])
    if at == len(order):
        raise SourceCorrupt(
            f"file {file!r} has {data_bytes - int(before[at])} bytes after its last tensor",
            file=file,
            hint="the header does not belong to this payload; copy the file again from its origin",
        )
    kind = "overlaps the one before it" if before[at] > after[at] else "leaves a hole before it"
    name = names[int(order[at])]
    raise SourceCorrupt(f"tensor {name!r} in {file!r} {kind}", tensor=name, file=file)


@dataclass(frozen=True, slots=True)
class HeaderEntry:
    """A tensor to be written: shape in stored elements, ``begin`` counted from the payload's start."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    begin: int
    end: int


def build_header(entries: Iterable[HeaderEntry], metadata: Mapping[str, str] | None = None, *, file: str = "") -> bytes:
    """Length prefix and JSON, padded with spaces so that the payload starts at a multiple of 8.

    ``metadata`` defaults to ``{"format": "pt"}``, which transformers asks for. Raises :class:`CannotHold`.
    """
    parts = ['"__metadata__":' + json.dumps(dict(_DEFAULT_METADATA if metadata is None else metadata))]
    for entry in entries:
        check_holdable(entry.name, entry.dtype, entry.shape)
        shape = ",".join(map(str, shape_in_values(entry.dtype, entry.shape)))
        parts.append(
            f'{_spelled(entry.name)}:{{"dtype":"{entry.dtype.name}","shape":[{shape}],'
            f'"data_offsets":[{entry.begin},{entry.end}]}}'
        )
    text = ("{" + ",".join(parts) + "}").encode("utf-8")
    text += b" " * (-(LENGTH_BYTES + len(text)) % ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise CannotHold(
            f"{len(parts) - 1} tensors need a header of {len(text)} bytes; the format allows {MAX_HEADER_BYTES}",
            file=file or None,
            hint="write several files (--max-shard-size) instead of one",
        )
    return struct.pack("<Q", len(text)) + text


def shape_in_values(dtype: DType, shape: tuple[int, ...]) -> list[int]:
    """The shape as the format counts it: single values, also where several share a byte."""
    sizes = list(shape)
    if dtype.values_per_element > 1:
        sizes[-1] *= dtype.values_per_element
    return sizes


def check_holdable(name: str, dtype: DType, shape: tuple[int, ...]) -> None:
    """Raise :class:`CannotHold` for a tensor that no safetensors header can describe."""
    if not dtype.in_safetensors:
        raise CannotHold(
            f"safetensors has no type for tensor {name!r} of dtype {dtype}",
            tensor=name,
            hint="leave it out with --exclude, or write --to dcp",
        )
    if dtype.values_per_element > 1 and not shape:
        raise CannotHold(f"safetensors can't hold the 0-dim tensor {name!r} of packed dtype {dtype}", tensor=name)
    if name == "__metadata__":
        raise CannotHold("'__metadata__' is reserved in safetensors and can't name a tensor", tensor=name)
    fault = name_fault(name)
    if fault is not None:
        raise CannotHold(f"tensor name {name[:60]!r} {fault}: no safetensors name", tensor=name)
