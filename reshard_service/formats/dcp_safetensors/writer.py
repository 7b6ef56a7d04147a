"""A selection as the ``shard-*-model-*`` folder that torch's HuggingFaceStorageReader and transformers load."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from reshard_service.catalogue import Int64s, Notice, build_chunks
from reshard_service.formats.dcp_safetensors.names import shard_name, sharding_metadata
from reshard_service.formats.options import WriteOptions
from reshard_service.formats.safetensors.header import HeaderEntry, build_header
from reshard_service.formats.safetensors.writer import aligned_order, check_names
from reshard_service.formats.selected import ownership_items
from reshard_service.formats.strict_json import paused_gc
from reshard_service.formats.target import Design, Literal, OutputFile, Selection

if TYPE_CHECKING:
    from reshard_service.layouts.layout import Layout

_NOT_READ_BY_TORCH = ("F8_E8M0", "F4", "F6_E2M3", "F6_E3M2")
"""``safetensors.torch._getdtype`` (0.8) knows no such type, so HuggingFaceStorageReader fails on a file with one."""


@paused_gc()
def design_dcp_safetensors(selection: Selection, layout: Layout | None, options: WriteOptions) -> Design:
    """Each rank's chunks in ``shard-<rank + 1>-model-00001-of-00001.safetensors``; replicated chunks once.

    Without a layout one rank holds everything. A name can stand in a file once: a rank that owns several chunks of one
    tensor gets as many files, and then every rank does. Ranks that own nothing get a file too, so that a missing one
    shows as a gap. ``options.max_shard_bytes`` does not apply: torch writes one file a rank.
    """
    del options
    check_names(selection.tensors)
    world, tensor_of, offsets, sizes, owner = _owned(selection, layout)
    part = _occurrence(owner, tensor_of)
    files = int(part.max(initial=0)) + 1
    paths = [shard_name(rank, file + 1, files) for rank in range(world) for file in range(files)]
    file_of = owner * files + part
    members: list[list[int]] = [[] for _ in paths]
    for row, file in enumerate(file_of.tolist()):
        members[file].append(row)
    itemsizes = np.array([tensor.dtype.itemsize for tensor in selection.tensors], dtype=np.int64)
    lengths: Int64s = sizes.prod(axis=1) * itemsizes[tensor_of]
    starts = np.zeros(len(tensor_of), dtype=np.int64)
    dims = [len(tensor.shape) for tensor in selection.tensors]
    begins = [tuple(row[: dims[t]]) for t, row in zip(tensor_of.tolist(), offsets.tolist(), strict=True)]
    shapes = [tuple(row[: dims[t]]) for t, row in zip(tensor_of.tolist(), sizes.tolist(), strict=True)]
    literals: list[Literal] = []
    outputs: list[OutputFile] = []
    for file, rows in enumerate(members):
        extents = list(zip(lengths[rows].tolist(), itemsizes[tensor_of[rows]].tolist(), strict=True))
        at = 0
        entries: list[HeaderEntry] = []
        saved: dict[str, tuple[int, ...]] = {}
        ordered = aligned_order(rows, extents)
        for row, nbytes in zip(ordered, lengths[ordered].tolist(), strict=True):
            tensor = selection.tensors[int(tensor_of[row])]
            entries.append(HeaderEntry(tensor.key, tensor.dtype, shapes[row], at, at + nbytes))
            saved[tensor.key] = begins[row]
            starts[row] = at
            at += nbytes
        header = build_header(entries, sharding_metadata(saved), file=paths[file])
        starts[ordered] += len(header)
        literals.append(Literal(file, 0, header))
        outputs.append(OutputFile(paths[file], len(header) + at))
    odd = sorted({tensor.dtype.name for tensor in selection.tensors} & set(_NOT_READ_BY_TORCH))
    return Design(
        format="dcp-safetensors",
        tensors=selection.tensors,
        sources=selection.sources,
        chunks=build_chunks(
            len(selection.tensors),
            tensor_of,
            offsets=begins,
            sizes=shapes,
            file=file_of.tolist(),
            start=starts.tolist(),
            length=lengths.tolist(),
        ),
        files=tuple(outputs),
        literals=tuple(literals),
        world=world,
        left_out=tuple(entry.key for entry in selection.objects),
        notices=(Notice("torch_cannot_read", f"torch's HuggingFaceStorageReader knows no {', '.join(odd)}"),)
        if odd
        else (),
    )


def _owned(selection: Selection, layout: Layout | None) -> tuple[int, Int64s, Int64s, Int64s, Int64s]:
    """World, and per chunk its tensor, offsets, sizes and owning rank, in selection order."""
    if layout is not None:
        from reshard_service.layouts.ownership import own_chunks

        owned = own_chunks(layout, ownership_items(selection))
        count = np.diff(owned.first)
        tensor_of = np.repeat(np.arange(len(count), dtype=np.int64), count)
        return layout.world, tensor_of, owned.offsets, owned.sizes, np.asarray(owned.owner, dtype=np.int64)
    rank = max((len(tensor.shape) for tensor in selection.tensors), default=0)
    sizes = np.ones((len(selection.tensors), rank), dtype=np.int64)
    for row, tensor in enumerate(selection.tensors):
        sizes[row, : len(tensor.shape)] = tensor.shape
    tensor_of = np.arange(len(selection.tensors), dtype=np.int64)
    return 1, tensor_of, np.zeros_like(sizes), sizes, np.zeros(len(tensor_of), dtype=np.int64)


def _occurrence(owner: Int64s, tensor: Int64s) -> Int64s:
    """For each chunk how many chunks of the same tensor its rank owns before it."""
    if not len(owner):
        return np.zeros(0, dtype=np.int64)
    order = np.lexsort((np.arange(len(owner)), tensor, owner))
    new = np.ones(len(owner), dtype=bool)
    new[1:] = (owner[order][1:] != owner[order][:-1]) | (tensor[order][1:] != tensor[order][:-1])
    position = np.arange(len(owner), dtype=np.int64)
    result = np.empty(len(owner), dtype=np.int64)
    result[order] = position - np.maximum.accumulate(np.where(new, position, 0))
    return result
