"""Checkpoints in several places of one folder, as the Trainer and accelerate leave them (decision 26).

One catalogue comes out: the model's weights, the optimizer's, and the training state beside them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from reshard_service.catalogue import ByteObject, Catalogue, FileEntry, Identity, Notice, Section, build_chunks
from reshard_service.errors import AmbiguousSource, UnsupportedSource
from reshard_service.formats.merging import merge
from reshard_service.formats.side_files import side_file_names
from reshard_service.storage.base import DirEntry, Storage

if TYPE_CHECKING:
    from reshard_service.formats.options import OpenOptions

Opener = Callable[[Storage, "OpenOptions"], Catalogue]

_MODEL_FOLDER = re.compile(r"(pytorch_model_fsdp_\d+|model)\Z")
_OPTIMIZER_FOLDER = re.compile(r"(optimizer_\d+|optimizer|optim)\Z")
TRAINING_STATE = re.compile(
    r"(scheduler(_\d+)?\.(pt|bin)|rng_state(_\d+)?\.pth|random_states_\d+\.pkl|scaler\.pt|sampler(_\d+)?\.bin|"
    r"dl_state_dict(_\d+)?\.bin|custom_checkpoint_\d+\.pkl|trainer_state\.json|training_args\.bin)\Z"
)
_OF_THE_PROGRAM = ("training_args.bin",)
"""Pickles of a program's own classes, which no other process should have to load with a checkpoint."""
OPTIMIZER_FILE = re.compile(r"optimizer(_\d+)?\.(pt|bin)\Z")


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


def files_beside(entries: Sequence[DirEntry]) -> list[str]:
    """Files of optimizer and training state that a trainer leaves beside the weights."""
    return [
        entry.name
        for entry in entries
        if not entry.is_dir and (TRAINING_STATE.match(entry.name) or OPTIMIZER_FILE.match(entry.name))
    ]


def open_composite(
    storage: Storage,
    options: OpenOptions,
    own: Opener | None,
    folders: Sequence[str],
    beside: Sequence[str],
) -> Catalogue:
    """The folder's own weights (if ``own`` opens them and no sub-folder holds the model), its parts and its state.

    ``folders`` are from :func:`part_folders`, ``beside`` from :func:`files_beside`.
    """
    from reshard_service.formats.dcp.reader import open_dcp

    models = [name for name in folders if _MODEL_FOLDER.match(name)]
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
    opened += ((f"{name}/", open_dcp(storage.child(name), options)) for name in folders)
    optimizers = [name for name in folders if _OPTIMIZER_FOLDER.match(name)]
    for name in beside:
        if TRAINING_STATE.match(name):
            _add_state(storage, name, opened, notices)
        elif optimizers:
            notices.append(Notice("files_ignored", f"{name} beside {optimizers[0]}/ is not read", name))
        else:
            _add_optimizer(storage, name, options, opened, notices)
    return merge(storage, opened, notices=notices, side_files=side_file_names(storage))


def _add_optimizer(
    storage: Storage, name: str, options: OpenOptions, opened: list[tuple[str, Catalogue]], notices: list[Notice]
) -> None:
    """A ``torch.save``d optimizer state, if it speaks of parameters by name."""
    from reshard_service.formats.torch_zip.reader import open_torch

    try:
        catalogue = open_torch(storage, options, path=name)
    except UnsupportedSource as error:
        notices.append(Notice("optimizer_not_read", error.message, name))
        return
    fqns = {tensor.identity.fqn for tensor in catalogue.tensors}
    sections = {tensor.identity.section for tensor in catalogue.tensors}
    if sections - {Section.OPTIMIZER} or any(fqn.isdecimal() for fqn in fqns):
        reason = f"{name} numbers its parameters instead of naming them, so nothing tells which is which"
        notices.append(Notice("optimizer_not_read", reason, name))
        return
    opened.append(("", catalogue))


def _add_state(storage: Storage, name: str, opened: list[tuple[str, Catalogue]], notices: list[Notice]) -> None:
    """Scheduler, scaler or RNG state: a ``torch.save``d file is an object like those in a DCP, another only noticed."""
    status = storage.stat(name)
    if status is None:
        return
    opaque = name in _OF_THE_PROGRAM or status.bytes < 4 or storage.read_bytes(name, 0, 4) != b"PK\x03\x04"
    if opaque:
        notices.append(Notice("training_state", f"{name} is training state beside the weights and not converted", name))
        return
    entry = FileEntry(name, status.bytes, status.identity)
    leaf = ByteObject(name, Identity(Section.EXTRA, name), (name,), 0, 0, status.bytes)
    opened.append(
        ("", Catalogue(storage.uri, storage, "", (), build_chunks(0, [], [], [], [], [], []), (entry,), (leaf,)))
    )
