"""What lies at a URI, and which reader opens it (decision 26)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from reshard_service.catalogue import Catalogue
from reshard_service.errors import (
    CheckpointIncomplete,
    NotACheckpoint,
    SourceCorrupt,
    SourceNotFound,
    UsageError,
)
from reshard_service.formats import composite, run_folders, torch_folder
from reshard_service.manifest import MANIFEST_NAME
from reshard_service.storage.base import DirEntry, Storage

if TYPE_CHECKING:
    from reshard_service.formats.options import OpenOptions

Opener = Callable[[Storage, "OpenOptions"], Catalogue]

LAYOUT_NAME = "reshard.layout.json"

_PER_RANK_METADATA = re.compile(r"__\d+\.metadata\Z")
_DISTRIBUTED_SHARD = re.compile(r"shard-\d{5,9}-model-\d{5,9}-of-\d{5,9}\.safetensors\Z")
_RANK_FILE = re.compile(r"model-rank-\d+-part-\d+\.safetensors\Z")
_TORCH_WEIGHTS = re.compile(r"(?P<stem>.+)\.(bin|pt|pth)\Z")
_MANIFEST_FORMAT = re.compile(rb'\s*\{\s*"version"\s*:\s*\d+\s*,\s*"format"\s*:\s*"([a-z-]{1,40})"')
_MANIFEST_HEAD_BYTES = 4096
_STAGING = re.compile(r"\..+\.reshard-[0-9a-f]{6,}\Z")


def _open_dcp(storage: Storage, options: OpenOptions) -> Catalogue:
    from reshard_service.formats.dcp.reader import open_dcp

    return open_dcp(storage, options)


def _open_safetensors(storage: Storage, options: OpenOptions) -> Catalogue:
    from reshard_service.formats.safetensors.reader import open_safetensors

    return open_safetensors(storage, options)


def _open_dcp_safetensors(storage: Storage, options: OpenOptions) -> Catalogue:
    from reshard_service.formats.dcp_safetensors.reader import open_dcp_safetensors

    return open_dcp_safetensors(storage, options)


def _open_rank_safetensors(storage: Storage, options: OpenOptions) -> Catalogue:
    from reshard_service.formats.rank_safetensors.reader import open_rank_safetensors

    return open_rank_safetensors(storage, options)


def _open_torch(storage: Storage, options: OpenOptions) -> Catalogue:
    return torch_folder.open_torch_folder(storage, options)


READERS: dict[str, Opener] = {
    "dcp": _open_dcp,
    "dcp-safetensors": _open_dcp_safetensors,
    "rank-safetensors": _open_rank_safetensors,
    "safetensors": _open_safetensors,
    "torch": _open_torch,
}
"""Every format that can be read, by the name that ``--from`` takes. A reader is imported when it is needed."""


def open_checkpoint(storage: Storage, options: OpenOptions) -> Catalogue:
    """The catalogue of whatever checkpoint lies at the storage's root.

    ``options.format`` skips detection, ``options.step`` chooses from a run folder. Raises :class:`SourceNotFound`,
    :class:`NotACheckpoint` (listing what is there), :class:`AmbiguousSource`, :class:`CheckpointIncomplete`, and what
    the readers raise.
    """
    if options.format is not None and options.format not in READERS:
        raise UsageError(f"no format {options.format!r} can be read; known: {', '.join(READERS)}")
    status = storage.stat("")
    entries = storage.list_dir() if status is None or status.is_dir else []
    if status is None and not entries:
        raise SourceNotFound(f"nothing lies at {storage.uri!r}", hint="check the path, and for a store its credentials")
    if options.step is not None:
        return run_folders.open_step(storage, entries, options, open_checkpoint)
    if options.format is not None:
        return READERS[options.format](storage, options)
    if status is not None and not status.is_dir:
        return READERS[_format_of_file(storage)](storage, options)
    return _open_folder(storage, entries, options)


def _open_folder(storage: Storage, entries: Sequence[DirEntry], options: OpenOptions) -> Catalogue:
    _refuse_staging(storage)
    found = _recognise(storage, entries)
    own = READERS[found] if found is not None else None
    if found in (None, "safetensors", "dcp-safetensors", "torch"):
        folders = composite.part_folders(storage, entries)
        beside = composite.files_beside(entries)
        if folders or (own is not None and beside):
            return composite.open_composite(storage, options, own, folders, beside)
    steps = run_folders.step_folders(entries)
    if own is not None:
        return run_folders.mention_steps(own(storage, options), steps)
    if steps:
        raise run_folders.choose_a_step(storage, steps)
    _refuse_half_written(storage, entries)
    raise _nothing_known(storage, entries)


def _recognise(storage: Storage, entries: Sequence[DirEntry]) -> str | None:
    """The format of a folder's own files, in decision 26's order."""
    names = [entry.name for entry in entries if not entry.is_dir]
    if MANIFEST_NAME in names:
        return _format_of_manifest(storage)
    if ".metadata" in names or any(_PER_RANK_METADATA.match(name) for name in names):
        return "dcp"
    if any(_DISTRIBUTED_SHARD.match(name) for name in names):
        return "dcp-safetensors"
    if any(_RANK_FILE.match(name) for name in names):
        return "rank-safetensors"
    if any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        return "safetensors"
    if torch_folder.torch_weight_files(names):
        return "torch"
    return None


def _format_of_manifest(storage: Storage) -> str:
    """The format that a manifest names, from its first bytes: the digests behind them can be many."""
    status = storage.stat(MANIFEST_NAME)
    head = storage.read_bytes(MANIFEST_NAME, 0, min(status.bytes, _MANIFEST_HEAD_BYTES)) if status else b""
    match = _MANIFEST_FORMAT.match(head)
    name = match[1].decode("ascii") if match else None
    if name == "peft":
        return "safetensors"
    if name is None or name not in READERS:
        raise SourceCorrupt(
            f"{MANIFEST_NAME} names {f'the format {name!r}' if name else 'no format'}; known: {', '.join(READERS)}",
            file=MANIFEST_NAME,
            hint="say --from FORMAT to read the folder without its manifest",
        )
    return name


def _format_of_file(storage: Storage) -> str:
    """The format of a source that is a single file: by its first bytes, which lie less often than its name."""
    status = storage.stat("")
    size = status.bytes if status is not None else 0
    name = storage.uri.rsplit("/", 1)[-1]
    if name.endswith((".distcp", ".metadata", ".index.json")) or name in (MANIFEST_NAME, LAYOUT_NAME):
        raise NotACheckpoint(f"{name!r} is one file of a checkpoint", hint="name the folder it lies in")
    head = storage.read_bytes("", 0, min(size, 9))
    if name.endswith(".safetensors") or (len(head) == 9 and head[8:9] == b"{"):
        return "safetensors"
    if head[:4] == b"PK\x03\x04" or _TORCH_WEIGHTS.match(name):
        return "torch"
    raise NotACheckpoint(
        f"{storage.uri!r} is neither a safetensors file nor a torch.save file",
        hint=f"formats that can be read: {', '.join(READERS)}",
    )


def _refuse_staging(storage: Storage) -> None:
    name = storage.uri.rstrip("/").rsplit("/", 1)[-1]
    if _STAGING.match(name):
        raise CheckpointIncomplete(
            f"{storage.uri!r} is the staging folder of a conversion that has not finished",
            hint="run the same conversion again; it goes on from there",
        )


def _refuse_half_written(storage: Storage, entries: Sequence[DirEntry]) -> None:
    names = [entry.name for entry in entries if not entry.is_dir]
    if ".metadata.tmp" in names or any(name.endswith(".distcp") for name in names):
        raise CheckpointIncomplete(
            f"{storage.uri!r} has DCP data files but no .metadata, which is written last",
            hint="the save has not finished: wait for it (--wait-complete), or take an earlier step",
        )


def _nothing_known(storage: Storage, entries: Sequence[DirEntry]) -> NotACheckpoint:
    shown = [entry.name + ("/" if entry.is_dir else "") for entry in entries]
    what = f"it holds {', '.join(shown[:12])}" if shown else "it is empty"
    if len(shown) > 12:
        what += f" and {len(shown) - 12} more"
    return NotACheckpoint(
        f"no checkpoint is recognised in {storage.uri!r}: {what}",
        hint=f"formats that can be read: {', '.join(READERS)} (--from FORMAT); name the folder that holds the weights",
    )
