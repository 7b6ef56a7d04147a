"""Tying DCP's chunks to the places where they are stored.

``.metadata`` keeps chunks (``state_dict_metadata``) and places (``storage_data``) apart, related by tensor and offset.
Both sides are sorted by that and compared, so that a million chunks take a second. Per-rank files
(``__{rank}.metadata``, torch's ``use_collectives=False``) are read as one: each tells what its own rank wrote, replicas
included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Never

import numpy as np
import xxhash

from reshard_service.catalogue import Int64s, Path
from reshard_service.errors import CheckpointIncomplete, CoverageError, SourceCorrupt, UnsafeSource
from reshard_service.formats.dcp.metadata import DcpMetadata, MetadataFile, StoredObject

_MOST_DIMS = 64
_MOST_ELEMENTS = 1 << 62


def join_metadata(parts: Sequence[MetadataFile]) -> DcpMetadata:
    """Tie chunks to places over one metadata file, or over all ranks' in rank order.

    Raises :class:`SourceCorrupt` naming the tensor where the two sides disagree, :class:`UnsafeSource` for absurd
    shapes, :class:`CoverageError` for a chunk that reaches out of its tensor or that two different items claim to hold.
    """
    return _Joining(parts).result()


class _Joining:
    """Numbers keys and files over all parts, then sorts chunks and places into the same order."""

    def __init__(self, parts: Sequence[MetadataFile]) -> None:
        self.parts = parts
        self.paths = self._joined_paths()
        self.texts: dict[str, int] = {}
        self.numbers = [self._number_texts(part) for part in parts]
        self.names = list(self.texts)
        self.tensor_of_text = np.full(len(self.names), -1, dtype=np.int64)
        self._collect_tensors()

    def _number_texts(self, part: MetadataFile) -> Int64s:
        return np.array([self.texts.setdefault(text, len(self.texts)) for text in part.texts], dtype=np.int64)

    def _file(self) -> str:
        return self.parts[0].name

    def _corrupt(self, tensor: int, what: str) -> Never:
        key = self.keys[tensor]
        raise SourceCorrupt(f"{self._file()!r}: tensor {key!r} {what}", tensor=key, file=self._file())

    def _collect_tensors(self) -> None:
        keys: list[str] = []
        dtypes: list[str] = []
        shapes: list[tuple[int, ...]] = []
        tensors_of_parts: list[Int64s] = []
        for part, numbers in zip(self.parts, self.numbers, strict=True):
            columns = part.columns
            flat, ends = columns["tensor_shape"].tolist(), np.cumsum(columns["tensor_rank"]).tolist()
            rows: list[int] = []
            start = 0
            for text, dtype, end in zip(
                numbers[columns["tensor_key"]].tolist(), columns["tensor_dtype"].tolist(), ends, strict=True
            ):
                shape = tuple(flat[start:end])
                start = end
                known = int(self.tensor_of_text[text])
                if known < 0:
                    known = self.tensor_of_text[text] = len(keys)
                    keys.append(self.names[text])
                    dtypes.append(part.texts[dtype])
                    shapes.append(shape)
                elif (shapes[known], dtypes[known]) != (shape, part.texts[dtype]):
                    raise SourceCorrupt(
                        f"tensor {keys[known]!r} is {dtypes[known]}{list(shapes[known])} in {self._file()!r} and "
                        f"{part.texts[dtype]}{list(shape)} in {part.name!r}",
                        tensor=keys[known],
                        file=part.name,
                    )
                rows.append(known)
            tensors_of_parts.append(np.array(rows, dtype=np.int64))
        order = self._saved_order(keys)
        renumbered = np.empty(len(keys), dtype=np.int64)
        renumbered[order] = np.arange(len(keys))
        is_tensor = self.tensor_of_text >= 0
        self.tensor_of_text[is_tensor] = renumbered[self.tensor_of_text[is_tensor]]
        self.tensors_of_parts = [renumbered[tensors] for tensors in tensors_of_parts]
        self.keys = [keys[old] for old in order]
        self.dtypes = [dtypes[old] for old in order]
        self.shapes = shapes = [shapes[old] for old in order]
        self.rank_of = np.array([len(shape) for shape in shapes], dtype=np.int64)
        self.dims = int(self.rank_of.max(initial=0))
        if self.dims > _MOST_DIMS:
            self._absurd(int(self.rank_of.argmax()))
        self.extent = np.ones((len(shapes), self.dims), dtype=np.int64)
        self.extent[np.arange(self.dims) < self.rank_of[:, None]] = [n for shape in shapes for n in shape]
        # An empty shard lies at the far edge, so positions along a dim run from 0 to its extent.
        radix = np.maximum(self.extent, 0) + 1
        absurd = np.flatnonzero(
            (radix.astype(np.float64).prod(axis=1) > _MOST_ELEMENTS) | (self.extent < 0).any(axis=1)
        )
        if len(absurd):
            self._absurd(int(absurd[0]))
        self.strides = np.ones_like(radix)
        for dim in range(self.dims - 2, -1, -1):
            self.strides[:, dim] = self.strides[:, dim + 1] * radix[:, dim + 1]

    def _saved_order(self, keys: list[str]) -> list[int]:
        """The tensors in the order of the state dict that was saved, in which a resume will ask for them.

        ``planner_data`` keeps that order. ``state_dict_metadata`` does not: torch 2.13 fills it rank by rank after it
        has spread replicated tensors over the ranks, so what rank 0 need not write comes late.
        """
        positions = {key: i for i, key in enumerate(self.paths or ())}
        return sorted(range(len(keys)), key=lambda tensor: positions.get(keys[tensor], len(positions)))

    def _absurd(self, tensor: int) -> Never:
        key = self.keys[tensor]
        shape = str(list(self.shapes[tensor]))[:120]
        raise UnsafeSource(f"tensor {key!r} claims the impossible shape {shape}", tensor=key, file=self._file())

    def _padded(self, ranks: Int64s, flat: Int64s, fill: int) -> Int64s:
        table = np.full((len(ranks), self.dims), fill, dtype=np.int64)
        if len(ranks) and self.dims and (ranks == self.dims).all():
            table[:] = flat.reshape(-1, self.dims)
        else:
            table[np.arange(self.dims) < ranks[:, None]] = flat
        return table

    def _chunks(self) -> tuple[Int64s, Int64s, Int64s]:
        """Tensor, offsets and sizes of every chunk, within the bounds of its tensor."""
        tensor, offsets, sizes = [], [], []
        for part, tensors in zip(self.parts, self.tensors_of_parts, strict=True):
            of_chunk = np.repeat(tensors, part.columns["tensor_chunks"])
            ranks = self.rank_of[of_chunk]
            tensor.append(of_chunk)
            offsets.append(self._padded(ranks, part.columns["chunk_offsets"], 0))
            sizes.append(self._padded(ranks, part.columns["chunk_sizes"], 1))
        all_tensors, all_offsets, all_sizes = map(np.concatenate, (tensor, offsets, sizes))
        extent = self.extent[all_tensors]
        bad = (all_offsets < 0) | (all_sizes < 0) | (all_offsets > extent) | (all_sizes > extent - all_offsets)
        rows = np.flatnonzero(bad.any(axis=1))
        if len(rows):
            row, t = int(rows[0]), int(all_tensors[rows[0]])
            rank = len(self.shapes[t])
            raise CoverageError(
                f"tensor {self.keys[t]!r}: its chunk at {all_offsets[row, :rank].tolist()} of sizes "
                f"{all_sizes[row, :rank].tolist()} reaches out of its shape {list(self.shapes[t])}",
                tensor=self.keys[t],
                file=self._file(),
            )
        return all_tensors, all_offsets, all_sizes

    def _places(self) -> tuple[Int64s, Int64s, dict[str, Int64s], list[StoredObject]]:
        """Tensor, offsets and the other columns of every stored chunk; and the byte objects."""
        tensor, offsets, objects = [], [], []
        others: dict[str, list[Int64s]] = {name: [] for name in ("file", "start", "length", "transforms")}
        self.transform_lists: dict[tuple[str, ...], int] = {(): 0}
        seen_objects: set[str] = set()
        for part, numbers in zip(self.parts, self.numbers, strict=True):
            columns = part.columns
            keys, ranks = numbers[columns["storage_key"]], columns["storage_rank"].copy()
            renumbered = np.array(
                [self.transform_lists.setdefault(names, len(self.transform_lists)) for names in part.transforms],
                dtype=np.int64,
            )
            values = {
                "file": numbers[columns["storage_file"]],
                "start": columns["storage_start"],
                "length": columns["storage_length"],
                "transforms": renumbered[columns["storage_transforms"]],
            }
            of_row = self.tensor_of_text[keys]
            is_object = of_row < 0
            rank_of_row = np.zeros_like(ranks)
            rank_of_row[~is_object] = self.rank_of[of_row[~is_object]]
            known = {self.names[number] for number in numbers[columns["object_key"]].tolist()}
            places = (values[name][is_object].tolist() for name in ("file", "start", "length", "transforms"))
            for text, *place in zip(keys[is_object].tolist(), *places, strict=True):
                key = self.names[text]
                if key not in known:
                    raise SourceCorrupt(
                        f"{part.name!r} says where {key!r} is stored, but not what it is", tensor=key, file=part.name
                    )
                if key not in seen_objects:
                    seen_objects.add(key)
                    objects.append(StoredObject(key, *place))
            for key in known - seen_objects:
                raise CheckpointIncomplete(
                    f"{part.name!r} lists the object {key!r} but not where it is stored", tensor=key, file=part.name
                )
            wrong = np.flatnonzero(~is_object & (ranks >= 0) & (ranks != rank_of_row))
            if len(wrong):
                self._corrupt(int(of_row[wrong[0]]), "has a stored chunk whose offset has another number of dims")
            if (is_object & (ranks > 0)).any():
                raise SourceCorrupt(f"{part.name!r} gives a byte object an offset", file=part.name)
            table = self._padded(np.maximum(ranks, 0), columns["storage_offset"], 0)
            tensor.append(of_row[~is_object])
            offsets.append(table[~is_object])
            for name, column in values.items():
                others[name].append(column[~is_object])
        joined = {name: np.concatenate(columns) for name, columns in others.items()}
        return np.concatenate(tensor), np.concatenate(offsets), joined, objects

    def _ordered(self, tensor: Int64s, offsets: Int64s) -> tuple[Int64s, Int64s, Int64s]:
        """Row numbers in the order of (tensor, position of the offset), with both."""
        position: Int64s = (offsets * self.strides[tensor]).sum(axis=1)
        order = np.lexsort((position, tensor))
        return order, tensor[order], position[order]

    def result(self) -> DcpMetadata:
        chunk_tensor, chunk_offsets, chunk_sizes = self._chunks()
        place_tensor, place_offsets, places, objects = self._places()
        outside = np.flatnonzero(((place_offsets < 0) | (place_offsets > self.extent[place_tensor])).any(axis=1))
        if len(outside):
            self._corrupt(int(place_tensor[outside[0]]), "has a stored chunk outside its shape")
        rows, tensor, position = self._ordered(chunk_tensor, chunk_offsets)
        new = _first_of_each(tensor, position)
        self._require_equal_replicas(rows, new, tensor, chunk_offsets, chunk_sizes)
        rows, tensor, position = rows[new], tensor[new], position[new]
        place_rows, tied_tensor, tied_position = self._ordered(place_tensor, place_offsets)
        new = _first_of_each(tied_tensor, tied_position)
        if not new.all():
            if len(self.parts) == 1:
                t = int(tied_tensor[np.flatnonzero(~new)[0]])
                raise CoverageError(
                    f"tensor {self.keys[t]!r}: two items claim to hold the same chunk", tensor=self.keys[t],
                    file=self._file(),
                )  # fmt: skip
            place_rows, tied_tensor, tied_position = place_rows[new], tied_tensor[new], tied_position[new]
        if not (np.array_equal(tensor, tied_tensor) and np.array_equal(position, tied_position)):
            self._explain_mismatch(tensor, position, tied_tensor, tied_position)
        used, file = np.unique(
            np.concatenate([places["file"][place_rows], np.array([o.file for o in objects], dtype=np.int64)]),
            return_inverse=True,
        )
        return DcpMetadata(
            keys=tuple(self.keys),
            dtypes=tuple(self.dtypes),
            shapes=tuple(self.shapes),
            first=np.searchsorted(tensor, np.arange(len(self.keys) + 1)).astype(np.int64),
            offsets=chunk_offsets[rows],
            sizes=chunk_sizes[rows],
            file=file[: len(rows)].astype(np.int32),
            start=places["start"][place_rows],
            length=places["length"][place_rows],
            transforms=places["transforms"][place_rows].astype(np.int32),
            files=tuple(self.names[number] for number in used.tolist()),
            transform_lists=tuple(self.transform_lists),
            objects=tuple(
                StoredObject(found.key, number, found.start, found.length, found.transforms)
                for found, number in zip(objects, file[len(rows) :].tolist(), strict=True)
            ),
            paths=self.paths,
            planner=next((part.planner for part in self.parts if part.planner), None),
            version=self.parts[0].version,
            other_fields=self.parts[0].other_fields,
            digest=_joint_digest(self.parts),
            bytes=sum(part.bytes for part in self.parts),
        )

    def _require_equal_replicas(
        self, rows: Int64s, new: np.ndarray[Any, Any], tensor: Int64s, offsets: Int64s, sizes: Int64s
    ) -> None:
        again = np.flatnonzero(~new)
        differing = (sizes[rows[again]] != sizes[rows[again - 1]]).any(axis=1)
        if differing.any():
            t = int(tensor[again[np.flatnonzero(differing)[0]]])
            raise CoverageError(
                f"tensor {self.keys[t]!r}: two chunks of different sizes begin at the same offset",
                tensor=self.keys[t],
                file=self._file(),
            )

    def _explain_mismatch(self, tensor: Int64s, position: Int64s, tied: Int64s, tied_position: Int64s) -> Never:
        shorter = min(len(tensor), len(tied))
        differs = (tensor[:shorter] != tied[:shorter]) | (position[:shorter] != tied_position[:shorter])
        at = int(differs.argmax()) if differs.any() else shorter
        wanted = (int(tensor[at]), int(position[at])) if at < len(tensor) else (len(self.keys), 0)
        found = (int(tied[at]), int(tied_position[at])) if at < len(tied) else (len(self.keys), 0)
        t, where = min(wanted, found)
        shape = self.shapes[t]
        offset = [where // int(self.strides[t, d]) % (shape[d] + 1) for d in range(len(shape))]
        if wanted < found:
            key = self.keys[t]
            raise CheckpointIncomplete(
                f"{self._file()!r} lists a chunk of {key!r} at {offset} but not where it is stored",
                tensor=key,
                file=self._file(),
            )
        self._corrupt(t, f"has an item stored for a chunk at {offset} that it does not have")

    def _joined_paths(self) -> dict[str, Path] | None:
        if any(part.paths is None for part in self.parts):
            return None
        merged: dict[str, Path] = {}
        for part in self.parts:
            merged.update(part.paths or {})
        for key, path in merged.items():  # as torch's flatten_state_dict makes them; no checksum guards this file
            if ".".join(map(str, path)) != key:
                raise SourceCorrupt(
                    f"{self._file()!r} says that {key!r} lies at {'.'.join(map(str, path))!r} of the state dict",
                    tensor=key,
                    file=self._file(),
                    hint="the metadata is damaged; copy it again from its origin",
                )
        return merged


def _first_of_each(tensor: Int64s, position: Int64s) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """True at the first of equal neighbours."""
    new = np.ones(len(tensor), dtype=bool)
    new[1:] = (tensor[1:] != tensor[:-1]) | (position[1:] != position[:-1])
    return new


def _joint_digest(parts: Sequence[MetadataFile]) -> str:
    if len(parts) == 1:
        return parts[0].digest
    lines = "\n".join(f"{part.name} {part.digest}" for part in parts)
    return xxhash.xxh3_128_hexdigest(lines.encode())
