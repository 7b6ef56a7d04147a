"""Batches hold every tensor once; parts share the work by bytes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reshard_service.catalogue import Chunks, Storing, build_chunks
from reshard_service.planning.batches import Batch, batches_by_file, batches_by_tensor, parts, split_tensor
from tests.planning.tilings import unhurried

sizes = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=40)


def _columns(pairs: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    table = np.array(pairs, dtype=np.int64).reshape(len(pairs), 2)
    return table[:, 0], table[:, 1]


@unhurried
@given(sizes, st.integers(1, 120))
def test_batches_hold_every_tensor_once_and_in_order(pairs: list[tuple[int, int]], largest: int) -> None:
    read, written = _columns(pairs)
    batches = batches_by_tensor(read, written, largest=largest)
    assert [t for batch in batches for t in range(batch.first, batch.stop)] == list(range(len(pairs)))
    for batch in batches:
        assert batch.rows is None
        assert batch.read_bytes == read[batch.first : batch.stop].sum()
        assert batch.write_bytes == written[batch.first : batch.stop].sum()
        alone = batch.stop == batch.first + 1
        assert alone or max(batch.read_bytes, batch.write_bytes) <= largest


@unhurried
@given(sizes, st.integers(1, 120), st.integers(1, 9))
def test_parts_hold_every_batch_once_and_in_order(pairs: list[tuple[int, int]], largest: int, workers: int) -> None:
    batches = batches_by_tensor(*_columns(pairs), largest=largest)
    shared = parts(batches, workers)
    assert len(shared) == workers
    assert sorted((batch for part in shared for batch in part), key=lambda batch: batch.first) == list(batches)
    for part in shared:
        assert [batch.first for batch in part] == sorted(batch.first for batch in part)


@unhurried
@given(sizes, st.integers(1, 9))
def test_no_part_has_more_than_its_share_and_one_batch(pairs: list[tuple[int, int]], workers: int) -> None:
    batches = batches_by_tensor(*_columns(pairs), largest=1)
    weights = [batch.read_bytes + batch.write_bytes for batch in batches]
    for part in parts(batches, workers):
        work = sum(batch.read_bytes + batch.write_bytes for batch in part)
        assert work <= sum(weights) / workers + max(weights, default=0) + 1


@st.composite
def _rows(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """Tensor, file and bytes of each row, by tensor."""
    rows = draw(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 4), st.integers(0, 20)), min_size=1, max_size=30))
    return sorted(rows, key=lambda row: row[0])


@unhurried
@given(_rows(), st.randoms())
def test_a_batch_by_file_is_one_file_from_front_to_back(rows: list[tuple[int, int, int]], random: object) -> None:
    tensor, file, length = (np.array(column, dtype=np.int64) for column in zip(*rows, strict=True))
    order = list(range(len(rows)))
    random.shuffle(order)  # type: ignore[attr-defined]
    start, ends = np.zeros(len(rows), dtype=np.int64), dict.fromkeys(range(5), 8)
    for row in order:
        start[row] = ends[rows[row][1]]
        ends[rows[row][1]] += rows[row][2]
    scale = np.where(tensor % 2 == 0, 2.0, 1.0)
    batches = batches_by_file(tensor, file, start, length, scale)
    assert sorted(row for batch in batches for row in batch.rows.tolist()) == list(range(len(rows)))
    assert len(batches) == len(set(file.tolist()))
    for batch in batches:
        held = batch.rows
        assert len(set(file[held].tolist())) == 1
        assert start[held].tolist() == sorted(start[held].tolist())
        assert batch.first == tensor[held].min()
        assert batch.stop == tensor[held].max() + 1
        assert batch.write_bytes == length[held].sum()
        assert batch.read_bytes == int((length[held] * scale[held]).sum())


def test_nothing_to_do_gives_empty_parts() -> None:
    none = np.zeros(0, dtype=np.int64)
    assert batches_by_tensor(none, none) == ()
    assert batches_by_file(none, none, none, none, none.astype(np.float64)) == ()
    assert parts((), 3) == ((), (), ())
    assert parts((Batch(0, 1, 0, 0),), 2) in {((Batch(0, 1, 0, 0),), ()), ((), (Batch(0, 1, 0, 0),))}


def _rows_table(begins: list[int], columns: int, storing: Storing = Storing.RAW) -> Chunks:
    """Chunks of one tensor of shape [begins[-1], 8 * columns]: row blocks, each cut into column shards."""
    blocks = list(itertools.pairwise(begins))
    offsets = [[low, 8 * c] for low, _ in blocks for c in range(columns)]
    sizes = [[high - low, 8] for low, high in blocks for _ in range(columns)]
    count = len(offsets)
    lengths = [size[0] * 8 for size in sizes]
    return build_chunks(1, [0] * count, offsets, sizes, [0] * count, list(range(count)), lengths, storing)


@pytest.mark.parametrize("columns", [1, 3])
def test_a_large_tensor_is_cut_between_row_blocks_and_column_shards_stay_together(columns: int) -> None:
    target = _rows_table([0, 10, 20, 30, 37, 40], columns)
    source = _rows_table([0, 40], 1)
    whole = Batch(0, 1, 40 * 8 * columns, 40 * 8 * columns)
    pieces = split_tensor(whole, target, source, 0, largest=20 * 8 * columns)
    rows = [piece.rows.tolist() for piece in pieces if piece.rows is not None]
    assert [len(members) // columns for members in rows] == [2, 3]
    assert sorted(itertools.chain(*rows)) == list(range(len(target)))
    assert sum(piece.read_bytes for piece in pieces) == whole.read_bytes


def test_no_cut_goes_through_a_source_chunk_that_carries_a_checksum() -> None:
    target, largest = _rows_table([0, 10, 20, 30, 40], 1), 80
    whole = Batch(0, 1, 320, 320)
    items = _rows_table([0, 20, 40], 1, Storing.TORCH_ITEM)
    assert [len(piece.rows) for piece in split_tensor(whole, target, items, 0, largest) if piece.rows is not None] == [
        2,
        2,
    ]
    assert split_tensor(whole, target, _rows_table([0, 40], 1, Storing.TORCH_ITEM), 0, largest) == (whole,)


def test_one_large_batch_does_not_take_its_neighbours_along() -> None:
    batches = tuple(Batch(t, t + 1, size, size) for t, size in enumerate([10, 10, 100, 10, 10, 10, 50]))
    loads = [sum(batch.read_bytes for batch in part) for part in parts(batches, 2)]
    assert max(loads) == 100
