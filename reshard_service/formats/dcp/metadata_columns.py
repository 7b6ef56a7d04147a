"""Turn the pickle in ``.metadata`` into plain columns, naming nothing of torch.

Standard library only, because it also runs as a child process that starts in 20 ms and holds nothing but the pickle:
:func:`child_main`. What makes a million chunks take three seconds: garbage collection is off, ``torch.Size`` becomes
``tuple`` itself (no call of ours), and instances note their fields in arrays and empty their state dicts.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from array import array
from itertools import chain
from typing import Any, BinaryIO

from reshard_service.formats.dcp.metadata_standins import (
    BytesEntry,
    ForbiddenGlobal,
    MetadataUnpickler,
    Root,
    TensorEntry,
)


class Columns:
    """What ``.metadata`` says, as columns: ragged ones are flat, with ranks and counts beside them.

    ``texts`` holds each distinct string once and columns index it. Tensor columns run over the tensors in their stored
    order, chunk columns over all chunks of each tensor in turn, storage columns over ``storage_data``, whose rank is
    -1 where the index has no offset (a byte object).
    """

    NAMES = (
        "tensor_key", "tensor_dtype", "tensor_rank", "tensor_chunks", "tensor_shape", "chunk_offsets", "chunk_sizes",
        "object_key", "storage_key", "storage_rank", "storage_offset", "storage_file", "storage_start",
        "storage_length", "storage_transforms",
    )  # fmt: skip

    def __init__(self) -> None:
        self.columns = {name: array("q") for name in self.NAMES}
        self.texts: list[str] = []
        self.transforms: list[list[str]] = [[]]
        self.paths: dict[str, list[str | int]] | None = None
        """``planner_data`` where it is the default planner's: the path of each key in the nested state dict."""
        self.planner: str | None = None
        """Type of a ``planner_data`` that isn't; None if there is none."""
        self.version: str | None = None
        self.other_fields: list[str] = []

    def header(self) -> dict[str, Any]:
        """Everything but the columns themselves."""
        header = {name: value for name, value in vars(self).items() if name != "columns"}
        header["columns"] = {name: [column.typecode, len(column)] for name, column in self.columns.items()}
        return header

    def dump(self, out: BinaryIO) -> None:
        """One line of JSON, then the columns one after the other."""
        out.write(json.dumps(self.header()).encode() + b"\n")
        for column in self.columns.values():
            out.write(memoryview(column))


def load_columns(file: BinaryIO) -> Columns:
    """Unpickle ``file`` and lay it out.

    Raises :class:`ForbiddenGlobal`, or any other exception for a pickle that is damaged or is not metadata: the caller
    words the error.
    """
    unpickler = MetadataUnpickler(file)
    return _lay_out(unpickler, _load(unpickler, file))


def _load(unpickler: MetadataUnpickler, file: BinaryIO) -> dict[str, Any]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        root = unpickler.load()
    finally:
        if enabled:
            gc.enable()
    if file.read(1):
        raise ValueError("bytes follow the end of the pickle")
    if not isinstance(root, Root):
        raise TypeError("the pickle holds no Metadata object")
    return root.fields


def _lay_out(noted: MetadataUnpickler, fields: dict[str, Any]) -> Columns:
    made = Columns()
    entries, storage = fields["state_dict_metadata"], fields.get("storage_data") or {}
    if not isinstance(entries, dict) or not isinstance(storage, dict):
        raise TypeError("state_dict_metadata and storage_data are not dicts")
    _lay_out_entries(made.columns, noted, entries)
    _lay_out_storage(made, noted, storage)
    made.texts = list(noted.texts)
    planner = fields.get("planner_data")
    if isinstance(planner, dict) and all(_is_path(key, path) for key, path in planner.items()):
        made.paths = {key: list(path) for key, path in planner.items() if key in entries}
    elif planner is not None:
        made.planner = type(planner).__name__
    version = fields.get("version")
    made.version = version if isinstance(version, str) else None
    known = {"state_dict_metadata", "storage_data", "planner_data", "storage_meta", "version"}
    made.other_fields = [name for name, value in fields.items() if name not in known and value]
    return made


def _lay_out_entries(columns: dict[str, array[int]], noted: MetadataUnpickler, entries: dict[Any, Any]) -> None:
    tensors = {key: entry for key, entry in entries.items() if isinstance(entry, TensorEntry)}
    objects = [key for key, entry in entries.items() if isinstance(entry, BytesEntry)]
    if len(tensors) + len(objects) < len(entries):
        raise TypeError("an entry of state_dict_metadata is neither a tensor nor bytes")
    number = noted.texts.__getitem__
    columns["tensor_key"].extend(map(number, tensors))
    columns["object_key"].extend(map(number, objects))
    chunks = noted.chunks
    chunks.sort_as(chain.from_iterable(tensor.chunks for tensor in tensors.values()), ())
    start = 0
    for key, tensor in tensors.items():
        rank, count = len(tensor.size), len(tensor.chunks)
        if chunks.ranks[start : start + count].count(rank) != count:
            raise ValueError(f"a chunk of {key!r} has another number of dims than the tensor")
        start += count
        columns["tensor_dtype"].append(number(tensor.properties.dtype))
        columns["tensor_rank"].append(rank)
        columns["tensor_chunks"].append(count)
        columns["tensor_shape"].extend(tensor.size)
    columns["chunk_offsets"], columns["chunk_sizes"] = chunks.corners["offsets"], chunks.corners["sizes"]


def _lay_out_storage(made: Columns, noted: MetadataUnpickler, storage: dict[Any, Any]) -> None:
    columns, indices = made.columns, noted.indices
    (columns["storage_key"],) = indices.sort_as(storage, [noted.index_key])
    columns["storage_rank"], columns["storage_offset"] = indices.ranks, indices.corners["offsets"]
    places = (noted.info_file, noted.info_start, noted.info_length, noted.info_transforms)
    for name, column in zip(
        ("storage_file", "storage_start", "storage_length", "storage_transforms"),
        noted.infos.sort_as(storage.values(), places),
        strict=True,
    ):
        columns[name] = column
    if not all(isinstance(name, str) for names in noted.transforms for name in names):
        raise TypeError("a transform descriptor is not a string")
    made.transforms = [list(names) for names in noted.transforms]


def _is_path(key: object, path: object) -> bool:
    return (
        isinstance(key, str)
        and isinstance(path, (tuple, list))
        and 0 < len(path) <= 64
        and all(type(part) in (str, int) for part in path)
    )


def child_main(memory_bytes: int, cpu_seconds: int) -> None:
    """Read a pickle from standard input and write :meth:`Columns.dump`; the exit status says what went wrong.

    0: columns follow. 3: one line of JSON, ``{"error": "global" | "memory" | "corrupt", "what": …}``. Never returns:
    tearing down a million objects would take half a second.
    """
    _limit(memory_bytes, cpu_seconds)
    gc.disable()
    out = sys.stdout.buffer
    no_memory = _failure("memory")  # made while there is memory
    try:
        unpickler = MetadataUnpickler(sys.stdin.buffer)
        fields = _load(unpickler, sys.stdin.buffer)
        _lay_out(unpickler, fields).dump(out)
        out.flush()
        os._exit(0)
    except ForbiddenGlobal as error:
        answer = _failure("global", str(error))
    except MemoryError:
        answer = no_memory
    except Exception as error:
        answer = _failure("corrupt", f"{type(error).__name__}: {str(error)[:400]}")
    os.write(out.fileno(), answer)
    os._exit(3)


def _failure(kind: str, what: str = "") -> bytes:
    return json.dumps({"error": kind, "what": what}).encode() + b"\n"


def _limit(memory_bytes: int, cpu_seconds: int) -> None:
    try:
        import resource
    except ImportError:  # not a POSIX system: nothing can be limited there
        return
    for kind, most in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        lowest = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (lowest, lowest))
