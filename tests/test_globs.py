"""Globs on FQNs, against a slow recursive reading of the same rules."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reshard_service.errors import UsageError
from reshard_service.globs import compile_glob


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("model.norm.weight", ["model.norm.weight"], ["model.norm.weights", "a.model.norm.weight", "model.norm"]),
        ("*", ["weight", "x"], ["a.b"]),
        ("**", ["weight", "a.b.c"], []),
        ("**.weight", ["weight", "a.weight", "a.b.weight"], ["aweight", "a.bweight", "weight.a"]),
        ("model.**", ["model.a", "model.a.b", "model"], ["models.a", "amodel.a"]),
        ("a.**.b", ["a.b", "a.x.b", "a.x.y.b"], ["ab", "a.xb", "a.b.c"]),
        ("a.**.**.b", ["a.b", "a.x.y.b"], ["a.xb"]),
        ("model.layers.*.mlp.*.weight", ["model.layers.0.mlp.up.weight"], ["model.layers.0.1.mlp.up.weight"]),
        (
            "**.{q,k,v}_proj.weight",
            ["l.0.q_proj.weight", "v_proj.weight"],
            ["l.o_proj.weight", "l.{q,k,v}_proj.weight"],
        ),
        ("layers.?.w", ["layers.7.w"], ["layers.12.w", "layers...w", "layers..w"]),
        ("**.experts.**", ["m.experts.gate_up_proj", "experts.0.w1"], ["m.shared_experts.w", "m.experts_x.w"]),
        ("a*c*.{x,y.z}", ["ac.x", "abcd.y.z"], ["a.c.x", "ab.x"]),
        ("**.*.w", ["a.w", "a.b.w"], ["w"]),
        ("*.**", ["a", "a.b"], []),
        ("lm_head{,.base}.weight", ["lm_head.weight", "lm_head.base.weight"], ["lm_head.x.weight"]),
    ],
)
def test_a_glob_matches_whole_names_component_by_component(pattern: str, yes: list[str], no: list[str]) -> None:
    glob = compile_glob(pattern)
    assert [name for name in yes if not glob.matches(name)] == []
    assert [name for name in no if glob.matches(name)] == []


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("", "empty"),
        ("a..b", "empty component"),
        (".a", "empty component"),
        ("a**", "whole components"),
        ("***", "whole components"),
        ("{a,{b,c}}", "braces inside"),
        ("{a,b", "without '}'"),
        ("a}", "without '{'"),
        ("a.{}", "empty braces"),
        ("layers.[0-3].w", "{0,1}"),
        ("a\\.b", "special"),
        ("a\nb", "special"),
        ("a" * 600, "longer"),
        ("{a,b}" * 9, "512 patterns"),
    ],
)
def test_a_bad_glob_says_what_is_wrong(pattern: str, says: str) -> None:
    with pytest.raises(UsageError) as error:
        compile_glob(pattern)
    assert says in str(error.value)


def naive_component(pattern: str, text: str) -> bool:
    if not pattern:
        return not text
    if pattern[0] == "*":
        return naive_component(pattern[1:], text) or (bool(text) and naive_component(pattern, text[1:]))
    return bool(text) and pattern[0] in ("?", text[0]) and naive_component(pattern[1:], text[1:])


def naive(pattern: list[str], name: list[str]) -> bool:
    if not pattern:
        return not name
    if pattern[0] == "**":
        return naive(pattern[1:], name) or (bool(name) and naive(pattern, name[1:]))
    return bool(name) and naive_component(pattern[0], name[0]) and naive(pattern[1:], name[1:])


component = st.text("ab*?", min_size=1, max_size=4).filter(lambda text: "**" not in text) | st.just("**")
name_part = st.text("ab", min_size=0, max_size=4)


@settings(deadline=None)
@given(st.lists(component, min_size=1, max_size=5), st.lists(name_part, min_size=1, max_size=5))
def test_the_automaton_agrees_with_a_recursive_matcher(pattern: list[str], name: list[str]) -> None:
    assert compile_glob(".".join(pattern)).matches(".".join(name)) == naive(pattern, name)


def test_the_work_for_a_hostile_pattern_is_linear_in_the_name() -> None:
    # Exponential matching would never return here; no clock is asserted.
    glob = compile_glob("**." + ".".join(["*a*a*a*", "**"] * 30) + ".b")
    assert not glob.matches(".".join(["a" * 50] * 200))
