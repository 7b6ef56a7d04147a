"""Folders of ``torch.save``d weights: one file, a set with an index, or a file per rank."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from reshard_service.catalogue import Catalogue
from reshard_service.errors import AmbiguousSource, CheckpointIncomplete, NotACheckpoint, SourceCorrupt
from reshard_service.formats.composite import OPTIMIZER_FILE, TRAINING_STATE
from reshard_service.formats.merging import merge
from reshard_service.formats.side_files import side_file_names
from reshard_service.formats.strict_json import read_json_object
from reshard_service.storage.base import Storage, contained_path

if TYPE_CHECKING:
    from reshard_service.formats.options import OpenOptions

_TORCH_FILE = re.compile(r".+\.(bin|pt|pth)\Z")
_RANK = re.compile(r"(?:\A|[._-])rank[_-]?\d{1,6}")
_TORCH_INDEX = "pytorch_model.bin.index.json"


def torch_weight_files(names: Sequence[str]) -> list[str]:
    """The torch.save files of a folder that hold weights, training state set apart."""
    return [
        name
        for name in names
        if _TORCH_FILE.match(name) and not TRAINING_STATE.match(name) and not OPTIMIZER_FILE.match(name)
    ]


def open_torch_folder(storage: Storage, options: OpenOptions) -> Catalogue:
    """A torch.save file, or a folder with one, ``pytorch_model.bin.index.json`` with its shards, or a file per rank."""
    from reshard_service.formats.torch_zip.ranks import open_torch_ranks, rank_of_file
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
    if len(files) == 1:
        storage.follow(files[0])
        return replace(open_torch(storage, options, path=files[0]), side_files=side_files)
    families = _families(files) if all(rank_of_file(name) is not None for name in files) else []
    if not families:
        raise AmbiguousSource(
            f"{storage.uri!r} has {len(files)} torch.save files: {', '.join(files[:6])}", hint="name the one file"
        )
    parts = [("", open_torch_ranks(storage, options, family)) for family in families]
    return merge(storage, parts, side_files=side_files)


def _families(files: Sequence[str]) -> list[list[str]]:
    """Per-rank files by what their names share, the optimizer's last (accelerate: ``pytorch_model_fsdp_0_rank3.bin``
    beside ``optimizer_0_rank3.bin``); none if they are more than a model's and an optimizer's.
    """
    families: dict[str, list[str]] = {}
    for name in files:
        families.setdefault(_RANK.sub("", name), []).append(name)
    if len(families) > 2 or (len(families) == 2 and sum("optim" in family for family in families) != 1):
        return []
    return [families[family] for family in sorted(families, key=lambda family: "optim" in family)]


def _indexed_files(storage: Storage) -> list[str]:
    document, _ = read_json_object(storage, _TORCH_INDEX, what="index")
    weight_map = document.get("weight_map")
    if not isinstance(weight_map, dict) or not all(type(file) is str for file in weight_map.values()):
        raise SourceCorrupt(f"index {_TORCH_INDEX!r} has no weight_map of tensor names to file names")
    files = sorted({contained_path(file, named_in=_TORCH_INDEX) for file in set(weight_map.values())})
    missing = [file for file in files if storage.stat(file) is None]
    if missing:
        raise CheckpointIncomplete(
            f"index {_TORCH_INDEX!r} names {len(missing)} of {len(files)} files that are not there, such as "
            f"{missing[0]!r}",
            file=missing[0],
        )
    return files
