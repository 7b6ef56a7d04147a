"""Writing ``.metadata``: the pickle that torch's ``FileSystemReader`` loads, without torch and without a pickler.

The classes and their states are those of torch 2.13 (``distributed/checkpoint/metadata.py``, ``filesystem.py``), which
are also those of 2.6. All numbers of a column have one width, so that the records of all chunks of one rank are one
numpy table of bytes: a template repeated, with the numbers written into its holes. ``storage_meta`` is left at None:
torch puts the saving host's path and a random id there, and a resumed output must be byte-identical (decision 17).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from reshard_service.catalogue import Chunks, Int64s, Path, Tensor
from reshard_service.errors import CannotHold
from reshard_service.formats.target import ObjectCopy

_METADATA = "torch.distributed.checkpoint.metadata"
_GLOBALS = (
    (_METADATA, "Metadata"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "BytesStorageMetadata"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
)
_WORDS = (
    "state_dict_metadata",
    "planner_data",
    "storage_data",
    "version",
    "properties",
    "size",
    "chunks",
    "offsets",
    "sizes",
    "fqn",
    "offset",
    "index",
    "relative_path",
    "length",
    "transform_descriptors",
)
_GET = {name: b"h" + bytes([i]) for i, name in enumerate([name for _, name in _GLOBALS] + list(_WORDS))}
"""How to push each of these again: they take the first places of the memo."""
_NEW = b")\x81"
_POP = b"0"


def metadata_pickle(
    tensors: Sequence[Tensor], chunks: Chunks, files: Sequence[str], objects: Sequence[ObjectCopy] = ()
) -> bytes:
    """``.metadata`` for these tensors, whose chunks (one item each) lie in ``files``, and these byte objects."""
    return b"".join(_parts(tensors, chunks, files, objects))


def _parts(
    tensors: Sequence[Tensor], chunks: Chunks, files: Sequence[str], objects: Sequence[ObjectCopy]
) -> Iterator[bytes]:
    memo = _Memo()
    yield b"\x80\x02"
    for module, name in _GLOBALS:
        yield f"c{module}\n{name}\n".encode() + memo.put() + _POP
    for word in _WORDS:
        yield memo.text(word) + _POP
    yield _GET["_get_layout"] + memo.text("torch.strided") + b"\x85R" + memo.put() + _POP
    yield _GET["_MEM_FORMAT_ENCODING"] + b"K\x00\x85R" + memo.put() + _POP
    strided, contiguous = memo.next - 2, memo.next - 1
    first_file = memo.next
    yield from (_text(path) + memo.put() + _POP for path in files)
    first_key = memo.next
    keys = [tensor.key for tensor in tensors] + [copy.source.key for copy in objects]
    yield from (_text(key) + memo.put() + _POP for key in keys)
    places = _places(chunks, [len(tensor.shape) for tensor in tensors])

    yield b"".join((_GET["Metadata"], _NEW, b"}(", _GET["state_dict_metadata"], b"}"))
    properties = _Properties(memo, _get(strided), _get(contiguous))
    yield from _tensor_metadata(tensors, chunks, places, properties, first_key)
    for i in range(len(tensors), len(keys)):
        yield b"".join((_get(first_key + i), _GET["BytesStorageMetadata"], _NEW, b"s"))

    yield _GET["planner_data"] + b"}"
    paths = [tensor.path for tensor in tensors] + [copy.source.path for copy in objects]
    for i, path in enumerate(paths):
        yield b"".join((_get(first_key + i), _path(path, memo), b"s"))

    yield _GET["storage_data"] + b"}"
    for i, copy in enumerate(objects):
        yield _object_storage(copy, first_key + len(tensors) + i, first_file)
    yield from _tensor_storage(chunks, places, first_key, first_file)
    yield b"".join((_GET["version"], _text("1.0.0"), b"ub."))


class _Memo:
    """Numbers what the pickle remembers, in order; texts are found again."""

    def __init__(self) -> None:
        self.next = 0
        self.texts: dict[str, int] = {}

    def put(self) -> bytes:
        """Remember the top of the stack."""
        at = self.next
        self.next += 1
        return b"q" + bytes([at]) if at < 256 else b"r" + struct.pack("<I", at)

    def text(self, text: str) -> bytes:
        """Push a text, and remember it if it is new."""
        at = self.texts.get(text)
        if at is not None:
            return _get(at)
        self.texts[text] = self.next
        return _text(text) + self.put()


def _get(at: int) -> bytes:
    return b"h" + bytes([at]) if at < 256 else b"j" + struct.pack("<I", at)


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def _number(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + bytes([value])
    return b"\x8a\x08" + struct.pack("<q", value)


def _tuple(items: Sequence[bytes]) -> bytes:
    closing = {0: b")", 1: b"\x85", 2: b"\x86", 3: b"\x87"}.get(len(items))
    return b"".join(items) + closing if closing is not None else b"(" + b"".join(items) + b"t"


def _path(path: Path, memo: _Memo) -> bytes:
    return _tuple([_number(part) if isinstance(part, int) else memo.text(part) for part in path])


def _tensor_metadata(
    tensors: Sequence[Tensor], chunks: Chunks, places: Sequence[Int64s], properties: _Properties, first_key: int
) -> Iterator[bytes]:
    """``key -> TensorStorageMetadata`` of each tensor."""
    records = [_chunk_records(chunks, rows, rank) for rank, rows in enumerate(places)]
    taken = [0] * len(records)
    counts = np.diff(chunks.first).tolist()
    for i, tensor in enumerate(tensors):
        rank = len(tensor.shape)
        table = records[rank]
        at = taken[rank]
        taken[rank] = at + counts[i]
        size = _GET["Size"] + _tuple([_number(dim) for dim in tensor.shape]) + b"\x85R"
        head = (
            _get(first_key + i),
            _GET["TensorStorageMetadata"],
            _NEW,
            b"}(",
            properties.of(tensor),
            _GET["size"],
            size,
        )
        yield b"".join((*head, _GET["chunks"], b"]("))
        yield table[at : taken[rank]].tobytes()
        yield b"eubs"


class _Properties:
    """``"properties": TensorProperties`` of each element type; its state is a tuple (``__getstate__``)."""

    def __init__(self, memo: _Memo, strided: bytes, contiguous: bytes) -> None:
        self._memo = memo
        self._before = b"".join((_GET["properties"], _GET["TensorProperties"], _NEW, b"("))
        self._after = b"".join((strided, b"\x89", contiguous, b"\x89tb"))
        self._made: dict[str, bytes] = {}

    def of(self, tensor: Tensor) -> bytes:
        made = self._made.get(tensor.dtype.name)
        if made is not None:
            return made
        name = tensor.dtype.torch
        if name is None:
            raise CannotHold(
                f"torch has no element type for {tensor.dtype.name}",
                tensor=tensor.key,
                hint="write safetensors instead",
            )
        at = self._memo.next
        self._made[tensor.dtype.name] = self._before + _get(at) + self._after
        return self._before + f"ctorch\n{name}\n".encode() + self._memo.put() + self._after


def _tensor_storage(chunks: Chunks, places: Sequence[Int64s], first_key: int, first_file: int) -> Iterator[bytes]:
    """``MetadataIndex -> _StorageInfo`` of each chunk; the index hint is the chunk's place in its tensor's list."""
    of_row = chunks.tensor_of_row()
    hint = np.arange(len(chunks), dtype=np.int64) - chunks.first[of_row]
    for rank, rows in enumerate(places):
        if not len(rows):
            continue
        record = _Records()
        record += _GET["MetadataIndex"] + _NEW + b"}(" + _GET["fqn"]
        record.recall(first_key + of_row[rows])
        record += _GET["index"]
        record.number(hint[rows])
        record += _GET["offset"]
        record.size(chunks.offsets[rows, :rank])
        record += b"ub" + _GET["_StorageInfo"] + _NEW + b"}(" + _GET["relative_path"]
        record.recall(first_file + chunks.file[rows].astype(np.int64))
        record += _GET["offset"]
        record.number(chunks.start[rows])
        record += _GET["length"]
        record.number(chunks.length[rows])
        record += b"ub" + b"s"
        yield record.table(len(rows)).tobytes()


def _object_storage(copy: ObjectCopy, key: int, first_file: int) -> bytes:
    source = copy.source
    transforms = b""
    if source.transforms:
        names = b"".join(_text(name) for name in source.transforms)
        transforms = _GET["transform_descriptors"] + b"](" + names + b"e"
    return b"".join(
        (
            *(_GET["MetadataIndex"], _NEW, b"}(", _GET["fqn"], _get(key), _GET["index"], b"Nub"),
            *(_GET["_StorageInfo"], _NEW, b"}(", _GET["relative_path"], _get(first_file + copy.file)),
            *(_GET["offset"], _number(copy.start), _GET["length"], _number(source.length), transforms, b"ubs"),
        )
    )


def _places(chunks: Chunks, ranks: Sequence[int]) -> list[Int64s]:
    """For each tensor rank the rows of all tensors of that rank, in order."""
    of_row = np.repeat(np.asarray(ranks, dtype=np.int64), np.diff(chunks.first))
    return [np.flatnonzero(of_row == rank) for rank in range(max(ranks, default=-1) + 1)]


def _chunk_records(chunks: Chunks, rows: Int64s, rank: int) -> NDArray[np.uint8]:
    record = _Records()
    record += _GET["ChunkStorageMetadata"] + _NEW + b"}(" + _GET["offsets"]
    record.size(chunks.offsets[rows, :rank])
    record += _GET["sizes"]
    record.size(chunks.sizes[rows, :rank])
    record += b"ub"
    return record.table(len(rows))


class _Records:
    """A template of pickle opcodes with holes, and the columns of numbers that go there."""

    def __init__(self) -> None:
        self.template = bytearray()
        self.holes: list[tuple[int, Int64s, str]] = []

    def __iadd__(self, opcodes: bytes) -> _Records:
        self.template += opcodes
        return self

    def _hole(self, opcode: bytes, column: Int64s, form: str) -> None:
        self.template += opcode
        self.holes.append((len(self.template), column, form))
        self.template += bytes(np.dtype(form).itemsize)

    def number(self, column: Int64s) -> None:
        largest = int(column.max(initial=0))
        if largest < 1 << 8:
            self._hole(b"K", column, "<u1")
        elif largest < 1 << 31:
            self._hole(b"J", column, "<i4")
        else:
            self._hole(b"\x8a\x08", column, "<i8")

    def recall(self, memo: Int64s) -> None:
        self._hole(b"j", memo, "<u4")

    def size(self, columns: Int64s) -> None:
        """A ``torch.Size``."""
        rank = columns.shape[1]
        self += _GET["Size"] + (b"(" if rank > 3 else b"")
        for dim in range(rank):
            self.number(columns[:, dim])
        self += {0: b")", 1: b"\x85", 2: b"\x86", 3: b"\x87"}.get(rank, b"t") + b"\x85R"

    def table(self, count: int) -> NDArray[np.uint8]:
        width = len(self.template)
        table = np.empty((count, width), dtype=np.uint8)
        table[:] = np.frombuffer(self.template, dtype=np.uint8)
        for at, column, form in self.holes:
            kind = np.dtype(form)
            table[:, at : at + kind.itemsize] = column.astype(kind).view(np.uint8).reshape(count, kind.itemsize)
        return table
