"""Turn the pickle in ``.metadata`` into plain columns, naming nothing of torch.

Standard library only, because it also runs as a child process that starts in 20 ms and holds nothing but the pickle:
:func:`child_main`. A million chunks take about 2.5 s to unpickle and a second to lay out. What makes it fast: garbage
collection is off, ``torch.Size`` becomes ``tuple`` itself (no call of ours), and each stand-in takes what it needs out
of its state dict and empties it, which keeps a million chunks at 1.1 GB instead of 1.5.

The classes and their fields are torch's ``distributed/checkpoint/metadata.py`` and ``filesystem.py``, 1.13 to 2.13.
"""

from __future__ import annotations

import gc
import json
import os
import pickle
import re
import sys
from array import array
from collections.abc import Iterable
from itertools import chain
from operator import attrgetter
from typing import Any, BinaryIO

from reshard_service.formats.pickles.standins import InertDict, Opaque


class ForbiddenGlobal(Exception):  # noqa: N818 - becomes UnsafeSource in the parent
    """The pickle names something outside the allow-list; the argument is its dotted name."""


class _Chunk:
    """``ChunkStorageMetadata``."""

    __slots__ = ("offsets", "sizes")

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.offsets = state["offsets"]
        self.sizes = state["sizes"]
        state.clear()


class _Index:
    """``MetadataIndex``: compared by identity here; the index hint is not needed."""

    __slots__ = ("fqn", "offset")

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.fqn = state["fqn"]
        self.offset = state.get("offset")
        state.clear()


class _StorageInfo:
    """``_StorageInfo``."""

    __slots__ = ("length", "path", "start", "transforms")

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path = state["relative_path"]
        self.start = state["offset"]
        self.length = state["length"]
        self.transforms = state.get("transform_descriptors")
        state.clear()


class _Tensor:
    """``TensorStorageMetadata``."""

    __slots__ = ("chunks", "properties", "size")

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.properties = state["properties"]
        self.size = state["size"]
        self.chunks = state["chunks"]


class _Properties:
    """``TensorProperties``, whose state is a tuple that begins with the dtype and the layout."""

    __slots__ = ("dtype",)

    def __setstate__(self, state: Any) -> None:
        self.dtype = state["dtype"] if isinstance(state, dict) else state[0]


class _Bytes:
    """``BytesStorageMetadata``, which has no fields."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        """Nothing is kept."""


class _Root:
    """``Metadata``. Fields that later versions or other producers added stay in ``fields``."""

    __slots__ = ("fields",)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.fields = state


_METADATA = "torch.distributed.checkpoint.metadata."
_PLANNER = "torch.distributed.checkpoint.planner."
_SHARD_CHECKPOINT = "torch.distributed._shard.checkpoint."
_SHARDED_TENSOR = "torch.distributed._shard.sharded_tensor.metadata."
ALLOWED: dict[str, Any] = {
    "torch.Size": tuple,
    "collections.OrderedDict": InertDict,
    "torch.serialization._get_layout": Opaque,
    f"{_METADATA}_MEM_FORMAT_ENCODING": Opaque,
    f"{_METADATA}StorageMeta": Opaque,
    "torch.distributed.checkpoint.filesystem._StorageInfo": _StorageInfo,
    # torch 1.13 to 2.2
    f"{_SHARDED_TENSOR}TensorProperties": _Properties,
    f"{_SHARDED_TENSOR}MEM_FORMAT_ENCODING": Opaque,
    f"{_SHARD_CHECKPOINT}filesystem._StorageInfo": _StorageInfo,
    # Megatron's subclass, and the plans that some writers cache in the file
    "megatron.core.dist_checkpointing.strategies.torch.MCoreMetadata": _Root,
    **{
        _PLANNER + name: Opaque
        for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")
    },
    **{
        package + name: standin
        for package in (_METADATA, f"{_SHARD_CHECKPOINT}metadata.")
        for name, standin in (
            ("Metadata", _Root),
            ("TensorStorageMetadata", _Tensor),
            ("BytesStorageMetadata", _Bytes),
            ("ChunkStorageMetadata", _Chunk),
            ("MetadataIndex", _Index),
            ("TensorProperties", _Properties),
        )
    },
    # the folder that was saved to, whatever Python wrote it
    **{
        f"{module}.{name}": Opaque
        for module in ("pathlib", "pathlib._local")
        for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    },
}
_OFFSETS, _SIZES, _TRANSFORMS = attrgetter("offsets"), attrgetter("sizes"), attrgetter("transforms")
_DTYPE = re.compile(r"(?:q?u?int\d{1,2}(?:x\d)?|b?float\d{1,2}\w{0,16}|complex\d{1,3}|bits\w{1,6}|bool)")


class MetadataUnpickler(pickle.Unpickler):
    """C's unpickler, which can reach nothing but ``ALLOWED`` and dtypes; a dtype becomes its name."""

    def find_class(self, module: str, name: str) -> Any:
        dotted = f"{module}.{name}"
        found = ALLOWED.get(dotted)
        if found is None:
            if module == "torch" and _DTYPE.fullmatch(name):
                return name
            raise ForbiddenGlobal(dotted)
        return found


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
        header["lengths"] = {name: len(column) for name, column in self.columns.items()}
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
    return _lay_out(_load(file))


def _load(file: BinaryIO) -> dict[str, Any]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        root = MetadataUnpickler(file).load()
    finally:
        if enabled:
            gc.enable()
    if file.read(1):
        raise ValueError("bytes follow the end of the pickle")
    if not isinstance(root, _Root):
        raise TypeError("the pickle holds no Metadata object")
    return root.fields


class _Texts(dict[str, int]):
    """Numbers distinct strings in order of appearance."""

    def number(self, texts: Iterable[Any]) -> list[int]:
        column = list(texts)
        for text in dict.fromkeys(column):
            if not isinstance(text, str):
                raise TypeError(f"a name is not a string but {type(text).__name__}")
            self.setdefault(text, len(self))
        return list(map(self.__getitem__, column))


def _lay_out(fields: dict[str, Any]) -> Columns:
    made, texts = Columns(), _Texts()
    entries, storage = fields["state_dict_metadata"], fields.get("storage_data") or {}
    if not isinstance(entries, dict) or not isinstance(storage, dict):
        raise TypeError("state_dict_metadata and storage_data are not dicts")
    _lay_out_entries(made.columns, entries, texts)
    _lay_out_storage(made, storage, texts)
    made.texts = list(texts)
    planner = fields.get("planner_data")
    if isinstance(planner, dict) and all(_is_path(key, path) for key, path in planner.items()):
        made.paths = {key: list(path) for key, path in planner.items() if key in entries}
    elif planner is not None:
        made.planner = type(planner).__name__.lstrip("_")
    version = fields.get("version")
    made.version = version if isinstance(version, str) else None
    known = {"state_dict_metadata", "storage_data", "planner_data", "storage_meta", "version"}
    made.other_fields = [name for name, value in fields.items() if name not in known and value]
    return made


def _lay_out_entries(columns: dict[str, Any], entries: dict[Any, Any], texts: _Texts) -> None:
    tensors = {key: entry for key, entry in entries.items() if isinstance(entry, _Tensor)}
    objects = [key for key, entry in entries.items() if isinstance(entry, _Bytes)]
    if len(tensors) + len(objects) < len(entries):
        raise TypeError("an entry of state_dict_metadata is neither a tensor nor bytes")
    columns["tensor_key"].extend(texts.number(tensors))
    columns["object_key"].extend(texts.number(objects))
    columns["tensor_dtype"].extend(texts.number(tensor.properties.dtype for tensor in tensors.values()))
    for key, tensor in tensors.items():
        rank = len(tensor.size)
        columns["tensor_rank"].append(rank)
        columns["tensor_chunks"].append(len(tensor.chunks))
        columns["tensor_shape"].extend(tensor.size)
        for name, corners in (
            ("chunk_offsets", list(map(_OFFSETS, tensor.chunks))),
            ("chunk_sizes", list(map(_SIZES, tensor.chunks))),
        ):
            if not set(map(len, corners)) <= {rank}:
                raise ValueError(f"a chunk of {key!r} has another number of dims than the tensor")
            columns[name].extend(chain.from_iterable(corners))


def _lay_out_storage(made: Columns, storage: dict[Any, Any], texts: _Texts) -> None:
    columns, infos = made.columns, storage.values()
    columns["storage_key"].extend(texts.number(map(attrgetter("fqn"), storage)))
    corners = list(map(attrgetter("offset"), storage))
    columns["storage_rank"].extend([-1 if corner is None else len(corner) for corner in corners])
    columns["storage_offset"].extend(chain.from_iterable(filter(None, corners)))
    columns["storage_file"].extend(texts.number(map(attrgetter("path"), infos)))
    columns["storage_start"].extend(map(attrgetter("start"), infos))
    columns["storage_length"].extend(map(attrgetter("length"), infos))
    numbers: dict[tuple[str, ...], int] = {(): 0}
    columns["storage_transforms"].extend(
        [0 if not names else numbers.setdefault(tuple(names), len(numbers)) for names in map(_TRANSFORMS, infos)]
    )
    if not all(isinstance(name, str) for names in numbers for name in names):
        raise TypeError("a transform descriptor is not a string")
    made.transforms = [list(names) for names in numbers]


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
    try:
        fields = _load(sys.stdin.buffer)
        _lay_out(fields).dump(out)
        out.flush()
        os._exit(0)
    except ForbiddenGlobal as error:
        failure = ("global", str(error))
    except MemoryError:
        failure = ("memory", "")
    except Exception as error:
        failure = ("corrupt", f"{type(error).__name__}: {str(error)[:400]}")
    out.write(json.dumps({"error": failure[0], "what": failure[1]}).encode() + b"\n")
    out.flush()
    os._exit(3)


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
