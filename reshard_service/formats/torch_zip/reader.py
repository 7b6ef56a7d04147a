"""A ``torch.save``d state dict into a catalogue: its tensors are byte ranges of the zip's members."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from reshard_service.catalogue import Catalogue, FileEntry, Identity, Notice, Path, Section, Tensor, build_chunks
from reshard_service.dtypes import DType, by_torch_name
from reshard_service.errors import ReshardError, SourceCorrupt, SourceNotFound, UnsupportedSource
from reshard_service.formats.dcp.data_pickle import StoredArray
from reshard_service.formats.dcp.item import place_in_storage
from reshard_service.formats.pickles import PickleLimits
from reshard_service.formats.torch_zip.archive import Archive, Member, read_archive
from reshard_service.formats.torch_zip.state_dict import StateDict, read_state_dict
from reshard_service.identity import identities
from reshard_service.storage.base import Storage

if TYPE_CHECKING:
    from reshard_service.formats.options import OpenOptions

_SECTION_NAMES = {"model_state_dict": "model", "module": "model", "optimizer_state_dict": "optimizer"}
"""How training scripts and DeepSpeed name what decision 1 calls ``model`` and ``optimizer``."""


@dataclass(frozen=True, slots=True)
class TorchFile:
    """One opened file: its leaves, and for each tensor where its bytes lie."""

    entry: FileEntry
    leaves: StateDict
    dtypes: tuple[DType, ...]
    starts: tuple[int, ...]
    """Where each tensor's array begins in the file."""
    crcs: tuple[int, ...]
    """CRC32 of each array, -1 where none is known."""
    digest: str
    payload_bytes: int


def open_torch(storage: Storage, options: OpenOptions, path: str = "") -> Catalogue:
    """The catalogue of one file, ``path`` below the storage's root, or the root itself.

    Raises :class:`UnsupportedSource` for torch's old formats, for tensors that are more than their bytes or do not lie
    row-major, and for a rank's piece of a DTensor; :class:`SourceCorrupt` and :class:`UnsafeSource` for what no torch
    wrote. What is no tensor has no bytes of its own here: it is named in a notice.
    """
    opened = read_torch_file(storage, path)
    for tensor in opened.leaves.tensors.values():
        if tensor.global_shape is not None and tensor.global_shape != tensor.array.sizes:
            raise UnsupportedSource(
                f"tensor {tensor.key!r} in {path or storage.uri!r} is one rank's piece {tensor.array.sizes} of a "
                f"tensor {tensor.global_shape}",
                tensor=tensor.key,
                file=path,
                hint="name the folder with the files of all ranks, and say --source-layout",
            )
    tensors = make_tensors(opened, [one.array.sizes for one in opened.leaves.tensors.values()], options)
    shapes = [tensor.shape for tensor in tensors]
    count = len(tensors)
    chunks = build_chunks(
        count,
        range(count),
        [(0,) * len(shape) for shape in shapes],
        shapes,
        [0] * count,
        opened.starts,
        [tensor.nbytes for tensor in tensors],
        crc=opened.crcs,
    )
    return Catalogue(
        uri=storage.uri,
        storage=storage,
        format="torch",
        tensors=tensors,
        chunks=chunks,
        files=(opened.entry,),
        producer=options.producer,
        metadata_digest=opened.digest,
        metadata_bytes=opened.entry.bytes - opened.payload_bytes,
        notices=left_behind(opened, path),
    )


def read_torch_file(storage: Storage, path: str) -> TorchFile:
    """The leaves of one file and the byte range of each tensor."""
    status = storage.stat(path)
    if status is None or status.is_dir:
        raise SourceNotFound(f"no file lies at {path or storage.uri!r}", file=path)
    archive = read_archive(storage, path, status.bytes)
    pickle = _small_member(storage, path, archive, "data.pkl", PickleLimits().data_bytes)
    if pickle is None or "constants.pkl" in archive.members:
        what = "a TorchScript archive" if pickle is not None else "a zip file that torch.save did not write"
        raise UnsupportedSource(f"{archive.file!r} is {what}", file=path, hint="save model.state_dict()")
    if _small_member(storage, path, archive, "byteorder", 16) not in (None, b"little"):
        raise UnsupportedSource(
            f"{archive.file!r} was saved on a big-endian machine", file=path, hint="load it there and save it anew"
        )
    leaves = read_state_dict(pickle, archive.file)
    stored = list(leaves.tensors.values())
    members: dict[str, Member] = {}
    for tensor in stored:
        members[tensor.array.storage_key] = _member_of(archive, tensor.key, tensor.array)
    keys = list(members)
    begins = dict(zip(keys, archive.data_starts(storage, path, [members[key] for key in keys]), strict=True))
    dtypes, starts, crcs = [], [], []
    for tensor in stored:
        dtype, offset, whole = _placed(tensor.key, tensor.array, archive.file)
        member = members[tensor.array.storage_key]
        dtypes.append(dtype)
        starts.append(begins[member.name.removeprefix("data/")] + offset)
        crcs.append(member.crc if whole and member.crc else -1)
    digest = xxhash.xxh3_128()
    digest.update(archive.directory)
    digest.update(pickle)
    return TorchFile(
        entry=FileEntry(path, status.bytes, status.identity),
        leaves=leaves,
        dtypes=tuple(dtypes),
        starts=tuple(starts),
        crcs=tuple(crcs),
        digest=digest.hexdigest(),
        payload_bytes=sum(member.bytes for member in members.values()),
    )


def _small_member(storage: Storage, path: str, archive: Archive, name: str, most: int) -> bytes | None:
    member = archive.members.get(name)
    if member is None:
        return None
    if member.bytes > most:
        raise SourceCorrupt(
            f"{name!r} in {archive.file!r} has {member.bytes} bytes; at most {most} are read", file=path
        )
    start = archive.data_starts(storage, path, [member])[0]
    content = storage.read_bytes(path, start, member.bytes)
    if member.crc and zlib.crc32(content) != member.crc:
        raise SourceCorrupt(
            f"{name!r} in {archive.file!r} does not match its CRC32",
            file=path,
            hint="copy the file again from its origin",
        )
    return content


def _member_of(archive: Archive, key: str, array: StoredArray) -> Member:
    member = archive.members.get(f"data/{array.storage_key}")
    if member is None or member.bytes != array.storage_bytes:
        found = "is not there" if member is None else f"has {member.bytes} bytes"
        raise SourceCorrupt(
            f"tensor {key!r} in {archive.file!r} lies in a storage of {array.storage_bytes} bytes, but its member "
            f"{found}",
            tensor=key,
            file=archive.file,
            hint="copy the file again from its origin",
        )
    return member


def _placed(key: str, array: StoredArray, file: str) -> tuple[DType, int, bool]:
    """Element type, offset of the array in its storage, and whether it is the whole storage."""
    try:
        dtype = by_torch_name(array.torch_dtype)
        place = place_in_storage(array, dtype)
    except ReshardError as error:
        error.tensor, error.file = key, file
        raise
    if place.strides is not None:
        raise UnsupportedSource(
            f"tensor {key!r} in {file!r} is stored with the strides {place.strides} of another order of dims",
            tensor=key,
            file=file,
            hint="save it again as tensor.contiguous()",
        )
    nbytes = int(np.prod(array.sizes, dtype=object)) * dtype.itemsize
    return dtype, place.storage_offset_bytes, nbytes == array.storage_bytes


def make_tensors(opened: TorchFile, shapes: Sequence[tuple[int, ...]], options: OpenOptions) -> tuple[Tensor, ...]:
    """The tensors of a file with these (global) shapes, identified by where they sit in the nested dict."""
    found = _identities(opened.leaves, options.key_prefix)
    return tuple(
        Tensor(one.key, found[one.key], dtype, tuple(shape), one.path)
        for one, dtype, shape in zip(opened.leaves.tensors.values(), opened.dtypes, shapes, strict=True)
    )


def _identities(leaves: StateDict, key_prefix: str | None) -> Mapping[str, Identity]:
    paths: dict[str, Path] = {key: _usual(tensor.path, key_prefix) for key, tensor in leaves.tensors.items()}
    paths |= {key: _usual(path, key_prefix) for key, path in leaves.others.items()}
    found = identities(paths, objects=set(leaves.others))
    if not key_prefix:
        return found
    # What does not lie under the named key is not the model, however much it looks like one.
    outside = {key for key, path in paths.items() if found[key].section is Section.MODEL and path[:1] != ("model",)}
    return {key: replace(one, section=Section.EXTRA) if key in outside else one for key, one in found.items()}


def _usual(path: Path, key_prefix: str | None) -> Path:
    """The path with the section's usual name in front."""
    if key_prefix:
        prefix = tuple(key_prefix.split("."))
        if path[: len(prefix)] == prefix and len(path) > len(prefix):
            return ("model", *path[len(prefix) :])
        return path
    if len(path) > 1 and path[0] in _SECTION_NAMES:
        return (_SECTION_NAMES[str(path[0])], *path[1:])
    return path


def left_behind(opened: TorchFile, path: str) -> tuple[Notice, ...]:
    """One notice that names the values which are no tensors."""
    others = list(opened.leaves.others)
    if not others:
        return ()
    shown = ", ".join(others[:6]) + (", …" if len(others) > 6 else "")
    return (
        Notice(
            "values_not_carried",
            f"{len(others)} values that are no tensors ({shown}) have no bytes of their own in a torch.save file and "
            "are not converted",
            others[0],
            path or None,
        ),
    )
