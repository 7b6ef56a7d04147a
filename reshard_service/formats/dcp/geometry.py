"""The chunk geometry that was really stored, where the recorded one is wrong.

torch 2.13 computes a shard's offset and size for its metadata apart from the split it really makes, and for some uneven
dims under FSDP x TP the two differ (``tensor/_utils.py``; dim 7 over dp 3 and tp 2: rank 4 holds nothing and claims a
row, rank 5 holds a row and claims none). The save succeeds; torch's own load of it fails. What gives it away is that an
item holds more or less than its chunk claims. Every item is compared with its own ``data.pkl`` when it is copied; here
those whose length is out of line are looked at beforehand, so that nothing starts that can't succeed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from reshard_service.catalogue import Chunks, Int64s, Notice, Section, Storing, Tensor
from reshard_service.errors import GeometryWrong, LayoutInvalid, UsageError
from reshard_service.formats.dcp.item import HEAD_BYTES, ItemReader
from reshard_service.formats.dcp.metadata import DcpMetadata
from reshard_service.layouts.holdings import Holdings, View
from reshard_service.storage.base import ByteReader, Storage

if TYPE_CHECKING:
    from reshard_service.formats.options import OpenOptions
    from reshard_service.layouts.layout import Layout

_SLACK_BYTES = 192
"""How much the zip around a payload varies between tensors of one writer: numbers in pickles, padding to 64 bytes."""

_MOST_LOOKS_LOCAL, _MOST_LOOKS_REMOTE = 4096, 64
_RANK_FILE = re.compile(r"(?:.*/)?__(\d+)_\d+\.distcp\Z")


def true_chunks(
    storage: Storage, metadata: DcpMetadata, tensors: Sequence[Tensor], storing: Int64s, options: OpenOptions
) -> tuple[Chunks, list[Notice]]:
    """The chunk table of the metadata, repaired if ``options.repair`` asks for it and it can be proved right.

    Raises :class:`GeometryWrong` naming tensor and file otherwise. Reads the heads of suspicious items only.
    """
    chunks = Chunks(
        first=metadata.first,
        offsets=metadata.offsets,
        sizes=metadata.sizes,
        file=metadata.file,
        start=metadata.start,
        length=metadata.length,
        storing=storing.astype(np.uint8),
    )
    items = _Items(storage, metadata, tensors)
    notices: list[Notice] = []
    try:
        if options.repair:
            if options.layout is None:
                raise UsageError("--repair needs the layout that wrote the checkpoint: --source-layout SPEC")
            chunks, notices = _repaired(chunks, tensors, items, options.layout)
        rows = _suspicious(chunks, tensors)
        for row in rows[: _MOST_LOOKS_LOCAL if storage.is_local else _MOST_LOOKS_REMOTE].tolist():
            items.require(row, chunks)
        return chunks, notices
    finally:
        items.close()


def _suspicious(chunks: Chunks, tensors: Sequence[Tensor]) -> Int64s:
    """Rows whose item is longer or shorter than its payload and the usual zip around it; the worst first."""
    itemsizes = np.array([tensor.dtype.itemsize for tensor in tensors], dtype=np.int64)
    around = chunks.length - chunks.nbytes_of_rows(itemsizes)
    plain = chunks.storing == Storing.TORCH_ITEM
    if not plain.any():
        return np.empty(0, dtype=np.int64)
    deviation = np.where(plain, np.abs(around - int(np.median(around[plain]))), 0)
    deviation[plain & (around < 0)] = np.iinfo(np.int64).max
    rows = np.flatnonzero(deviation > _SLACK_BYTES)
    return rows[np.argsort(-deviation[rows], kind="stable")]


@dataclass(slots=True)
class _Items:
    """Looks into stored items."""

    storage: Storage
    metadata: DcpMetadata
    tensors: Sequence[Tensor]
    _reader: ItemReader = field(default_factory=ItemReader)
    _open: dict[int, ByteReader] = field(default_factory=dict)

    def tensor_of(self, row: int) -> Tensor:
        return self.tensors[int(np.searchsorted(self.metadata.first, row, side="right")) - 1]

    def file_of(self, row: int) -> str:
        return self.metadata.files[int(self.metadata.file[row])]

    def ranks(self) -> Int64s:
        """The rank that wrote each file, -1 where the name does not tell."""
        names = (_RANK_FILE.match(name) for name in self.metadata.files)
        return np.array([-1 if name is None else min(int(name[1]), 1 << 40) for name in names], dtype=np.int64)

    def agrees(self, row: int, chunks: Chunks) -> bool:
        """Whether the item of ``row`` holds an array of the row's sizes."""
        try:
            self.require(row, chunks)
        except GeometryWrong:
            return False
        return True

    def require(self, row: int, chunks: Chunks) -> None:
        """Raise :class:`GeometryWrong` unless the item of ``row`` holds an array of the row's sizes."""
        tensor, number = self.tensor_of(row), int(self.metadata.file[row])
        dims = len(tensor.shape)
        offsets, sizes = chunks.offsets[row, :dims].tolist(), chunks.sizes[row, :dims].tolist()
        file, length = self.file_of(row), int(self.metadata.length[row])
        if number not in self._open:
            if len(self._open) > 64:
                self.close()
            self._open[number] = self.storage.open(file)
        head = bytearray(min(HEAD_BYTES, length))
        self._open[number].read_into(int(self.metadata.start[row]), memoryview(head))
        try:
            self._reader.locate(
                memoryview(head),
                tensor.dtype,
                tuple(sizes),
                item_bytes=length,
                key=tensor.key,
                file=file,
            )
        except GeometryWrong as error:
            raise GeometryWrong(
                f"tensor {tensor.key!r} in {file!r}: a chunk of sizes {sizes} is expected at "
                f"{offsets}, but the stored item is not that ({error.message})",
                tensor=tensor.key,
                file=file,
                hint="torch 2.13 writes this for uneven dims under FSDP x TP; --repair --source-layout SPEC recovers "
                "it where the layout that wrote it explains what is stored",
            ) from None

    def close(self) -> None:
        for reader in self._open.values():
            reader.close()
        self._open.clear()


def _repaired(chunks: Chunks, tensors: Sequence[Tensor], items: _Items, layout: Layout) -> tuple[Chunks, list[Notice]]:
    """Chunks as the layout says they were split, for every tensor whose items contradict the metadata."""
    repaired = replace(chunks, offsets=chunks.offsets.copy(), sizes=chunks.sizes.copy())
    shapes = {tensor.identity.fqn: tensor.shape for tensor in tensors if tensor.identity.section is Section.MODEL}
    ranks = items.ranks()
    notices: list[Notice] = []
    for index, tensor in enumerate(tensors):
        rows = chunks.rows(index)
        if 0 in tensor.shape or (chunks.storing[rows] != Storing.TORCH_ITEM).any():
            continue
        held = _holdings(layout, tensor, shapes)
        if held is None:
            continue
        true_offsets, true_sizes = _by_rank(held, ranks[chunks.file[rows]])
        dims = len(tensor.shape)
        recorded_offsets, recorded_sizes = chunks.offsets[rows, :dims], chunks.sizes[rows, :dims]
        nothing = (recorded_sizes == 0).any(axis=1) & (true_sizes == 0).any(axis=1)
        same = (recorded_offsets == true_offsets).all(axis=1) & (recorded_sizes == true_sizes).all(axis=1)
        if (same | nothing).all() or all(items.agrees(row, chunks) for row in range(rows.start, rows.stop)):
            continue
        _repair(tensor, rows, (true_offsets, true_sizes), held, items, repaired)
        notices.append(Notice("geometry_repaired", "chunk geometry recomputed from the layout", tensor.key))
    return repaired, notices


def _by_rank(held: Holdings, ranks: Int64s) -> tuple[Int64s, Int64s]:
    """Offsets and sizes that each of ``ranks`` holds; of one that holds nothing, its local shape at no offset.

    A rank the layout does not have (or -1, no rank's file) gets sizes of -1, which agree with nothing.
    """
    dims = held.sizes.shape[1]
    world = len(held.local_shape)
    offsets = np.zeros((world + 1, dims), dtype=np.int64)
    sizes = np.concatenate([held.local_shape, np.full((1, dims), -1, dtype=np.int64)])
    offsets[held.rank], sizes[held.rank] = held.offsets, held.sizes
    at = np.where((ranks >= 0) & (ranks < world), ranks, world)
    return offsets[at], sizes[at]


def _holdings(layout: Layout, tensor: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> Holdings | None:
    """Who holds what of a tensor; None where the layout can't say, or splits a rank's part into several rectangles."""
    identity = tensor.identity
    parameter = shapes.get(identity.fqn) if identity.slot is not None else None
    try:
        held = layout.holdings(identity.fqn, tensor.shape, View.CHECKPOINT, parameter)
    except LayoutInvalid:
        return None
    return held if len(np.unique(held.rank)) == len(held.rank) else None


def _distinct(offsets: Int64s, sizes: Int64s) -> Int64s:
    """The different rectangles that hold something, sorted."""
    found: Int64s = np.unique(np.concatenate([offsets, sizes], axis=1)[(sizes > 0).all(axis=1)], axis=0)
    return found


def _repair(
    tensor: Tensor, rows: slice, truth: tuple[Int64s, Int64s], held: Holdings, items: _Items, chunks: Chunks
) -> None:
    """Give each row its rank's rectangle, if its item holds exactly that and in the end nothing lacks.

    Rows whose item is what the metadata says must stay where they are, or else this layout may not be the one that
    wrote them. (Of 43 wrong cases, dims up to 40 over 2-5 x 2-4 ranks, torch misplaces a row of the right size in 2:
    those are refused too.)
    """
    dims = len(tensor.shape)
    for row, offsets, sizes in zip(range(rows.start, rows.stop), *truth, strict=True):
        file = items.file_of(row)
        moved = (offsets != chunks.offsets[row, :dims]).any() and (sizes > 0).all()
        if sizes.min(initial=0) < 0 or (moved and items.agrees(row, chunks)):
            raise GeometryWrong(
                f"tensor {tensor.key!r} can't be repaired: the layout does not explain what {file!r} holds",
                tensor=tensor.key,
                file=file,
                hint="give the layout that wrote the checkpoint as --source-layout",
            )
        chunks.offsets[row, :dims], chunks.sizes[row, :dims] = offsets, sizes
        items.require(row, chunks)
    wanted = _distinct(held.offsets, held.sizes)
    found = _distinct(chunks.offsets[rows, :dims], chunks.sizes[rows, :dims])
    if not np.array_equal(found, wanted):
        raise GeometryWrong(
            f"tensor {tensor.key!r} can't be repaired: {len(wanted) - len(found)} of the {len(wanted)} parts that the "
            "layout's ranks held are not stored",
            tensor=tensor.key,
            hint="a rank's part was dropped when it was saved; only the training run still has it",
        )
