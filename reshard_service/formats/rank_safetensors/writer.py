"""A selection as rank-local files: what each rank holds in memory, replicas repeated."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from reshard_service.catalogue import Int32s, Int64s, Tensor
from reshard_service.errors import UsageError
from reshard_service.formats.options import WriteOptions
from reshard_service.formats.rank_safetensors.layout_file import LAYOUT_NAME, LayoutFile, rank_file_name
from reshard_service.formats.rank_safetensors.local_chunks import local_chunks
from reshard_service.formats.safetensors.header import HeaderEntry, build_header
from reshard_service.formats.safetensors.writer import aligned_order, check_names
from reshard_service.formats.selected import OwnershipItem, ownership_items
from reshard_service.formats.strict_json import paused_gc
from reshard_service.formats.target import ClosingFile, Design, Literal, OutputFile, Selection
from reshard_service.layouts.holdings import Holdings, View

if TYPE_CHECKING:
    from reshard_service.layouts.layout import Layout


@paused_gc()
def design_rank_safetensors(selection: Selection, layout: Layout | None, options: WriteOptions) -> Design:
    """``model-rank-{r}-part-{p}.safetensors`` for every rank, parts of at most ``max_shard_bytes`` payload.

    A rank's file holds its local tensor of every name, also of those it has no element of (a dim of 0). The layout file
    is written last. Raises :class:`UsageError` without a layout.
    """
    if layout is None:
        raise UsageError(
            "rank-local safetensors need a layout: which rank holds what",
            hint="give --layout, such as --layout tp=2 with --model for its rules",
        )
    check_names(selection.tensors)
    items = ownership_items(selection)
    held = [layout.holdings(fqn, shape, View.MEMORY, parameter_shape=parameter) for fqn, shape, parameter, _ in items]
    local_shapes = [_local_shapes(holdings) for holdings in held]
    files = _Files()
    starts = np.zeros((len(held), layout.world), dtype=np.int64)
    file_of = np.zeros((len(held), layout.world), dtype=np.int32)
    for rank in range(layout.world):
        files.add_rank(rank, selection.tensors, [shapes[rank] for shapes in local_shapes], options, starts, file_of)
    return Design(
        format="rank-safetensors",
        tensors=selection.tensors,
        sources=selection.sources,
        chunks=local_chunks(selection.tensors, held, starts, file_of),
        files=tuple(files.outputs),
        literals=tuple(files.literals),
        closing=(ClosingFile(LAYOUT_NAME, _layout_file(selection, layout, items).to_bytes),),
        world=layout.world,
        left_out=tuple(entry.key for entry in selection.objects),
    )


def _local_shapes(holdings: Holdings) -> list[tuple[int, ...]]:
    return [tuple(row) for row in holdings.local_shape.tolist()]


def _layout_file(selection: Selection, layout: Layout, items: list[OwnershipItem]) -> LayoutFile:
    shapes = {tensor.key: tensor.shape for tensor in selection.tensors}
    here = {tensor.identity.fqn for tensor in selection.tensors if tensor.identity.slot is None}
    parameters = {fqn: parameter for fqn, _, parameter, _ in items if parameter is not None and fqn not in here}
    return LayoutFile(layout, shapes, parameters)


@dataclass(slots=True)
class _Files:
    outputs: list[OutputFile] = field(default_factory=list)
    literals: list[Literal] = field(default_factory=list)

    def add_rank(
        self,
        rank: int,
        tensors: tuple[Tensor, ...],
        shapes: list[tuple[int, ...]],
        options: WriteOptions,
        starts: Int64s,
        file_of: Int32s,
    ) -> None:
        """Lay out one rank's files; fills column ``rank`` of ``starts`` and ``file_of``."""
        nbytes = [prod(shape) * tensor.dtype.itemsize for shape, tensor in zip(shapes, tensors, strict=True)]
        parts: list[list[int]] = [[]]
        payload = 0
        for i, size in enumerate(nbytes):
            if parts[-1] and payload + size > options.max_shard_bytes:
                parts.append([])
                payload = 0
            parts[-1].append(i)
            payload += size
        for part, members in enumerate(parts):
            path = rank_file_name(rank, part)
            ordered = aligned_order(members, [(nbytes[i], tensors[i].dtype.itemsize) for i in members])
            entries: list[HeaderEntry] = []
            at = 0
            for i in ordered:
                entries.append(HeaderEntry(tensors[i].key, tensors[i].dtype, shapes[i], at, at + nbytes[i]))
                starts[i, rank] = at
                at += nbytes[i]
            header = build_header(entries, file=path)
            starts[ordered, rank] += len(header)
            file_of[ordered, rank] = len(self.outputs)
            self.literals.append(Literal(len(self.outputs), 0, header))
            self.outputs.append(OutputFile(path, len(header) + at))
