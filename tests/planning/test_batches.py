"""Batches hold every tensor once; parts share the work by bytes."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from reshard_service.planning.batches import Batch, batches_by_file, batches_by_tensor, parts
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
def test_parts_hold_every_batch_once_and_consecutively(
    pairs: list[tuple[int, int]], largest: int, workers: int
) -> None:
    batches = batches_by_tensor(*_columns(pairs), largest=largest)
    shared = parts(batches, workers)
    assert len(shared) == workers
    assert [batch for part in shared for batch in part] == list(batches)


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
