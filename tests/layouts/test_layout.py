"""Rules, defaults, views and identity of layouts."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reshard_service.documents.layout import RuleDocument, layout_document
from reshard_service.errors import DocumentInvalid, LayoutInvalid, LayoutRulesMissing, UsageError
from reshard_service.layouts.holdings import View
from reshard_service.layouts.layout import layout_from_document, with_rules
from reshard_service.layouts.shorthand import parse_layout, parse_shorthand
from tests.layouts.pieces import make_layout, rule

EXAMPLES = sorted(Path(__file__).parents[2].glob("examples/layouts/*.yaml"))


def test_fsdp_shards_dim_0_and_everything_else_replicates_without_a_rule() -> None:
    layout = parse_layout("fsdp=2,tp=2,dp_replicate=2", rules_known=True)
    holdings = layout.holdings("model.norm.weight", (4,))
    assert layout.world == 8
    # Axes (pp, dp_replicate, fsdp, tp), the last fastest.
    assert holdings.offsets[:, 0].tolist() == [0, 0, 2, 2, 0, 0, 2, 2]


def test_experts_lie_on_their_own_mesh_over_the_same_ranks() -> None:
    layout = parse_layout("fsdp=4,tp=2,ep=4", rules_known=True)
    assert layout.expert_mesh is not None
    assert layout.expert_mesh.size("efsdp") == 2
    layout = with_rules(layout, [RuleDocument(match="**.experts.*", placements={"ep": "shard(0)"})])
    holdings = layout.holdings("model.layers.0.mlp.experts.down_proj", (8, 4, 2))
    # efsdp is slow and splits what ep leaves: ep 0 has experts 0-1, of which efsdp 0 has 0.
    assert holdings.offsets[:, 0].tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    dense = layout.holdings("model.layers.0.mlp.shared_expert.down_proj", (8, 4, 2))
    assert dense.offsets[:, 0].tolist() == [0, 0, 2, 2, 4, 4, 6, 6]


def test_efsdp_dim_moves_the_default_of_efsdp_only() -> None:
    layout = parse_layout("fsdp=4,ep=2,efsdp_dim=1", rules_known=True)
    experts = layout.holdings("mlp.experts.down_proj", (4, 6, 2))
    assert experts.offsets[:, 1].tolist() == [0, 0, 3, 3]
    assert layout.holdings("mlp.up.weight", (4, 6)).offsets[:, 0].tolist() == [0, 1, 2, 3]
    with pytest.raises(LayoutInvalid, match="dim 1"):
        layout.holdings("mlp.experts.bias", (4,))


def test_a_document_may_have_ep_as_the_slow_axis() -> None:
    layout = make_layout(
        [("fsdp", 4)],
        rule("**.experts.**", ep="shard(0)"),
        expert_mesh={"axes": [["ep", 2], ["efsdp", 2]], "efsdp_dim": 1},
    )
    holdings = layout.holdings("mlp.experts.down_proj", (4, 6))
    assert holdings.offsets.tolist() == [[0, 0], [0, 3], [2, 0], [2, 3]]


def test_experts_without_a_rule_are_replicated_over_ep() -> None:
    layout = parse_layout("fsdp=2,ep=2", rules_known=True)
    assert layout.holdings("mlp.experts.w", (4, 2)).sizes.tolist() == [[4, 2], [4, 2]]


def test_the_first_rule_of_the_asked_view_wins() -> None:
    first = {**rule("**.gate_up", tp="strided(0,2)"), "view": "memory"}
    layout = make_layout([("tp", 2)], first, rule("**.gate_up", tp="shard(0)"), rule("**", tp="shard(1)"))
    assert layout.holdings("mlp.gate_up", (8, 4)).offsets[:, 0].tolist() == [0, 4]
    assert layout.holdings("mlp.gate_up", (8, 4), View.MEMORY).offsets[:, 0].tolist() == [0, 4, 2, 6]
    assert layout.holdings("mlp.down", (8, 4)).offsets.tolist() == [[0, 0], [0, 2]]
    assert layout.place("mlp.gate_up", View.MEMORY).rule == 0
    assert layout.place("mlp.gate_up").rule == 1


def test_a_slot_of_another_shape_and_a_tensor_without_dims_are_replicated() -> None:
    layout = parse_layout("fsdp=2")
    assert layout.holdings("w", (4, 2), parameter_shape=(4, 2)).sizes.tolist() == [[2, 2], [2, 2]]
    assert layout.holdings("w", (4, 1), parameter_shape=(4, 2)).sizes.tolist() == [[4, 1], [4, 1]]
    scalar = layout.holdings("w", (), parameter_shape=(4, 2))
    assert scalar.rank.tolist() == [0, 1]
    assert scalar.offsets.shape == scalar.sizes.shape == scalar.local_shape.shape == (2, 0)


def test_tensors_placed_and_shaped_alike_share_one_object() -> None:
    layout = make_layout([("fsdp", 2), ("tp", 2)], rule("**.q", tp="shard(0)"), rule("**.k", tp="shard(0)"))
    holdings = layout.holdings("0.q", (8, 2))
    assert layout.holdings("1.q", (8, 2)) is holdings
    assert layout.holdings("1.k", (8, 2), parameter_shape=(8, 2)) is holdings
    assert layout.holdings("1.q", (4, 2)) is not holdings


def test_a_rule_for_the_other_mesh_and_axes_that_are_absent_place_nothing() -> None:
    layout = make_layout([("fsdp", 2)], rule("**", ep="shard(0)", tp="shard(1)"))
    assert layout.holdings("w", (4, 2)).offsets[:, 0].tolist() == [0, 2]


@pytest.mark.parametrize("text", ["fsdp=2,tp=2", "tp=2", "pp=2", "fsdp=4,ep=2"])
def test_tensor_expert_and_pipeline_parallelism_need_rules(text: str) -> None:
    with pytest.raises(LayoutRulesMissing) as error:
        parse_layout(text)
    assert error.value.exit_code == 2
    layout = parse_layout(text, rules_known=True)
    with pytest.raises(LayoutRulesMissing):
        layout_from_document(layout.document)
    with pytest.raises(LayoutRulesMissing):
        with_rules(layout, [])
    assert with_rules(layout, [RuleDocument(match="**", placements={})]).world == layout.world


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "keys pp, dp_replicate, fsdp, tp, ep, efsdp_dim"),
        ("fsdp", "keys pp"),
        ("dp=4", "keys pp"),
        ("fsdp=4,", "keys pp"),
        ("fsdp=4,fsdp=4", "twice"),
        ("fsdp=0", "at least 1"),
        ("fsdp=-1", "at least 1"),
        ("fsdp=1_0", "at least 1"),
        ("fsdp=٣", "at least 1"),
        ("fsdp=four", "at least 1"),
        ("fsdp=999999999,tp=999999999", "ranks"),
        ("fsdp=2,efsdp_dim=1", "ep > 1"),
        ("missing/layout.yaml", "no document"),
        ("fsdp8.yml", "no document"),
    ],
)
def test_a_wrong_shorthand_is_a_usage_error_that_names_the_keys(text: str, says: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_layout(text, rules_known=True)
    assert says in str(error.value)


def test_an_ep_that_does_not_fit_the_ranks_names_those_that_do() -> None:
    with pytest.raises(LayoutInvalid, match="valid ep: 1, 2, 4, 8"):
        parse_layout("fsdp=4,tp=2,ep=3", rules_known=True)


def test_meshes_over_different_worlds_are_refused() -> None:
    with pytest.raises(LayoutInvalid, match="8 ranks"):
        make_layout([("fsdp", 8)], rule("**"), expert_mesh={"axes": [["ep", 4]]})


@settings(deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "pp": st.integers(1, 2),
            "dp_replicate": st.integers(1, 2),
            "fsdp": st.integers(1, 4),
            "tp": st.integers(1, 4),
        },
    ),
    st.randoms(use_true_random=False),
    st.data(),
)
def test_the_shorthand_is_the_document_it_stands_for(sizes: dict[str, int], random, data: st.DataObject) -> None:  # type: ignore[no-untyped-def]
    over = sizes.get("fsdp", 1) * sizes.get("tp", 1)
    ep = data.draw(st.sampled_from([size for size in range(1, over + 1) if over % size == 0]))
    keys = {**sizes, "ep": ep}
    pairs = [f"{key}={size}" for key, size in keys.items()]
    random.shuffle(pairs)
    layout = parse_layout(" , ".join(pairs), rules_known=True)
    pp, replicas = sizes.get("pp", 1), sizes.get("dp_replicate", 1)
    dense: list[tuple[str, int]] = [
        ("pp", pp),
        ("dp_replicate", replicas),
        ("fsdp", sizes.get("fsdp", 1)),
        ("tp", sizes.get("tp", 1)),
    ]
    axes = [axis for axis in dense if axis[1] > 1] or [("fsdp", 1)]
    document: dict[str, object] = {"version": 1, "mesh": {"axes": axes}}
    if ep > 1:
        document["expert_mesh"] = {"axes": [["pp", pp], ["dp_replicate", replicas], ["efsdp", over // ep], ["ep", ep]]}
    written = layout_from_document(layout_document(document), rules_known=True)
    assert written == layout
    assert hash(written) == hash(layout)
    assert written.digest() == layout.digest()
    for name in ("w", "a.experts.w"):
        ours, theirs = layout.holdings(name, (7, 3)), written.holdings(name, (7, 3))
        assert np.array_equal(ours.offsets, theirs.offsets)
        assert np.array_equal(ours.local_shape, theirs.local_shape)


def test_a_digest_tells_different_layouts_apart_and_not_spellings() -> None:
    base = make_layout([("fsdp", 2), ("tp", 2)], rule("**.q", tp="strided(0,3)"))
    same = make_layout([("pp", 1), ("fsdp", 2), ("tp", 2)], rule("**.q", tp="strided(0, 3)", pp="shard(0)"))
    assert base.digest() == same.digest()
    others = [
        make_layout([("tp", 2), ("fsdp", 2)], rule("**.q", tp="strided(0,3)")),
        make_layout([("fsdp", 2), ("tp", 2)], rule("**.q", tp="strided(0,2)")),
        make_layout([("fsdp", 2), ("tp", 2)], rule("**.k", tp="strided(0,3)")),
        make_layout([("fsdp", 2), ("tp", 2)], {**rule("**.q", tp="strided(0,3)"), "view": "memory"}),
        make_layout([("fsdp", 4)], rule("**.q", fsdp="shard(0)")),
    ]
    assert len({layout.digest() for layout in [base, *others]}) == 1 + len(others)
    # A rule that does nothing still keeps later rules from names that it matches.
    blocking = make_layout([("tp", 2)], rule("**.q", ep="shard(0)"), rule("**", tp="shard(0)"))
    assert blocking.digest() != make_layout([("tp", 2)], rule("**", tp="shard(0)")).digest()


def test_a_layout_survives_a_pickle() -> None:
    layout = make_layout([("fsdp", 2), ("tp", 2)], rule("**", tp="shard(1)"))
    layout.holdings("w", (4, 4))
    again = pickle.loads(pickle.dumps(layout))
    assert again == layout
    assert again.holdings("w", (4, 4)).offsets.tolist() == layout.holdings("w", (4, 4)).offsets.tolist()


def test_rules_that_name_an_unknown_axis_are_refused_when_they_are_joined_to_a_mesh() -> None:
    with pytest.raises(DocumentInvalid, match="/rules/0/placements/tensor"):
        with_rules(parse_layout("fsdp=2"), [RuleDocument(match="**", placements={"tensor": "shard(0)"})])


def test_every_example_is_a_layout_of_the_world_it_says() -> None:
    assert {path.stem: parse_layout(str(path)).world for path in EXAMPLES} == {
        "ep2-efsdp4-twinkle": 8,
        "fsdp2-tp2-llama": 4,
        "fsdp4-tp2-ep8-qwen3-moe": 8,
        "fsdp8": 8,
        "hsdp2-fsdp4": 8,
        "megatron-fsdp4-flat": 4,
        "tp4-qwen3-moe": 4,
    }


def test_the_fsdp_example_is_its_shorthand() -> None:
    examples = {path.stem: parse_layout(str(path)) for path in EXAMPLES}
    assert examples["fsdp8"] == parse_layout("fsdp=8")
    assert examples["hsdp2-fsdp4"] == parse_layout("dp_replicate=2,fsdp=4")
    moe = examples["fsdp4-tp2-ep8-qwen3-moe"].document
    assert parse_shorthand("fsdp=4,tp=2,ep=8").mesh == moe.mesh
