"""What the source's own manifest says of its bytes, so that damage shows while they are read."""

from __future__ import annotations

from pathlib import Path

from reshard_service.catalogue import Catalogue
from reshard_service.errors import SourceCorrupt
from reshard_service.manifest import MANIFEST_NAME, Manifest, SegmentRow, digest_bytes, parse_manifest
from reshard_service.storage.local import LocalStorage


class SourceDigests:
    """Segments of the stored arrays of a source that was written by us; empty for any other.

    A file whose size is not the manifest's was replaced on purpose, by a tool that does not know the manifest: it is
    left out.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self.algorithm = ""
        self._segments: dict[int, dict[int, SegmentRow]] = {}
        manifest = _manifest(catalogue)
        if manifest is None:
            return
        self.algorithm = manifest.algorithm
        single = len(catalogue.files) == 1 and catalogue.files[0].path == ""
        written = {"" if single else file.path: file for file in manifest.files}
        for number, entry in enumerate(catalogue.files):
            file = written.get(entry.path)
            if file is not None and file.bytes == entry.bytes:
                self._segments[number] = {segment[0]: segment for segment in file.segments}

    def __bool__(self) -> bool:
        return bool(self._segments)

    def of(self, file: int, start: int, length: int) -> list[SegmentRow] | None:
        """The segments that make up ``[start, start + length)`` of a file; None if it has no such."""
        known = self._segments.get(file)
        found: list[SegmentRow] = []
        end = start + length
        while known is not None and start < end:
            segment = known.get(start)
            if segment is None or segment[1] <= 0:
                return None
            found.append(segment)
            start += segment[1]
        return found if known is not None and start == end else None

    def check(self, file: int, start: int, data: memoryview, key: str, path: str) -> None:
        """Compare stored bytes that are at hand whole; raises :class:`SourceCorrupt`."""
        expected = self.of(file, start, len(data))
        if expected is not None and len(expected) == 1:
            self.compare(expected, [(start, len(data), digest_bytes(data, self.algorithm))], key, path)

    def compare(self, expected: list[SegmentRow], found: list[SegmentRow], key: str, path: str) -> None:
        """Raise :class:`SourceCorrupt` if the segments of tensor ``key`` in file ``path`` are not the written ones."""
        for wanted, is_there in zip(expected, found, strict=False):
            if wanted != is_there:
                raise SourceCorrupt(
                    f"tensor {key!r} in {path!r}: bytes {wanted[0]} to {wanted[0] + wanted[1]} have "
                    f"{self.algorithm} {is_there[2]}, the checkpoint's manifest says {wanted[2]}",
                    tensor=key,
                    file=path,
                    hint=f"copy the file again; if it was changed on purpose, remove {MANIFEST_NAME}",
                )


def _manifest(catalogue: Catalogue) -> Manifest | None:
    """The manifest in a folder, or beside a local file."""
    if len(catalogue.files) == 1 and catalogue.files[0].path == "":
        path = Path(catalogue.storage.uri)
        if not catalogue.storage.is_local:
            return None
        storage, name = LocalStorage(path.parent), f"{path.name}.reshard.json"
        return parse_manifest(storage.read_bytes(name), named=name) if storage.stat(name) is not None else None
    if catalogue.storage.stat(MANIFEST_NAME) is None:
        return None
    return parse_manifest(catalogue.storage.read_bytes(MANIFEST_NAME), named=MANIFEST_NAME)
