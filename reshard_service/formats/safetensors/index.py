"""``model.safetensors.index.json``: which tensor lies in which shard, checked against the shards' own headers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from reshard_service.catalogue import Notice
from reshard_service.errors import CheckpointIncomplete, SourceCorrupt, UnsupportedSource
from reshard_service.formats.safetensors.header import Header
from reshard_service.formats.strict_json import read_json_object
from reshard_service.storage.base import Storage, contained_path

INDEX_NAME = "model.safetensors.index.json"
INDEX_SUFFIX = ".safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Index:
    """The parsed index; ``files`` in the order of their names."""

    path: str
    weight_map: Mapping[str, str] = field(repr=False)
    files: tuple[str, ...]
    total_size: int | None
    raw: bytes = field(repr=False)


def read_index(storage: Storage, path: str) -> Index:
    """Parse an index and make sure that every file it names is a plain path, present, and a safetensors file."""
    document, raw = read_json_object(storage, path, what="index")
    weight_map = document.get("weight_map")
    if not isinstance(weight_map, dict) or not all(type(file) is str for file in weight_map.values()):
        raise SourceCorrupt(f"index {path!r} has no weight_map of tensor names to file names", file=path)
    files = sorted({contained_path(file, named_in=path) for file in set(weight_map.values())})
    foreign = next((file for file in files if not file.endswith(".safetensors")), None)
    if foreign is not None:
        raise UnsupportedSource(f"index {path!r} names {foreign!r}, which is no safetensors file", file=path)
    missing = [file for file in files if (found := storage.stat(file)) is None or found.is_dir]
    if missing:
        lost = sum(1 for file in weight_map.values() if file in set(missing))
        raise CheckpointIncomplete(
            f"index {path!r} names {len(missing)} of {len(files)} files that are not there, such as {missing[0]!r} "
            f"({lost} tensors)",
            file=missing[0],
            hint="copy the missing files, or wait until the checkpoint is written",
        )
    metadata = document.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if isinstance(total, float) and total.is_integer():
        total = int(total)  # some writers
    return Index(path, weight_map, tuple(files), total if type(total) is int else None, raw)


def cross_check(index: Index, headers: Sequence[Header], *, strict: bool) -> tuple[list[frozenset[str]], list[Notice]]:
    """Per file the names *not* to take from it, and what is odd about the index.

    A tensor that the index places in a file which lacks it is an error; one that several files hold is taken from
    where the index says; one that the index does not list is taken with a notice (``strict``: error), since every
    loader that opens the shards takes it too.
    """
    notices: list[Notice] = []
    listed: list[set[str]] = [set() for _ in index.files]
    number = {file: i for i, file in enumerate(index.files)}
    for name, file in index.weight_map.items():
        listed[number[file]].add(name)
    skipped: list[frozenset[str]] = []
    for file, names, header in zip(index.files, listed, headers, strict=True):
        present = set(header.names)
        lacking = names - present
        if lacking:
            raise SourceCorrupt(
                f"index {index.path!r} places tensor {min(lacking)!r} in {file!r}, which does not hold it"
                + (f" (nor {len(lacking) - 1} others)" if len(lacking) > 1 else ""),
                tensor=min(lacking),
                file=file,
                hint="index and shards are of different checkpoints; copy them together from their origin",
            )
        extra = present - names
        elsewhere = frozenset(name for name in extra if name in index.weight_map)
        unlisted = extra - elsewhere
        for what, code, found in (
            ("is listed for another file and taken from there", "duplicate_in_shards", elsewhere),
            ("is not in the index, but taken", "not_in_index", unlisted),
        ):
            if not found:
                continue
            reason = f"tensor {min(found)!r} of {file!r} {what}" + (
                f"; so are {len(found) - 1} others" if len(found) > 1 else ""
            )
            if strict:
                raise SourceCorrupt(reason, tensor=min(found), file=file)
            notices.append(Notice(code, reason, min(found), file))
        skipped.append(elsewhere)
    return skipped, notices


def index_bytes(weight_map: Mapping[str, str], total_size: int) -> bytes:
    """The index as transformers writes it; ``total_size`` counts the tensors' bytes, headers excluded."""
    document = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
