"""One thread of a worker: runs batches of a plan, round by round, through its two buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from reshard_service.catalogue import Chunks, Int64s, Tensor
from reshard_service.engine.buffers import PAGE, Buffer, align_up
from reshard_service.engine.checksums import RunningCrc, RunningSegments, crc32, segment_of
from reshard_service.engine.moves import move_bytes, move_cast
from reshard_service.engine.rounds import Fetcher, Place
from reshard_service.engine.source import Source
from reshard_service.errors import Cancelled
from reshard_service.manifest import ALGORITHM, SegmentRow
from reshard_service.planning.batches import Batch
from reshard_service.planning.budget import Budget
from reshard_service.planning.panels import Arrays, Panel, Write, cut_panels
from reshard_service.planning.plan import Plan

_CACHED_MOVES = 200_000
_CACHED_PANELS = 64


class RunSink:
    """Where finished runs of bytes go; one per thread. Implemented by the targets."""

    def write(self, file: int, start: int, buffer: Buffer, at: int, length: int) -> None:
        """Take ``length`` bytes from ``buffer`` at ``at`` for ``file`` at ``start``.

        ``at`` and ``start`` are equal modulo the page size and the page before ``at`` is free for use.
        """
        raise NotImplementedError

    def add_segments(self, file: int, segments: list[SegmentRow]) -> None:
        """Digests of stored bytes; they arrive before the bytes count as written."""
        raise NotImplementedError

    def end_batch(self) -> None:
        """The batch is complete: nothing may be held back."""
        raise NotImplementedError


@dataclass(slots=True)
class _Piece:
    """A write of the current round with its place in the target file."""

    file: int
    start: int
    length: int
    row: int
    write: Write
    tensor: Tensor
    source: Tensor
    first_place: int
    sizes: tuple[int, ...]
    """Of the array that is framed."""
    head: bytes | None
    tail_bytes: int


class Mover:
    """Executes batches. Everything a batch needs in memory is this object's two buffers."""

    def __init__(
        self,
        plan: Plan,
        source: Source,
        sink: RunSink,
        budget: Budget,
        progress: Callable[[int], None] = lambda written: None,
        cancelled: Callable[[], bool] = lambda: False,
        skip_files: frozenset[int] = frozenset(),
        algorithm: str = ALGORITHM,
    ) -> None:
        self._plan = plan
        self._source = source
        self._sink = sink
        self._budget = budget
        self._progress = progress
        self._cancelled = cancelled
        self._skip = sorted(skip_files)
        self._algorithm = algorithm
        self._staging = Buffer(budget.staging_bytes)
        self._output = Buffer(budget.output_bytes)
        self._fetcher = Fetcher(source, self._staging)
        self._panel_bytes = _panel_bytes(plan, budget.panel_bytes)
        self._panels: dict[tuple[object, ...], list[Panel]] = {}
        self._cached_moves = 0
        self._crcs: dict[int, RunningCrc] = {}
        self._segments: dict[int, RunningSegments] = {}
        self._fresh: list[SegmentRow] = []
        """Digests of the run that is being made."""
        self._pending: list[_Piece] = []
        self._pending_bytes = 0

    def close(self) -> None:
        self._pending.clear()
        self._staging.close()
        self._output.close()

    def run(self, batch: Batch) -> None:
        """Copy one batch; on return all its bytes are written (not yet synced)."""
        plan, design = self._plan, self._plan.design
        done: list[range] = []
        for t, only in self._steps(batch):
            s = int(design.sources[t])
            rows = plan.source.chunks.rows(s)
            self._source.hold(range(rows.start, rows.stop))
            for panel in self._panels_of(t, s, only):
                if not self._fetcher.room_for(rows.start, panel.reads) or self._is_full(panel):
                    self._flush(done)
                self._add(t, s, rows.start, panel)
            done.append(range(rows.start, rows.stop))
        self._flush(done)
        self._fetcher.running.clear()  # of arrays that only other batches read to the end
        self._sink.end_batch()

    def _steps(self, batch: Batch) -> Iterator[tuple[int, Int64s | None]]:
        """Tensors to work on, with the chunk rows that are wanted of each (None = all), counted from its first."""
        chunks = self._plan.design.chunks
        if batch.rows is not None and batch.in_order:
            for (t, _), rows in groupby(self._located(batch.rows), key=lambda located: located[:2]):
                yield t, np.array([row - int(chunks.first[t]) for _, _, row in rows], dtype=np.int64)
            return
        for t in range(batch.first, batch.stop):
            wanted = None if batch.rows is None else batch.rows - int(chunks.first[t])
            if self._skip:
                missing = np.flatnonzero(~np.isin(chunks.file[chunks.rows(t)], self._skip)).astype(np.int64)
                wanted = missing if wanted is None else np.intersect1d(wanted, missing)
            if wanted is None or len(wanted):
                yield t, wanted

    def _located(self, rows: Int64s) -> Iterator[tuple[int, int, int]]:
        """Tensor, place and row: rows of one stored array have the same place and are neighbours."""
        chunks = self._plan.design.chunks
        tensors = np.searchsorted(chunks.first, rows, side="right") - 1
        return zip(tensors.tolist(), chunks.start[rows].tolist(), rows.tolist(), strict=True)

    def _is_full(self, panel: Panel) -> bool:
        return self._pending_bytes + panel.bytes_out + PAGE * len(panel.writes) > self._output.size

    def _panels_of(self, t: int, s: int, keep: Int64s | None) -> Iterator[Panel]:
        """Panels of one tensor, remembered by geometry: layers of a model repeat."""
        plan, chunks = self._plan, self._plan.design.chunks
        wanted, given = plan.design.tensors[t], plan.source.tensors[s]
        source_rows, target_rows = plan.source.chunks.rows(s), chunks.rows(t)
        number = int(plan.pattern_of[t])
        key = (
            number,
            self._panel_bytes[t],
            given.dtype.itemsize,
            wanted.dtype.itemsize,
            _arrays_key(plan.source.chunks, source_rows, plan.dims),
            _arrays_key(chunks, target_rows, plan.dims),
            None if keep is None else keep.tobytes(),
        )
        known = self._panels.get(key)
        if known is not None:
            yield from known
            return
        pattern = plan.patterns[number] if keep is None else plan.patterns[number].only_targets(keep)
        panels: list[Panel] | None = []
        moves = 0
        for panel in cut_panels(
            wanted.shape,
            pattern,
            Arrays.of(plan.source.chunks, source_rows, plan.dims),
            Arrays.of(chunks, target_rows, plan.dims),
            given.dtype.itemsize,
            wanted.dtype.itemsize,
            self._panel_bytes[t],
            keep,
        ):
            if panels is not None:
                panels.append(panel)
                moves += sum(len(write.moves) for write in panel.writes)
                if len(panels) > _CACHED_PANELS or self._cached_moves + moves > _CACHED_MOVES:
                    panels = None
            yield panel
        if panels is not None:
            self._panels[key] = panels
            self._cached_moves += moves

    def _add(self, t: int, s: int, first_source_row: int, panel: Panel) -> None:
        design = self._plan.design
        chunks, tensor, source = design.chunks, design.tensors[t], self._plan.source.tensors[s]
        first_place = self._fetcher.ask(first_source_row, panel.reads, source)
        first_row = int(chunks.first[t])
        for write in panel.writes:
            span = write.span
            row = first_row + span.row
            start, length, head, tail_bytes = int(chunks.start[row]), span.length, None, 0
            sizes: tuple[int, ...] = ()
            if design.framing is None:
                start += span.start
            else:
                sizes = tuple(chunks.sizes[row, : len(tensor.shape)].tolist())
                head = design.framing.head(tensor.dtype, sizes)
                if span.start + length == span.array_bytes:
                    tail_bytes = int(chunks.length[row]) - len(head) - span.array_bytes
                    length += tail_bytes
                if span.start == 0:
                    length += len(head)
                else:
                    start += len(head) + span.start
                    head = None
            if length == 0:
                continue  # an array without elements and framing: its file may be complete already
            file = int(chunks.file[row])
            self._pending.append(
                _Piece(file, start, length, row, write, tensor, source, first_place, sizes, head, tail_bytes)
            )
            self._pending_bytes += length + PAGE

    def _flush(self, done: list[range]) -> None:
        """Fetch the round's reads, make its writes, hand them to the sink run by run."""
        if self._cancelled():
            raise Cancelled("stopped before the end; nothing became visible at the target")
        places = self._fetcher.fetch()
        pieces = sorted(self._pending, key=lambda piece: (piece.file, piece.start))
        self._pending, self._pending_bytes = [], 0
        at = 0
        run: tuple[int, int, int] | None = None  # file, start in the file, position in the buffer
        for piece in pieces:
            if run is not None and (piece.file, piece.start) != (run[0], run[1] + at - run[2]):
                self._write(*run, at)
                run = None
                at = align_up(at)
            if run is None:
                begin = align_up(at) + PAGE + piece.start % PAGE
                if begin + piece.length > self._output.size:
                    begin = PAGE + piece.start % PAGE
                run = (piece.file, piece.start, begin)
                at = begin
            elif at + piece.length > self._output.size:
                self._write(*run, at)
                at = PAGE + piece.start % PAGE
                run = (piece.file, piece.start, at)
            self._make(piece, places, at)
            at += piece.length
        if run is not None:
            self._write(*run, at)
        for rows in done:
            self._source.forget(rows)
        done.clear()

    def _write(self, file: int, start: int, begin: int, end: int) -> None:
        """Hand over one run, ``[begin, end)`` of the output buffer, and its digests before it."""
        fresh, self._fresh = self._fresh, []
        self._sink.add_segments(file, fresh)
        self._sink.write(file, start, self._output, begin, end - begin)
        self._progress(end - begin)

    def _make(self, piece: _Piece, places: list[Place], at: int) -> None:
        """Fill one piece of the output buffer: head, moved bytes, tail; digests and CRC on the way."""
        span, view = piece.write.span, self._output.view
        begin = at
        if piece.head is not None:
            view[at : at + len(piece.head)] = piece.head
            at += len(piece.head)
        same = piece.source.dtype == piece.tensor.dtype
        for move in piece.write.moves:
            array, place = places[piece.first_place + move.read]
            if same:
                move_bytes(move, array, place, self._output.array, at, piece.tensor.dtype.itemsize)
            else:
                move_cast(move, array, place, self._output.array, at, piece.source.dtype, piece.tensor.dtype)
        at += span.length
        if self._plan.design.framing is not None:
            self._frame(piece, at)
            at += piece.tail_bytes
        self._digest(piece, view[begin:at])

    def _frame(self, piece: _Piece, at: int) -> None:
        """Run the payload's CRC on; at its end write the tail that carries it."""
        span, framing = piece.write.span, self._plan.design.framing
        payload = self._output.view[at - span.length : at]
        running = None if span.whole else self._crcs.setdefault(piece.row, RunningCrc())
        if running is not None:
            running.add(span.start, payload)
        if span.start + span.length == span.array_bytes and framing is not None:
            crc = crc32(payload) if running is None else running.value
            self._crcs.pop(piece.row, None)
            self._output.view[at : at + piece.tail_bytes] = framing.tail(piece.tensor.dtype, piece.sizes, crc)

    def _digest(self, piece: _Piece, data: memoryview) -> None:
        span = piece.write.span
        if span.whole and len(data) <= self._budget.output_bytes:
            if len(data):
                self._fresh.append(segment_of(piece.start, data, self._algorithm))
            return
        running = self._segments.get(piece.row)
        if running is None:
            running = self._segments[piece.row] = RunningSegments(piece.start, self._algorithm)
        running.add(piece.start, data)
        if span.start + span.length == span.array_bytes:
            del self._segments[piece.row]
            self._fresh += running.finish()


def _arrays_key(chunks: Chunks, rows: slice, dims: int) -> bytes:
    """What tells the stored arrays of tensors apart whose rectangles are the same."""
    return b"" if chunks.stored is None else Arrays.of(chunks, rows, dims).key()


def _panel_bytes(plan: Plan, largest: int) -> list[int]:
    """Payload of a panel of each tensor: less where framing makes up much of what is read or written."""
    source, design = plan.source, plan.design
    itemsizes = np.array([tensor.dtype.itemsize for tensor in design.tensors], dtype=np.int64)
    read = _framing_factor(source.chunks, source.itemsizes())[design.sources]
    written = _framing_factor(design.chunks, itemsizes)
    panel: list[int] = np.maximum(1 << 12, largest / np.maximum(read, written)).astype(np.int64).tolist()
    return panel


def _framing_factor(chunks: Chunks, itemsizes: Int64s) -> NDArray[np.float64]:
    """For each tensor its bytes on disk over its payload, at least 1 (compressed items count as unpacked)."""
    if chunks.stored is not None or not len(chunks):
        return np.ones(len(itemsizes))
    stored, payload = (
        np.add.reduceat(np.append(column, 0).astype(np.float64), chunks.first[:-1]) * (np.diff(chunks.first) > 0)
        for column in (chunks.length, chunks.nbytes_of_rows(itemsizes))
    )
    factor: NDArray[np.float64] = np.maximum(1.0, stored / np.maximum(payload, 1.0))
    return factor
