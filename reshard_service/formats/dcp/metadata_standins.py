"""What stands in for the classes in a ``.metadata``: they note their fields in columns while they are unpickled.

Standard library only; it runs in a child process (see ``metadata_columns``). A million chunks are three million
instances, so an instance holds nothing: its state goes into flat arrays at once and the instance is only noted, in
order. What the pickle then puts into lists and dicts is compared with that order. The classes and fields are torch's,
``distributed/checkpoint/metadata.py`` and ``filesystem.py``, 1.13 to 2.13.
"""

from __future__ import annotations

import pickle
import re
from array import array
from collections.abc import Iterable
from itertools import accumulate
from operator import is_
from typing import Any, BinaryIO

from reshard_service.formats.pickles.standins import InertDict, Opaque


class ForbiddenGlobal(Exception):  # noqa: N818 - becomes UnsafeSource in the parent
    """The pickle names something outside the allow-list; the argument is its dotted name."""


class TensorEntry:
    """``TensorStorageMetadata``."""

    __slots__ = ("chunks", "properties", "size")

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.properties = state["properties"]
        self.size = state["size"]
        self.chunks = state["chunks"]


class TensorProperties:
    """``TensorProperties``, whose state is a tuple that begins with the dtype."""

    __slots__ = ("dtype",)

    def __setstate__(self, state: Any) -> None:
        self.dtype = state["dtype"] if isinstance(state, dict) else state[0]


class BytesEntry:
    """``BytesStorageMetadata``, which has no fields."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        """Nothing is kept."""


class Root:
    """``Metadata``. Fields that later versions or other producers added are there too."""

    __slots__ = ("fields",)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.fields = state


class Texts(dict[str, int]):
    """Numbers distinct strings in the order of appearance."""

    def __missing__(self, text: Any) -> int:
        if not isinstance(text, str):
            raise TypeError(f"a name is not a string but {type(text).__name__}")
        number = self[text] = len(self)
        return number


class Noted:
    """All instances of one class in the order in which they got their state, and their ragged corners."""

    def __init__(self, *corners: str) -> None:
        self.instances: list[object] = []
        self.ranks = array("b")
        self.corners = {name: array("q") for name in corners}

    def sort_as(self, wanted: Iterable[object], plain: Iterable[array[int]]) -> list[array[int]]:
        """Bring ranks, corners and the ``plain`` columns into the order of ``wanted``; gives the columns back.

        They are in that order already in every file that torch writes; others may share or reorder instances.
        """
        listed, columns = list(wanted), list(plain)
        if len(listed) == len(self.instances) and all(map(is_, listed, self.instances)):
            return columns
        place = {id(instance): number for number, instance in enumerate(self.instances)}
        order = [place[id(instance)] for instance in listed]
        ends = list(accumulate(max(rank, 0) for rank in self.ranks))
        for name, flat in self.corners.items():
            self.corners[name] = array("q")
            for row in order:
                self.corners[name].extend(flat[ends[row] - max(self.ranks[row], 0) : ends[row]])
        if self.ranks:
            self.ranks = array("b", [self.ranks[row] for row in order])
        self.instances = listed
        return [array(column.typecode, [column[row] for row in order]) for column in columns]


class MetadataUnpickler(pickle.Unpickler):
    """C's unpickler, which can reach nothing but the stand-ins and dtypes; a dtype becomes its name.

    After ``load`` its attributes hold what the instances noted.
    """

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self.texts = Texts()
        self.transforms: dict[tuple[str, ...], int] = {(): 0}
        self.chunks = Noted("offsets", "sizes")
        self.indices = Noted("offsets")
        self.infos = Noted()
        self.index_key, self.info_file, self.info_transforms = array("i"), array("i"), array("h")
        self.info_start, self.info_length = array("q"), array("q")
        self._allowed = _allowed(self._chunk_class(), self._index_class(), self._info_class())

    def find_class(self, module: str, name: str) -> Any:
        dotted = f"{module}.{name}"
        found = self._allowed.get(dotted)
        if found is None:
            if module == "torch" and _DTYPE.fullmatch(name):
                return name
            raise ForbiddenGlobal(dotted)
        return found

    def _chunk_class(self) -> type:
        note, ranks = self.chunks.instances.append, self.chunks.ranks
        offsets, sizes = self.chunks.corners["offsets"], self.chunks.corners["sizes"]

        class ChunkStorageMetadata:
            __slots__ = ()

            def __setstate__(self, state: dict[str, Any]) -> None:
                offset, size = state["offsets"], state["sizes"]
                if len(offset) != len(size):
                    raise ValueError("a chunk's offsets and sizes differ in number")
                note(self)
                ranks.append(len(size))
                offsets.extend(offset)
                sizes.extend(size)
                state.clear()

        return ChunkStorageMetadata

    def _index_class(self) -> type:
        note, ranks, offsets = self.indices.instances.append, self.indices.ranks, self.indices.corners["offsets"]
        texts, keys = self.texts, self.index_key

        class MetadataIndex:
            __slots__ = ()

            def __setstate__(self, state: dict[str, Any]) -> None:
                offset = state.get("offset")
                note(self)
                keys.append(texts[state["fqn"]])
                if offset is None:
                    ranks.append(-1)
                else:
                    ranks.append(len(offset))
                    offsets.extend(offset)
                state.clear()

        return MetadataIndex

    def _info_class(self) -> type:
        note, texts, known = self.infos.instances.append, self.texts, self.transforms
        files, starts, lengths, transforms = (
            self.info_file, self.info_start, self.info_length, self.info_transforms,
        )  # fmt: skip

        class StorageInfo:
            __slots__ = ()

            def __setstate__(self, state: dict[str, Any]) -> None:
                note(self)
                files.append(texts[state["relative_path"]])
                starts.append(state["offset"])
                lengths.append(state["length"])
                names = state.get("transform_descriptors")
                transforms.append(known.setdefault(tuple(names), len(known)) if names else 0)
                state.clear()

        return StorageInfo


_METADATA = "torch.distributed.checkpoint.metadata."
_PLANNER = "torch.distributed.checkpoint.planner."
_SHARD_CHECKPOINT = "torch.distributed._shard.checkpoint."
_SHARDED_TENSOR = "torch.distributed._shard.sharded_tensor.metadata."
_PACKAGES = (_METADATA, f"{_SHARD_CHECKPOINT}metadata.")
_INERT = {
    "torch.Size": tuple,
    "collections.OrderedDict": InertDict,
    "torch.serialization._get_layout": Opaque,
    f"{_METADATA}_MEM_FORMAT_ENCODING": Opaque,
    f"{_METADATA}StorageMeta": Opaque,
    **{package + "Metadata": Root for package in _PACKAGES},
    **{package + "TensorStorageMetadata": TensorEntry for package in _PACKAGES},
    **{package + "BytesStorageMetadata": BytesEntry for package in _PACKAGES},
    **{package + "TensorProperties": TensorProperties for package in _PACKAGES},
    # torch 1.13 to 2.2
    f"{_SHARDED_TENSOR}TensorProperties": TensorProperties,
    f"{_SHARDED_TENSOR}MEM_FORMAT_ENCODING": Opaque,
    # Megatron's subclass, and the plans that some writers cache in the file
    "megatron.core.dist_checkpointing.strategies.torch.MCoreMetadata": Root,
    **{
        _PLANNER + name: Opaque
        for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")
    },
    # the folder that was saved to, whatever Python wrote it
    **{
        f"{module}.{name}": Opaque
        for module in ("pathlib", "pathlib._local")
        for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    },
}
_DTYPE = re.compile(r"(?:q?u?int\d{1,2}(?:x\d)?|b?float\d{1,2}\w{0,16}|complex\d{1,3}|bits\w{1,6}|bool)")


def _allowed(chunk: type, index: type, info: type) -> dict[str, Any]:
    """Everything that a real ``.metadata`` names."""
    return {
        **_INERT,
        **{package + "ChunkStorageMetadata": chunk for package in _PACKAGES},
        **{package + "MetadataIndex": index for package in _PACKAGES},
        "torch.distributed.checkpoint.filesystem._StorageInfo": info,
        f"{_SHARD_CHECKPOINT}filesystem._StorageInfo": info,
    }
