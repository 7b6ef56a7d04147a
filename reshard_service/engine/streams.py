"""Output objects of a store without positional writes: each is one stream, written front to back by one thread."""

from __future__ import annotations

from collections.abc import Callable

from reshard_service.engine.buffers import Buffer
from reshard_service.engine.mover import RunSink
from reshard_service.formats.target import Design
from reshard_service.manifest import SegmentRow
from reshard_service.storage.base import Storage, StreamWriter

_ZEROS = memoryview(bytes(1 << 16))
Inserts = dict[int, list[tuple[int, int, Callable[[Callable[[memoryview], None]], list[SegmentRow]]]]]
"""Per file, sorted: start, length, and what writes those bytes (literals and copied objects)."""


class StreamSink(RunSink):
    """One thread's sink: opens a file at its first run, closes it at the end of the batch."""

    def __init__(
        self,
        storage: Storage,
        design: Design,
        inserts: Inserts,
        begun: Callable[[str], None],
        finished: Callable[[int, list[SegmentRow]], None],
    ) -> None:
        self._storage = storage
        self._design = design
        self._inserts = inserts
        self._begun = begun
        self._finished = finished
        self._file: int | None = None
        self._stream: StreamWriter | None = None
        self._at = 0
        self._segments: list[SegmentRow] = []

    def write(self, file: int, start: int, buffer: Buffer, at: int, length: int) -> None:
        if self._file is None:
            self._open(file)
        if file != self._file or start < self._at:
            raise AssertionError(f"bytes for {self._design.files[file].path!r} at {start} come out of order")
        self._fill_up_to(start)
        self._put(buffer.view[at : at + length])

    def add_segments(self, file: int, segments: list[SegmentRow]) -> None:
        self._segments.extend(segments)

    def end_batch(self) -> None:
        if self._file is not None:
            self._close()

    def write_whole(self, file: int) -> None:
        """A file of literals and objects alone."""
        self._open(file)
        self._close()

    def abort(self) -> None:
        """Drop an unfinished file: nothing of it becomes visible."""
        if self._stream is not None:
            self._stream.abort()
            self._stream = None

    def _open(self, file: int) -> None:
        self._file, self._at = file, 0
        self._begun(self._design.files[file].path)
        self._stream = self._storage.create(self._design.files[file].path)

    def _close(self) -> None:
        if self._file is None or self._stream is None:
            return
        self._fill_up_to(self._design.files[self._file].bytes)
        self._stream.close()
        self._finished(self._file, sorted(self._segments))
        self._file, self._stream, self._segments = None, None, []

    def _put(self, data: memoryview) -> None:
        if self._stream is not None:
            self._stream.write(data)
            self._at += len(data)

    def _fill_up_to(self, start: int) -> None:
        """Literals and objects that lie before ``start``, and zeros where nothing lies."""
        waiting = self._inserts.get(self._file if self._file is not None else -1, [])
        while waiting and waiting[0][0] < start:
            begin, _, produce = waiting.pop(0)
            self._zeros(begin - self._at)
            self._segments.extend(produce(self._put))
        self._zeros(start - self._at)

    def _zeros(self, count: int) -> None:
        while count > 0:
            piece = _ZEROS[: min(count, len(_ZEROS))]
            self._put(piece)
            count -= len(piece)
