"""``shard-*-model-*`` folders into a catalogue; ranks whose files are missing are noticed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

from reshard_service.catalogue import Catalogue, Chunks, Notice, Section, Tensor, build_chunks
from reshard_service.dtypes import DType
from reshard_service.errors import NotACheckpoint, SourceCorrupt
from reshard_service.formats.dcp_safetensors import completeness
from reshard_service.formats.dcp_safetensors.names import SAVED_OFFSETS, SHARDING_INFO, parse_shard_name
from reshard_service.formats.safetensors.header import MAX_DIM, Header
from reshard_service.formats.safetensors.sources import MetadataSum, file_entries, identities, read_headers
from reshard_service.formats.side_files import side_file_names
from reshard_service.formats.strict_json import parse_json, paused_gc, read_json_object
from reshard_service.manifest import MANIFEST_NAME, parse_manifest
from reshard_service.storage.base import Storage

if TYPE_CHECKING:
    from reshard_service.formats.options import OpenOptions

CONFIG_NAME = "config.json"
_MAX_CONFIG_BYTES = 16_000_000


@paused_gc()
def open_dcp_safetensors(storage: Storage, options: OpenOptions) -> Catalogue:
    """The catalogue of a folder with one set of shard files per rank.

    A tensor's shape is the largest offset + size of its chunks: all that torch's own reader knows. Gaps in the rank or
    file numbers are refused (:class:`CheckpointIncomplete`); the last rank's presence is proved by the manifest,
    ``options.world``, the layout's world or config.json, otherwise a notice says that it is unproven
    (``options.strict``: an error). Gaps within a tensor are found by planning.
    """
    names = [entry.name for entry in storage.list_dir() if not entry.is_dir]
    parsed = {name: found for name in names if (found := parse_shard_name(name)) is not None}
    if not parsed:
        raise NotACheckpoint(f"no shard-…-model-…-of-….safetensors lies in {storage.uri!r}")
    shards = completeness.complete_set(parsed, storage.uri)
    notices: list[Notice] = []
    beside = [name for name in names if name.endswith(".safetensors") and name not in parsed]
    if beside:
        reason = f"{', '.join(beside[:5])} lie beside the shard files and are not read"
        notices.append(Notice("files_ignored", reason, beside[0]))
    headers = read_headers(storage, shards.names)
    metadata = MetadataSum()
    gathered = _Gathered()
    for file, (name, header) in enumerate(zip(shards.names, headers, strict=True)):
        metadata.add_header(name, header)
        gathered.add(file, name, header, shards.names)
    tensors = gathered.tensors(options.key_prefix)
    config = _config(storage, names)
    notices += _completeness(storage, options, shards, tensors, names, config)
    return Catalogue(
        uri=storage.uri,
        storage=storage,
        format="dcp-safetensors",
        tensors=tensors,
        chunks=gathered.chunks(),
        files=file_entries(shards.names, headers),
        producer=options.producer or ("transformers" if config is not None else "torch"),
        metadata_digest=metadata.digest(),
        metadata_bytes=metadata.total_bytes,
        side_files=side_file_names(storage),
        notices=tuple(notices),
        world=shards.ranks,
    )


def _completeness(
    storage: Storage,
    options: OpenOptions,
    shards: completeness.ShardSet,
    tensors: Sequence[Tensor],
    names: Sequence[str],
    config: dict[str, Any] | None,
) -> list[Notice]:
    """Prove that no last rank is missing, or say that nothing proves it."""
    proven = False
    if MANIFEST_NAME in names:
        manifest = parse_manifest(storage.read_bytes(MANIFEST_NAME), named=MANIFEST_NAME)
        listed = [entry.path for entry in manifest.files if parse_shard_name(entry.path) is not None]
        if listed:
            completeness.check_manifest(shards, listed, storage.uri)
            proven = True
    for world in (options.world, options.layout.world if options.layout is not None else None):
        if world is not None:
            completeness.check_world(shards, world, storage.uri)
            proven = True
    if config is not None:
        model = {t.identity.fqn: t.shape for t in tensors if t.identity.section is Section.MODEL}
        only_model = len(model) == len(tensors)
        proven = (completeness.prove_by_config(config, model) and only_model) or proven
    return [] if proven else [completeness.unproven(shards, options.strict, storage.uri)]


def _config(storage: Storage, names: Sequence[str]) -> dict[str, Any] | None:
    if CONFIG_NAME not in names:
        return None
    return read_json_object(storage, CONFIG_NAME, max_bytes=_MAX_CONFIG_BYTES)[0]


@dataclass(slots=True)
class _Gathered:
    """Chunk lists that grow file by file; a tensor gets its number where it is first met."""

    number: dict[str, int] = field(default_factory=dict)
    dtypes: list[DType] = field(default_factory=list)
    shapes: list[list[int]] = field(default_factory=list)
    rows: list[tuple[int, tuple[int, ...], tuple[int, ...], int, int, int]] = field(default_factory=list)
    """tensor, offsets, sizes, file, start, length"""

    def add(self, file: int, path: str, header: Header, paths: Sequence[str]) -> None:
        offsets_of = _saved_offsets(header, path)
        for at, name in enumerate(header.names):
            dtype, sizes = header.dtypes[at], header.shapes[at]
            offsets = _offsets(offsets_of.get(name), name, sizes, path)
            ends = [offset + size for offset, size in zip(offsets, sizes, strict=True)]
            tensor = self.number.setdefault(name, len(self.dtypes))
            if tensor == len(self.dtypes):
                self.dtypes.append(dtype)
                self.shapes.append(ends)
            elif dtype != self.dtypes[tensor] or len(sizes) != len(self.shapes[tensor]):
                raise SourceCorrupt(
                    f"tensor {name!r} is {dtype} with {len(sizes)} dims in {path!r}, but {self.dtypes[tensor]} with "
                    f"{len(self.shapes[tensor])} dims in other ranks' files",
                    tensor=name,
                    file=path,
                    hint="files of different saves are mixed",
                )
            else:
                self.shapes[tensor] = [max(a, b) for a, b in zip(self.shapes[tensor], ends, strict=True)]
            self.rows.append((tensor, offsets, sizes, file, int(header.starts[at]), int(header.lengths[at])))

    def tensors(self, key_prefix: str | None) -> tuple[Tensor, ...]:
        for name, shape, dtype in zip(self.number, self.shapes, self.dtypes, strict=True):
            if prod(shape) * dtype.itemsize > MAX_DIM:
                raise SourceCorrupt(f"tensor {name!r} would have the impossible shape {shape}", tensor=name)
        found = identities(self.number, key_prefix)
        return tuple(
            Tensor(name, identity, self.dtypes[i], tuple(self.shapes[i]), path)
            for i, (name, (identity, path)) in enumerate(zip(self.number, found, strict=True))
        )

    def chunks(self) -> Chunks:
        """Empty shards of tensors that are not empty tell only of the shape, and are dropped."""
        rows = [row for row in self.rows if 0 not in row[2] or 0 in self.shapes[row[0]]]
        return build_chunks(
            len(self.dtypes),
            [row[0] for row in rows],
            offsets=[row[1] for row in rows],
            sizes=[row[2] for row in rows],
            file=[row[3] for row in rows],
            start=[row[4] for row in rows],
            length=[row[5] for row in rows],
        )


def _saved_offsets(header: Header, path: str) -> dict[str, Any]:
    """The file's sharding info: tensor name to where its chunk begins."""
    text = header.metadata.get(SHARDING_INFO)
    if text is None:
        raise SourceCorrupt(
            f"{path!r} has no {SHARDING_INFO} in its metadata, so nothing tells where its chunks belong",
            file=path,
            hint="it was not written by torch's distributed save, or was rewritten by another tool",
        )
    info = parse_json(text.encode("utf-8", "surrogatepass"), file=path, what=SHARDING_INFO)
    if not isinstance(info, dict):
        raise SourceCorrupt(f"{SHARDING_INFO} of {path!r} is not an object", file=path)
    missing = sorted(set(info) - set(header.names))
    if missing:
        raise SourceCorrupt(
            f"{SHARDING_INFO} of {path!r} tells of tensor {missing[0]!r}, which the file lacks",
            tensor=missing[0],
            file=path,
        )
    return {name: entry.get(SAVED_OFFSETS) if isinstance(entry, dict) else None for name, entry in info.items()}


def _offsets(value: Any, name: str, sizes: tuple[int, ...], path: str) -> tuple[int, ...]:
    if (
        not isinstance(value, list)
        or len(value) != len(sizes)
        or any(type(offset) is not int or not 0 <= offset <= MAX_DIM for offset in value)
    ):
        raise SourceCorrupt(
            f"saved_offsets {str(value)[:60]} of tensor {name!r} in {path!r} are no position in its {len(sizes)} dims",
            tensor=name,
            file=path,
        )
    return tuple(value)
