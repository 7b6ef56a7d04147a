"""A slow, plain engine for tests: whole tensors in memory, one numpy assignment a rectangle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from reshard_service.catalogue import Catalogue, Chunks, Storing
from reshard_service.formats.target import Design, Selection

Bytes = NDArray[np.uint8]


def select(catalogue: Catalogue, names: Sequence[str] | None = None) -> Selection:
    """All tensors of a catalogue, or those with these keys, under their own names."""
    chosen = [i for i, tensor in enumerate(catalogue.tensors) if names is None or tensor.key in names]
    return Selection(
        catalogue, tuple(catalogue.tensors[i] for i in chosen), np.array(chosen, dtype=np.int64), catalogue.objects
    )


def tensor_bytes(catalogue: Catalogue, index: int) -> Bytes:
    """A tensor's bytes, shape ``[*shape, itemsize]``; asserts that its chunks cover it."""
    tensor = catalogue.tensors[index]
    whole = np.zeros((*tensor.shape, tensor.dtype.itemsize), dtype=np.uint8)
    covered = np.zeros(tensor.shape, dtype=bool)
    chunks = catalogue.chunks
    for row in range(*chunks.rows(index).indices(len(chunks))):
        assert chunks.storing[row] == Storing.RAW
        path = catalogue.files[int(chunks.file[row])].path
        box, inner, stored = _box(chunks, row, len(tensor.shape))
        count = int(np.prod(stored, dtype=np.int64)) * tensor.dtype.itemsize
        data = catalogue.storage.read_bytes(path, int(chunks.start[row]), count)
        array = np.frombuffer(data, dtype=np.uint8).reshape(*stored, tensor.dtype.itemsize)
        whole[box] = array[inner]
        covered[box] = True
    assert covered.all(), f"{tensor.key} is not covered"
    return whole


def materialise(design: Design, selection: Selection, folder: Path) -> None:
    """Write every file of a design."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [bytearray(file.bytes) for file in design.files]
    for literal in design.literals:
        files[literal.file][literal.start : literal.start + len(literal.data)] = literal.data
    chunks = design.chunks
    for index, tensor in enumerate(design.tensors):
        whole = tensor_bytes(selection.source, int(design.sources[index]))
        for row in range(*chunks.rows(index).indices(len(chunks))):
            box, inner, stored = _box(chunks, row, len(tensor.shape))
            count = int(np.prod(stored, dtype=np.int64)) * tensor.dtype.itemsize
            start = int(chunks.start[row])
            target = np.frombuffer(files[int(chunks.file[row])], dtype=np.uint8)[start : start + count]
            target.reshape(*stored, tensor.dtype.itemsize)[inner] = whole[box]
    for file, content in zip(design.files, files, strict=True):
        (folder / file.path).write_bytes(content)
    for closing in design.closing:
        (folder / closing.path).write_bytes(closing.make())


def _box(chunks: Chunks, row: int, dims: int) -> tuple[tuple[slice, ...], tuple[slice, ...], tuple[int, ...]]:
    """Slices of a row's rectangle in the tensor and in its stored array, and the array's sizes."""
    offsets, sizes = chunks.offsets[row, :dims].tolist(), chunks.sizes[row, :dims].tolist()
    local = [0] * dims if chunks.local is None else chunks.local[row, :dims].tolist()
    stored = sizes if chunks.stored is None else chunks.stored[row, :dims].tolist()
    return (
        tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True)),
        tuple(slice(place, place + size) for place, size in zip(local, sizes, strict=True)),
        tuple(stored),
    )
