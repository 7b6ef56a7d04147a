"""One ``torch.save`` file per rank, with that rank's piece of every tensor: joined under the layout that cut them.

accelerate writes ``pytorch_model_fsdp_rank3.bin`` (FSDP's LOCAL_STATE_DICT), DeepSpeed ``mp_rank_03_model_states.pt``,
scripts ``rank3.pt``. A piece is a plain tensor, or a DTensor that also tells the shape of the whole; what was cut how
is in neither, so the layout has to be given, and every local shape has to agree with it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from reshard_service.catalogue import Catalogue, Chunks, Int64s, Section, Tensor
from reshard_service.errors import (
    AmbiguousSource,
    CheckpointIncomplete,
    GeometryWrong,
    LayoutInvalid,
    SourceCorrupt,
)
from reshard_service.formats.rank_safetensors.local_chunks import local_chunks
from reshard_service.formats.rank_safetensors.shapes import global_shape
from reshard_service.formats.torch_zip.reader import TorchFile, left_behind, make_tensors, read_torch_file
from reshard_service.formats.torch_zip.state_dict import StoredTensor
from reshard_service.layouts.holdings import Holdings, View
from reshard_service.storage.base import Storage

if TYPE_CHECKING:
    from reshard_service.formats.options import OpenOptions
    from reshard_service.layouts.layout import Layout

Shape = tuple[int, ...]

_RANK = re.compile(r"(?:\A|[._-])rank[_-]?(?P<rank>\d{1,6})(?=\D|\Z)")


def rank_of_file(name: str) -> int | None:
    """The rank that a per-rank file's name ends in or carries; None if it names none."""
    found = _RANK.search(name)
    return int(found["rank"]) if found else None


def open_torch_ranks(storage: Storage, options: OpenOptions, names: Sequence[str]) -> Catalogue:
    """The catalogue of the per-rank files ``names``, cut as ``options.layout`` says.

    Raises :class:`AmbiguousSource` without a layout, or where every file holds the same bytes and so seems to hold the
    whole of what the layout calls pieces; :class:`CheckpointIncomplete` if a rank's file or a tensor of it
    is missing, :class:`GeometryWrong` where a local shape is not what the layout gives its rank, and
    :class:`LayoutInvalid` where ranks that should hold the same piece hold different bytes.
    """
    if options.layout is None:
        raise AmbiguousSource(
            f"{storage.uri!r} has a file per rank, and nothing tells how the tensors were cut",
            hint="say --source-layout SPEC (with --model for its rules); if each file holds everything, name one file",
        )
    layout = options.layout
    paths = _by_rank(storage, names, layout)
    opened = [read_torch_file(storage, path) for path in paths]
    rows = _rows(opened, paths)
    ordered = list(rows)
    local = {key: _local_shapes(key, rows[key], paths) for key in ordered}
    pieces = _with_keys(opened[0], ordered, [tuple(local[key][0].tolist()) for key in ordered], options)
    shapes = _global_shapes(layout, pieces, local, rows)
    held = [_held(layout, piece, shapes, local, paths) for piece in pieces]
    tensors = tuple(replace(piece, shape=shapes[piece.key]) for piece in pieces)
    at = [{key: i for i, key in enumerate(file.leaves.tensors)} for file in opened]
    places = [[at[rank][key] for rank in range(layout.world)] for key in ordered]
    starts = _table(places, [file.starts for file in opened])
    crcs = _table(places, [file.crcs for file in opened])
    _check_types(ordered, places, opened, paths)
    _refuse_copies(rows, crcs, held, storage.uri)
    file_of = np.broadcast_to(np.arange(layout.world, dtype=np.int32), (len(ordered), layout.world))
    chunks = local_chunks(tensors, held, starts, file_of)
    column = [crcs[i, holdings.rank] for i, holdings in enumerate(held)]
    chunks = replace(chunks, crc=np.concatenate(column) if column else np.zeros(0, dtype=np.int64))
    _check_replicas(tensors, chunks, paths)
    parts = "\n".join(f"{path}\0{file.digest}" for path, file in zip(paths, opened, strict=True))
    return Catalogue(
        uri=storage.uri,
        storage=storage,
        format="torch",
        tensors=tensors,
        chunks=chunks,
        files=tuple(file.entry for file in opened),
        producer=options.producer,
        metadata_digest=xxhash.xxh3_128_hexdigest(parts.encode()),
        metadata_bytes=sum(file.entry.bytes - file.payload_bytes for file in opened),
        notices=left_behind(opened[0], paths[0]),
        world=layout.world,
    )


def _by_rank(storage: Storage, names: Sequence[str], layout: Layout) -> list[str]:
    found: dict[int, str] = {}
    for name in names:
        rank = rank_of_file(name)
        if rank is None or rank in found:
            reason = "names no rank" if rank is None else f"is of rank {rank}, as is {found[rank]!r}"
            raise AmbiguousSource(
                f"{name!r} in {storage.uri!r} {reason}", file=name, hint="put the files of one model in a folder"
            )
        found[rank] = name
    extra = [rank for rank in found if rank >= layout.world]
    if extra:
        raise AmbiguousSource(
            f"{found[max(extra)]!r} is of rank {max(extra)}, but the layout has {layout.world} ranks",
            file=found[max(extra)],
            hint="say the --source-layout that wrote these files",
        )
    lacking = [rank for rank in range(layout.world) if rank not in found]
    if lacking:
        raise CheckpointIncomplete(
            f"the file of rank {lacking[0]} is missing from {storage.uri!r} (the layout has {layout.world} ranks)",
            hint="copy the missing file",
        )
    return [found[rank] for rank in range(layout.world)]


def _rows(opened: Sequence[TorchFile], paths: Sequence[str]) -> dict[str, list[StoredTensor]]:
    """For each key its piece on every rank."""
    keys = dict.fromkeys(key for file in opened for key in file.leaves.tensors)
    for key in keys:
        for file, path in zip(opened, paths, strict=True):
            if key not in file.leaves.tensors:
                raise CheckpointIncomplete(
                    f"{path!r} has no tensor {key!r}, which the files of other ranks have", tensor=key, file=path
                )
    return {key: [file.leaves.tensors[key] for file in opened] for key in keys}


def _local_shapes(key: str, row: Sequence[StoredTensor], paths: Sequence[str]) -> Int64s:
    dims = {len(piece.array.sizes) for piece in row}
    if len(dims) != 1 or len({piece.global_shape for piece in row}) != 1:
        raise SourceCorrupt(
            f"tensor {key!r} has another number of dims, or another global shape, on different ranks",
            tensor=key,
            file=paths[0],
        )
    return np.array([piece.array.sizes for piece in row], dtype=np.int64).reshape(len(row), dims.pop())


def _with_keys(first: TorchFile, keys: Sequence[str], shapes: Sequence[Shape], options: OpenOptions) -> list[Tensor]:
    by_key = {tensor.key: tensor for tensor in make_tensors(first, shapes, options)}
    return [by_key[key] for key in keys]


def _global_shapes(
    layout: Layout, pieces: Sequence[Tensor], local: Mapping[str, Int64s], rows: Mapping[str, Sequence[StoredTensor]]
) -> dict[str, Shape]:
    """The shape of each whole tensor; an optimizer slot is cut like its parameter if its pieces have the same shapes.

    Where the parameter is not there, the slot with the most elements stands for it.
    """
    shapes = {key: shape for key, row in rows.items() if (shape := row[0].global_shape) is not None}
    parameter: dict[str, str] = {}
    by_size = sorted(pieces, key=lambda piece: (piece.identity.slot is not None, -prod(piece.shape), -len(piece.shape)))
    for piece in by_size:
        key, fqn = piece.key, piece.identity.fqn
        if piece.identity.section is not Section.EXTRA:
            parameter.setdefault(fqn, key)
        if key in shapes:
            continue
        leader = parameter.get(fqn, key)
        if leader == key:
            shapes[key] = global_shape(layout, fqn, local[key], key)
        elif np.array_equal(local[leader], local[key]):
            shapes[key] = shapes[leader]
        else:
            shapes[key] = tuple(local[key][0].tolist())
    return shapes


def _held(
    layout: Layout, piece: Tensor, shapes: Mapping[str, Shape], local: Mapping[str, Int64s], paths: Sequence[str]
) -> Holdings:
    shape = shapes[piece.key]
    found = local[piece.key]
    holdings = layout.holdings(piece.identity.fqn, shape, View.MEMORY)
    if piece.identity.slot is not None and not np.array_equal(holdings.local_shape, found):
        # Not of its parameter's shape, so every rank has all of it (decision 11).
        holdings = layout.holdings(piece.identity.fqn, shape, View.MEMORY, parameter_shape=(*shape, 1))
    if not np.array_equal(holdings.local_shape, found):
        rank = int(np.flatnonzero((holdings.local_shape != found).any(axis=1))[0])
        raise GeometryWrong(
            f"tensor {piece.key!r} has shape {found[rank].tolist()} in {paths[rank]!r}, but the layout gives that rank "
            f"{holdings.local_shape[rank].tolist()} of {list(shape)}",
            tensor=piece.key,
            file=paths[rank],
            hint="the layout is not the one that wrote these files",
        )
    return holdings


def _table(places: Sequence[Sequence[int]], columns: Sequence[Sequence[int]]) -> Int64s:
    """``[tensor, rank]`` of a column that each file has."""
    rows = [[columns[rank][at] for rank, at in enumerate(row)] for row in places]
    return np.array(rows, dtype=np.int64).reshape(len(places), len(columns))


def _check_types(
    keys: Sequence[str], places: Sequence[Sequence[int]], opened: Sequence[TorchFile], paths: Sequence[str]
) -> None:
    for key, row in zip(keys, places, strict=True):
        for rank, at in enumerate(row):
            if opened[rank].dtypes[at] != opened[0].dtypes[row[0]]:
                raise SourceCorrupt(
                    f"tensor {key!r} is {opened[0].dtypes[row[0]]} in {paths[0]!r} but {opened[rank].dtypes[at]} in "
                    f"{paths[rank]!r}",
                    tensor=key,
                    file=paths[rank],
                )


def _refuse_copies(
    rows: Mapping[str, Sequence[StoredTensor]], crcs: Int64s, held: Sequence[Holdings], uri: str
) -> None:
    """Pieces of one tensor that are all alike, in every tensor, are whole copies, which joining would multiply.

    Only plain tensors with recorded CRC32s can tell: a DTensor says itself how large the whole is.
    """
    cut = [
        i
        for i, (row, holdings) in enumerate(zip(rows.values(), held, strict=True))
        if row[0].global_shape is None and (holdings.offsets != holdings.offsets[:1]).any()
    ]
    if cut and bool((crcs[cut] >= 0).all()) and bool((crcs[cut] == crcs[cut][:, :1]).all()):
        raise AmbiguousSource(
            f"the files of all ranks in {uri!r} hold the same bytes, where the layout says they hold different pieces",
            hint="if each file holds the whole model, name one of them instead of the folder",
        )


def _check_replicas(tensors: Sequence[Tensor], chunks: Chunks, paths: Sequence[str]) -> None:
    """Where ranks hold the same rectangle, the CRC32s that torch recorded have to be the same.

    Without that, expert parallelism hidden in plain tensors of equal names would quietly become one rank's experts.
    """
    assert chunks.crc is not None
    for i, tensor in enumerate(tensors):
        rows = chunks.rows(i)
        seen: dict[bytes, tuple[int, int]] = {}
        for row in range(rows.start, rows.stop):
            crc, file = int(chunks.crc[row]), int(chunks.file[row])
            if crc < 0:
                continue
            known = seen.setdefault(chunks.offsets[row].tobytes() + chunks.sizes[row].tobytes(), (crc, file))
            if known[0] != crc:
                raise LayoutInvalid(
                    f"the layout says that {paths[known[1]]!r} and {paths[file]!r} hold the same of tensor "
                    f"{tensor.key!r}, but their bytes differ",
                    tensor=tensor.key,
                    file=paths[file],
                    hint="the layout is not the one that wrote these files",
                )
