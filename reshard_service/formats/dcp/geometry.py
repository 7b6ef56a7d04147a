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
            items.require(row, chunks.offsets[row], chunks.sizes[row])
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

    def require(self, row: int, offsets: Int64s, sizes: Int64s) -> None:
        """Raise :class:`GeometryWrong` unless the item of ``row`` holds an array of these sizes."""
        tensor, number = self.tensor_of(row), int(self.metadata.file[row])
        dims = len(tensor.shape)
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
                tuple(sizes[:dims].tolist()),
                item_bytes=length,
                key=tensor.key,
                file=file,
            )
        except GeometryWrong as error:
            raise GeometryWrong(
                f"tensor {tensor.key!r} in {file!r}: a chunk of sizes {sizes[:dims].tolist()} is expected at "
                f"{offsets[:dims].tolist()}, but the stored item is not that ({error.message})",
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
    """Chunks as the layout says they were split, for every tensor where that is not what the metadata says."""
    repaired = replace(chunks, offsets=chunks.offsets.copy(), sizes=chunks.sizes.copy())
    shapes = {tensor.identity.fqn: tensor.shape for tensor in tensors if tensor.identity.section is Section.MODEL}
    notices: list[Notice] = []
    for index, tensor in enumerate(tensors):
        rows = chunks.rows(index)
        if 0 in tensor.shape or (chunks.storing[rows] != Storing.TORCH_ITEM).any():
            continue
        held = _holdings(layout, tensor, shapes)
        if held is None or np.array_equal(
            _rectangles(repaired, rows, len(tensor.shape)), _distinct(held.offsets, held.sizes)
        ):
            continue
        _repair(tensor, rows, held, layout.world, items, repaired)
        notices.append(Notice("geometry_repaired", "chunk geometry recomputed from the layout", tensor.key))
    return repaired, notices


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


def _rectangles(chunks: Chunks, rows: slice, dims: int) -> Int64s:
    return _distinct(chunks.offsets[rows, :dims], chunks.sizes[rows, :dims])


def _repair(tensor: Tensor, rows: slice, held: Holdings, world: int, items: _Items, chunks: Chunks) -> None:
    """Give each row of the tensor its rank's rectangle, if its item holds exactly that and in the end nothing lacks."""
    dims = len(tensor.shape)
    row_of_rank = {rank: row for row, rank in enumerate(held.rank.tolist())}
    offsets, sizes = chunks.offsets, chunks.sizes
    for row in range(rows.start, rows.stop):
        file = items.file_of(row)
        named = _RANK_FILE.match(file)
        if named is None or int(named[1]) >= world:
            raise GeometryWrong(
                f"tensor {tensor.key!r} can't be repaired: {file!r} is no file of one of the layout's {world} ranks",
                tensor=tensor.key,
                file=file,
                hint="give the layout that wrote the checkpoint as --source-layout",
            )
        rank = int(named[1])
        at = row_of_rank.get(rank)
        if at is None:  # the rank holds nothing of it, whatever its chunk claims
            offsets[row, :dims], sizes[row, :dims] = 0, held.local_shape[rank]
        else:
            offsets[row, :dims], sizes[row, :dims] = held.offsets[at], held.sizes[at]
        items.require(row, offsets[row], sizes[row])
    truth = _distinct(held.offsets, held.sizes)
    found = _rectangles(chunks, rows, dims)
    if not np.array_equal(found, truth):
        raise GeometryWrong(
            f"tensor {tensor.key!r} can't be repaired: {len(truth) - len(found)} of the {len(truth)} parts that the "
            "layout's ranks held are not stored",
            tensor=tensor.key,
            hint="a rank's part was dropped when it was saved; only the training run still has it",
        )
