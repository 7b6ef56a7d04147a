"""Are two checkpoints the same tensors? Compared by identity, whatever formats and layouts, in constant memory.

The comparison runs the same panels as a conversion from A to B would, except that B's side is read instead of written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from reshard_service.catalogue import ByteObject, Catalogue, Identity, Notice, Section, Tensor
from reshard_service.engine.buffers import Buffer
from reshard_service.engine.rounds import Fetcher, Place
from reshard_service.engine.source import Source
from reshard_service.errors import NameCollision
from reshard_service.globs import compile_glob
from reshard_service.identity import strip_wrappers
from reshard_service.planning.budget import Budget
from reshard_service.planning.coverage import tiling_fault
from reshard_service.planning.intersect import intersect, widen
from reshard_service.planning.panels import Arrays, Move, Panel, Span, cut_panels

_HOLDS_OBJECTS = ("dcp", "torch")


@dataclass(frozen=True, slots=True)
class Diff:
    """``same`` is true if everything compared is equal. ``not_compared`` names what only one side can have."""

    same: bool
    compared: int
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    different: tuple[Notice, ...]
    not_compared: tuple[str, ...]


def diff(
    a: Catalogue,
    b: Catalogue,
    *,
    everything: bool = False,
    only: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    threads: int = 2,
    progress: Callable[[int], None] = lambda compared: None,
) -> Diff:
    """Compare sections present on both sides (decision 10); ``everything`` makes one-sided ones count as well.

    ``only`` restricts it to one section.
    """
    wanted = _wanted(include, exclude)
    sections_a, sections_b = _sections(a), _sections(b)
    compared = set(Section) if everything else sections_a & sections_b
    if only in (Section.MODEL, Section.OPTIMIZER):
        compared &= {Section(only)}
    tensors_a, tensors_b = _by_identity(a, compared, wanted), _by_identity(b, compared, wanted)
    not_compared = [
        f"{side}:{section.value}"
        for side, sections in (("a", sections_a), ("b", sections_b))
        for section in sorted(sections - compared)
    ]
    only_a = [a.tensors[tensors_a[i]].key for i in tensors_a if i not in tensors_b]
    only_b = [b.tensors[tensors_b[i]].key for i in tensors_b if i not in tensors_a]
    pairs = [(tensors_a[i], tensors_b[i]) for i in tensors_a if i in tensors_b]
    different = _compare(a, b, pairs, threads, progress)
    objects_a, objects_b = _objects(a, compared, wanted), _objects(b, compared, wanted)
    if everything or (a.format in _HOLDS_OBJECTS and b.format in _HOLDS_OBJECTS):
        only_a += [objects_a[i].key for i in objects_a if i not in objects_b]
        only_b += [objects_b[i].key for i in objects_b if i not in objects_a]
        different += _compare_objects(a, b, objects_a, objects_b)
    else:
        not_compared += [f"{side}:objects" for side, found in (("a", objects_a), ("b", objects_b)) if found]
    same = not (only_a or only_b or different)
    return Diff(same, len(pairs), tuple(only_a), tuple(only_b), tuple(different), tuple(not_compared))


def _wanted(include: Sequence[str], exclude: Sequence[str]) -> Callable[[str], bool]:
    takes, drops = [compile_glob(p) for p in include], [compile_glob(p) for p in exclude]
    return lambda fqn: (
        not any(glob.matches(fqn) for glob in drops) and (not takes or any(glob.matches(fqn) for glob in takes))
    )


def _sections(catalogue: Catalogue) -> set[Section]:
    tensors = {tensor.identity.section for tensor in catalogue.tensors}
    return tensors | {item.identity.section for item in catalogue.objects}


def _bare(identity: Identity) -> Identity:
    return Identity(identity.section, strip_wrappers(identity.fqn), identity.slot)


def _by_identity(catalogue: Catalogue, sections: set[Section], wanted: Callable[[str], bool]) -> dict[Identity, int]:
    found: dict[Identity, int] = {}
    for index, tensor in enumerate(catalogue.tensors):
        identity = _bare(tensor.identity)
        if identity.section not in sections or not wanted(identity.fqn):
            continue
        if identity in found:
            raise NameCollision(
                f"{catalogue.uri!r} holds {tensor.key!r} and {catalogue.tensors[found[identity]].key!r}, "
                "which are the same tensor once wrapper names are dropped",
                tensor=tensor.key,
            )
        found[identity] = index
    return found


def _objects(catalogue: Catalogue, sections: set[Section], wanted: Callable[[str], bool]) -> dict[Identity, ByteObject]:
    return {
        _bare(item.identity): item
        for item in catalogue.objects
        if item.identity.section in sections and wanted(_bare(item.identity).fqn)
    }


def _compare_objects(
    a: Catalogue, b: Catalogue, objects_a: dict[Identity, ByteObject], objects_b: dict[Identity, ByteObject]
) -> list[Notice]:
    different = []
    for identity in objects_a.keys() & objects_b.keys():
        mine, other = objects_a[identity], objects_b[identity]
        if mine.length != other.length or _object_bytes(a, mine) != _object_bytes(b, other):
            different.append(Notice("object", "the stored bytes differ", mine.key))
    return sorted(different, key=lambda notice: notice.name or "")


def _object_bytes(catalogue: Catalogue, item: ByteObject) -> bytes:
    return catalogue.storage.read_bytes(catalogue.files[item.file].path, item.start, item.length)


def _compare(
    a: Catalogue, b: Catalogue, pairs: list[tuple[int, int]], threads: int, progress: Callable[[int], None]
) -> list[Notice]:
    different: list[Notice] = []
    readable: list[tuple[int, int]] = []
    for i, j in pairs:
        notice = (
            _header_difference(a.tensors[i], b.tensors[j]) or _coverage_fault(a, i, "a") or _coverage_fault(b, j, "b")
        )
        if notice is None:
            readable.append((i, j))
        else:
            different.append(notice)
    source_a, source_b = Source(a), Source(b)
    groups = [readable[k::threads] for k in range(threads)]
    try:
        with ThreadPoolExecutor(threads) as pool:
            for found in pool.map(lambda group: _Comparer(source_a, source_b, progress).run(group), groups):
                different += found
    finally:
        source_a.close()
        source_b.close()
    order = {a.tensors[i].key: position for position, (i, _) in enumerate(pairs)}
    return sorted(different, key=lambda notice: order.get(notice.name or "", 0))


def compare_tensors(a: Catalogue, i: int, b: Catalogue, j: int) -> Notice | None:
    """The first difference between one tensor of ``a`` and one of ``b``; None if they are the same bits."""
    found = _header_difference(a.tensors[i], b.tensors[j]) or _coverage_fault(a, i, "a") or _coverage_fault(b, j, "b")
    if found is not None:
        return found
    sources = Source(a), Source(b)
    try:
        different = _Comparer(*sources, lambda compared: None).run([(i, j)])
    finally:
        for source in sources:
            source.close()
    return different[0] if different else None


def _header_difference(mine: Tensor, other: Tensor) -> Notice | None:
    if mine.dtype != other.dtype:
        return Notice("dtype", f"{mine.dtype} in A, {other.dtype} in B", mine.key)
    if mine.shape != other.shape:
        return Notice("shape", f"{list(mine.shape)} in A, {list(other.shape)} in B", mine.key)
    return None


def _coverage_fault(catalogue: Catalogue, index: int, side: str) -> Notice | None:
    rows = catalogue.chunks.rows(index)
    tensor = catalogue.tensors[index]
    fault = tiling_fault(tensor.shape, catalogue.chunks.offsets[rows], catalogue.chunks.sizes[rows])
    return None if fault is None else Notice("coverage", f"in {side.upper()}: {fault}", tensor.key)


class _Comparer:
    """One thread: walks pairs of tensors panel by panel."""

    def __init__(self, a: Source, b: Source, progress: Callable[[int], None]) -> None:
        budget = Budget()
        self._a, self._b = a, b
        self._budget = budget.panel_bytes
        self._progress = progress
        self._buffers = Buffer(budget.staging_bytes), Buffer(budget.staging_bytes)
        self._fetch_a, self._fetch_b = Fetcher(a, self._buffers[0]), Fetcher(b, self._buffers[1])
        self._waiting: list[tuple[int, int, Panel, Arrays, int, int]] = []
        self._found: dict[str, Notice] = {}

    def run(self, pairs: list[tuple[int, int]]) -> list[Notice]:
        try:
            for i, j in pairs:
                self._pair(i, j)
            self._flush()
        finally:
            for buffer in self._buffers:
                buffer.close()
        return list(self._found.values())

    def _pair(self, i: int, j: int) -> None:
        a, b = self._a.catalogue, self._b.catalogue
        rows_a, rows_b = a.chunks.rows(i), b.chunks.rows(j)
        dims = max(a.chunks.rank, b.chunks.rank, 1)
        pattern = intersect(
            widen(a.chunks.offsets[rows_a], dims, 0),
            widen(a.chunks.sizes[rows_a], dims, 1),
            widen(b.chunks.offsets[rows_b], dims, 0),
            widen(b.chunks.sizes[rows_b], dims, 1),
        )
        arrays_a, arrays_b = Arrays.of(a.chunks, rows_a, dims), Arrays.of(b.chunks, rows_b, dims)
        tensor = a.tensors[i]
        stored = max(int(a.chunks.length[rows_a].sum()), int(b.chunks.length[rows_b].sum()), tensor.nbytes, 1)
        budget = max(1 << 12, self._budget * max(1, tensor.nbytes) // stored)
        itemsize = tensor.dtype.itemsize
        for panel in cut_panels(tensor.shape, pattern, arrays_a, arrays_b, itemsize, itemsize, budget):
            if tensor.key in self._found:
                break
            spans = tuple(write.span for write in panel.writes)
            if not (self._fetch_a.room_for(rows_a.start, panel.reads) and self._fetch_b.room_for(rows_b.start, spans)):
                self._flush()
            first_a = self._fetch_a.ask(rows_a.start, panel.reads, tensor)
            first_b = self._fetch_b.ask(rows_b.start, spans, b.tensors[j])
            self._waiting.append((i, j, panel, arrays_b, first_a, first_b))

    def _flush(self) -> None:
        places_a, places_b = self._fetch_a.fetch(), self._fetch_b.fetch()
        for i, _, panel, arrays, first_a, first_b in self._waiting:
            tensor = self._a.catalogue.tensors[i]
            if tensor.key not in self._found:
                where = self._first_difference(panel, tensor, places_a[first_a:], places_b[first_b:], arrays)
                if where is not None:
                    self._found[tensor.key] = Notice(
                        "bytes", f"first difference at index {where}", tensor.key, at=where
                    )
            self._progress(panel.bytes_out)
        for i, j, *_ in self._waiting:
            self._forget(self._a, i)
            self._forget(self._b, j)
        self._waiting.clear()

    @staticmethod
    def _forget(source: Source, index: int) -> None:
        rows = source.catalogue.chunks.rows(index)
        source.forget(range(rows.start, rows.stop))

    def _first_difference(
        self, panel: Panel, tensor: Tensor, from_a: list[Place], from_b: list[Place], arrays: Arrays
    ) -> str | None:
        """Global index of the first element that differs, row-major within the panel."""
        itemsize = tensor.dtype.itemsize
        first: tuple[int, ...] | None = None
        for write, (array_b, at_b) in zip(panel.writes, from_b, strict=False):
            for move in write.moves:
                array_a, at_a = from_a[move.read]
                here = np.ndarray(
                    (*move.shape[:-1], move.shape[-1] * itemsize),
                    np.uint8,
                    array_a,
                    at_a + move.source_start,
                    (*move.source_strides[:-1], 1),
                )
                there = np.ndarray(
                    here.shape, np.uint8, array_b, at_b + move.target_start, (*move.target_strides[:-1], 1)
                )
                if np.array_equal(here, there):
                    continue
                index = np.unravel_index(int(np.argmax(here != there)), here.shape)
                found = _global_index(write.span, move, [int(x) for x in index], arrays, tensor, itemsize)
                first = found if first is None else min(first, found)
        return None if first is None else str(list(first))


def _global_index(
    span: Span, move: Move, index: list[int], arrays: Arrays, tensor: Tensor, itemsize: int
) -> tuple[int, ...]:
    """From a byte of B's span to the element of the tensor it belongs to."""
    byte = span.start + move.target_start
    byte += sum(i * stride for i, stride in zip(index[:-1], move.target_strides[:-1], strict=True)) + index[-1]
    local = np.unravel_index(byte // itemsize, tuple(arrays.stored[span.row].tolist()))
    for row in np.flatnonzero(arrays.array == span.row):
        inside = [int(x) - int(lo) for x, lo in zip(local, arrays.local[row], strict=True)]
        if all(x >= 0 for x in inside):
            place = tuple(int(o) + x for o, x in zip(arrays.offsets[row], inside, strict=True))
            if all(p < extent for p, extent in zip(place, tensor.shape, strict=False)):
                return place[: len(tensor.shape)]
    return tuple(int(x) for x in local)[: len(tensor.shape)]
