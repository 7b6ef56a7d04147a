"""The design of a DCP target: which chunk lies as which item in which ``__{rank}_0.distcp``, and ``.metadata``.

With a layout, a chunk lies in the file of the rank that owns it, in the order of the selection, so that a rank that
resumes reads its own file from front to back; a chunk that several ranks hold is stored once (decision 13). Without
one, a DCP source's own chunks and files are kept; any other source becomes the checkpoint of one rank (decision 23).

Byte objects lie behind the tensors of their file: their lengths are odd, and in front they would move every payload
off its alignment. torch finds items by offset, so their order means nothing to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from reshard_service.catalogue import Chunks, Int32s, Int64s, Section, Storing, Tensor
from reshard_service.errors import CannotHold, NameCollision
from reshard_service.formats.dcp.framing import TorchItemFraming
from reshard_service.formats.dcp.metadata_pickle import metadata_pickle
from reshard_service.formats.options import WriteOptions
from reshard_service.formats.target import ClosingFile, Design, ObjectCopy, OutputFile, Selection
from reshard_service.layouts.layout import Layout
from reshard_service.layouts.ownership import own_chunks


@dataclass(frozen=True, slots=True)
class _Cut:
    """How the tensors are cut, and in which file each rectangle and each object goes."""

    first: Int64s
    offsets: Int64s
    sizes: Int64s
    file: Int32s
    object_file: tuple[int, ...]
    paths: tuple[str, ...]
    world: int | None


def design_dcp(selection: Selection, layout: Layout | None, options: WriteOptions) -> Design:
    """Where every byte of the DCP checkpoint will lie. ``options`` has nothing that concerns this format.

    Raises :class:`CannotHold` for a type torch does not have, :class:`NameCollision` for two leaves of one key.
    """
    _check(selection)
    if layout is not None:
        cut = _cut_by_layout(selection, layout)
    elif selection.source.format == "dcp":
        cut = _cut_as_source(selection)
    else:
        cut = _cut_for_one_rank(selection)
    return _lay_out(selection, cut)


def file_of_rank(rank: int) -> str:
    """The name torch gives a rank's first file (``filesystem.py``: ``__{rank}_{n}.distcp``)."""
    return f"__{rank}_0.distcp"


def _check(selection: Selection) -> None:
    seen: set[str] = set()
    for key in (*(tensor.key for tensor in selection.tensors), *(one.key for one in selection.objects)):
        if key in seen:
            raise NameCollision(f"two leaves would have the key {key!r} in the target", tensor=key)
        seen.add(key)
    for tensor in selection.tensors:
        if tensor.dtype.torch is None:
            raise CannotHold(
                f"tensor {tensor.key!r} is {tensor.dtype.name}, which torch has no element type for",
                tensor=tensor.key,
                hint="write safetensors, or exclude it",
            )


def _cut_by_layout(selection: Selection, layout: Layout) -> _Cut:
    shapes = parameter_shapes(selection)
    owned = own_chunks(
        layout,
        [
            (tensor.identity.fqn, tensor.shape, shape, tensor.dtype.itemsize)
            for tensor, shape in zip(selection.tensors, shapes, strict=True)
        ],
    )
    used = np.zeros(layout.world, dtype=bool)
    used[owned.owner] = True
    used[0] |= bool(selection.objects)
    ranks = np.flatnonzero(used)
    file_of = np.cumsum(used) - 1
    return _Cut(
        owned.first,
        owned.offsets,
        owned.sizes,
        file_of[owned.owner].astype(np.int32),
        (0,) * len(selection.objects),
        tuple(file_of_rank(rank) for rank in ranks.tolist()),
        layout.world,
    )


def parameter_shapes(selection: Selection) -> list[tuple[int, ...] | None]:
    """For each optimizer tensor the shape of its parameter: its rule is followed only where the shapes are equal.

    The parameter is looked for in the selection and in the rest of the source; where only the optimizer is there, its
    largest slot has the parameter's shape. None for what is no optimizer slot.
    """
    model: dict[str, tuple[int, ...]] = {}
    slots: dict[str, tuple[int, ...]] = {}
    for tensor in (*selection.source.tensors, *selection.tensors):
        fqn = tensor.identity.fqn
        if tensor.identity.section is Section.MODEL:
            model[fqn] = tensor.shape
        elif tensor.identity.section is Section.OPTIMIZER:
            slots[fqn] = max(slots.get(fqn, ()), tensor.shape, key=lambda shape: (prod(shape), len(shape)))
    return [
        model.get(tensor.identity.fqn, slots[tensor.identity.fqn])
        if tensor.identity.section is Section.OPTIMIZER
        else None
        for tensor in selection.tensors
    ]


def _cut_as_source(selection: Selection) -> _Cut:
    source = selection.source
    chunks = source.chunks
    counts = np.diff(chunks.first)[selection.sources]
    first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    within = np.arange(first[-1], dtype=np.int64) - np.repeat(first[:-1], counts)
    rows = np.repeat(chunks.first[selection.sources], counts) + within
    source_file = chunks.file[rows]
    used = np.zeros(len(source.files), dtype=bool)
    used[source_file] = True
    used[[one.file for one in selection.objects]] = True
    file_of = np.cumsum(used) - 1
    return _Cut(
        first,
        chunks.offsets[rows],
        chunks.sizes[rows],
        file_of[source_file].astype(np.int32),
        tuple(int(file_of[one.file]) for one in selection.objects),
        tuple(source.files[i].path for i in np.flatnonzero(used).tolist()),
        source.world,
    )


def _cut_for_one_rank(selection: Selection) -> _Cut:
    count = len(selection.tensors)
    rank = max((len(tensor.shape) for tensor in selection.tensors), default=0)
    sizes = np.ones((count, rank), dtype=np.int64)
    for i, tensor in enumerate(selection.tensors):
        sizes[i, : len(tensor.shape)] = tensor.shape
    paths = (file_of_rank(0),) if count or selection.objects else ()
    return _Cut(
        np.arange(count + 1, dtype=np.int64),
        np.zeros((count, rank), dtype=np.int64),
        sizes,
        np.zeros(count, dtype=np.int32),
        (0,) * len(selection.objects),
        paths,
        1,
    )


def _lay_out(selection: Selection, cut: _Cut) -> Design:
    framing = TorchItemFraming()
    length = _item_lengths(framing, selection.tensors, cut)
    start, file_bytes = _one_behind_the_other(cut.file, length, len(cut.paths))
    objects = []
    for source, file in zip(selection.objects, cut.object_file, strict=True):
        objects.append(ObjectCopy(source, file, file_bytes[file]))
        file_bytes[file] += source.length
    chunks = Chunks(
        first=cut.first,
        offsets=cut.offsets,
        sizes=cut.sizes,
        file=cut.file,
        start=start,
        length=length,
        storing=np.full(len(start), int(Storing.TORCH_ITEM), dtype=np.uint8),
    )
    placed = tuple(objects)

    def metadata() -> bytes:
        return metadata_pickle(selection.tensors, chunks, cut.paths, placed)

    return Design(
        format="dcp",
        tensors=selection.tensors,
        sources=selection.sources,
        chunks=chunks,
        files=tuple(OutputFile(path, size) for path, size in zip(cut.paths, file_bytes, strict=True)),
        objects=placed,
        closing=(ClosingFile(".metadata", metadata),),
        framing=framing,
        world=cut.world,
    )


def _item_lengths(framing: TorchItemFraming, tensors: Sequence[Tensor], cut: _Cut) -> Int64s:
    """Bytes of the item of each chunk."""
    kinds: dict[tuple[str, int], int] = {}
    kind_of_tensor = np.array(
        [kinds.setdefault((tensor.dtype.name, len(tensor.shape)), len(kinds)) for tensor in tensors], dtype=np.int64
    )
    dtypes = {tensor.dtype.name: tensor.dtype for tensor in tensors}
    kind_of_row = np.repeat(kind_of_tensor, np.diff(cut.first))
    volume = cut.sizes.prod(axis=1)
    length = np.zeros(len(volume), dtype=np.int64)
    for (name, rank), kind in kinds.items():
        rows = np.flatnonzero(kind_of_row == kind)
        _, length[rows] = framing.item_lengths(dtypes[name], rank, volume[rows] * dtypes[name].itemsize)
    return length


def _one_behind_the_other(file: Int32s, length: Int64s, files: int) -> tuple[Int64s, list[int]]:
    """Start of each item when the items of a file follow each other in row order; and the bytes each file then has."""
    order = np.argsort(file, kind="stable")
    ends = np.cumsum(length[order])
    per_file = np.bincount(file, weights=None, minlength=files)
    before_file = np.concatenate([[0], ends])[np.concatenate([[0], np.cumsum(per_file)])].astype(np.int64)
    start = np.empty(len(length), dtype=np.int64)
    start[order] = ends - length[order] - np.repeat(before_file[:-1], per_file)
    return start, np.diff(before_file).tolist()
