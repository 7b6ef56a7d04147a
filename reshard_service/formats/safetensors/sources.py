"""What the readers of the safetensors family share: headers of many files, file entries, the metadata digest."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import xxhash

from reshard_service.catalogue import FileEntry, Identity, Path, Section
from reshard_service.errors import UnsafeSource
from reshard_service.formats.safetensors.header import LENGTH_BYTES, MAX_TENSORS, Header, read_header
from reshard_service.identity import known_fqns, split_at_known
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


def identities(names: Collection[str], key_prefix: str | None = None) -> list[tuple[Identity, Path]]:
    """What each name of the family stands for, and its path in a nested state dict (decision 2).

    Names are bare FQNs of the model, but ``optimizer.state.<fqn>.<slot>`` is the optimizer's: cut where the longest
    known FQN ends, failing that at the last dot. Where the user gives a ``key_prefix``, the model lies under it.
    """
    known: AbstractSet[str] = frozenset()
    if key_prefix or any(name.startswith(OPTIMIZER_PREFIX) for name in names):
        known = known_fqns(_path(name, key_prefix) for name in names)
    return [_identity(name, known, key_prefix) for name in names]


def _path(name: str, key_prefix: str | None) -> Path:
    if key_prefix and name.startswith(f"{key_prefix}."):
        return (name[len(key_prefix) + 1 :],)
    if name.startswith(OPTIMIZER_PREFIX):
        return ("optimizer", name[len("optimizer.") :])
    return ("model", name)


def _identity(name: str, known: AbstractSet[str], key_prefix: str | None) -> tuple[Identity, Path]:
    if key_prefix and name.startswith(f"{key_prefix}."):
        fqn = name[len(key_prefix) + 1 :]
        return Identity(Section.MODEL, fqn), (key_prefix, fqn)
    if name.startswith(OPTIMIZER_PREFIX):
        rest = name[len(OPTIMIZER_PREFIX) :]
        fqn, slot = split_at_known(rest, known) or (rest.rpartition(".")[0], rest.rpartition(".")[2])
        if fqn and slot:
            return Identity(Section.OPTIMIZER, fqn, slot), ("optimizer", "state", fqn, slot)
    return Identity(Section.MODEL, name), (name,)
