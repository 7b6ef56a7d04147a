"""Rank-local files into a catalogue, under the layout that cut them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from reshard_service.catalogue import Catalogue, Identity, Int64s, Notice, Section, Tensor
from reshard_service.dtypes import DType
from reshard_service.errors import (
    AmbiguousSource,
    CheckpointIncomplete,
    GeometryWrong,
    NotACheckpoint,
    SourceCorrupt,
)
from reshard_service.formats.rank_safetensors.layout_file import (
    LAYOUT_NAME,
    MAX_LAYOUT_BYTES,
    LayoutFile,
    parse_layout_file,
    parse_rank_file_name,
    rank_file_name,
)
from reshard_service.formats.rank_safetensors.local_chunks import local_chunks
from reshard_service.formats.rank_safetensors.shapes import global_shape
from reshard_service.formats.safetensors.header import Header
from reshard_service.formats.safetensors.sources import MetadataSum, file_entries, identities, read_headers
from reshard_service.formats.side_files import side_file_names
from reshard_service.formats.strict_json import paused_gc, read_small_file
from reshard_service.layouts.holdings import Holdings, View
from reshard_service.storage.base import Storage

if TYPE_CHECKING:
    from reshard_service.formats.options import OpenOptions
    from reshard_service.layouts.layout import Layout

Place = tuple[int, int]
"""File and position in its header."""


@paused_gc()
def open_rank_safetensors(storage: Storage, options: OpenOptions) -> Catalogue:
    """The catalogue of a folder of rank files.

    The layout comes from ``reshard.layout.json`` or ``options.layout`` (:class:`AmbiguousSource` if neither is there,
    or if they differ). Every rank's files must be there, and every local tensor must have the shape that the layout
    gives its rank (:class:`GeometryWrong`).
    """
    names = [entry.name for entry in storage.list_dir() if not entry.is_dir]
    parsed = {name: place for name in names if (place := parse_rank_file_name(name)) is not None}
    if not parsed:
        raise NotACheckpoint(f"no model-rank-…-part-….safetensors lies in {storage.uri!r}")
    metadata = MetadataSum()
    layout, told = _layout(storage, options, names, metadata)
    paths = _all_parts(parsed, layout.world, storage.uri)
    headers = read_headers(storage, paths)
    for path, header in zip(paths, headers, strict=True):
        metadata.add_header(path, header)
    places = _places(paths, headers, [parsed[path][0] for path in paths], layout.world)
    found = identities(places, options.key_prefix)
    shapes, held = _geometry(layout, told, places, [identity for identity, _ in found], headers, paths)
    tensors = tuple(
        Tensor(name, identity, _dtype_of(name, row, headers, paths), shapes[name], path)
        for (name, row), (identity, path) in zip(places.items(), found, strict=True)
    )
    beside = [name for name in names if name.endswith(".safetensors") and name not in parsed]
    ignored = Notice("files_ignored", f"{', '.join(beside[:5])} lie beside the rank files and are not read")
    starts = np.array([[headers[file].starts[at] for file, at in row] for row in places.values()], dtype=np.int64)
    file_of = np.array([[file for file, _ in row] for row in places.values()], dtype=np.int32)
    return Catalogue(
        uri=storage.uri,
        storage=storage,
        format="rank-safetensors",
        tensors=tensors,
        chunks=local_chunks(tensors, held, starts, file_of),
        files=file_entries(paths, headers),
        producer=options.producer,
        metadata_digest=metadata.digest(),
        metadata_bytes=metadata.total_bytes,
        side_files=side_file_names(storage),
        notices=(ignored,) if beside else (),
        world=layout.world,
    )


def _layout(
    storage: Storage, options: OpenOptions, names: Sequence[str], metadata: MetadataSum
) -> tuple[Layout, LayoutFile | None]:
    if LAYOUT_NAME not in names:
        if options.layout is None:
            raise AmbiguousSource(
                f"{storage.uri!r} has rank files but no {LAYOUT_NAME}, so nothing tells how the tensors were cut",
                hint="say --source-layout SPEC (with --model for its rules)",
            )
        return options.layout, None
    data = read_small_file(storage, LAYOUT_NAME, max_bytes=MAX_LAYOUT_BYTES)
    metadata.add(LAYOUT_NAME, data)
    told = parse_layout_file(data)
    if options.layout is not None and options.layout.digest() != told.layout.digest():
        raise AmbiguousSource(
            f"--source-layout says {options.layout}, but {LAYOUT_NAME} says {told.layout}",
            hint=f"leave --source-layout out, or remove {LAYOUT_NAME} if it is wrong",
        )
    return told.layout, told


def _all_parts(parsed: Mapping[str, Place], world: int, uri: str) -> list[str]:
    """The rank files by rank and part, without gaps and none too many."""
    last: dict[int, int] = {}
    for rank, part in parsed.values():
        last[rank] = max(part, last.get(rank, 0))
    extra = [rank for rank in last if rank >= world]
    if extra:
        raise SourceCorrupt(
            f"{uri!r} has files of rank {max(extra)}, but the layout has {world} ranks",
            file=rank_file_name(max(extra), 0),
            hint="files of another save lie among them, or the layout is not the one that wrote them",
        )
    present = set(parsed.values())
    for rank in range(world):
        for part in range(last.get(rank, 0) + 1):
            if (rank, part) not in present:
                raise CheckpointIncomplete(
                    f"{rank_file_name(rank, part)!r} is missing from {uri!r} (the layout has {world} ranks)",
                    file=rank_file_name(rank, part),
                    hint="copy the missing file",
                )
    return sorted(parsed, key=lambda name: parsed[name])


def _places(
    paths: Sequence[str], headers: Sequence[Header], rank_of: Sequence[int], world: int
) -> dict[str, list[Place]]:
    """For each name, where every rank's local tensor lies; a rank without one is refused."""
    found: dict[str, dict[int, Place]] = {}
    for file, (path, header, rank) in enumerate(zip(paths, headers, rank_of, strict=True)):
        for at, name in enumerate(header.names):
            places = found.setdefault(name, {})
            if rank in places:
                raise SourceCorrupt(
                    f"tensor {name!r} is both in {paths[places[rank][0]]!r} and in {path!r}", tensor=name, file=path
                )
            places[rank] = (file, at)
    for name, places in found.items():
        if len(places) != world:
            lacking = next(rank for rank in range(world) if rank not in places)
            raise CheckpointIncomplete(
                f"rank {lacking} has no local tensor {name!r}, which other ranks have",
                tensor=name,
                file=rank_file_name(lacking, 0),
                hint="a part of that rank's files is missing",
            )
    return {name: [places[rank] for rank in range(world)] for name, places in found.items()}


def _geometry(
    layout: Layout,
    told: LayoutFile | None,
    places: Mapping[str, list[Place]],
    identified: Sequence[Identity],
    headers: Sequence[Header],
    paths: Sequence[str],
) -> tuple[dict[str, tuple[int, ...]], list[Holdings]]:
    """Global shape and holdings of each tensor, with every local shape checked."""
    local = {name: _local_shapes(name, row, headers, paths) for name, row in places.items()}
    if told is not None:
        lost = next((name for name in told.shapes if name not in places), None)
        extra = next((name for name in places if name not in told.shapes), None)
        if lost is not None or extra is not None:
            raise CheckpointIncomplete(
                f"tensor {lost!r} of {LAYOUT_NAME} is in no rank file"
                if lost is not None
                else f"tensor {extra!r} of the rank files is not in {LAYOUT_NAME}",
                tensor=lost or extra,
            )
        shapes = dict(told.shapes)
    else:
        shapes = {
            name: global_shape(layout, identity.fqn, local[name], name)
            for name, identity in zip(places, identified, strict=True)
        }
    parameters = dict(told.parameters) if told is not None else {}
    parameters |= {
        identity.fqn: shapes[name]
        for name, identity in zip(places, identified, strict=True)
        if identity.section is Section.MODEL
    }
    held: list[Holdings] = []
    for name, identity in zip(places, identified, strict=True):
        parameter = parameters.get(identity.fqn) if identity.slot is not None else None
        holdings = layout.holdings(identity.fqn, shapes[name], View.MEMORY, parameter_shape=parameter)
        if not np.array_equal(holdings.local_shape, local[name]):
            rank = _first_difference(holdings.local_shape, local[name])
            raise GeometryWrong(
                f"tensor {name!r} has shape {local[name][rank].tolist()} on rank {rank}, but the layout gives it "
                f"{holdings.local_shape[rank].tolist()} of {list(shapes[name])}",
                tensor=name,
                file=paths[places[name][rank][0]],
                hint="the layout is not the one that wrote these files",
            )
        held.append(holdings)
    return shapes, held


def _local_shapes(name: str, row: Sequence[Place], headers: Sequence[Header], paths: Sequence[str]) -> Int64s:
    shapes = [headers[file].shapes[at] for file, at in row]
    if len({len(shape) for shape in shapes}) != 1:
        raise SourceCorrupt(
            f"tensor {name!r} has different numbers of dims on different ranks", tensor=name, file=paths[row[0][0]]
        )
    return np.array(shapes, dtype=np.int64).reshape(len(shapes), len(shapes[0]))


def _first_difference(expected: Int64s, found: Int64s) -> int:
    if expected.shape != found.shape:
        return 0
    return int(np.flatnonzero((expected != found).any(axis=1))[0])


def _dtype_of(name: str, row: Sequence[Place], headers: Sequence[Header], paths: Sequence[str]) -> DType:
    file, at = row[0]
    dtype = headers[file].dtypes[at]
    for other, position in row:
        if headers[other].dtypes[position] != dtype:
            raise SourceCorrupt(
                f"tensor {name!r} is {dtype} in {paths[file]!r} but {headers[other].dtypes[position]} in "
                f"{paths[other]!r}",
                tensor=name,
                file=paths[other],
            )
    return dtype
