"""Is this layout valid for this checkpoint, or for this model?"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3MoeConfig

from reshard_service.layouts.check import check_layout
from reshard_service.layouts.config_check import check_config
from reshard_service.layouts.holdings import View
from reshard_service.layouts.layout import Layout
from reshard_service.layouts.problems import LayoutProblem, Severity, nearest_sizes
from reshard_service.layouts.shorthand import parse_layout
from tests.layouts.pieces import Shape, make_layout, rule

EXAMPLES = Path(__file__).parents[2] / "examples" / "layouts"


def found(problems: list[LayoutProblem]) -> list[tuple[str, str]]:
    return [(problem.code, problem.name) for problem in problems]


def only(problems: list[LayoutProblem], code: str) -> LayoutProblem:
    (problem,) = [problem for problem in problems if problem.code == code]
    return problem


def test_a_layout_that_fits_has_no_findings() -> None:
    layout = make_layout([("fsdp", 2), ("tp", 2)], rule("**.q.weight", tp="shard(0)"))
    assert check_layout(layout, [("a.q.weight", (8, 4)), ("a.norm", (4,)), ("step", ())]) == []


def test_tensors_alike_are_one_finding_named_by_the_first() -> None:
    layout = make_layout([("tp", 2)], rule("**", tp="strided(0,2)"))
    problem = only(check_layout(layout, [("a.w", (7, 2)), ("b.w", (7, 2)), ("c.w", (8, 2))]), "packed_not_divisible")
    assert problem.name == "a.w"
    assert problem.severity is Severity.ERROR
    assert problem.at == "/rules/0"
    assert "and 1 more like it" in problem.reason
    assert problem.fix is not None
    assert "6, 8" in problem.fix


def test_a_dim_that_a_tensor_does_not_have_is_an_error() -> None:
    layout = make_layout([("tp", 2)], rule("**", tp="shard(1)"))
    problem = only(check_layout(layout, [("w", (4, 4)), ("bias", (4,))]), "dim_missing")
    assert (problem.name, problem.severity) == ("bias", Severity.ERROR)


def test_experts_that_ep_does_not_divide_name_the_sizes_that_would() -> None:
    layout = make_layout(
        [("fsdp", 24)], rule("**.experts.**", ep="shard(0)"), expert_mesh={"axes": [["efsdp", 3], ["ep", 8]]}
    )
    problem = only(check_layout(layout, [("mlp.experts.w", (12, 4, 4)), ("w", (48,))]), "experts_not_divisible")
    assert problem.severity is Severity.ERROR
    assert problem.fix == "nearest valid ep over the same ranks: 3, 4, 6, 12"


def test_rules_that_never_count_are_warnings() -> None:
    layout = make_layout(
        [("tp", 2)], rule("**.w", tp="shard(0)"), rule("a.w", tp="shard(1)"), rule("**.typo", tp="shard(0)")
    )
    problems = check_layout(layout, [("a.w", (4, 4))])
    assert found(problems) == [("rule_shadowed", "a.w"), ("rule_matches_nothing", "**.typo")]
    assert {problem.severity for problem in problems} == {Severity.WARNING}
    assert [problem.at for problem in problems] == ["/rules/1", "/rules/2"]


def test_a_rule_that_counts_in_the_other_view_is_not_idle() -> None:
    layout = make_layout(
        [("tp", 2)], {**rule("**.w", tp="shard(0)"), "view": "checkpoint"}, rule("**.w", tp="strided(0,2)")
    )
    assert check_layout(layout, [("a.w", (4, 4))]) == []
    assert check_layout(layout, [("a.w", (4, 4))], View.MEMORY) == []


def test_idle_ranks_and_uneven_shards_are_notices_only() -> None:
    layout = make_layout([("fsdp", 4), ("tp", 2)], rule("embed", tp="shard(0)"))
    problems = check_layout(layout, [("embed", (5, 2)), ("norm", (2,))])
    assert found(problems) == [("uneven_shards", "embed"), ("ranks_left_empty", "embed"), ("ranks_left_empty", "norm")]
    assert {problem.severity for problem in problems} == {Severity.NOTICE}


def test_an_axis_that_shards_nothing_and_a_rule_for_the_other_mesh_are_warnings() -> None:
    layout = make_layout(
        [("fsdp", 2), ("tp", 2)], rule("**.w", ep="shard(0)"), expert_mesh={"axes": [["efsdp", 2], ["ep", 2]]}
    )
    problems = check_layout(layout, [("a.w", (4, 4))])
    assert found(problems) == [
        ("axis_elsewhere", "a.w"),
        ("axis_unused", "tp"),
        ("axis_unused", "efsdp"),
        ("axis_unused", "ep"),
    ]


def test_a_flat_layout_is_checked_when_it_is_bound() -> None:
    layout = make_layout([("fsdp", 2)], rule("**", fsdp="flat"))
    assert found(check_layout(layout, [("w", (4, 2))])) == [("flat_not_checked", "w")]
    assert check_layout(layout.bind([("w", (4, 2), "F32")]), [("w", (4, 2))]) == []
    broken = layout.bind([("w", (4, 0), "F32")])
    assert found(check_layout(broken, [("w", (4, 0))])) == [("flat_invalid", "w")]


def parameters(config: PretrainedConfig) -> list[tuple[str, Shape]]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]


LLAMA = LlamaConfig(num_hidden_layers=2)
QWEN = Qwen3MoeConfig(num_hidden_layers=2, mlp_only_layers=[0])


@pytest.mark.parametrize(
    ("example", "config"),
    [
        ("fsdp8", LLAMA),
        ("hsdp2-fsdp4", LLAMA),
        ("fsdp2-tp2-llama", LLAMA),
        ("fsdp4-tp2-ep8-qwen3-moe", QWEN),
        ("tp4-qwen3-moe", QWEN),
        ("ep2-efsdp4-twinkle", QWEN),
    ],
)
@pytest.mark.parametrize("view", View)
def test_the_examples_fit_the_real_models_names(example: str, config: PretrainedConfig, view: View) -> None:
    layout = parse_layout(str(EXAMPLES / f"{example}.yaml"))
    assert check_layout(layout, parameters(config), view) == []


def layout_of(text: str) -> Layout:
    return parse_layout(text, rules_known=True)


def test_a_config_that_fits_yields_only_what_was_checked() -> None:
    (notice,) = check_config(layout_of("fsdp=2,tp=4"), LLAMA.to_dict())
    assert (notice.code, notice.severity) == ("checked_dims", Severity.NOTICE)
    assert "num_attention_heads=32" in notice.reason
    assert "not the shapes of tensors" in notice.reason


def test_dims_that_tensor_parallelism_does_not_divide_name_the_nearest_that_do() -> None:
    problems = check_config(layout_of("tp=3"), LLAMA.to_dict())
    heads = only(problems, "heads_not_divisible")
    assert heads.fix == "nearest valid tp: 1, 2, 4, 8, 16"
    assert heads.at == "/num_attention_heads"
    assert only(problems, "kv_heads_not_divisible").severity is Severity.ERROR
    assert only(problems, "intermediate_not_divisible").severity is Severity.ERROR
    assert only(problems, "hidden_size_uneven").severity is Severity.NOTICE
    assert only(problems, "vocab_size_uneven").severity is Severity.NOTICE


def test_more_ranks_than_key_value_heads_would_need_copies() -> None:
    config = {"text_config": {"num_attention_heads": 32, "num_key_value_heads": 4}, "vocab_size": 64}
    problem = only(check_config(layout_of("tp=8"), config), "kv_heads_need_replication")
    assert problem.at == "/text_config/num_key_value_heads"
    assert "on 2 ranks" in problem.reason
    assert problem.fix is not None
    assert problem.fix.startswith("nearest valid tp: 1, 2, 4;")


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts", "n_routed_experts"])
def test_experts_are_checked_under_each_of_their_names(key: str) -> None:
    problems = check_config(layout_of("fsdp=24,ep=8"), {key: 12, "moe_intermediate_size": 7})
    assert only(problems, "experts_not_divisible").fix == "nearest valid ep over the same ranks: 3, 4, 6, 12"
    assert found(check_config(layout_of("fsdp=4,ep=4"), {key: 12}))[:-1] == []
    assert found(check_config(layout_of("fsdp=4,ep=4"), {}))[0] == ("no_experts", "config.json")
    moe = check_config(layout_of("tp=2"), {key: 12, "moe_intermediate_size": 7})
    assert found(moe)[0] == ("moe_intermediate_not_divisible", "moe_intermediate_size")


def test_stages_are_checked_against_layers() -> None:
    assert found(check_config(layout_of("pp=4"), {"num_hidden_layers": 3}))[0][0] == "layers_fewer_than_stages"
    uneven = check_config(layout_of("pp=4"), {"num_hidden_layers": 6})[0]
    assert (uneven.code, uneven.severity) == ("layers_uneven", Severity.NOTICE)


def test_nonsense_in_a_config_is_not_a_dim() -> None:
    config: dict[str, object] = {
        "num_attention_heads": "32",
        "num_key_value_heads": True,
        "intermediate_size": -3,
        "vocab_size": None,
        "num_experts": [8, 6],
        "text_config": [],
    }
    problems = check_config(layout_of("fsdp=4,tp=2,ep=4"), config)
    assert found(problems) == [("experts_not_divisible", "num_experts"), ("checked_dims", "config.json")]
    assert problems[0].at == "/num_experts/1"


def test_nearest_sizes_end_somewhere_for_any_number() -> None:
    assert nearest_sizes(10**18, lambda size: size == 5) == "5"
    assert nearest_sizes(3, lambda size: False) == "none"
