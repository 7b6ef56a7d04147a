"""The plan: everything that will be copied, proved complete, with its figures, before a byte moves."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import numpy as np
import xxhash

from reshard_service.catalogue import Catalogue, Chunks, Int64s, Notice
from reshard_service.errors import CoverageError
from reshard_service.formats.target import Design
from reshard_service.planning.batches import (
    Batch,
    batch_bytes,
    batches_by_file,
    batches_by_tensor,
    parts,
    split_tensor,
)
from reshard_service.planning.budget import PROCESS_BYTES, Budget, default_budget
from reshard_service.planning.coverage import tiling_fault, uncovered_target
from reshard_service.planning.intersect import Pattern, PatternCache


@dataclass(frozen=True, slots=True)
class WorkerShare:
    """What one worker reads and writes, payload bytes."""

    rank: int
    read_bytes: int
    write_bytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Copies from the source's chunks to the design's chunks. Nothing in it depends on who executes it."""

    source: Catalogue
    design: Design
    patterns: tuple[Pattern, ...] = field(repr=False)
    pattern_of: Int64s = field(repr=False)
    """For each tensor of the design the number of its pattern."""
    dims: int
    batches: tuple[Batch, ...] = field(repr=False)
    parts: tuple[tuple[Batch, ...], ...] = field(repr=False)
    problems: tuple[Notice, ...]
    digest: str
    """Identifies source metadata, design and options: the same plan always writes the same bytes."""
    read_bytes: int
    write_bytes: int
    peak_memory_bytes: int

    def shares(self) -> tuple[WorkerShare, ...]:
        return tuple(
            WorkerShare(
                rank,
                sum(batch.read_bytes for batch in part),
                sum(batch.write_bytes for batch in part),
            )
            for rank, part in enumerate(self.parts)
        )


def make_plan(
    source: Catalogue,
    design: Design,
    *,
    workers: int = 1,
    budget: Budget | None = None,
    in_order: bool = False,
    options_key: str = "",
) -> Plan:
    """Intersect, prove coverage, batch and balance. Faults of coverage are collected in ``problems``.

    ``in_order`` is for targets whose files must each be written front to back by one worker (object stores).
    ``options_key`` is whatever else decides the bytes of the target (casts, names), for the digest.
    """
    budget = budget or default_budget()
    cache = PatternCache(source.chunks, design.chunks)
    proof = _Proof(source, design)
    pattern_of = np.zeros(len(design.tensors), dtype=np.int64)
    read_of = np.zeros(len(design.tensors), dtype=np.int64)
    for t, s in enumerate(design.sources.tolist()):
        source_rows, target_rows = source.chunks.rows(s), design.chunks.rows(t)
        number = cache.pattern(source_rows, target_rows)
        pattern_of[t] = number
        proof.check(t, s, number, cache.patterns[number])
        read_of[t] = proof.elements(number, cache.patterns[number]) * source.tensors[s].dtype.itemsize
    write_of = _stored_bytes_of_tensors(design.chunks)
    largest = batch_bytes(int(max(read_of.sum(), write_of.sum())), max(workers, budget.threads))
    batches = _file_batches(source, design) if in_order else _tensor_batches(source, design, read_of, write_of, largest)
    objects = sum(copy.source.length for copy in design.objects)
    return Plan(
        source=source,
        design=design,
        patterns=tuple(cache.patterns),
        pattern_of=pattern_of,
        dims=cache.dims,
        batches=batches,
        parts=parts(batches, workers),
        problems=tuple(proof.problems),
        digest=_digest(source, design, options_key),
        read_bytes=int(read_of.sum()) + objects,
        write_bytes=design.data_bytes,
        peak_memory_bytes=PROCESS_BYTES
        + budget.buffer_bytes
        + _table_bytes(source.chunks)
        + _table_bytes(design.chunks),
    )


def require_sound(plan: Plan) -> None:
    """Raise the first problem of a plan, counting the others."""
    if not plan.problems:
        return
    first = plan.problems[0]
    more = f" (and {len(plan.problems) - 1} more problems)" if len(plan.problems) > 1 else ""
    raise CoverageError(
        f"tensor {first.name!r}: {first.reason}{more}",
        tensor=first.name,
        file=first.at,
        hint="a rank's file or part of one is missing, or the checkpoint was written wrong; `reshard plan` lists all",
    )


class _Proof:
    """Checks each tensor once per distinct geometry and shape."""

    def __init__(self, source: Catalogue, design: Design) -> None:
        self._source = source
        self._design = design
        self._faults: dict[tuple[int, tuple[int, ...]], str | None] = {}
        self._elements: dict[int, int] = {}
        self.problems: list[Notice] = []

    def check(self, t: int, s: int, number: int, pattern: Pattern) -> None:
        tensor, wanted = self._source.tensors[s], self._design.tensors[t]
        key = (number, tensor.shape)
        if key not in self._faults:
            self._faults[key] = self._fault(t, s, pattern)
        fault = self._faults[key]
        if fault is not None:
            self.problems.append(Notice("coverage", fault, name=tensor.key))
        if tensor.shape != wanted.shape:
            self.problems.append(
                Notice("shape", f"source shape {list(tensor.shape)} is not {list(wanted.shape)}", name=tensor.key)
            )

    def _fault(self, t: int, s: int, pattern: Pattern) -> str | None:
        rows = self._source.chunks.rows(s)
        fault = tiling_fault(
            self._source.tensors[s].shape, self._source.chunks.offsets[rows], self._source.chunks.sizes[rows]
        )
        if fault is not None:
            return fault
        wanted, chunks = self._design.chunks.rows(t), self._design.chunks
        target_sizes = chunks.sizes[wanted]
        fault = tiling_fault(self._design.tensors[t].shape, chunks.offsets[wanted], target_sizes)
        if fault is not None:
            return f"the target would not hold it whole: {fault}"
        missing = uncovered_target(target_sizes, pattern.target, pattern.volumes())
        return (
            None
            if missing is None
            else f"target chunk {missing} of size {target_sizes[missing].tolist()} is not covered"
        )

    def elements(self, number: int, pattern: Pattern) -> int:
        if number not in self._elements:
            self._elements[number] = int(pattern.volumes().sum())
        return self._elements[number]


def array_lengths(chunks: Chunks) -> Int64s:
    """Per row the bytes on disk of its stored array, framing included; 0 in all but the first row of an array."""
    lengths = chunks.length.astype(np.int64)
    if chunks.stored is None:
        return lengths
    # With the length, since an array without elements lies where the next one begins.
    place = np.stack([chunks.file.astype(np.int64), chunks.start, lengths], axis=1)
    _, first = np.unique(place, axis=0, return_index=True)
    own = np.zeros_like(lengths)
    own[first] = lengths[first]
    return own


def _stored_bytes_of_tensors(chunks: Chunks) -> Int64s:
    lengths = array_lengths(chunks)
    running = np.concatenate([[0], np.cumsum(lengths)])
    totals: Int64s = running[chunks.first[1:]] - running[chunks.first[:-1]]
    return totals


def _tensor_batches(
    source: Catalogue, design: Design, read_of: Int64s, write_of: Int64s, largest: int
) -> tuple[Batch, ...]:
    """Consecutive tensors; one that is larger than a batch is cut by rows where that is possible."""
    batches: list[Batch] = []
    for batch in batches_by_tensor(read_of, write_of, largest=largest):
        if batch.stop == batch.first + 1:
            origin = int(design.sources[batch.first])
            batches += split_tensor(batch, design.chunks, source.chunks, origin, largest)
        else:
            batches.append(batch)
    return tuple(batches)


def _file_batches(source: Catalogue, design: Design) -> tuple[Batch, ...]:
    tensor_of_row = design.chunks.tensor_of_row()
    scale = source.itemsizes()[design.sources] / np.maximum(
        np.array([tensor.dtype.itemsize for tensor in design.tensors], dtype=np.int64), 1
    )
    return batches_by_file(
        tensor_of_row,
        design.chunks.file.astype(np.int64),
        design.chunks.start,
        array_lengths(design.chunks),
        scale[tensor_of_row],
    )


def _table_bytes(chunks: Chunks) -> int:
    columns = (chunks.offsets, chunks.sizes, chunks.file, chunks.start, chunks.length, chunks.storing)
    optional = (chunks.crc, chunks.local, chunks.stored)
    return sum(column.nbytes for column in (*columns, *optional) if column is not None)


def _digest(source: Catalogue, design: Design, options_key: str) -> str:
    digest = xxhash.xxh3_128()
    digest.update(source.metadata_digest.encode())
    digest.update(json.dumps([(entry.path, entry.bytes, entry.identity) for entry in source.files]).encode())
    digest.update(options_key.encode())
    tensors = [(tensor.key, tensor.dtype.name, tensor.shape, tensor.path) for tensor in design.tensors]
    files = [(file.path, file.bytes) for file in design.files]
    objects = [(copy.source.key, copy.source.path, copy.file, copy.start) for copy in design.objects]
    digest.update(json.dumps([design.format, design.world, tensors, files, objects]).encode())
    chunks = design.chunks
    for column in (design.sources, chunks.first, chunks.offsets, chunks.sizes, chunks.file, chunks.start):
        digest.update(np.ascontiguousarray(column).tobytes())
    return digest.hexdigest()
