"""One round: many spans fetched with few sequential reads into the staging buffer, checked, and found again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reshard_service.catalogue import Storing, Tensor
from reshard_service.engine.buffers import Buffer
from reshard_service.engine.checksums import RunningCrc, RunningSegments, crc32
from reshard_service.engine.source import Source, crc_mismatch
from reshard_service.engine.source_digests import SourceDigests
from reshard_service.formats.dcp.item import AFTER_BYTES, Payload, checksum
from reshard_service.planning.panels import Span

GAP_BYTES = 32 << 10
"""Ranges closer than this are fetched as one: reading over the gap is cheaper than another call."""

Bytes = NDArray[Any]
Place = tuple[Bytes, int]
"""Where a span's bytes are now: an array of bytes and a position in it."""


@dataclass(slots=True)
class _Range:
    """Bytes of a source file that a round needs, and what they are for."""

    file: int
    start: int
    length: int
    at: int
    """Position in the staging buffer, once placed."""
    index: int
    row: int
    span: Span
    tensor: Tensor
    whole_item: bool
    payload: Payload | None


@dataclass(slots=True)
class Fetcher:
    """Reads the spans of one thread's rounds. CRCs of arrays that span several rounds run on in ``running``."""

    source: Source
    staging: Buffer
    running: dict[int, RunningCrc] = field(default_factory=dict)
    segments: dict[int, RunningSegments] = field(default_factory=dict)
    _ranges: list[_Range] = field(default_factory=list)
    _unpacked: list[tuple[int, int, Span, Tensor]] = field(default_factory=list)
    _count: int = 0
    used: int = 0
    """Staging bytes that the ranges asked for so far will take."""

    def room_for(self, first_row: int, spans: tuple[Span, ...]) -> bool:
        """Whether these spans fit beside what was asked for already. An empty round takes any panel."""
        if not self._count:
            return True
        lengths = self.source.catalogue.chunks.length
        wanted = 0
        for span in spans:
            wanted += int(lengths[first_row + span.row]) if span.whole else span.length + AFTER_BYTES
        return self.used + wanted <= self.staging.size

    def ask(self, first_row: int, spans: tuple[Span, ...], tensor: Tensor) -> int:
        """Ask for spans of one tensor; they are numbered from the returned index on."""
        chunks = self.source.catalogue.chunks
        first = self._count
        others = sum(span.length + AFTER_BYTES for span in spans)
        for number, span in enumerate(spans, first):
            others -= span.length + AFTER_BYTES
            row = first_row + span.row
            kind = int(chunks.storing[row])
            file, start = int(chunks.file[row]), int(chunks.start[row])
            whole, payload, length = False, None, span.length
            if kind == Storing.RAW:
                start += span.start
            elif kind == Storing.ZSTD_ITEM:
                self._unpacked.append((number, row, span, tensor))
                continue
            elif span.whole and int(chunks.length[row]) + others <= self.staging.size - self.used:
                whole, length = True, int(chunks.length[row])
            else:
                payload = self.source.payload(row, tensor)
                if not payload.is_plain:
                    self._unpacked.append((number, row, span, tensor))
                    continue
                start += payload.start + span.start
                if span.start + span.length == span.array_bytes:
                    behind = int(chunks.length[row]) - payload.start - span.array_bytes
                    length += max(0, min(AFTER_BYTES, behind))
            self._ranges.append(_Range(file, start, length, 0, number, row, span, tensor, whole, payload))
            self.used += length
        self._count += len(spans)
        return first

    def fetch(self) -> list[Place]:
        """Read everything asked for; the places hold until the next round."""
        places: list[Place] = [(self.staging.array, 0)] * self._count
        self._read()
        for wanted in self._ranges:
            places[wanted.index] = self._item(wanted) if wanted.whole_item else self._plain(wanted)
        for number, row, span, tensor in self._unpacked:
            unpacked = self.source.unpacked(row, tensor)
            data = np.empty(span.length, dtype=np.uint8)
            unpacked.read_into(span.start, data.data)
            places[number] = (data, 0)
        self._ranges, self._unpacked, self._count, self.used = [], [], 0, 0
        return places

    def _read(self) -> None:
        """Place ranges in file order; close neighbours share one read where the staging buffer has room for the gap."""
        if self.used > self.staging.size:
            raise AssertionError(f"a round of {self.used} bytes does not fit the staging buffer")
        ranges = sorted(self._ranges, key=lambda wanted: (wanted.file, wanted.start))
        spare = self.staging.size - self.used
        at = 0
        runs: list[tuple[int, int, int, int]] = []
        position = 0
        while position < len(ranges):
            head = ranges[position]
            begin, end = head.start, head.start + head.length
            head.at = at
            position += 1
            while position < len(ranges):
                wanted = ranges[position]
                gap = wanted.start - end
                if wanted.file != head.file or gap > min(GAP_BYTES, spare):
                    break
                if gap > 0:
                    spare -= gap
                wanted.at = at + wanted.start - begin
                end = max(end, wanted.start + wanted.length)
                position += 1
            runs.append((head.file, begin, at, end - begin))
            at += end - begin
        for file, begin, _, length in runs:
            self.source.will_read(file, begin, length)
        for file, begin, place, length in runs:
            self.source.read_into(file, begin, self.staging.view[place : place + length])

    def _plain(self, wanted: _Range) -> Place:
        """A span whose place was known before reading. Its CRC runs on, and is compared at the array's end."""
        span, chunks = wanted.span, self.source.catalogue.chunks
        known = wanted.payload.crc32 if wanted.payload is not None else None
        if wanted.payload is None and chunks.crc is not None and chunks.crc[wanted.row] >= 0:
            known = int(chunks.crc[wanted.row])
        if wanted.payload is not None or known is not None:
            running = self.running.setdefault(wanted.row, RunningCrc())
            running.add(span.start, self.staging.view[wanted.at : wanted.at + span.length])
            if span.start + span.length == span.array_bytes:
                del self.running[wanted.row]
                after = self.staging.view[wanted.at + span.length : wanted.at + wanted.length]
                if known is None and wanted.payload is not None:
                    known = checksum(after, span.array_bytes)
                if running.at == span.array_bytes and known is not None and known != running.value:
                    raise crc_mismatch(wanted.tensor.key, self.source.file_path(wanted.row), known, running.value)
        if wanted.payload is None and self.source.digests:
            self._digest(wanted, self.source.digests)
        return self.staging.array, wanted.at

    def _digest(self, wanted: _Range, digests: SourceDigests) -> None:
        """Run the digests of a bare array on; at its end compare them with the source's manifest."""
        span, begin = wanted.span, wanted.start - wanted.span.start
        running = self.segments.get(wanted.row)
        if running is None:
            expected = digests.of(wanted.file, begin, span.array_bytes) if span.start == 0 else None
            if expected is None:
                return
            running = self.segments[wanted.row] = RunningSegments(begin, digests.algorithm)
        if running.at != wanted.start:
            del self.segments[wanted.row]  # a part was skipped, so the rest proves nothing
            return
        running.add(wanted.start, self.staging.view[wanted.at : wanted.at + span.length])
        if span.start + span.length == span.array_bytes:
            del self.segments[wanted.row]
            expected = digests.of(wanted.file, begin, span.array_bytes) or []
            digests.compare(expected, running.finish(), wanted.tensor.key, self.source.file_path(wanted.row))

    def _item(self, wanted: _Range) -> Place:
        """A whole zip item: find the payload in what was read, compare its CRC."""
        item = self.staging.view[wanted.at : wanted.at + wanted.length]
        payload = self.source.locate(wanted.row, wanted.tensor, item)
        stop = payload.start + payload.storage_bytes
        expected = payload.crc32
        if expected is None:
            expected = checksum(item[stop:], payload.storage_bytes)
        if expected is not None:
            found = crc32(item[payload.start : stop])
            if found != expected:
                raise crc_mismatch(wanted.tensor.key, self.source.file_path(wanted.row), expected, found)
        if self.source.digests:
            path = self.source.file_path(wanted.row)
            self.source.digests.check(wanted.file, wanted.start, item, wanted.tensor.key, path)
        if payload.is_plain:
            return self.staging.array, wanted.at + payload.start
        itemsize = wanted.tensor.dtype.itemsize
        sizes = self.source.stored_sizes(wanted.row, wanted.tensor)
        begin = wanted.at + payload.start + payload.storage_offset_bytes
        kind = np.dtype((np.void, itemsize))
        view = (
            np.ndarray(sizes, kind, self.staging.array, begin)
            if payload.strides is None
            else np.ndarray(sizes, kind, self.staging.array, begin, tuple(s * itemsize for s in payload.strides))
        )
        return np.ascontiguousarray(view).reshape(-1).view(np.uint8), 0
