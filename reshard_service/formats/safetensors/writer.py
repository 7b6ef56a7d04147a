"""Safetensors out of a selection: one file, or shards with an index, as transformers names them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reshard_service.catalogue import Tensor, build_chunks
from reshard_service.errors import CannotHold, NameCollision, UsageError
from reshard_service.formats.options import WriteOptions
from reshard_service.formats.safetensors.header import HeaderEntry, build_header, check_holdable
from reshard_service.formats.safetensors.index import INDEX_NAME, index_bytes
from reshard_service.formats.safetensors.reader import SINGLE_NAME
from reshard_service.formats.strict_json import paused_gc
from reshard_service.formats.target import ClosingFile, Design, Literal, OutputFile, Selection

if TYPE_CHECKING:
    from reshard_service.layouts.layout import Layout

HEADER_BUDGET_BYTES = 64_000_000
"""A shard is closed before its header can come near the format's 100 MB, however small its tensors."""

_ENTRY_BYTES = 80
"""Upper estimate of a header entry without its name and shape."""


@paused_gc()
def design_safetensors(selection: Selection, layout: Layout | None, options: WriteOptions) -> Design:
    """One file (``options.single_file`` or ``model.safetensors``), or shards of at most ``max_shard_bytes`` payload.

    Tensors are dealt to shards in selection order; a tensor above the limit gets a shard of its own. The index is the
    marker and is written last. Objects can't be held and are ``left_out``. Raises :class:`UsageError` with a layout
    (these files hold whole tensors), :class:`NameCollision`, :class:`CannotHold`.
    """
    if layout is not None:
        raise UsageError(
            "gathered safetensors hold whole tensors, so --layout means nothing for them",
            hint="leave --layout out, or write --to rank-safetensors, dcp-safetensors or dcp",
        )
    check_names(selection.tensors)
    single = options.single_file is not None
    shards = [list(range(len(selection.tensors)))] if single else _deal(selection.tensors, options.max_shard_bytes)
    count = max(1, len(shards))
    paths = [
        options.single_file
        if options.single_file is not None
        else SINGLE_NAME
        if count == 1
        else f"model-{number:05d}-of-{count:05d}.safetensors"
        for number in range(1, count + 1)
    ]
    placed = [place(path, selection.tensors, members) for path, members in zip(paths, shards or [[]], strict=True)]
    order = [i for shard in placed for i in shard.members]
    tensors = tuple(selection.tensors[i] for i in order)
    chunks = build_chunks(
        len(tensors),
        range(len(tensors)),
        offsets=[(0,) * len(tensor.shape) for tensor in tensors],
        sizes=[tensor.shape for tensor in tensors],
        file=[number for number, shard in enumerate(placed) for _ in shard.members],
        start=[start for shard in placed for start in shard.starts],
        length=[tensor.nbytes for tensor in tensors],
    )
    closing: tuple[ClosingFile, ...] = ()
    if count > 1:
        weight_map = {selection.tensors[i].key: shard.path for shard in placed for i in shard.members}
        total = sum(tensor.nbytes for tensor in tensors)
        closing = (ClosingFile(INDEX_NAME, lambda: index_bytes(weight_map, total)),)
    return Design(
        format="safetensors",
        tensors=tensors,
        sources=selection.sources[order],
        chunks=chunks,
        files=tuple(OutputFile(shard.path, shard.file_bytes) for shard in placed),
        literals=tuple(Literal(number, 0, shard.header) for number, shard in enumerate(placed)),
        closing=closing,
        left_out=tuple(entry.key for entry in selection.objects),
    )


@dataclass(frozen=True, slots=True)
class PlacedFile:
    """One file laid out: which tensors in which order, where each begins (from the file's first byte), the header."""

    path: str
    members: tuple[int, ...]
    starts: tuple[int, ...]
    header: bytes
    file_bytes: int


def place(path: str, tensors: Sequence[Tensor], members: Sequence[int]) -> PlacedFile:
    """Lay the chosen whole tensors out in one file."""
    ordered = aligned_order(members, [(tensors[i].nbytes, tensors[i].dtype.itemsize) for i in members])
    entries: list[HeaderEntry] = []
    at = 0
    for i in ordered:
        tensor = tensors[i]
        entries.append(HeaderEntry(tensor.key, tensor.dtype, tensor.shape, at, at + tensor.nbytes))
        at += tensor.nbytes
    header = build_header(entries, file=path)
    starts = tuple(entry.begin + len(header) for entry in entries)
    return PlacedFile(path, tuple(ordered), starts, header, len(header) + at)


def aligned_order(members: Sequence[int], extents: Sequence[tuple[int, int]]) -> list[int]:
    """Selection order as far as alignment lets it stand; ``extents`` are (bytes, bytes of an element) of each member.

    The format allows no padding between tensors, so one whose size is no multiple of 8 shifts all that follow: those
    go last, largest element first. Then every tensor starts at a multiple of its element size, and all but the last
    few at a multiple of 8, which readers that map the file rely on.
    """
    odd = [k for k, (nbytes, _) in enumerate(extents) if nbytes % 8]
    if not odd:
        return list(members)
    odd_set = set(odd)
    odd.sort(key=lambda k: -(extents[k][1] & -extents[k][1]))
    return [members[k] for k in range(len(members)) if k not in odd_set] + [members[k] for k in odd]


def check_names(tensors: Sequence[Tensor]) -> None:
    """Every tensor has a name of its own and a type that safetensors knows."""
    seen: dict[str, Tensor] = {}
    for tensor in tensors:
        other = seen.setdefault(tensor.key, tensor)
        if other is not tensor:
            raise NameCollision(
                f"two tensors get the name {tensor.key!r} in the target: {'.'.join(map(str, other.path))!r} and "
                f"{'.'.join(map(str, tensor.path))!r}",
                tensor=tensor.key,
                hint="leave one out with --exclude, or write --to dcp, which keeps the source's keys",
            )
        check_holdable(tensor.key, tensor.dtype, tensor.shape)


def _deal(tensors: Sequence[Tensor], max_shard_bytes: int) -> list[list[int]]:
    """Member lists of the shards, in selection order."""
    if max_shard_bytes <= 0:
        raise UsageError(f"a shard can't have {max_shard_bytes} bytes", hint="give --max-shard-size, such as 5GB")
    shards: list[list[int]] = []
    payload = header = 0
    for i, tensor in enumerate(tensors):
        entry = _ENTRY_BYTES + len(tensor.key.encode("utf-8", "replace")) + 20 * len(tensor.shape)
        if not shards or payload + tensor.nbytes > max_shard_bytes or header + entry > HEADER_BUDGET_BYTES:
            if len(shards) >= 99_999:
                raise CannotHold(
                    f"shards of {max_shard_bytes} bytes would be more than 99999 files",
                    hint="choose a larger --max-shard-size",
                )
            shards.append([])
            payload = header = 0
        shards[-1].append(i)
        payload += tensor.nbytes
        header += entry
    return shards
