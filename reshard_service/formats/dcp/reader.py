"""A DCP folder as a catalogue, from its metadata alone; what the metadata claims is checked against the files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from reshard_service.catalogue import (
    Catalogue,
    Chunks,
    FileEntry,
    Int64s,
    Notice,
    Storing,
    Tensor,
)
from reshard_service.errors import CheckpointIncomplete, NotACheckpoint, SourceCorrupt, UnsupportedSource
from reshard_service.formats.dcp import geometry, naming
from reshard_service.formats.dcp.joining import join_metadata
from reshard_service.formats.dcp.metadata import DcpMetadata, read_metadata_file
from reshard_service.formats.side_files import side_file_names
from reshard_service.formats.strict_json import paused_gc
from reshard_service.storage.base import Storage, contained_path

if TYPE_CHECKING:
    from reshard_service.formats.options import OpenOptions

METADATA_NAME = ".metadata"
_PER_RANK = re.compile(r"__(\d+)\.metadata\Z")
_DATA_FILE = re.compile(r"__(\d+)_\d+\.distcp\Z")
_STORING: dict[tuple[str, ...], Storing] = {(): Storing.TORCH_ITEM, ("stream.zstd/1",): Storing.ZSTD_ITEM}


def open_dcp(storage: Storage, options: OpenOptions) -> Catalogue:
    """The catalogue of the DCP folder at the storage's root, from ``.metadata`` or else every rank's own metadata.

    Nothing is unpickled but inert values; a million chunks take about 5 s and 1.2 GB, in a child process. Raises
    :class:`CheckpointIncomplete` for missing metadata, ranks or files, :class:`UnsafeSource`, :class:`SourceCorrupt`
    and :class:`UnsupportedSource` for what the metadata says, :class:`GeometryWrong` where stored sizes contradict it
    (see ``options.repair``), :class:`AmbiguousSource` if nothing tells which keys are the model's.
    """
    with paused_gc():
        return _open(storage, options)


def _open(storage: Storage, options: OpenOptions) -> Catalogue:
    names = _metadata_names(storage, options)
    metadata = join_metadata([read_metadata_file(storage, name) for name in names])
    files = _files(storage, metadata, names[0])
    tensors, objects, naming_notices = naming.name_leaves(storage, metadata, options)
    table = _Table(metadata, tensors, files)
    table.check(names[0])
    chunks, repaired = geometry.true_chunks(storage, metadata, tensors, table.storing, options)
    return Catalogue(
        uri=storage.uri,
        storage=storage,
        format="dcp",
        tensors=tensors,
        chunks=_without_empty_shards(chunks, tensors),
        files=files,
        objects=objects,
        producer=options.producer or naming.guess_producer(storage, metadata),
        metadata_digest=metadata.digest,
        metadata_bytes=metadata.bytes,
        side_files=side_file_names(storage),
        notices=(*naming_notices, *repaired, *_notices(storage, metadata, files)),
        world=_world(files) if names == [METADATA_NAME] else len(names),
    )


def _metadata_names(storage: Storage, options: OpenOptions) -> list[str]:
    if storage.stat(METADATA_NAME) is not None:
        return [METADATA_NAME]
    entries = [entry.name for entry in storage.list_dir() if not entry.is_dir]
    ranks = sorted(int(found[1]) for name in entries if (found := _PER_RANK.match(name)))
    if not ranks:
        if ".metadata.tmp" in entries or any(name.endswith(".distcp") for name in entries):
            raise CheckpointIncomplete(
                f"{storage.uri!r} has DCP data files but no .metadata, which is written last",
                hint="the save has not finished: wait for it (--wait-complete), or take an earlier step",
            )
        raise NotACheckpoint(f"{storage.uri!r} is no DCP folder: it has no .metadata")
    world = max(ranks[-1] + 1, options.world or 0)
    missing = sorted(set(range(world)) - set(ranks)) if world <= 1 << 20 else [ranks[-1] - 1]
    if missing:
        raise CheckpointIncomplete(
            f"{storage.uri!r} has the metadata of {len(ranks)} of {world} ranks; missing: "
            f"{', '.join(f'__{rank}.metadata' for rank in missing[:5])}{' …' if len(missing) > 5 else ''}",
            file=f"__{missing[0]}.metadata",
            hint="each rank described only what it wrote; copy the missing files, or save again",
        )
    return [f"__{rank}.metadata" for rank in ranks]


def _files(storage: Storage, metadata: DcpMetadata, named_in: str) -> tuple[FileEntry, ...]:
    found: list[FileEntry] = []
    missing: list[str] = []
    for name in metadata.files:
        status = storage.stat(contained_path(name, named_in=named_in))
        if status is None or status.is_dir:
            missing.append(name)
        else:
            found.append(FileEntry(name, status.bytes, status.identity))
    if missing:
        raise CheckpointIncomplete(
            f"{named_in!r} names {len(metadata.files)} data files, of which {len(missing)} are not there, such as "
            f"{missing[0]!r}",
            file=missing[0],
            hint="a rank's file was not copied or not written",
        )
    return tuple(found)


@dataclass(frozen=True, slots=True)
class _Table:
    """Checks of all items against their files, on columns."""

    metadata: DcpMetadata
    tensors: tuple[Tensor, ...]
    files: tuple[FileEntry, ...]

    @property
    def storing(self) -> Int64s:
        """The ``Storing`` of each row; refuses transforms we don't know, by name."""
        return self._kinds()[self.metadata.transforms]

    def _kinds(self) -> Int64s:
        kinds = np.full(len(self.metadata.transform_lists), -1, dtype=np.int64)
        for number, names in enumerate(self.metadata.transform_lists):
            kinds[number] = _STORING.get(names, -1)
        used = np.flatnonzero(kinds[self.metadata.transforms] < 0) if (kinds < 0).any() else kinds[:0]
        if len(used):
            row = int(used[0])
            names = self.metadata.transform_lists[int(self.metadata.transforms[row])]
            raise UnsupportedSource(
                f"tensor {self.key_of(row)!r} is stored through the stream extension {' + '.join(names)}",
                tensor=self.key_of(row),
                hint="only stream.zstd/1 is built into torch; load it there with the extension and save it without",
            )
        return kinds

    def key_of(self, row: int) -> str:
        """The key of a chunk row, or of the object numbered behind the rows."""
        if row >= len(self.metadata.start):
            return self.metadata.objects[row - len(self.metadata.start)].key
        return self.tensors[int(np.searchsorted(self.metadata.first, row, side="right")) - 1].key

    def check(self, named_in: str) -> None:
        """Every item lies inside its file, and no two share a byte."""
        metadata, objects = self.metadata, self.metadata.objects
        file = np.concatenate([metadata.file, np.array([found.file for found in objects], dtype=np.int64)])
        start = np.concatenate([metadata.start, np.array([found.start for found in objects], dtype=np.int64)])
        length = np.concatenate([metadata.length, np.array([found.length for found in objects], dtype=np.int64)])
        if not len(start):
            return
        size = np.array([entry.bytes for entry in self.files], dtype=np.int64)[file]
        outside = np.flatnonzero((start < 0) | (length <= 0) | (start > size) | (length > size - start))
        if len(outside):
            row = int(outside[0])
            path = self.files[int(file[row])].path
            raise SourceCorrupt(
                f"{self.key_of(row)!r} is said to lie at byte {start[row]} for {length[row]} bytes of {path!r}, which "
                f"has {size[row]}",
                tensor=self.key_of(row),
                file=path,
                hint="the file is truncated, or belongs to another save; copy it again from its origin",
            )
        order = np.lexsort((start, file))
        file, start, length = file[order], start[order], length[order]
        shared = np.flatnonzero((file[1:] == file[:-1]) & (start[1:] < start[:-1] + length[:-1]))
        if len(shared):
            one, other = int(order[shared[0]]), int(order[shared[0] + 1])
            path = self.files[int(file[shared[0]])].path
            raise SourceCorrupt(
                f"{named_in!r} puts {self.key_of(one)!r} and {self.key_of(other)!r} on the same bytes of {path!r}",
                tensor=self.key_of(other),
                file=path,
                hint="the metadata is damaged or does not belong to these files",
            )


def _without_empty_shards(chunks: Chunks, tensors: Sequence[Tensor]) -> Chunks:
    """Drop rows that hold nothing; an empty tensor keeps its first."""
    keep = np.all(chunks.sizes > 0, axis=1, keepdims=True)[:, 0]
    empty = [index for index, tensor in enumerate(tensors) if 0 in tensor.shape]
    rows = chunks.first[empty]
    keep[rows[rows < chunks.first[np.array(empty, dtype=np.int64) + 1]]] = True
    if keep.all():
        return chunks
    counts = np.bincount(chunks.tensor_of_row()[keep], minlength=len(tensors))
    return Chunks(
        first=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        offsets=chunks.offsets[keep],
        sizes=chunks.sizes[keep],
        file=chunks.file[keep],
        start=chunks.start[keep],
        length=chunks.length[keep],
        storing=chunks.storing[keep],
    )


def _notices(storage: Storage, metadata: DcpMetadata, files: Sequence[FileEntry]) -> list[Notice]:
    named = {entry.path for entry in files}
    found = [
        Notice("files_ignored", "no tensor or object lies in this file: it may be left from another save", entry.name)
        for entry in storage.list_dir()
        if not entry.is_dir and entry.name.endswith(".distcp") and entry.name not in named
    ]
    if metadata.version is not None and not metadata.version.startswith("1."):
        found.append(Notice("metadata_version", f"metadata version {metadata.version!r} is newer than what we know"))
    if metadata.other_fields:
        found.append(
            Notice("metadata_fields", f"fields of another producer are not carried: {', '.join(metadata.other_fields)}")
        )
    return found


def _world(files: Sequence[FileEntry]) -> int | None:
    """One more than the highest rank that wrote a file; a rank that held nothing of its own leaves no trace."""
    ranks = [int(found[1]) for entry in files if (found := _DATA_FILE.match(entry.path))]
    return max(ranks) + 1 if ranks and len(ranks) == len(files) else None
