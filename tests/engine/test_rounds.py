"""Rounds: what is read together, found again, and checked on the way, with staging buffers of a few pages."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reshard_service.catalogue import Catalogue, Identity, Section, Storing, Tensor, build_chunks
from reshard_service.conversion import open_source
from reshard_service.documents.job import SourceDocument
from reshard_service.dtypes import by_name
from reshard_service.engine.buffers import Buffer
from reshard_service.engine.execute import execute
from reshard_service.engine.rounds import GAP_BYTES, Fetcher
from reshard_service.engine.source import Source
from reshard_service.engine.targets import LocalTarget
from reshard_service.errors import SourceCorrupt
from reshard_service.formats.options import WriteOptions
from reshard_service.formats.safetensors.writer import design_safetensors
from reshard_service.formats.target import Selection
from reshard_service.planning.budget import Budget
from reshard_service.planning.panels import Span
from reshard_service.planning.plan import make_plan
from reshard_service.storage.local import LocalStorage
from tests.engine.checkpoints import bits, filled, read, save_dcp, tiny_budget


def opened(path: Path) -> Catalogue:
    return open_source(SourceDocument(uri=str(path), producer="plain"))


def one_tensor_of(catalogue: Catalogue, keys: Sequence[str]) -> Catalogue:
    """The catalogue of one tensor whose chunks are the one-dim tensors named, one behind the other."""
    index = {tensor.key: i for i, tensor in enumerate(catalogue.tensors)}
    chunks = catalogue.chunks
    rows = [chunks.rows(index[key]).start for key in keys]
    sizes = [catalogue.tensors[index[key]].shape[0] for key in keys]
    offsets = np.cumsum([0, *sizes]).tolist()
    tensor = Tensor("joined", Identity(Section.MODEL, "joined"), by_name("U8"), (offsets[-1],), ("joined",))
    table = build_chunks(
        1,
        [0] * len(rows),
        [(offset,) for offset in offsets[:-1]],
        [(size,) for size in sizes],
        file=chunks.file[rows].tolist(),
        start=chunks.start[rows].tolist(),
        length=chunks.length[rows].tolist(),
        storing=chunks.storing[rows].tolist(),
    )
    return replace(catalogue, tensors=(tensor,), chunks=table, objects=())


def write(catalogue: Catalogue, target: Path, budget: Budget) -> None:
    selection = Selection(catalogue, catalogue.tensors, np.arange(len(catalogue.tensors), dtype=np.int64))
    design = design_safetensors(selection, None, WriteOptions(single_file=target.name))
    execute(make_plan(catalogue, design), LocalTarget(target, "0" * 32, True, False), budget)


@pytest.mark.parametrize("tiny", [1, 10, 20, 60])
def test_many_tiny_items_beside_a_large_one_fit_a_round(tiny: int, tmp_path: Path) -> None:
    """Whole items are cheaper to read, but not where their framing takes the room of the rest."""
    state = {f"p{number:03}": filled((8,), torch.uint8, number) for number in range(tiny)}
    state["large"] = filled((3500,), torch.uint8, 1000)
    catalogue = one_tensor_of(opened(save_dcp(state, tmp_path / "in")), sorted(state, reverse=True))
    write(catalogue, tmp_path / "out.safetensors", tiny_budget())
    found = read(tmp_path / "out.safetensors", "safetensors", {})["joined"]
    assert bits(found) == b"".join(bits(state[key]) for key in sorted(state, reverse=True))


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=12), pages=st.integers(2, 6))
def test_chunks_of_any_size_come_out_of_a_round_of_any_size(
    sizes: list[int], pages: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("case")
    state = {f"p{number:03}": filled((size,), torch.uint8, number) for number, size in enumerate(sizes)}
    catalogue = one_tensor_of(opened(save_dcp(state, folder / "in")), sorted(state))
    write(catalogue, folder / "out.safetensors", Budget(1, pages << 12, 16 << 10))
    found = read(folder / "out.safetensors", "safetensors", {})["joined"]
    assert bits(found) == b"".join(bits(state[key]) for key in sorted(state))


# --- what is read -------------------------------------------------------------------------------------------


class CountingSource(Source):
    """Notes each read."""

    def __init__(self, catalogue: Catalogue) -> None:
        super().__init__(catalogue)
        self.reads: list[tuple[int, int, int]] = []

    def read_into(self, file: int, start: int, buffer: memoryview) -> None:
        self.reads.append((file, start, len(buffer)))
        super().read_into(file, start, buffer)


def raw(folder: Path, places: Sequence[tuple[int, int]], *, crc: Sequence[int] | None = None) -> Catalogue:
    """One-dim byte tensors at these (start, length) of a file of random bytes."""
    folder.mkdir(exist_ok=True)
    size = max(start + length for start, length in places)
    (folder / "data").write_bytes(bytes(filled((size,), torch.uint8, 5).numpy()))
    count = len(places)
    tensors = tuple(
        Tensor(f"t{i}", Identity(Section.MODEL, f"t{i}"), by_name("U8"), (places[i][1],), (f"t{i}",))
        for i in range(count)
    )
    table = build_chunks(
        count,
        range(count),
        [(0,)] * count,
        [(length,) for _, length in places],
        file=[0] * count,
        start=[start for start, _ in places],
        length=[length for _, length in places],
        storing=Storing.RAW,
        crc=crc,
    )
    storage = LocalStorage(folder)
    return Catalogue(str(folder), storage, "torch", tensors, table, ())


class _File:
    path = "data"


def fetched(catalogue: Catalogue, staging_bytes: int, order: Sequence[int]) -> tuple[CountingSource, list[bytes]]:
    catalogue = replace(catalogue, files=(_File(),))  # type: ignore[arg-type]
    source, staging = CountingSource(catalogue), Buffer(staging_bytes)
    fetcher = Fetcher(source, staging)
    for t in order:
        length = catalogue.tensors[t].nbytes
        fetcher.ask(t, (Span(0, 0, length, length),), catalogue.tensors[t])
    found = [
        bytes(array[at : at + catalogue.tensors[t].nbytes])
        for t, (array, at) in zip(order, fetcher.fetch(), strict=True)
    ]
    source.close()
    return source, found


def test_close_neighbours_are_one_read_and_far_ones_are_not(tmp_path: Path) -> None:
    near, far = 100 + GAP_BYTES, 100 + GAP_BYTES + 200 + GAP_BYTES + 1
    places = [(0, 100), (near, 200), (far, 50)]
    catalogue = raw(tmp_path / "in", places)
    source, found = fetched(catalogue, 1 << 20, [2, 0, 1])
    assert source.reads == [(0, 0, near + 200), (0, far, 50)]
    data = (tmp_path / "in" / "data").read_bytes()
    assert found == [data[start : start + length] for start, length in (places[2], places[0], places[1])]


def test_gaps_are_read_only_where_the_buffer_has_room_for_them(tmp_path: Path) -> None:
    places = [(0, 3000), (4000, 3000), (8000, 1500)]
    source, found = fetched(raw(tmp_path / "in", places), 8192, [0, 1, 2])
    assert sum(length for _, _, length in source.reads) <= 8192
    assert source.reads == [(0, 0, 3000), (0, 4000, 3000), (0, 8000, 1500)]
    assert [len(one) for one in found] == [3000, 3000, 1500]


@settings(max_examples=60, deadline=None)
@given(
    places=st.lists(st.tuples(st.integers(0, 60_000), st.integers(0, 3000)), min_size=1, max_size=12),
    spare=st.integers(1, 40_000),
    random=st.randoms(),
)
def test_ranges_in_any_order_overlapping_or_not_are_found_again(
    places: list[tuple[int, int]], spare: int, random: object, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("case")
    order = list(range(len(places)))
    random.shuffle(order)  # type: ignore[attr-defined]
    source, found = fetched(raw(folder, places), sum(length for _, length in places) + spare, order)
    data = (folder / "data").read_bytes()
    assert found == [data[places[t][0] : places[t][0] + places[t][1]] for t in order]
    assert source.reads == sorted(source.reads)


# --- what is checked ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [5000, 30_000])
def test_a_known_crc_of_raw_bytes_is_checked_in_one_round_or_many(length: int, tmp_path: Path) -> None:
    good = raw(tmp_path / "in", [(0, length)])
    data = (tmp_path / "in" / "data").read_bytes()
    for crc, is_good in ((zlib.crc32(data), True), (zlib.crc32(data) ^ 1, False), (-1, True)):
        table = replace(good.chunks, crc=np.array([crc]))
        catalogue = replace(good, chunks=table, files=(_File(),))  # type: ignore[arg-type]
        source, staging = Source(catalogue), Buffer(8192)
        fetcher = Fetcher(source, staging)

        def fetch_all(fetcher: Fetcher = fetcher, tensor: Tensor = catalogue.tensors[0]) -> None:
            for at in range(0, length, 6000):
                fetcher.ask(0, (Span(0, at, min(6000, length - at), length),), tensor)
                fetcher.fetch()

        if is_good:
            fetch_all()
        else:
            with pytest.raises(SourceCorrupt, match="'t0' in 'data' has CRC32"):
                fetch_all()
        source.close()
