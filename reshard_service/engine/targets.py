"""Where a plan's output goes: a local folder or file, or the objects of a store. One protocol, two implementations."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from reshard_service.engine.checksums import RunningSegments
from reshard_service.engine.files import LocalSink, OutputFiles
from reshard_service.engine.mover import RunSink
from reshard_service.engine.object_claims import ObjectClaim, claim_path, write_object
from reshard_service.engine.source import Source
from reshard_service.engine.staging import Staging
from reshard_service.engine.streams import Inserts, StreamSink
from reshard_service.errors import InputRefused, ReshardError, SourceCorrupt, TargetBusy
from reshard_service.formats.dcp.object_checks import damaged_member
from reshard_service.formats.target import Design, Literal, ObjectCopy
from reshard_service.manifest import MANIFEST_NAME, SegmentRow, manifest_path
from reshard_service.planning.plan import array_lengths
from reshard_service.storage.base import Storage
from reshard_service.storage.local import LocalStorage

_BLOCK = 1 << 20
Finished = dict[int, list[SegmentRow]]
Put = Callable[[memoryview], None]


class Target(Protocol):
    """One attempt at writing one target."""

    in_order: bool
    """Each file must be written front to back by one thread."""
    scratch: Path | None
    """A folder for nameless temporary files, None for the system's."""

    def begin(self, design: Design, source: Source, algorithm: str) -> Finished:
        """Prepare; gives the files that an earlier attempt finished, with their digests."""

    def write_fixed(self) -> None:
        """Write what is no tensor: headers, copied objects, empty files. Called once, before the batches."""

    def sink(self) -> RunSink:
        """A sink for one more thread."""

    def finished(self) -> Finished:
        """Files complete so far, and their digests."""

    def written(self) -> Storage:
        """The finished files, for reading them again before they become visible."""

    def write_small(self, path: str, data: bytes) -> None: ...

    def commit(self, manifest: bytes, closing: list[tuple[str, bytes]]) -> None:
        """Make it visible; ``closing`` in order, its last file is the marker."""

    def fail(self, error: BaseException) -> None:
        """Clean up after a failure; nothing is visible at the target afterwards."""


def produce_literal(literal: Literal, algorithm: str) -> Callable[[Put], list[SegmentRow]]:
    def produce(put: Put) -> list[SegmentRow]:
        running = RunningSegments(literal.start, algorithm)
        running.add(literal.start, memoryview(literal.data))
        put(memoryview(literal.data))
        return running.finish()

    return produce


def produce_object(copy: ObjectCopy, source: Source, algorithm: str) -> Callable[[Put], list[SegmentRow]]:
    """Copies opaque bytes a block at a time: a dataloader's state can be large."""

    def produce(put: Put) -> list[SegmentRow]:
        running = RunningSegments(copy.start, algorithm)
        block = memoryview(bytearray(min(_BLOCK, max(1, copy.source.length))))
        for at in range(0, copy.source.length, _BLOCK):
            piece = block[: min(_BLOCK, copy.source.length - at)]
            source.read_into(copy.source.file, copy.source.start + at, piece)
            if copy.source.length <= _BLOCK and not copy.source.transforms:
                _require_intact(copy, bytes(piece))
            running.add(copy.start + at, piece)
            put(piece)
        return running.finish()

    return produce


def _require_intact(copy: ObjectCopy, item: bytes) -> None:
    member = damaged_member(item)
    if member is not None:
        raise SourceCorrupt(
            f"object {copy.source.key!r}: {member!r} does not match its CRC32",
            tensor=copy.source.key,
            hint="copy the file again from its origin, or leave it out with --exclude",
        )


def design_bytes_of_files(design: Design) -> list[int]:
    """Per file how many of its bytes something claims: all but padding."""
    claimed = [0] * len(design.files)
    for file, length in zip(design.chunks.file.tolist(), array_lengths(design.chunks).tolist(), strict=True):
        claimed[file] += length
    for literal in design.literals:
        claimed[literal.file] += len(literal.data)
    for copy in design.objects:
        claimed[copy.file] += copy.source.length
    return claimed


def _inserts(design: Design, source: Source, algorithm: str) -> Inserts:
    inserts: Inserts = {}
    for literal in design.literals:
        inserts.setdefault(literal.file, []).append(
            (literal.start, len(literal.data), produce_literal(literal, algorithm))
        )
    for copy in design.objects:
        inserts.setdefault(copy.file, []).append(
            (copy.start, copy.source.length, produce_object(copy, source, algorithm))
        )
    for waiting in inserts.values():
        waiting.sort(key=lambda insert: insert[:2])
    return inserts


@dataclass
class LocalTarget:
    """A local folder, or a single local file."""

    path: Path
    plan_digest: str
    single_file: bool
    replace: bool
    in_order: bool = False
    scratch: Path | None = None
    _finished: Finished = field(default_factory=dict)

    def begin(self, design: Design, source: Source, algorithm: str) -> Finished:
        self._design = design
        self._staging = Staging(self.path, self.plan_digest, single_file=self.single_file)
        self._staging.begin()
        self.scratch = self._staging.scratch
        self._inserts = _inserts(design, source, algorithm)
        claimed = design_bytes_of_files(design)
        self._finished = self._staging.receipts(design.files, claimed, algorithm)
        self._files = OutputFiles(
            self._staging.folder,
            lambda number: self._staging.working_name(design.files[number]),
            design.files,
            claimed,
            self._on_finished,
        )
        self._claimed = claimed
        return dict(self._finished)

    def _on_finished(self, number: int, segments: list[SegmentRow]) -> None:
        self._staging.finish(number, self._design.files[number], segments)
        self._finished[number] = segments

    def write_fixed(self) -> None:
        for file, waiting in self._inserts.items():
            if file in self._finished:
                continue
            for start, _, produce in waiting:
                at = [start]

                def put(data: memoryview, file: int = file, at: list[int] = at) -> None:
                    self._files.put(file, at[0], data, direct=False)
                    at[0] += len(data)

                self._files.note(file, produce(put))
                self._files.count(file, at[0] - start)
        for file, claimed in enumerate(self._claimed):
            if claimed == 0 and file not in self._finished:
                self._files.create_empty(file)

    def sink(self) -> RunSink:
        return LocalSink(self._files)

    def finished(self) -> Finished:
        return self._finished

    def written(self) -> Storage:
        return LocalStorage(self._staging.folder)

    def write_small(self, path: str, data: bytes) -> None:
        self._staging.write_small(path, data)

    def commit(self, manifest: bytes, closing: list[tuple[str, bytes]]) -> None:
        self._files.close()
        self._staging.write_small(MANIFEST_NAME, manifest)
        for path, data in closing:
            self._staging.write_small(path, data)
        self._staging.commit(replace=self.replace)

    def fail(self, error: BaseException) -> None:
        if hasattr(self, "_files"):
            self._files.close()
        if not hasattr(self, "_staging") or isinstance(error, TargetBusy):
            return
        if isinstance(error, InputRefused):
            self._staging.remove()
        elif self._staging.abandon() and isinstance(error, ReshardError):
            error.hint = (
                f"{error.hint}; " if error.hint else ""
            ) + f"finished files wait in {str(self._staging.folder)!r}, the same command goes on from there"


@dataclass
class ObjectTarget:
    """Objects under a prefix of a store, or one object (decision 16)."""

    storage: Storage
    plan_digest: str
    single_file: bool
    replace: bool
    in_order: bool = True
    scratch: Path | None = None
    _finished: Finished = field(default_factory=dict)
    _sinks: list[StreamSink] = field(default_factory=list)
    _written: list[str] = field(default_factory=list)

    def begin(self, design: Design, source: Source, algorithm: str) -> Finished:
        self._design = design
        self._single = design.files[0].path if self.single_file else None
        self._claim = ObjectClaim(self.storage, self._single, self.plan_digest)
        self._claim.take()
        if self.replace:
            self._remove_old()
        self._inserts = _inserts(design, source, algorithm)
        return {}

    def _remove_old(self) -> None:
        """The old checkpoint's markers first, so that it stops being visible before its data goes."""
        names = [entry.name for entry in self.storage.list_dir() if entry.name != claim_path(self._single)]
        if self._single is not None:
            names = [name for name in names if name in (self._single, manifest_path(True, self._single))]
        markers = (".metadata", MANIFEST_NAME, "adapter_config.json", "config.json")
        for name in sorted(names, key=lambda name: (name not in markers and not name.endswith(".index.json"), name)):
            self.storage.remove(name)

    def write_fixed(self) -> None:
        with_chunks = set(self._design.chunks.file[self._design.chunks.length > 0].tolist())
        for file in range(len(self._design.files)):
            if file not in with_chunks:
                sink = self.sink()
                assert isinstance(sink, StreamSink)
                sink.write_whole(file)

    def sink(self) -> RunSink:
        # A name counts as written from the start: an upload whose answer was lost may be there all the same.
        sink = StreamSink(self.storage, self._design, self._inserts, self._written.append, self._on_finished)
        self._sinks.append(sink)
        return sink

    def _on_finished(self, number: int, segments: list[SegmentRow]) -> None:
        self._finished[number] = segments

    def finished(self) -> Finished:
        return self._finished

    def written(self) -> Storage:
        return self.storage

    def write_small(self, path: str, data: bytes) -> None:
        self._written.append(path)
        write_object(self.storage, path, data)

    def commit(self, manifest: bytes, closing: list[tuple[str, bytes]]) -> None:
        self._claim.check()
        self.write_small(manifest_path(self.single_file, self._design.files[0].path), manifest)
        for path, data in closing:
            self.write_small(path, data)
        with contextlib.suppress(ReshardError):  # the target stands; a claim that stays is one of a finished plan
            self._claim.release()

    def fail(self, error: BaseException) -> None:
        for sink in self._sinks:
            sink.abort()
        if not hasattr(self, "_claim") or not self._claim.is_held:
            return
        is_clean = True
        for path in reversed(self._written):  # the marker first
            try:
                self.storage.remove(path)
            except ReshardError:
                is_clean = False
        if is_clean:  # otherwise the claim lets the next attempt at the same plan write over what stayed
            with contextlib.suppress(ReshardError):
                self._claim.release()
