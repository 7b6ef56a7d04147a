"""Several catalogues of folders and files side by side as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import xxhash

from reshard_service.catalogue import ByteObject, Catalogue, Chunks, FileEntry, Identity, Int64s, Notice, Tensor
from reshard_service.errors import AmbiguousSource
from reshard_service.storage.base import Storage


def merge(
    storage: Storage,
    parts: Sequence[tuple[str, Catalogue]],
    *,
    notices: Sequence[Notice] = (),
    side_files: tuple[str, ...] = (),
    producer: str | None = None,
) -> Catalogue:
    """One catalogue over ``storage`` from catalogues of folders in it; ``parts`` are (path prefix, catalogue).

    Raises :class:`AmbiguousSource` if two parts hold the same tensor or the same key.
    """
    tensors: list[Tensor] = []
    objects: list[ByteObject] = []
    files: list[FileEntry] = []
    bases: list[int] = []
    owner: dict[str | Identity, str] = {}
    for prefix, part in parts:
        bases.append(len(files))
        leaves: tuple[Tensor | ByteObject, ...] = (*part.tensors, *part.objects)
        for leaf in leaves:
            names: tuple[str | Identity, ...] = (leaf.key, leaf.identity)
            for name in names:
                place = prefix + part.files[leaf.file].path if isinstance(leaf, ByteObject) else _place(prefix, part)
                other = owner.setdefault(name, place)
                if other != place:
                    raise AmbiguousSource(
                        f"{leaf.key!r} is both in {other!r} and in {place!r} of {storage.uri!r}",
                        tensor=leaf.key,
                        hint="name one of them",
                    )
        tensors += part.tensors
        objects += (replace(leaf, file=leaf.file + bases[-1]) for leaf in part.objects)
        files += (replace(entry, path=prefix + entry.path) for entry in part.files)
    formats = {part.format for _, part in parts if part.format}
    producers = {part.producer for _, part in parts if part.producer}
    digest = xxhash.xxh3_128_hexdigest(
        "\n".join(f"{prefix}\0{part.metadata_digest}" for prefix, part in parts).encode()
    )
    return Catalogue(
        uri=storage.uri,
        storage=storage,
        format=formats.pop() if len(formats) == 1 else "composite",
        tensors=tuple(tensors),
        chunks=concatenate([part.chunks for _, part in parts], bases),
        files=tuple(files),
        objects=tuple(objects),
        producer=producer or (producers.pop() if len(producers) == 1 else None),
        metadata_digest=digest,
        metadata_bytes=sum(part.metadata_bytes for _, part in parts),
        side_files=side_files,
        notices=(
            *notices,
            *(
                replace(notice, at=prefix + (notice.at or "")) if prefix else notice
                for prefix, part in parts
                for notice in part.notices
            ),
        ),
        world=max((part.world for _, part in parts if part.world is not None), default=None),
    )


def _place(prefix: str, part: Catalogue) -> str:
    """What a part is called in an error: its folder, or its first file."""
    return prefix or (part.files[0].path if part.files else "")


def concatenate(tables: Sequence[Chunks], file_bases: Sequence[int]) -> Chunks:
    """One chunk table from several; file numbers of table ``i`` grow by ``file_bases[i]``."""
    dims = max((table.rank for table in tables), default=0)

    def widened(column: Int64s, fill: int) -> Int64s:
        return np.pad(column, ((0, 0), (0, dims - column.shape[1])), constant_values=fill)

    def optional(columns: list[Int64s | None], fill: Callable[[Chunks], Int64s]) -> Int64s | None:
        if all(column is None for column in columns):
            return None
        return np.concatenate(
            [fill(table) if column is None else column for column, table in zip(columns, tables, strict=True)]
        )

    counts = np.concatenate([np.diff(table.first) for table in tables]) if tables else np.zeros(0, dtype=np.int64)
    local = optional(
        [None if table.local is None else widened(table.local, 0) for table in tables],
        lambda table: np.zeros((len(table), dims), dtype=np.int64),
    )
    stored = optional(
        [None if table.stored is None else widened(table.stored, 1) for table in tables],
        lambda table: widened(table.sizes, 1),
    )
    return Chunks(
        first=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        offsets=np.concatenate([widened(table.offsets, 0) for table in tables]),
        sizes=np.concatenate([widened(table.sizes, 1) for table in tables]),
        file=np.concatenate([table.file + base for table, base in zip(tables, file_bases, strict=True)]).astype(
            np.int32
        ),
        start=np.concatenate([table.start for table in tables]),
        length=np.concatenate([table.length for table in tables]),
        storing=np.concatenate([table.storing for table in tables]),
        crc=optional([table.crc for table in tables], lambda table: np.full(len(table), -1, dtype=np.int64)),
        local=local,
        stored=stored,
    )
