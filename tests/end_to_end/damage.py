"""Ways to spoil a good checkpoint: each takes a private copy and leaves it as bad luck or a bad person would."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

KEY = "model.model.embed_tokens.weight"
"""Shape (66, 20), cut into rows 17, 17, 17, 15 over four files."""


# --- DCP ----------------------------------------------------------------------------------------------------


def _edit_metadata(folder: Path, edit: Callable[[Metadata], None]) -> None:
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    edit(metadata)
    path.write_bytes(pickle.dumps(metadata))


def _index(metadata: Metadata, row: int) -> MetadataIndex:
    """The index of the chunk of KEY that begins at this row."""
    [index] = [index for index in metadata.storage_data if index.fqn == KEY and tuple(index.offset) == (row, 0)]
    return index


def _move_chunk(metadata: Metadata, row: int, chunk: ChunkStorageMetadata | None) -> None:
    """Replaces KEY's chunk at ``row``, or drops it."""
    tensor = metadata.state_dict_metadata[KEY]
    place = metadata.storage_data.pop(_index(metadata, row))
    tensor.chunks = [old for old in tensor.chunks if tuple(old.offsets) != (row, 0)]
    if chunk is not None:
        tensor.chunks.append(chunk)
        metadata.storage_data[MetadataIndex(KEY, chunk.offsets)] = place


def truncate_data(folder: Path) -> None:
    path = folder / "__1_0.distcp"
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(folder: Path) -> None:
    """In the middle of a tensor's payload, where only a checksum can notice."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    place = metadata.storage_data[_index(metadata, 17)]
    path = folder / place.relative_path
    data = bytearray(path.read_bytes())
    item = zipfile.ZipFile(io.BytesIO(bytes(data[place.offset : place.offset + place.length])))
    [member] = [info for info in item.infolist() if info.filename.endswith("/data/0")]
    name_bytes, extra_bytes = struct.unpack_from("<HH", data, place.offset + member.header_offset + 26)
    data[place.offset + member.header_offset + 30 + name_bytes + extra_bytes + 100] ^= 1
    path.write_bytes(data)


def remove_a_rank(folder: Path) -> None:
    (folder / "__2_0.distcp").unlink()


def point_an_item_beyond_its_file(folder: Path) -> None:
    def edit(metadata: Metadata) -> None:
        metadata.storage_data[_index(metadata, 17)].offset += 10**9

    _edit_metadata(folder, edit)


def point_an_item_before_its_file(folder: Path) -> None:
    def edit(metadata: Metadata) -> None:
        metadata.storage_data[_index(metadata, 17)].offset = -64

    _edit_metadata(folder, edit)


def let_two_items_overlap(folder: Path) -> None:
    def edit(metadata: Metadata) -> None:
        place = metadata.storage_data[_index(metadata, 17)]
        place.length += 64

    _edit_metadata(folder, edit)


def claim_an_absurd_shape(folder: Path) -> None:
    def edit(metadata: Metadata) -> None:
        metadata.state_dict_metadata[KEY].size = torch.Size([2**62, 2**62])

    _edit_metadata(folder, edit)


def claim_a_negative_shape(folder: Path) -> None:
    def edit(metadata: Metadata) -> None:
        metadata.state_dict_metadata[KEY].size = torch.Size([-66, -20])

    _edit_metadata(folder, edit)


def leave_a_gap(folder: Path) -> None:
    _edit_metadata(folder, lambda metadata: _move_chunk(metadata, 17, None))


def let_two_chunks_overlap(folder: Path) -> None:
    chunk = ChunkStorageMetadata(torch.Size([16, 0]), torch.Size([17, 20]))
    _edit_metadata(folder, lambda metadata: _move_chunk(metadata, 17, chunk))


def let_a_chunk_reach_out(folder: Path) -> None:
    chunk = ChunkStorageMetadata(torch.Size([52, 0]), torch.Size([15, 20]))
    _edit_metadata(folder, lambda metadata: _move_chunk(metadata, 51, chunk))


def name_bytes_that_are_not_utf8(folder: Path) -> None:
    path = folder / ".metadata"
    path.write_bytes(path.read_bytes().replace(KEY.encode(), b"\xff" + KEY.encode()[1:]))


def climb_out_with_dots(folder: Path) -> None:
    (folder / "__1_0.distcp").rename(folder.parent / "elsewhere.distcp")
    _rename_file(folder, "../elsewhere.distcp")


def climb_out_with_a_root(folder: Path) -> None:
    outside = folder.parent / "elsewhere.distcp"
    (folder / "__1_0.distcp").rename(outside)
    _rename_file(folder, str(outside))


def climb_out_with_a_link(folder: Path) -> None:
    outside = folder.parent / "elsewhere.distcp"
    (folder / "__1_0.distcp").rename(outside)
    (folder / "__1_0.distcp").symlink_to(outside)


def _rename_file(folder: Path, name: str) -> None:
    def edit(metadata: Metadata) -> None:
        for place in metadata.storage_data.values():
            if place.relative_path == "__1_0.distcp":
                place.relative_path = name

    _edit_metadata(folder, edit)


def claim_an_unknown_dtype(folder: Path) -> None:
    def edit(metadata: Metadata) -> None:
        metadata.state_dict_metadata[KEY].properties.dtype = torch.qint8

    _edit_metadata(folder, edit)


class _Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def plant_a_payload(folder: Path) -> None:
    """Code that a plain ``pickle.load`` would run: it creates ``<folder>.marker``."""

    def edit(metadata: Metadata) -> None:
        metadata.planner_data = _Payload(folder.with_suffix(".marker"))

    _edit_metadata(folder, edit)


def stop_before_the_metadata(folder: Path) -> None:
    (folder / ".metadata").rename(folder / ".metadata.tmp")


def truncate_the_metadata(folder: Path) -> None:
    path = folder / ".metadata"
    os.truncate(path, path.stat().st_size * 2 // 3)


def empty_the_metadata(folder: Path) -> None:
    os.truncate(folder / ".metadata", 0)


DCP: Sequence[tuple[Callable[[Path], None], str, tuple[str, ...]]] = (
    (truncate_data, "source_corrupt", ("__1_0.distcp",)),
    (flip_a_bit, "source_corrupt", (KEY,)),
    (remove_a_rank, "checkpoint_incomplete", ("__2_0.distcp",)),
    (point_an_item_beyond_its_file, "source_corrupt", ("__1_0.distcp",)),
    (point_an_item_before_its_file, "source_corrupt", ()),
    (let_two_items_overlap, "source_corrupt", ("__1_0.distcp",)),
    (claim_an_absurd_shape, "", (KEY,)),
    (claim_a_negative_shape, "", (KEY,)),
    (leave_a_gap, "coverage", (KEY,)),
    (let_two_chunks_overlap, "coverage", (KEY,)),
    (let_a_chunk_reach_out, "coverage", (KEY,)),
    (name_bytes_that_are_not_utf8, "", (".metadata",)),
    (climb_out_with_dots, "unsafe_source", ("../elsewhere.distcp",)),
    (climb_out_with_a_root, "unsafe_source", ("elsewhere.distcp",)),
    (climb_out_with_a_link, "unsafe_source", ("__1_0.distcp",)),
    (claim_an_unknown_dtype, "unsupported_source", ("qint8",)),
    (plant_a_payload, "unsafe_source", ("system",)),
    (stop_before_the_metadata, "checkpoint_incomplete", ()),
    (truncate_the_metadata, "source_corrupt", (".metadata",)),
    (empty_the_metadata, "source_corrupt", (".metadata",)),
)
"""Damage, the code of the refusal (empty where several fit), and what its message has to name."""


# --- safetensors --------------------------------------------------------------------------------------------

_GOOD = {
    "first": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "second": {"dtype": "I64", "shape": [2], "data_offsets": [16, 32]},
}


def _safetensors(header: str | bytes, data: bytes = bytes(32), claimed: int | None = None) -> bytes:
    raw = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(raw) if claimed is None else claimed) + raw + data


def _with_second(**fields: Any) -> bytes:
    return _safetensors(json.dumps(_GOOD | {"second": _GOOD["second"] | fields}))


SAFETENSORS: dict[str, bytes] = {
    "header length beyond the file": _safetensors(json.dumps(_GOOD), claimed=10_000),
    "header length beyond any file": _safetensors(json.dumps(_GOOD), claimed=2**63),
    "truncated data": _safetensors(json.dumps(_GOOD), data=bytes(31)),
    "trailing data": _safetensors(json.dumps(_GOOD), data=bytes(40)),
    "truncated length": b"\x10\x00\x00",
    "overlapping offsets": _with_second(data_offsets=[8, 24]),
    "offsets out of the file": _with_second(data_offsets=[16, 32000], shape=[3998]),
    "offsets backwards": _with_second(data_offsets=[32, 16]),
    "a hole": _safetensors(json.dumps(_GOOD | {"second": {**_GOOD["second"], "data_offsets": [24, 40]}}), bytes(40)),
    "size against shape": _with_second(shape=[3]),
    "an absurd shape": _with_second(shape=[2**62, 2**62]),
    "a product that wraps around": _with_second(shape=[2**63, 2, 2]),
    "a negative shape": _with_second(shape=[-2]),
    "a fractional shape": _with_second(shape=[2.0]),
    "an unknown dtype": _with_second(dtype="F7"),
    "duplicate keys": _safetensors(
        '{"first":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},'
        '"second":{"dtype":"F32","shape":[2,2],"data_offsets":[16,32]},'
        '"second":{"dtype":"I64","shape":[2],"data_offsets":[16,32]}}'
    ),
    "a name that is not UTF-8": _safetensors(json.dumps(_GOOD).encode().replace(b"second", b"seco\xff\xfe")),
    "no JSON": _safetensors(b"{" + b"x" * 50),
    "JSON nested without end": _safetensors('{"a":' + "[" * 100_000),
    "a list for a header": _safetensors("[1, 2]"),
}
"""Whole files, each spoilt in one way."""


def good_safetensors() -> bytes:
    """The file that the spoilt ones were made from."""
    return _safetensors(json.dumps(_GOOD))


def _good_shards(folder: Path, names: Sequence[str]) -> None:
    for name, key in zip(names, ("first", "second"), strict=True):
        header = {key: {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}
        (folder / name).write_bytes(_safetensors(json.dumps(header), bytes(16)))


def _index_of(folder: Path, **weight_map: str) -> None:
    document = {"metadata": {"total_size": 32}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document), encoding="utf-8")


def index_with_dots(folder: Path) -> None:
    _good_shards(folder, ["a.safetensors", "../b.safetensors"])
    _index_of(folder, first="a.safetensors", second="../b.safetensors")


def index_with_a_root(folder: Path) -> None:
    _good_shards(folder, ["a.safetensors", "../b.safetensors"])
    _index_of(folder, first="a.safetensors", second=str(folder.parent / "b.safetensors"))


def index_with_a_link(folder: Path) -> None:
    _good_shards(folder, ["a.safetensors", "../b.safetensors"])
    (folder / "b.safetensors").symlink_to(folder.parent / "b.safetensors")
    _index_of(folder, first="a.safetensors", second="b.safetensors")


def index_of_a_missing_file(folder: Path) -> None:
    _good_shards(folder, ["a.safetensors", "b.safetensors"])
    (folder / "b.safetensors").unlink()
    _index_of(folder, first="a.safetensors", second="b.safetensors")


def index_of_a_missing_tensor(folder: Path) -> None:
    _good_shards(folder, ["a.safetensors", "b.safetensors"])
    _index_of(folder, first="a.safetensors", second="b.safetensors", third="b.safetensors")


def index_cut_short(folder: Path) -> None:
    _good_shards(folder, ["a.safetensors", "b.safetensors"])
    _index_of(folder, first="a.safetensors", second="b.safetensors")
    os.truncate(folder / "model.safetensors.index.json", 40)


INDEXES: Sequence[tuple[Callable[[Path], None], str, tuple[str, ...]]] = (
    (index_with_dots, "unsafe_source", ("../b.safetensors",)),
    (index_with_a_root, "unsafe_source", ("b.safetensors",)),
    (index_with_a_link, "unsafe_source", ("b.safetensors",)),
    (index_of_a_missing_file, "checkpoint_incomplete", ("b.safetensors",)),
    (index_of_a_missing_tensor, "", ("third",)),
    (index_cut_short, "source_corrupt", ("model.safetensors.index.json",)),
)
