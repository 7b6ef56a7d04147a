"""Safetensors into a catalogue: one file, an index with its shards, or a folder whose files speak for themselves."""

from __future__ import annotations

import re
from collections.abc import Sequence

from reshard_service.catalogue import Catalogue, Notice, Tensor, build_chunks
from reshard_service.errors import AmbiguousSource, CheckpointIncomplete, NotACheckpoint
from reshard_service.formats.options import OpenOptions
from reshard_service.formats.safetensors.header import Header
from reshard_service.formats.safetensors.index import INDEX_NAME, INDEX_SUFFIX, cross_check, read_index
from reshard_service.formats.safetensors.sources import MetadataSum, file_entries, identities, read_headers
from reshard_service.formats.side_files import side_file_names
from reshard_service.formats.strict_json import paused_gc
from reshard_service.storage.base import Storage

SINGLE_NAME = "model.safetensors"

_PRODUCERS = {"pt": "transformers", "mlx": "mlx", "flax": "flax", "np": "numpy"}
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5,6})-of-(?P<count>\d{5,6})\.safetensors\Z")


@paused_gc()
def open_safetensors(storage: Storage, options: OpenOptions) -> Catalogue:
    """The catalogue of a safetensors file or folder, from headers and index alone.

    A folder is read by its index; without one by the only file, ``model.safetensors``, or a complete ``-of-`` set.
    Raises :class:`AmbiguousSource` where several readings are left, naming them.
    """
    status = storage.stat("")
    if status is not None and not status.is_dir:
        return _catalogue(storage, options, [""], read_headers(storage, [""]), [])
    entries = [entry for entry in storage.list_dir() if not entry.is_dir]
    indices = [entry.name for entry in entries if entry.name.endswith(INDEX_SUFFIX)]
    files = [entry.name for entry in entries if entry.name.endswith(".safetensors")]
    if indices:
        return _indexed(storage, options, indices, files)
    if not files:
        raise NotACheckpoint(f"no safetensors file lies in {storage.uri!r}")
    chosen, notices = _without_index(storage, files)
    for name in chosen:
        storage.follow(name)
    return _catalogue(storage, options, chosen, read_headers(storage, chosen), notices)


def _indexed(storage: Storage, options: OpenOptions, indices: Sequence[str], files: Sequence[str]) -> Catalogue:
    if INDEX_NAME not in indices and len(indices) > 1:
        raise AmbiguousSource(
            f"{storage.uri!r} has several indices ({', '.join(indices)}) and none is {INDEX_NAME!r}",
            hint="put the one you mean and its shards into a folder of their own",
        )
    index = read_index(storage, INDEX_NAME if INDEX_NAME in indices else indices[0])
    headers = read_headers(storage, index.files)
    skipped, notices = cross_check(index, headers, strict=options.strict)
    beside = sorted(set(files) - set(index.files))
    if beside:
        notices.append(
            Notice("files_ignored", f"{', '.join(beside[:5])} ({len(beside)} files) are not in {index.path}", beside[0])
        )
    metadata = MetadataSum()
    metadata.add(index.path, index.raw)
    taken = sum(int(header.lengths.sum()) for header in headers) - _skipped_bytes(headers, skipped)
    if index.total_size is not None and index.total_size != taken:
        reason = f"{index.path} says total_size {index.total_size}, the tensors have {taken} bytes"
        notices.append(Notice("total_size_wrong", reason, at=index.path))
    return _catalogue(storage, options, index.files, headers, notices, skipped=skipped, metadata=metadata)


def _skipped_bytes(headers: Sequence[Header], skipped: Sequence[frozenset[str]]) -> int:
    return sum(
        int(length)
        for header, skip in zip(headers, skipped, strict=True)
        if skip
        for name, length in zip(header.names, header.lengths, strict=True)
        if name in skip
    )


def _without_index(storage: Storage, files: Sequence[str]) -> tuple[list[str], list[Notice]]:
    """Which of a folder's files are the checkpoint."""
    if len(files) == 1:
        match = _SHARD.match(files[0])
        if match and int(match["count"]) > 1:
            raise _incomplete(storage, match["stem"], int(match["count"]), 1)
        return list(files), []
    main = [name for name in files if name == SINGLE_NAME]
    sets: dict[tuple[str, str], list[str]] = {}
    for name in files:
        match = _SHARD.match(name)
        if match:
            sets.setdefault((match["stem"], match["count"]), []).append(name)
    if main and not sets:
        others = [name for name in files if name != SINGLE_NAME]
        return main, [Notice("files_ignored", f"{', '.join(others[:5])} lie beside {SINGLE_NAME}", others[0])]
    if len(sets) == 1 and not main:
        ((stem, count), members) = next(iter(sets.items()))
        if len(members) != int(count):
            raise _incomplete(storage, stem, int(count), len(members))
        notices = [Notice("index_missing", f"no index; took the {count} files {stem}-…-of-{count}", members[0])]
        others = sorted(set(files) - set(members))
        if others:
            notices.append(Notice("files_ignored", f"{', '.join(others[:5])} lie beside them", others[0]))
        return sorted(members), notices
    if not sets and not main:
        return _disjoint(storage, files)
    raise AmbiguousSource(
        f"{storage.uri!r} has no index and several sets of safetensors files: {', '.join(files[:8])}",
        hint="name the one file, or put the set you mean into a folder of its own",
    )


def _disjoint(storage: Storage, files: Sequence[str]) -> tuple[list[str], list[Notice]]:
    """Files that are no numbered set are one checkpoint only if no tensor is in two of them.

    ``consolidated.safetensors`` (the same weights under other names, as Mistral publishes) is never joined to others.
    """
    named = [name for name in files if not name.startswith("consolidated")]
    if len(named) == len(files):
        seen: dict[str, str] = {}
        clash: tuple[str, str, str] | None = None
        for path, header in zip(files, read_headers(storage, files), strict=True):
            for name in header.names:
                if name in seen and clash is None:
                    clash = (name, seen[name], path)
                seen[name] = path
        if clash is None:
            reason = f"no index; joined {len(files)} files whose tensors all have different names"
            return list(files), [Notice("index_missing", reason, files[0])]
        reason = f"tensor {clash[0]!r} is both in {clash[1]!r} and in {clash[2]!r}"
    else:
        reason = f"it has {', '.join(files[:8])}"
    raise AmbiguousSource(
        f"{storage.uri!r} has several safetensors files and no index says which belong together: {reason}",
        hint="name the one file you mean",
    )


def _incomplete(storage: Storage, stem: str, count: int, found: int) -> CheckpointIncomplete:
    return CheckpointIncomplete(
        f"{storage.uri!r} has {found} of the {count} files {stem}-…-of-{count:05d}.safetensors and no index",
        hint="copy the missing files and the index, or wait until the checkpoint is written",
    )


def _catalogue(
    storage: Storage,
    options: OpenOptions,
    paths: Sequence[str],
    headers: Sequence[Header],
    notices: Sequence[Notice],
    *,
    skipped: Sequence[frozenset[str]] | None = None,
    metadata: MetadataSum | None = None,
) -> Catalogue:
    """One tensor a header entry, each a single chunk, in file order and then in the order in which they lie."""
    metadata = metadata or MetadataSum()
    rows: list[tuple[int, int]] = []
    owner: dict[str, int] = {}
    for file, header in enumerate(headers):
        metadata.add_header(paths[file], header)
        skip = skipped[file] if skipped is not None else frozenset[str]()
        for at, name in enumerate(header.names):
            if name in skip:
                continue
            if name in owner:
                raise AmbiguousSource(
                    f"tensor {name!r} is both in {paths[owner[name]]!r} and in {paths[file]!r}, and no index decides",
                    tensor=name,
                    hint="the files are of different checkpoints; name the one you mean",
                )
            owner[name] = file
            rows.append((file, at))
    found = identities([headers[file].names[at] for file, at in rows], options.key_prefix)
    tensors = tuple(
        Tensor(headers[file].names[at], identity, headers[file].dtypes[at], headers[file].shapes[at], path)
        for (file, at), (identity, path) in zip(rows, found, strict=True)
    )
    chunks = build_chunks(
        len(tensors),
        range(len(tensors)),
        offsets=[(0,) * len(tensor.shape) for tensor in tensors],
        sizes=[tensor.shape for tensor in tensors],
        file=[file for file, _ in rows],
        start=[int(headers[file].starts[at]) for file, at in rows],
        length=[int(headers[file].lengths[at]) for file, at in rows],
    )
    return Catalogue(
        uri=storage.uri,
        storage=storage,
        format="safetensors",
        tensors=tensors,
        chunks=chunks,
        files=file_entries(paths, headers),
        producer=options.producer or _producer(headers),
        metadata_digest=metadata.digest(),
        metadata_bytes=metadata.total_bytes,
        side_files=side_file_names(storage),
        notices=tuple(notices),
    )


def _producer(headers: Sequence[Header]) -> str | None:
    """What the files' own metadata tells about the framework that wrote them."""
    written = {header.metadata.get("format", "") for header in headers}
    return _PRODUCERS.get(written.pop()) if len(written) == 1 else None
