"""Does what is stored still match its manifest? For ``reshard verify``, and before every commit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from reshard_service.catalogue import Notice
from reshard_service.engine.checksums import read_digest
from reshard_service.errors import InputRefused, NotACheckpoint, SourceCorrupt, StorageFailed
from reshard_service.manifest import (
    MANIFEST_NAME,
    Manifest,
    ManifestFile,
    SegmentRow,
    digest_segments,
    manifest_path,
    parse_manifest,
)
from reshard_service.storage.base import Storage

_BLOCK = 4 << 20


@dataclass(frozen=True, slots=True)
class Verification:
    """What ``verify`` found; ``faults`` is empty if every byte is what was written."""

    files: int
    bytes: int
    algorithm: str
    faults: tuple[Notice, ...]


def find_manifest(storage: Storage, single_file: str | None) -> tuple[Manifest, str]:
    """The manifest of a folder, or of one file of it; and its path."""
    path = manifest_path(single_file is not None, single_file or "")
    if storage.stat(path) is None:
        if single_file is not None and storage.stat(single_file) is None:
            raise NotACheckpoint(f"nothing lies at {single_file!r} in {storage.uri!r}")
        raise InputRefused(
            f"there is no {path!r} at {storage.uri!r}: only what this tool wrote can be verified",
            hint="`reshard diff` compares it with another copy",
        )
    return parse_manifest(storage.read_bytes(path), named=path), path


def verify(
    storage: Storage,
    manifest: Manifest,
    *,
    threads: int = 2,
    progress: Callable[[int], None] = lambda checked: None,
) -> Verification:
    """Read every segment of every file again."""
    with ThreadPoolExecutor(threads) as pool:
        faults = [
            fault
            for found in pool.map(
                lambda file: list(_faults_of_file(storage, file, manifest.algorithm, progress)), manifest.files
            )
            for fault in found
        ]
    return Verification(
        len(manifest.files), sum(file.bytes for file in manifest.files), manifest.algorithm, tuple(faults)
    )


def _faults_of_file(
    storage: Storage, file: ManifestFile, algorithm: str, progress: Callable[[int], None]
) -> Iterable[Notice]:
    try:
        status = storage.stat(file.path)
        if status is None:
            yield Notice("file_missing", "the file is not there", file.path)
            return
        if status.bytes != file.bytes:
            yield Notice("file_size", f"the file has {status.bytes} bytes, {file.bytes} were written", file.path)
            return
        if file.bytes and not file.segments:
            yield Notice("manifest_damaged", "the manifest has no digest of this file's bytes", file.path)
        if digest_segments(file.segments, algorithm) != file.digest:
            yield Notice(
                "manifest_damaged", "the manifest's own digests of this file contradict one another", file.path
            )
        yield from _faults_of_segments(storage, file, file.segments, algorithm, progress)
    except (SourceCorrupt, StorageFailed) as error:
        yield Notice("file_unreadable", error.message, file.path)


def _faults_of_segments(
    storage: Storage,
    file: ManifestFile,
    segments: Iterable[SegmentRow],
    algorithm: str,
    progress: Callable[[int], None] = lambda checked: None,
) -> Iterable[Notice]:
    block = memoryview(bytearray(_BLOCK))
    reader = storage.open(file.path)
    try:
        for segment in segments:
            start, length, digest = segment
            if start < 0 or length < 0 or start + length > file.bytes:
                yield Notice("manifest_damaged", f"a segment at {start} reaches out of the file", file.path)
                continue
            found = read_digest(reader, start, length, block, algorithm)
            progress(length)
            if found != digest:
                yield Notice(
                    "digest",
                    f"bytes {start} to {start + length} have {algorithm} {found}, written was {digest}",
                    file.path,
                    at=str(start),
                )
    finally:
        reader.close()


def check_staged(storage: Storage, manifest: Manifest, data_files: int, choice: str) -> None:
    """Read again what was just written: ``sample`` the first and one more segment of each data file, ``full`` all.

    The first ``data_files`` of the manifest are data files. Raises :class:`StorageFailed`: a disk that does not give
    back what it was given.
    """
    if choice == "none":
        return
    for number, file in enumerate(manifest.files[:data_files]):
        segments = file.segments
        if choice == "sample" and len(segments) > 2:
            segments = (segments[0], segments[1 + number % (len(segments) - 1)])
        for fault in _faults_of_segments(storage, file, segments, manifest.algorithm):
            raise StorageFailed(
                f"{file.path!r} reads back differently than it was written: {fault.reason}",
                file=file.path,
                hint="the target's disk or file system is failing; write somewhere else",
            )


__all__ = ["MANIFEST_NAME", "Verification", "check_staged", "find_manifest", "verify"]
