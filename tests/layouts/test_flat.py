"""Flat buffers: the worked example of Megatron-FSDP's own documentation, and properties."""

from __future__ import annotations

from math import lcm, prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reshard_service.errors import LayoutInvalid
from reshard_service.layouts.flat import pack
from reshard_service.layouts.layout import Layout
from tests.layouts.pieces import Shape, coverage, make_layout, rule

EXAMPLE: list[Shape] = [(2, 6), (4, 4), (4, 4), (1, 2), (1, 6)]


def flat(axes: list[tuple[str, int]], unit: str | None = None, **placements: str) -> Layout:
    placements = placements or {name: "flat" for name, _ in axes}
    return make_layout(axes, {**rule("**", **placements), "unit": unit})


def bound(layout: Layout, shapes: list[Shape]) -> Layout:
    return layout.bind((f"p{at}", shape, "F32") for at, shape in enumerate(shapes))


def rows_of(layout: Layout, name: str, shape: Shape) -> list[tuple[int, int, int]]:
    holdings = layout.holdings(name, shape)
    return [
        (int(rank), int(offset[0]), int(size[0]))
        for rank, offset, size in zip(holdings.rank, holdings.offsets, holdings.sizes, strict=True)
    ]


def test_the_worked_example_packs_into_five_ranks() -> None:
    buffer = pack(EXAMPLE, 5)
    assert buffer.offsets == (0, 12, 32, 28, 48)
    assert buffer.size == 60


def test_the_worked_example_gives_each_rank_its_rows() -> None:
    layout = bound(flat([("fsdp", 5)]), EXAMPLE)
    rows = [rows_of(layout, f"p{at}", shape) for at, shape in enumerate(EXAMPLE)]
    assert rows == [[(0, 0, 2)], [(1, 0, 3), (2, 3, 1)], [(2, 0, 1), (3, 1, 3)], [(2, 0, 1)], [(4, 0, 1)]]
    # A rank without rows of a tensor holds an empty local tensor of it.
    assert layout.holdings("p0", (2, 6)).local_shape.tolist() == [[2, 6], *[[0, 6]] * 4]


shapes = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 6)), min_size=1, max_size=8)


@settings(deadline=None)
@given(shapes, st.integers(1, 6))
def test_tensors_never_overlap_and_rows_are_never_cut(chosen: list[Shape], ranks: int) -> None:
    buffer = pack(chosen, ranks)
    chunk = lcm(*(prod(shape[1:]) for shape in chosen))
    assert buffer.size % (chunk * ranks) == 0
    used = np.zeros(buffer.size, dtype=np.int64)
    for offset, shape in zip(buffer.offsets, chosen, strict=True):
        assert offset % prod(shape[1:]) == 0
        used[offset : offset + prod(shape)] += 1
    assert used.max(initial=0) <= 1
    assert used.sum() == sum(map(prod, chosen))


@settings(deadline=None)
@given(shapes, st.integers(1, 3), st.integers(1, 4))
def test_every_row_lies_on_one_rank_of_each_replica(chosen: list[Shape], replicas: int, ranks: int) -> None:
    layout = bound(flat([("dp_replicate", replicas), ("fsdp", ranks)], fsdp="flat"), chosen)
    for at, shape in enumerate(chosen):
        holdings = layout.holdings(f"p{at}", shape)
        if prod(shape):
            assert (coverage(holdings.offsets, holdings.sizes, shape) == replicas).all()
            assert (holdings.sizes[:, 1:] == shape[1:]).all()
        assert holdings.local_shape[:, 0].sum() == replicas * shape[0]


def test_the_last_flat_axis_selects_the_big_range() -> None:
    # 8 rows on (outer 2, inner 2): the inner coordinate picks a half, the outer one a quarter of it.
    layout = bound(flat([("dp_replicate", 2), ("fsdp", 2)]), [(8, 1)])
    assert rows_of(layout, "p0", (8, 1)) == [(0, 0, 2), (1, 4, 2), (2, 2, 2), (3, 6, 2)]


def test_replicas_count_when_the_buffer_is_padded() -> None:
    # 3 rows are padded for 3 x 2 ranks to 6, so the first of two ranges has them all; padded for 2 it would have 2.
    layout = bound(flat([("dp_replicate", 3), ("fsdp", 2)], fsdp="flat"), [(3, 1)])
    assert rows_of(layout, "p0", (3, 1)) == [(0, 0, 3), (2, 0, 3), (4, 0, 3)]


def test_a_unit_and_a_dtype_have_a_buffer_of_their_own() -> None:
    layout = flat([("fsdp", 2)], unit="**.layers.*").bind(
        [
            ("model.embed", (4, 2), "F32"),
            ("model.layers.0.a.weight", (4, 2), "F32"),
            ("model.layers.0.b.weight", (2, 2), "F32"),
            ("model.layers.1.a.weight", (4, 2), "F32"),
            ("model.layers.1.b.weight", (2, 2), "F32"),
            ("model.layers.1.c.weight", (4, 2), "BF16"),
        ]
    )
    assert rows_of(layout, "model.embed", (4, 2)) == [(0, 0, 2), (1, 2, 2)]
    # a and b share a buffer of 6 rows, of which each rank gets 3.
    assert rows_of(layout, "model.layers.0.a.weight", (4, 2)) == [(0, 0, 3), (1, 3, 1)]
    assert rows_of(layout, "model.layers.0.b.weight", (2, 2)) == [(1, 0, 2)]
    assert rows_of(layout, "model.layers.1.c.weight", (4, 2)) == [(0, 0, 2), (1, 2, 2)]
    again = layout.holdings("model.layers.1.a.weight", (4, 2))
    assert again is layout.holdings("model.layers.0.a.weight", (4, 2))


def test_flat_cuts_what_tensor_parallelism_leaves() -> None:
    layout = make_layout(
        [("fsdp", 2), ("tp", 2)], rule("**.col", fsdp="flat", tp="shard(1)"), rule("**", fsdp="flat", tp="shard(0)")
    ).bind([("x.col", (4, 3), "F32"), ("x.row", (4, 2), "F32")])
    col, row = layout.holdings("x.col", (4, 3)), layout.holdings("x.row", (4, 2))
    for holdings, shape in ((col, (4, 3)), (row, (4, 2))):
        assert (coverage(holdings.offsets, holdings.sizes, shape) == 1).all()
    # Columns 0-1 lie on tp 0 and column 2 on tp 1, each with a buffer of its own.
    assert {
        (int(rank) % 2, int(at[1]), int(size[1]))
        for rank, at, size in zip(col.rank, col.offsets, col.sizes, strict=True)
    } == {(0, 0, 2), (1, 2, 1)}


def test_what_a_flat_layout_can_not_answer_is_refused() -> None:
    layout = flat([("fsdp", 2)])
    with pytest.raises(LayoutInvalid, match="depends on all tensors"):
        layout.holdings("p0", (4, 2))
    assert layout.holdings("p0", ()).local_shape.tolist() == [[], []]
    some = bound(layout, [(4, 2)])
    with pytest.raises(LayoutInvalid, match="is not among"):
        some.holdings("p1", (4, 2))
    with pytest.raises(LayoutInvalid, match=r"has shape \[4, 2\]"):
        some.holdings("p0", (2, 2))
    with pytest.raises(LayoutInvalid, match="rows of no elements"):
        bound(layout, [(4, 0)]).holdings("p0", (4, 0))
    with pytest.raises(LayoutInvalid, match="no small common multiple"):
        bound(layout, [(1, prime) for prime in (65521, 65519, 65497, 65479)]).holdings("p0", (1, 65521))
    with pytest.raises(LayoutInvalid, match="two shapes"):
        layout.bind([("p0", (4, 2), "F32"), ("p0", (2, 2), "F32")])
    packed = make_layout([("fsdp", 2), ("tp", 2)], rule("**", fsdp="flat", tp="strided(0,2)"))
    with pytest.raises(LayoutInvalid, match="packed and flat"):
        packed.bind([("p0", (8, 2), "F32")]).holdings("p0", (8, 2))


def test_a_slot_of_its_parameters_shape_follows_it() -> None:
    layout = bound(flat([("fsdp", 2)]), [(4, 2)])
    assert layout.holdings("p0", (4, 2), parameter_shape=(4, 2)) is layout.holdings("p0", (4, 2))
    assert layout.holdings("p0", (4, 1), parameter_shape=(4, 2)).local_shape.tolist() == [[4, 1], [4, 1]]
