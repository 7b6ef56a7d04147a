"""Rectangles of generated meshes, placements and shapes: properties, and torch's own arithmetic as the oracle."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

from reshard_service.errors import LayoutInvalid
from reshard_service.layouts.holdings import View
from tests.layouts.dtensors import placement
from tests.layouts.pieces import Shape, coverage, joined, locals_of, make_layout, rule

sizes = st.lists(st.integers(1, 4), min_size=1, max_size=3)
shapes = st.lists(st.integers(0, 13), min_size=1, max_size=3).map(tuple)


@st.composite
def plain_placements(draw: st.DrawFn) -> tuple[list[int], Shape, list[str]]:
    mesh, shape = draw(sizes), draw(shapes)
    dims = st.integers(-len(shape), len(shape) - 1).map(lambda dim: f"shard({dim})")
    return mesh, shape, [draw(st.just("replicate") | dims) for _ in mesh]


@st.composite
def any_placements(draw: st.DrawFn) -> tuple[list[int], Shape, list[str]]:
    """Also right-first order on one dim, and packed shards alone on theirs; every dim in its own way."""
    mesh, rank = draw(sizes), draw(st.integers(1, 3))
    of_axis = [draw(st.integers(-1, rank - 1)) for _ in mesh]
    shape, texts = [0] * rank, ["replicate"] * len(mesh)
    for dim in range(rank):
        shape[dim] = draw(st.integers(0, 13))
        axes = [axis for axis, its in enumerate(of_axis) if its == dim]
        if len(axes) == 1 and draw(st.booleans()):
            blocks = draw(st.integers(2, 3))
            shape[dim] = blocks * draw(st.integers(0, 7))
            texts[axes[0]] = f"strided({dim},{blocks})"
            continue
        for at, axis in enumerate(axes):
            right = prod(mesh[other] for other in axes[at + 1 :])
            texts[axis] = draw(st.sampled_from([f"shard({dim})", f"strided({dim},{right})"]))
    return mesh, tuple(shape), texts


def named(mesh: list[int]) -> list[tuple[str, int]]:
    return [(f"a{at}", size) for at, size in enumerate(mesh)]


def placed(mesh: list[int], texts: list[str]) -> dict[str, object]:
    return rule("**", **{name: text for (name, _), text in zip(named(mesh), texts, strict=True)})


@settings(deadline=None)
@given(plain_placements())
def test_plain_shards_agree_with_torch_however_uneven(case: tuple[list[int], Shape, list[str]]) -> None:
    mesh, shape, texts = case
    layout = make_layout(named(mesh), placed(mesh, texts))
    holdings = layout.holdings("weight", shape)
    dims = [text.replace("(-", "(") if "(-" not in text else f"shard({int(text[6:-1]) + len(shape)})" for text in texts]
    for rank, coordinate in enumerate(np.ndindex(*mesh)):
        local, offset = _compute_local_shape_and_global_offset(
            shape, tuple(mesh), list(coordinate), [placement(text) for text in dims]
        )
        assert tuple(holdings.local_shape[rank]) == tuple(local)
        rows = holdings.rank == rank
        if prod(local):
            assert holdings.offsets[rows].tolist() == [list(offset)]
            assert holdings.sizes[rows].tolist() == [list(local)]


@settings(deadline=None)
@given(any_placements(), st.integers(1, 3))
def test_even_strided_shards_agree_with_torch(case: tuple[list[int], Shape, list[str]], times: int) -> None:
    mesh, shape, texts = case
    whole = prod(mesh) * 6 * times  # divisible by everything, so that torch's arithmetic is right
    shape = tuple(whole for _ in shape)
    holdings = make_layout(named(mesh), placed(mesh, texts)).holdings("weight", shape)
    for rank, coordinate in enumerate(np.ndindex(*mesh)):
        local, offset = _compute_local_shape_and_global_offset(
            shape, tuple(mesh), list(coordinate), [placement(text) for text in texts]
        )
        assert tuple(holdings.local_shape[rank]) == tuple(local)
        assert holdings.offsets[holdings.rank == rank][0].tolist() == list(offset)


@settings(deadline=None)
@given(any_placements())
def test_every_element_is_covered_once_by_the_distinct_rectangles(case: tuple[list[int], Shape, list[str]]) -> None:
    mesh, shape, texts = case
    holdings = make_layout(named(mesh), placed(mesh, texts)).holdings("weight", shape)
    distinct = np.unique(np.concatenate([holdings.offsets, holdings.sizes], axis=1), axis=0)
    held = distinct[(distinct[:, len(shape) :] > 0).all(axis=1)]
    assert (coverage(held[:, : len(shape)], held[:, len(shape) :], shape) == 1).all()


@settings(deadline=None)
@given(any_placements())
def test_a_ranks_rectangles_fill_its_local_tensor_and_are_in_order(case: tuple[list[int], Shape, list[str]]) -> None:
    mesh, shape, texts = case
    holdings = make_layout(named(mesh), placed(mesh, texts)).holdings("weight", shape)
    pieces = locals_of(holdings, shape)
    assert len(pieces) == prod(mesh)
    assert all((piece >= 0).all() for piece in pieces)
    assert np.array_equal(joined(holdings, shape, pieces), np.arange(prod(shape)).reshape(shape))
    rows = [(rank, *place) for rank, place in zip(holdings.rank.tolist(), holdings.local.tolist(), strict=True)]
    assert rows == sorted(rows)
    if prod(shape) == 0:
        assert holdings.rank.tolist() == list(range(prod(mesh)))
    else:
        assert (holdings.sizes > 0).all()
        assert set(holdings.rank.tolist()) == {rank for rank, piece in enumerate(pieces) if piece.size}


@settings(deadline=None)
@given(any_placements())
def test_axes_of_size_one_change_nothing(case: tuple[list[int], Shape, list[str]]) -> None:
    mesh, shape, texts = case
    kept = [at for at, size in enumerate(mesh) if size > 1]
    assume(len(kept) < len(mesh))
    full = make_layout(named(mesh), placed(mesh, texts)).holdings("weight", shape)
    names = [(f"a{at}", mesh[at]) for at in kept] or [("a0", 1)]
    given_axes = {f"a{at}": texts[at] for at in kept}
    small = make_layout(names, rule("**", **given_axes)).holdings("weight", shape)
    assert np.array_equal(full.offsets, small.offsets)
    assert np.array_equal(full.sizes, small.sizes)


def test_left_splits_first_unless_strided() -> None:
    left = make_layout([("a", 2), ("b", 2)], rule("**", a="shard(0)", b="shard(0)")).holdings("w", (8,))
    assert left.offsets[:, 0].tolist() == [0, 2, 4, 6]
    right = make_layout([("a", 2), ("b", 2)], rule("**", a="strided(0,2)", b="shard(0)")).holdings("w", (8,))
    assert right.offsets[:, 0].tolist() == [0, 4, 2, 6]


def test_the_true_geometry_of_uneven_fsdp_over_tensor_parallelism_is_not_torchs_arithmetic() -> None:
    # 7 rows, fsdp 3, tp 2: tp takes 4 and 3 rows; fsdp cuts 4 into 2, 2, 0 and 3 into 1, 1, 1. torch 2.13 says that
    # rank 4 holds a row at 6 and rank 5 none, saves that, and can't load it again.
    holdings = make_layout([("fsdp", 3), ("tp", 2)], rule("**", tp="shard(0)")).holdings("w", (7,))
    assert holdings.local_shape[:, 0].tolist() == [2, 1, 2, 1, 0, 1]
    assert holdings.rank.tolist() == [0, 1, 2, 3, 5]
    assert holdings.offsets[:, 0].tolist() == [0, 4, 2, 5, 6]


def test_a_packed_shard_is_a_piece_of_every_block() -> None:
    # gate rows 0-2 and up rows 3-5 over two ranks: rank 0 has [gate 0-1; up 3-4], rank 1 [gate 2; up 5].
    holdings = make_layout([("tp", 2)], rule("**", tp="strided(0,2)")).holdings("w", (6, 1))
    assert holdings.rank.tolist() == [0, 0, 1, 1]
    assert holdings.offsets[:, 0].tolist() == [0, 3, 2, 5]
    assert holdings.local[:, 0].tolist() == [0, 2, 0, 1]
    assert holdings.local_shape.tolist() == [[4, 1], [2, 1]]


@pytest.mark.parametrize(
    ("axes", "placements", "shape", "says"),
    [
        ([("tp", 2)], {"tp": "strided(0,2)"}, (7, 2), "2 equal blocks"),
        ([("tp", 2)], {"tp": "shard(2)"}, (8, 2), "shards dim 2"),
        ([("tp", 2)], {"tp": "shard(-3)"}, (8, 2), "shards dim -3"),
        ([("fsdp", 2), ("tp", 2)], {"tp": "strided(0,2)"}, (8, 2), "packed"),
        ([("fsdp", 2), ("tp", 2)], {"fsdp": "strided(0,2)", "tp": "strided(0,2)"}, (8, 2), "packed"),
        ([("fsdp", 2), ("tp", 4)], {"fsdp": "strided(0,2)", "tp": "shard(0)"}, (16, 2), "strided(0,4)"),
        ([("a", 2), ("b", 2), ("c", 2)], {"a": "strided(0,2)", "b": "shard(0)", "c": "shard(0)"}, (16,), "packed"),
    ],
)
def test_what_has_no_defined_order_or_no_such_dim_is_refused_by_name(
    axes: list[tuple[str, int]], placements: dict[str, str], shape: Shape, says: str
) -> None:
    layout = make_layout(axes, rule("model.**", **placements))
    with pytest.raises(LayoutInvalid) as error:
        layout.holdings("model.w", shape)
    assert says in str(error.value)
    assert error.value.tensor == "model.w"
    assert error.value.hint


def test_a_nested_packed_shard_on_an_axis_of_size_one_is_no_fault() -> None:
    layout = make_layout([("fsdp", 1), ("tp", 2)], rule("**", tp="strided(0,2)"))
    assert layout.holdings("w", (8, 2), View.MEMORY).offsets[:, 0].tolist() == [0, 4, 2, 6]
