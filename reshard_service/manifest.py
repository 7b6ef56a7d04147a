"""The manifest written with every target: digests of all stored bytes, nothing that differs from run to run.

``reshard.manifest.json`` lies in a folder, ``<file>.reshard.json`` beside a single file (decision 17). It holds no
time, host or attempt, so that a resumed conversion gives the same bytes as an undisturbed one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import xxhash

from reshard_service.errors import SourceCorrupt
from reshard_service.storage.base import contained_path

MANIFEST_NAME = "reshard.manifest.json"
MANIFEST_VERSION = 1
ALGORITHM = "xxh3-128"
_LIMIT_BYTES = 1 << 30

SegmentRow = tuple[int, int, str]
"""Start and length in the file, and digest."""


@dataclass(frozen=True, slots=True)
class ManifestFile:
    """One file of the target. ``segments`` cover every byte that is not padding, in order."""

    path: str
    bytes: int
    digest: str
    segments: tuple[SegmentRow, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """What was written. ``plan`` is the digest of all that decides the bytes: source, layout, options (decision 19)."""

    format: str
    algorithm: str
    plan: str
    files: tuple[ManifestFile, ...]
    left_out: tuple[str, ...] = ()
    world: int | None = None

    def to_bytes(self) -> bytes:
        """JSON with one line per segment, so that two manifests compare well with a text diff."""
        document = {
            "version": MANIFEST_VERSION,
            "format": self.format,
            "algo": self.algorithm,
            "plan": self.plan,
            "world": self.world,
            "left_out": list(self.left_out),
        }
        head = json.dumps(document, indent=1, ensure_ascii=False)[:-2]
        files = ",\n".join(
            json.dumps({"path": file.path, "bytes": file.bytes, "digest": file.digest}, ensure_ascii=False)[:-1]
            + ', "segments": [\n'
            + ",\n".join(f'[{start}, {length}, "{digest}"]' for start, length, digest in file.segments)
            + "\n]}"
            for file in self.files
        )
        return f'{head},\n "files": [\n{files}\n]\n}}\n'.encode()


class Hasher(Protocol):
    """The part of hashlib's interface that we use."""

    def update(self, data: memoryview, /) -> None: ...

    def hexdigest(self) -> str: ...


def new_hasher(algorithm: str) -> Hasher:
    """An empty running digest."""
    hasher: Hasher = xxhash.xxh3_128() if algorithm == ALGORITHM else hashlib.sha256()
    return hasher


def digest_bytes(data: bytes | memoryview, algorithm: str = ALGORITHM) -> str:
    """Hex digest of some bytes."""
    if algorithm == ALGORITHM:
        return xxhash.xxh3_128_hexdigest(data)
    return hashlib.sha256(data).hexdigest()


def digest_segments(segments: Sequence[SegmentRow], algorithm: str = ALGORITHM) -> str:
    """A file's digest: that of its segment list, so that it can be made from parts written by several workers."""
    text = "".join(f"{start} {length} {digest}\n" for start, length, digest in segments)
    return digest_bytes(text.encode(), algorithm)


def manifest_file(path: str, size: int, segments: Sequence[SegmentRow], algorithm: str = ALGORITHM) -> ManifestFile:
    """A file's entry with its digest computed."""
    return ManifestFile(path, size, digest_segments(segments, algorithm), tuple(segments))


def parse_manifest(data: bytes, *, named: str) -> Manifest:
    """The manifest in ``data``, checked: :class:`SourceCorrupt` for anything that is not one of ours."""
    try:
        if len(data) > _LIMIT_BYTES:
            raise ValueError(f"larger than {_LIMIT_BYTES} bytes")
        document = json.loads(data)
        if document["version"] != MANIFEST_VERSION:
            raise ValueError(f"version {document['version']!r} is not {MANIFEST_VERSION}")
        return Manifest(
            format=str(document["format"]),
            algorithm=_known_algorithm(str(document["algo"])),
            plan=str(document["plan"]),
            files=tuple(_file(entry, named) for entry in document["files"]),
            left_out=tuple(str(key) for key in document.get("left_out", ())),
            world=None if document.get("world") is None else int(document["world"]),
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SourceCorrupt(f"{named!r} is not a manifest of ours: {error}", file=named) from None


def _known_algorithm(name: str) -> str:
    if name not in (ALGORITHM, "sha256"):
        raise ValueError(f"unknown digest {name!r}")
    return name


def _file(entry: dict[str, Any], named: str) -> ManifestFile:
    return ManifestFile(
        contained_path(str(entry["path"]), named_in=named),
        int(entry["bytes"]),
        str(entry["digest"]),
        tuple((int(start), int(length), str(digest)) for start, length, digest in entry["segments"]),
    )


def manifest_path(is_single_file: bool, name: str) -> str:
    """Where the manifest of a target lies, relative to the target's folder (its parent, for a single file)."""
    return f"{name}.reshard.json" if is_single_file else MANIFEST_NAME
