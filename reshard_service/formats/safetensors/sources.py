"""What the readers of the safetensors family share: headers of many files, file entries, the metadata digest."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import xxhash

from reshard_service.catalogue import FileEntry, Identity, Path, Section
from reshard_service.errors import UnsafeSource
from reshard_service.formats.safetensors.header import LENGTH_BYTES, MAX_TENSORS, Header, read_header
from reshard_service.storage.base import Storage

REMOTE_READS = 16
"""Headers fetched at once from a store where each costs a round trip."""

OPTIMIZER_PREFIX = "optimizer.state."


def read_headers(storage: Storage, paths: Sequence[str]) -> list[Header]:
    """The headers of these files, in their order."""
    if storage.is_local or len(paths) < 2:
        headers = [read_header(storage, path) for path in paths]
    else:
        with ThreadPoolExecutor(min(REMOTE_READS, len(paths))) as pool:
            headers = list(pool.map(lambda path: read_header(storage, path), paths))
    total = sum(len(header.names) for header in headers)
    if total > MAX_TENSORS:
        raise UnsafeSource(f"{storage.uri!r} lists {total} tensors in its headers; at most {MAX_TENSORS} are read")
    return headers


def file_entries(paths: Sequence[str], headers: Sequence[Header]) -> tuple[FileEntry, ...]:
    """One entry a data file."""
    return tuple(
        FileEntry(path, header.file_bytes, header.identity) for path, header in zip(paths, headers, strict=True)
    )


@dataclass(slots=True)
class MetadataSum:
    """Digest and size of every metadata byte that a catalogue is made from."""

    total_bytes: int = 0
    _parts: list[str] = field(default_factory=list)

    def add(self, path: str, data: bytes) -> None:
        """A whole metadata file."""
        self.total_bytes += len(data)
        self._parts.append(f"{path}\0{xxhash.xxh3_128_hexdigest(data)}")

    def add_header(self, path: str, header: Header) -> None:
        """The header of a data file."""
        self.total_bytes += header.data_start
        self._parts.append(f"{path}\0{header.data_start - LENGTH_BYTES}\0{header.digest}")

    def digest(self) -> str:
        return xxhash.xxh3_128_hexdigest("\n".join(self._parts).encode("utf-8", "surrogateescape"))


def identities(names: Iterable[str], known: Container[str]) -> list[tuple[Identity, Path]]:
    """What each bare name of the family stands for (decision 2): ``optimizer.state.<fqn>.<slot>``, else the model's.

    ``known`` are the model's FQNs, which tell where an optimizer key's FQN ends; without them the slot is the last
    component.
    """
    found: list[tuple[Identity, Path]] = []
    for name in names:
        if name.startswith(OPTIMIZER_PREFIX):
            fqn, slot = split_slot(name[len(OPTIMIZER_PREFIX) :], known)
            if slot:
                found.append((Identity(Section.OPTIMIZER, fqn, slot), ("optimizer", "state", fqn, slot)))
                continue
        found.append((Identity(Section.MODEL, name), (name,)))
    return found


def split_slot(text: str, known: Container[str]) -> tuple[str, str]:
    """``<fqn>.<slot>`` cut where the longest known FQN ends, else at the last dot."""
    end = text.rfind(".")
    last = end
    while end > 0:
        if text[:end] in known:
            return text[:end], text[end + 1 :]
        end = text.rfind(".", 0, end)
    return (text[:last], text[last + 1 :]) if last > 0 else (text, "")
