"""Panels carried out by a tiny engine in memory: whatever layouts, types and budgets, the tensor comes out whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from reshard_service.dtypes import DType, by_name
from reshard_service.engine.moves import move_bytes, move_cast
from reshard_service.planning.intersect import Pattern, intersect, widen
from reshard_service.planning.panels import Arrays, Panel, cut_panels, slabs
from tests.planning.tilings import Tiling, plain, shapes, tilings, unhurried

TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Engine:
    """Executes panels: arrays are byte strings, reads and writes must run front to back."""

    def __init__(self, source: dict[int, bytearray], given: DType, wanted: DType) -> None:
        self.source = source
        self.target: dict[int, bytearray] = {}
        self.given, self.wanted = given, wanted
        self.read_up_to: dict[int, int] = {}
        self.largest = 0

    def run(self, panels: list[Panel], source: Tiling, target: Tiling) -> None:
        for panel in panels:
            fetched = []
            for span in panel.reads:
                array = self.source[source.arrays[span.row]]
                assert span.array_bytes == len(array)
                assert span.whole == (span.length == len(array))
                # Nothing is read twice, and never backwards.
                assert span.start >= self.read_up_to.get(span.row, 0)
                self.read_up_to[span.row] = span.start + span.length
                fetched.append(np.frombuffer(array, dtype=np.uint8)[span.start : span.start + span.length].copy())
            assert panel.bytes_in == sum(span.length for span in panel.reads)
            assert panel.bytes_out == sum(write.span.length for write in panel.writes)
            self.largest = max([self.largest, *(write.span.length for write in panel.writes)])
            for write in panel.writes:
                made = np.full(write.span.length, 0xA5, dtype=np.uint8)
                for move in write.moves:
                    assert move.contiguous == (len(move.shape) == 1)
                    if self.given == self.wanted:
                        move_bytes(move, fetched[move.read], 0, made, 0, self.given.itemsize)
                    else:
                        move_cast(move, fetched[move.read], 0, made, 0, self.given, self.wanted)
                array = self.target.setdefault(target.arrays[write.span.row], bytearray())
                assert write.span.start == len(array), "an array grows front to back"
                array += made.tobytes()


def _panels(
    source: Tiling, target: Tiling, given: DType, wanted: DType, budget: int, only: list[int] | None = None
) -> list[Panel]:
    dims = max(len(source.shape), 1)
    columns = [
        widen(table, dims, fill)
        for tiling in (source, target)
        for table, fill in ((tiling.offsets, 0), (tiling.sizes, 1))
    ]
    pattern: Pattern = intersect(*columns)
    keep = None if only is None else np.array(only, dtype=np.int64)
    arrays = [Arrays.of(tiling.chunks(), slice(0, len(tiling.boxes)), dims) for tiling in (source, target)]
    return list(
        cut_panels(
            source.shape,
            pattern if keep is None else pattern.only_targets(keep),
            *arrays,
            given.itemsize,
            wanted.itemsize,
            budget,
            keep,
        )
    )


def _values(shape: tuple[int, ...], itemsize: int) -> NDArray[np.generic]:
    count = int(np.prod(shape, dtype=np.int64))
    data = np.random.default_rng(count).integers(0, 256, count * itemsize, dtype=np.uint8)
    return data.view(np.dtype((np.void, itemsize))).reshape(shape)


@settings(max_examples=200, deadline=None)
@given(st.data(), shapes(), st.sampled_from(["U8", "I16", "F6_E2M3", "F32", "C128"]), st.integers(1, 200))
def test_the_whole_tensor_comes_out_of_any_cut_into_any_other_on_any_budget(
    data: st.DataObject, shape: tuple[int, ...], name: str, budget: int
) -> None:
    source, target, dtype = data.draw(tilings(shape)), data.draw(tilings(shape)), by_name(name)
    whole = _values(shape, dtype.itemsize)
    engine = Engine(source.contents(whole), dtype, dtype)
    engine.run(_panels(source, target, dtype, dtype, budget), source, target)
    assert engine.target == target.contents(whole)
    assert engine.largest <= max(budget, dtype.itemsize)


@unhurried
@given(st.data(), shapes(), st.integers(1, 200))
def test_some_of_the_target_arrays_can_be_made_alone(data: st.DataObject, shape: tuple[int, ...], budget: int) -> None:
    source, target, dtype = data.draw(tilings(shape)), data.draw(tilings(shape)), by_name("I16")
    wanted = data.draw(st.sets(st.sampled_from(sorted(set(target.arrays)))))
    rows = [row for row, array in enumerate(target.arrays) if array in wanted]
    whole = _values(shape, dtype.itemsize)
    engine = Engine(source.contents(whole), dtype, dtype)
    engine.run(_panels(source, target, dtype, dtype, budget, rows), source, target)
    assert engine.target == {array: held for array, held in target.contents(whole).items() if array in wanted}


@unhurried
@given(st.data(), shapes(3), st.sampled_from(sorted(TYPES)), st.sampled_from(sorted(TYPES)), st.integers(1, 200))
def test_casts_on_the_way_are_torchs_casts(
    data: st.DataObject, shape: tuple[int, ...], given_name: str, wanted_name: str, budget: int
) -> None:
    source, target = data.draw(plain(shape)), data.draw(plain(shape))
    given_type, wanted = by_name(given_name), by_name(wanted_name)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(TYPES[given_name])
    engine = Engine(source.contents(_as_bytes(values, given_type)), given_type, wanted)
    engine.run(_panels(source, target, given_type, wanted, budget), source, target)
    assert engine.target == target.contents(_as_bytes(values.to(TYPES[wanted_name]), wanted))
    assert engine.largest <= max(budget, given_type.itemsize, wanted.itemsize)


def _as_bytes(values: torch.Tensor, dtype: DType) -> NDArray[np.generic]:
    flat = values.contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat.view(np.dtype((np.void, dtype.itemsize))).reshape(tuple(values.shape))


@unhurried
@given(shapes(), st.integers(1, 16), st.integers(1, 500))
def test_slabs_tile_a_shape_in_row_major_order_within_the_budget(
    shape: tuple[int, ...], itemsize: int, budget: int
) -> None:
    extent = shape or (1,)
    seen: list[int] = []
    numbers = np.arange(int(np.prod(extent)), dtype=np.int64).reshape(extent)
    for low, high in slabs(extent, itemsize, budget):
        inside = numbers[tuple(slice(begin, end) for begin, end in zip(low.tolist(), high.tolist(), strict=True))]
        assert inside.size * itemsize <= max(budget, itemsize)
        seen += inside.reshape(-1).tolist()
    assert seen == list(range(numbers.size))


def test_a_copy_of_equal_layouts_is_one_contiguous_move() -> None:
    tiling = Tiling((4, 6), (((0, 0), (4, 6)),), (0,), ((0, 0),), ((4, 6),), packed=False)
    [panel] = _panels(tiling, tiling, by_name("F32"), by_name("F32"), 1 << 20)
    [write] = panel.writes
    [move] = write.moves
    assert move.contiguous
    assert move.shape == (24,)


def test_rows_are_read_once_and_scattered_to_all_column_shards() -> None:
    rows = Tiling((4, 6), (((0, 0), (4, 6)),), (0,), ((0, 0),), ((4, 6),), packed=False)
    columns = Tiling(
        (4, 6), tuple(((0, 2 * c), (4, 2)) for c in range(3)), (0, 1, 2), ((0, 0),) * 3, ((4, 2),) * 3, packed=False
    )
    panels = _panels(rows, columns, by_name("F32"), by_name("F32"), 48)
    assert [[(span.start, span.length) for span in panel.reads] for panel in panels] == [[(0, 48)], [(48, 48)]]
    assert all(len(panel.writes) == 3 for panel in panels)


def test_arrays_without_elements_are_written_once_with_the_first_panel() -> None:
    empty = Tiling((0, 3), (((0, 0), (0, 3)),) * 2, (0, 1), ((0, 0),) * 2, ((0, 3),) * 2, packed=False)
    [panel] = _panels(empty, empty, by_name("F32"), by_name("F32"), 100)
    assert panel.reads == ()
    assert [write.span.row for write in panel.writes] == [0, 1]


@pytest.mark.parametrize("packed_dims", [2, 3])
def test_element_strides_are_row_major(packed_dims: int) -> None:
    stored = np.array([[4, 3, 2][:packed_dims], [5, 1, 7][:packed_dims]], dtype=np.int64)
    arrays = Arrays(np.arange(2), np.zeros_like(stored), np.zeros_like(stored), stored)
    for strides, sizes in zip(arrays.element_strides().tolist(), stored.tolist(), strict=True):
        assert strides == list(np.zeros(sizes, dtype=np.int8).strides)
