"""Checkpoints in several places: a Trainer's or accelerate's folder, and torch weights in several files.

One catalogue comes out: the parts' tensors, chunks and files side by side, paths prefixed with the part's folder.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from reshard_service.catalogue import (
    ByteObject,
    Catalogue,
    Chunks,
    FileEntry,
    Identity,
    Int64s,
    Notice,
    Tensor,
)
from reshard_service.errors import AmbiguousSource, CheckpointIncomplete, NotACheckpoint, SourceCorrupt
from reshard_service.formats.side_files import side_file_names
from reshard_service.formats.strict_json import read_json_object
from reshard_service.storage.base import DirEntry, Storage, contained_path

if TYPE_CHECKING:
    from reshard_service.formats.options import OpenOptions

Opener = Callable[[Storage, "OpenOptions"], Catalogue]

_MODEL_FOLDER = re.compile(r"(pytorch_model_fsdp_\d+|model)\Z")
_OPTIMIZER_FOLDER = re.compile(r"(optimizer_\d+|optimizer|optim)\Z")
_TRAINING_STATE = re.compile(
    r"(scheduler(_\d+)?\.(pt|bin)|rng_state(_\d+)?\.pth|random_states_\d+\.pkl|scaler\.pt|sampler(_\d+)?\.bin|"
    r"dl_state_dict(_\d+)?\.bin|custom_checkpoint_\d+\.pkl|trainer_state\.json|training_args\.bin)\Z"
)
_OPTIMIZER_FILE = re.compile(r"optimizer(_\d+)?\.(pt|bin)\Z")
_TORCH_FILE = re.compile(r".+\.(bin|pt|pth)\Z")
_RANK_FILE = re.compile(r".+_rank\d+\.(bin|pt)\Z")
_TORCH_INDEX = "pytorch_model.bin.index.json"


def torch_weight_files(names: Sequence[str]) -> list[str]:
    """The torch.save files of a folder that hold weights, training state set apart."""
    return [
        name
        for name in names
        if _TORCH_FILE.match(name) and not _TRAINING_STATE.match(name) and not _OPTIMIZER_FILE.match(name)
    ]


def part_folders(storage: Storage, entries: Sequence[DirEntry]) -> list[str]:
    """Sub-folders with the model's or the optimizer's DCP, as accelerate and the Trainer name them; model first."""
    found: list[str] = []
    for pattern in (_MODEL_FOLDER, _OPTIMIZER_FOLDER):
        for entry in entries:
            if entry.is_dir and pattern.match(entry.name):
                inner = [item.name for item in storage.list_dir(entry.name)]
                if any(name.endswith((".metadata", ".metadata.tmp", ".distcp")) for name in inner):
                    found.append(entry.name)
    return found


def open_composite(
    storage: Storage,
    entries: Sequence[DirEntry],
    options: OpenOptions,
    parts: Sequence[str],
    own: Opener | None,
) -> Catalogue:
    """The folder's own weights (if ``own`` opens them and no part holds the model) and its parts, as one catalogue."""
    from reshard_service.formats.dcp.reader import open_dcp

    models = [name for name in parts if _MODEL_FOLDER.match(name)]
    if len(models) > 1:
        raise AmbiguousSource(
            f"{storage.uri!r} holds {len(models)} models: {', '.join(models)}", hint="name one of these folders"
        )
    opened: list[tuple[str, Catalogue]] = []
    notices: list[Notice] = []
    if own is not None and not models:
        opened.append(("", own(storage, options)))
    elif own is not None:
        notices.append(Notice("files_ignored", f"weights beside {models[0]}/ are not read", models[0]))
    opened += ((f"{name}/", open_dcp(storage.child(name), options)) for name in parts)
    notices += training_state_notices(entries)
    return merge(storage, opened, notices=notices, side_files=side_file_names(storage))


def training_state_notices(entries: Sequence[DirEntry]) -> list[Notice]:
    """One notice for each file of scheduler, RNG or loader state beside the weights: it is not converted."""
    return [
        Notice("training_state", f"{entry.name} is training state beside the weights and is not converted", entry.name)
        for entry in entries
        if not entry.is_dir and (_TRAINING_STATE.match(entry.name) or _OPTIMIZER_FILE.match(entry.name))
    ]


def open_torch_folder(storage: Storage, options: OpenOptions) -> Catalogue:
    """A torch.save file, or a folder with one, or ``pytorch_model.bin.index.json`` with its shards."""
    from reshard_service.formats.torch_zip.reader import open_torch

    status = storage.stat("")
    if status is not None and not status.is_dir:
        return open_torch(storage, options)
    entries = [entry for entry in storage.list_dir() if not entry.is_dir]
    names = [entry.name for entry in entries]
    side_files = side_file_names(storage)
    if _TORCH_INDEX in names:
        files = _indexed_files(storage)
        parts = [("", open_torch(storage, options, path=name)) for name in files]
        return merge(storage, parts, side_files=side_files)
    files = torch_weight_files(names)
    if not files:
        raise NotACheckpoint(f"no torch.save file lies in {storage.uri!r}")
    if "pytorch_model.bin" in files:
        files = ["pytorch_model.bin"]
    if len(files) > 1:
        per_rank = all(_RANK_FILE.match(name) for name in files)
        raise AmbiguousSource(
            f"{storage.uri!r} has {len(files)} torch.save files: {', '.join(files[:6])}",
            hint="per-rank files need --source-layout" if per_rank else "name the one file",
        )
    return replace(open_torch(storage, options, path=files[0]), side_files=side_files)


def _indexed_files(storage: Storage) -> list[str]:
    document, _ = read_json_object(storage, _TORCH_INDEX, what="index")
    weight_map = document.get("weight_map")
    if not isinstance(weight_map, dict) or not all(type(file) is str for file in weight_map.values()):
        raise SourceCorrupt(f"index {_TORCH_INDEX!r} has no weight_map of tensor names to file names")
    files = sorted({contained_path(file, named_in=_TORCH_INDEX) for file in weight_map.values()})
    missing = [file for file in files if storage.stat(file) is None]
    if missing:
        raise CheckpointIncomplete(
            f"index {_TORCH_INDEX!r} names {len(missing)} of {len(files)} files that are not there, such as "
            f"{missing[0]!r}",
            file=missing[0],
        )
    return files


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
                other = owner.setdefault(name, prefix)
                if other != prefix:
                    raise AmbiguousSource(
                        f"{leaf.key!r} is both in {other or '.'!r} and in {prefix or '.'!r} of {storage.uri!r}",
                        tensor=leaf.key,
                        hint="name one of the folders",
                    )
        tensors += part.tensors
        objects += (replace(leaf, file=leaf.file + bases[-1]) for leaf in part.objects)
        files += (replace(entry, path=prefix + entry.path) for entry in part.files)
    formats = {part.format for _, part in parts}
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
