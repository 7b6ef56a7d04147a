"""Intersection against brute force on small grids."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reshard_service.catalogue import build_chunks
from reshard_service.planning.intersect import PatternCache, first_copies, intersect, overlapping_pairs
from tests.planning.tilings import Box, Tiling, shapes, tilings, unhurried

Table = np.ndarray[tuple[int, int], np.dtype[np.int64]]


def _cells(box: Box) -> set[tuple[int, ...]]:
    offsets, sizes = box
    return {tuple(np.add(offsets, index).tolist()) for index in np.ndindex(*sizes)}


@st.composite
def _boxes(draw: st.DrawFn, dims: int) -> list[Box]:
    sides = st.lists(st.integers(0, 4), min_size=dims, max_size=dims).map(tuple)
    return draw(st.lists(st.tuples(sides, sides), max_size=6))


def _table(boxes: list[Box], dims: int) -> tuple[Table, Table]:
    offsets = np.array([box[0] for box in boxes], dtype=np.int64).reshape(len(boxes), dims)
    return offsets, offsets + np.array([box[1] for box in boxes], dtype=np.int64).reshape(len(boxes), dims)


@unhurried
@given(st.data(), st.integers(0, 3))
def test_overlapping_pairs_are_those_that_share_an_element(data: st.DataObject, dims: int) -> None:
    a, b = data.draw(_boxes(dims)), data.draw(_boxes(dims))
    i, j = overlapping_pairs(*_table(a, dims), *_table(b, dims))
    found = list(zip(i.tolist(), j.tolist(), strict=True))
    expected = {(n, m) for n, mine in enumerate(a) for m, other in enumerate(b) if _cells(mine) & _cells(other)}
    assert set(found) == expected
    assert len(found) == len(expected)
    assert i.tolist() == sorted(i.tolist())


@unhurried
@given(st.data(), shapes())
def test_copies_fill_every_element_of_every_target_once_from_the_right_place(
    data: st.DataObject, shape: tuple[int, ...]
) -> None:
    source, target = data.draw(tilings(shape)), data.draw(tilings(shape))
    pattern = intersect(source.offsets, source.sizes, target.offsets, target.sizes)
    filled: dict[int, list[tuple[int, ...]]] = {row: [] for row in range(len(target.boxes))}
    for s, t, offsets, sizes in zip(
        pattern.source.tolist(),
        pattern.target.tolist(),
        pattern.offsets.tolist(),
        pattern.sizes.tolist(),
        strict=True,
    ):
        cells = _cells((tuple(offsets), tuple(sizes)))
        assert cells
        assert cells <= _cells(source.boxes[s])
        filled[t] += cells
    for row, cells_of_row in filled.items():
        assert sorted(cells_of_row) == sorted(_cells(target.boxes[row]))


@unhurried
@given(st.data(), shapes())
def test_only_one_replica_of_a_source_is_read(data: st.DataObject, shape: tuple[int, ...]) -> None:
    source, target = data.draw(tilings(shape)), data.draw(tilings(shape))
    pattern = intersect(source.offsets, source.sizes, target.offsets, target.sizes)
    used = {source.boxes[row] for row in pattern.source.tolist()}
    assert len(used) == len(set(pattern.source.tolist()))


@unhurried
@given(st.data(), shapes())
def test_a_pattern_restricted_to_some_targets_holds_all_their_copies(
    data: st.DataObject, shape: tuple[int, ...]
) -> None:
    source, target = data.draw(tilings(shape)), data.draw(tilings(shape))
    pattern = intersect(source.offsets, source.sizes, target.offsets, target.sizes)
    keep = data.draw(st.sets(st.integers(0, len(target.boxes) - 1)))
    some = pattern.only_targets(np.array(sorted(keep), dtype=np.int64))
    assert sorted(some.target.tolist()) == sorted(row for row in pattern.target.tolist() if row in keep)
    assert len(some.offsets) == len(some.sizes) == len(some.source) == len(some)
    assert int(some.volumes().sum()) == sum(len(_cells(target.boxes[row])) for row in keep)


@pytest.mark.parametrize("dims", [0, 1, 3])
def test_replicas_are_found_in_tables_of_any_width(dims: int) -> None:
    ones = np.ones((3, dims), dtype=np.int64)
    assert first_copies(ones, ones).tolist() == [0]
    assert first_copies(ones[:1], ones[:1]).tolist() == [0]
    assert first_copies(ones[:0], ones[:0]).tolist() == []


def test_a_busy_dim_is_joined_without_looking_at_all_pairs() -> None:
    """Ten thousand slices of one dim against as many of the same: a quadratic join would need 10^8 pairs."""
    count = 10_000
    offsets = np.stack([np.zeros(count, dtype=np.int64), np.arange(count, dtype=np.int64)], axis=1)
    sizes = np.ones_like(offsets)
    pattern = intersect(offsets, sizes, offsets, sizes)
    assert pattern.source.tolist() == pattern.target.tolist() == list(range(count))


def _two_layers(tiling: Tiling, other: Tiling) -> PatternCache:
    tables = []
    for cut in (tiling, other):
        count = len(cut.boxes)
        tables.append(
            build_chunks(
                2,
                [0] * count + [1] * count,
                [box[0] for box in cut.boxes] * 2,
                [box[1] for box in cut.boxes] * 2,
                file=[0] * 2 * count,
                start=list(range(2 * count)),
                length=[1] * 2 * count,
            )
        )
    return PatternCache(*tables)


@unhurried
@given(st.data(), shapes())
def test_layers_that_are_cut_alike_share_one_pattern(data: st.DataObject, shape: tuple[int, ...]) -> None:
    source, target = data.draw(tilings(shape)), data.draw(tilings(shape))
    cache = _two_layers(source, target)
    n, m = len(source.boxes), len(target.boxes)
    numbers = [cache.pattern(slice(k * n, k * n + n), slice(k * m, k * m + m)) for k in range(2)]
    assert numbers == [0, 0]
    assert len(cache.patterns) == 1
    dims = len(shape)
    expected = intersect(source.offsets, source.sizes, target.offsets, target.sizes)
    assert cache.patterns[0].sizes[:, :dims].prod(axis=1).sum() == expected.volumes().sum()
