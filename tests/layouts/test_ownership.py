"""Owners: every distinct rectangle once, by a rank that holds it, replicas balanced by bytes."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reshard_service.errors import LayoutInvalid
from reshard_service.layouts.holdings import View
from reshard_service.layouts.layout import Layout
from reshard_service.layouts.ownership import OwnedItem, own_chunks
from reshard_service.layouts.shorthand import parse_layout
from tests.layouts.pieces import Shape, coverage, make_layout, rule
from tests.layouts.test_geometry import any_placements, named, placed


def loads(layout: Layout, items: list[OwnedItem]) -> list[int]:
    owned = own_chunks(layout, items)
    itemsizes = np.repeat([item[3] for item in items], np.diff(owned.first))
    nbytes = owned.sizes.prod(axis=1) * itemsizes
    return [int(total) for total in np.bincount(owned.owner, weights=nbytes, minlength=layout.world)]


@settings(deadline=None)
@given(st.lists(any_placements(), min_size=1, max_size=3))
def test_chunks_tile_each_tensor_and_lie_with_a_holder(cases: list[tuple[list[int], Shape, list[str]]]) -> None:
    mesh = cases[0][0]
    cases = [case for case in cases if case[0] == mesh]
    rules = [{**placed(mesh, texts), "match": f"t{at}"} for at, (_, _, texts) in enumerate(cases)]
    layout = make_layout(named(mesh), *rules)
    items: list[OwnedItem] = [(f"t{at}", shape, None, 2) for at, (_, shape, _) in enumerate(cases)]
    owned = own_chunks(layout, items)
    assert owned.first[-1] == len(owned.owner) == len(owned.offsets) == len(owned.replicated)
    for at, (name, shape, _, _) in enumerate(items):
        rows = slice(int(owned.first[at]), int(owned.first[at + 1]))
        offsets, sizes = owned.offsets[rows], owned.sizes[rows]
        assert (offsets[:, len(shape) :] == 0).all()
        assert (sizes[:, len(shape) :] == 1).all()
        if prod(shape) == 0:
            assert sizes[:, : len(shape)].tolist() == [list(shape)]
            assert offsets.sum() == owned.owner[rows].sum() == 0
            continue
        assert (coverage(offsets[:, : len(shape)], sizes[:, : len(shape)], shape) == 1).all()
        holdings = layout.holdings(name, shape)
        for offset, size, owner, replicated in zip(
            offsets, sizes, owned.owner[rows], owned.replicated[rows], strict=True
        ):
            holders = [
                int(rank)
                for rank, begin, length in zip(holdings.rank, holdings.offsets, holdings.sizes, strict=True)
                if begin.tolist() == offset[: len(shape)].tolist() and length.tolist() == size[: len(shape)].tolist()
            ]
            assert int(owner) in holders
            assert bool(replicated) == (len(holders) > 1)


def test_a_chunk_that_one_rank_holds_is_its_own() -> None:
    owned = own_chunks(parse_layout("fsdp=4"), [("w", (6, 2), None, 4)])
    assert owned.owner.tolist() == [0, 1, 2]
    assert owned.offsets.tolist() == [[0, 0], [2, 0], [4, 0]]
    assert not owned.replicated.any()


def test_replicated_chunks_even_out_what_ranks_own() -> None:
    layout = parse_layout("fsdp=4,tp=2", rules_known=True)
    norms: list[OwnedItem] = [(f"norm{at}", (8,), None, 4) for at in range(100)]
    steps: list[OwnedItem] = [(f"norm{at}", (), (8,), 4) for at in range(100)]
    owned = loads(layout, [*norms, *steps])
    assert sum(owned) == 100 * 32 + 100 * 4
    assert max(owned) - min(owned) <= 8


def test_replicas_go_where_least_is_owned_and_the_lowest_of_equals() -> None:
    layout = make_layout([("tp", 3)], rule("big", tp="shard(0)"), rule("**"))
    # Uneven: 2, 2 and 1 rows of 4 bytes are owned by themselves.
    items: list[OwnedItem] = [("big", (5,), None, 4), ("a", (1,), None, 4), ("b", (1,), None, 4), ("c", (3,), None, 4)]
    owned = own_chunks(layout, items)
    # c, the largest, to rank 2; then a to 0 and b to 1.
    assert owned.owner[owned.first[1] :].tolist() == [0, 1, 2]
    assert owned.owner.tolist() == own_chunks(layout, items).owner.tolist()


def test_a_packed_cell_goes_to_one_owner_whole() -> None:
    layout = make_layout([("dp_replicate", 2), ("tp", 2)], rule("**", tp="strided(0,2)"))
    owned = own_chunks(layout, [("w", (8,), None, 1)], View.MEMORY)
    assert owned.offsets[:, 0].tolist() == [0, 4, 2, 6]
    assert owned.owner.tolist() == [0, 0, 1, 1]


def test_slots_follow_their_parameter_or_are_replicated() -> None:
    owned = own_chunks(
        parse_layout("fsdp=2"), [("w", (4, 2), (4, 2), 4), ("w", (4, 1), (4, 2), 4), ("w", (), (4, 2), 4)]
    )
    assert np.diff(owned.first).tolist() == [2, 1, 1]
    assert owned.replicated.tolist() == [False, False, True, True]


def test_nothing_gives_no_chunks() -> None:
    owned = own_chunks(parse_layout("fsdp=2"), [])
    assert owned.first.tolist() == [0]
    assert owned.offsets.shape == (0, 0)


def test_a_tensor_that_the_layout_can_not_place_is_named() -> None:
    layout = make_layout([("tp", 2)], rule("**", tp="shard(1)"))
    with pytest.raises(LayoutInvalid, match="bias"):
        own_chunks(layout, [("w", (4, 4), None, 2), ("bias", (4,), None, 2)])


def test_many_layers_of_few_patterns_ask_for_few_holdings() -> None:
    layout = parse_layout("fsdp=64,dp_replicate=2")
    items: list[OwnedItem] = [
        (f"layers.{layer}.{name}.weight", (256, 8), None, 2) for layer in range(2000) for name in ("q", "k", "v", "o")
    ]
    owned = own_chunks(layout, items)
    assert len(owned.owner) == 8000 * 64
    assert len({id(layout.holdings(fqn, shape)) for fqn, shape, _, _ in items}) == 1
    assert len(set(loads(layout, items))) == 1
