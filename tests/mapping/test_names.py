"""Names that a target gets, and that reading it gives the same identities back."""

from __future__ import annotations

import pytest

from reshard_service.catalogue import Identity, Section
from reshard_service.errors import NameCollision
from reshard_service.identity import identities
from reshard_service.mapping.names import bare_name, dcp_key, natural_order, require_distinct


@pytest.mark.parametrize(
    ("identity", "name"),
    [
        (Identity(Section.MODEL, "layers.0.w"), "layers.0.w"),
        (Identity(Section.MODEL, "_orig_mod.layers.0._fsdp_wrapped_module.w"), "layers.0.w"),
        (Identity(Section.OPTIMIZER, "module.layers.0.w", "exp_avg"), "optimizer.state.layers.0.w.exp_avg"),
    ],
)
def test_safetensors_names_are_bare(identity: Identity, name: str) -> None:
    assert bare_name(identity) == name


def test_identities_survive_the_way_into_a_dcp() -> None:
    given = [
        Identity(Section.MODEL, "step"),
        Identity(Section.MODEL, "layers.0.w"),
        Identity(Section.OPTIMIZER, "layers.0.w", "exp_avg"),
        Identity(Section.OPTIMIZER, "layers.0.w", "a_slot_nobody_knows"),
    ]
    model_only = given[:2]
    for wanted in (given[1:], model_only):
        found = identities(dict(dcp_key(identity, None) for identity in wanted))
        assert set(found.values()) == set(wanted)
    nested = identities(dict(dcp_key(identity, "model") for identity in given))
    assert set(nested.values()) == set(given)


def test_layers_follow_one_another_by_number() -> None:
    names = ["layers.10.w", "layers.2.w", "embed.w", "layers.2.b", "norm.w"]
    assert [names[i] for i in natural_order(names)] == ["embed.w", "layers.2.b", "layers.2.w", "layers.10.w", "norm.w"]


def test_two_tensors_with_one_name_are_refused() -> None:
    with pytest.raises(NameCollision, match="'b'"):
        require_distinct([("x", "a"), ("x", "b")])
