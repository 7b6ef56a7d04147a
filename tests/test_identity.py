"""What a key is: from its path, from known parameter names, or from what is known of its producer."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

from reshard_service.catalogue import Identity, Path, Section
from reshard_service.identity import (
    identify,
    identify_key,
    identities,
    known_fqns,
    split_at_known,
    strip_wrappers,
)

MODEL, OPTIMIZER, EXTRA = Section.MODEL, Section.OPTIMIZER, Section.EXTRA


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (("model", "up.weight"), Identity(MODEL, "up.weight")),
        (("state_dict", "up.weight"), Identity(MODEL, "up.weight")),
        (("app", "model", "up.weight"), Identity(MODEL, "up.weight")),
        (("model", "layers", "up.weight"), Identity(MODEL, "layers.up.weight")),
        (("up.weight",), Identity(MODEL, "up.weight")),
        (("optim", "state", "up.weight", "exp_avg"), Identity(OPTIMIZER, "up.weight", "exp_avg")),
        (("optimizer", "state", "up.weight", "step"), Identity(OPTIMIZER, "up.weight", "step")),
        (("app", "optim", "state", "up.weight", "step"), Identity(OPTIMIZER, "up.weight", "step")),
        (("optim", "state", "up.weight", "GG", 0), Identity(OPTIMIZER, "up.weight", "GG.0")),
        (("optimizer", "state.up.weight.exp_avg"), Identity(OPTIMIZER, "up.weight", "exp_avg")),
        (("state.up.weight.exp_avg",), Identity(OPTIMIZER, "up.weight", "exp_avg")),
        (("state.up.weight.shampoo.0.left",), Identity(OPTIMIZER, "up.weight", "shampoo.0.left")),
        (("state", "up.weight", "exp_avg"), Identity(OPTIMIZER, "up.weight", "exp_avg")),
        (("optim", "param_groups", 0, "lr"), Identity(OPTIMIZER, "param_groups.0.lr")),
        (("optimizer", "param_groups.up.weight.lr"), Identity(OPTIMIZER, "param_groups.up.weight.lr")),
        (("param_groups.up.weight.lr",), Identity(OPTIMIZER, "param_groups.up.weight.lr")),
        (("lr_scheduler", "last_epoch"), Identity(EXTRA, "lr_scheduler.last_epoch")),
        (("rng_state",), Identity(EXTRA, "rng_state")),
        (("dataloader", "dp_rank_0"), Identity(EXTRA, "dataloader.dp_rank_0")),
    ],
)
def test_a_path_tells_the_identity(path: Path, expected: Identity) -> None:
    assert identify(path, frozenset({"up.weight"})) == expected


def test_a_flattened_key_is_never_split_by_guessing() -> None:
    assert identify(("state.a.b.c.d",)) == Identity(OPTIMIZER, "state.a.b.c.d")


def test_the_longest_known_name_wins() -> None:
    known = {"a", "a.b", "a.b.c"}
    assert split_at_known("a.b.c.exp_avg", known) == ("a.b.c", "exp_avg")
    assert split_at_known("a.b.exp_avg", known) == ("a.b", "exp_avg")
    assert split_at_known("z.exp_avg", known) is None


def test_a_parameter_named_like_a_slot_is_told_apart_by_known_names() -> None:
    known = frozenset({"layer.step", "layer"})
    assert identify(("state.layer.step.step",), known) == Identity(OPTIMIZER, "layer.step", "step")
    assert identify(("state.layer.step",), known) == Identity(OPTIMIZER, "layer", "step")


def test_byte_objects_at_the_top_level_are_no_model() -> None:
    assert identify(("progress",), is_object=True) == Identity(EXTRA, "progress")
    assert identify(("layers.0._extra_state",), is_object=True) == Identity(MODEL, "layers.0._extra_state")


def test_names_are_learnt_from_a_flattened_optimizer_alone() -> None:
    paths: list[Path] = [
        ("optimizer", "state.a.b.exp_avg"),
        ("optimizer", "state.a.b.odd"),
        ("optimizer", "param_groups.c.d.lr"),
        ("optimizer", "param_groups.c.d.betas"),
    ]
    assert known_fqns(paths) == {"a.b", "c.d"}


@pytest.mark.parametrize(
    ("fqn", "bare"),
    [
        ("layers.0.weight", "layers.0.weight"),
        ("_orig_mod.layers.0.weight", "layers.0.weight"),
        ("layers._checkpoint_wrapped_module.0._fsdp_wrapped_module.weight", "layers.0.weight"),
        ("module.module.weight", "weight"),
        ("module._orig_mod.weight", "weight"),
        ("_orig_mod.module.weight", "weight"),
        ("submodule.weight", "submodule.weight"),
        ("a.module.weight", "a.module.weight"),
        ("my_orig_mod.weight", "my_orig_mod.weight"),
        ("module", "module"),
    ],
)
def test_wrappers_are_stripped_as_whole_segments(fqn: str, bare: str) -> None:
    assert strip_wrappers(fqn) == bare


@pytest.mark.parametrize(
    ("key", "options", "expected"),
    [
        ("model.up.weight", {"producer": "torch"}, Identity(MODEL, "up.weight")),
        ("up.weight", {"producer": "torchtitan"}, Identity(MODEL, "up.weight")),
        ("model.up.weight", {"producer": "torchtitan"}, Identity(MODEL, "model.up.weight")),
        ("optimizer.state.up.weight.exp_avg", {"producer": "torchtitan"}, Identity(OPTIMIZER, "up.weight", "exp_avg")),
        ("train_state.step", {"producer": "torchtitan"}, Identity(EXTRA, "train_state.step")),
        ("net.up.weight", {"key_prefix": "net"}, Identity(MODEL, "up.weight")),
        ("net.up.weight", {"key_prefix": "net."}, Identity(MODEL, "up.weight")),
        ("other.weight", {"key_prefix": "net"}, Identity(EXTRA, "other.weight")),
        ("net.up.weight", {"key_prefix": ""}, Identity(MODEL, "net.up.weight")),
        ("optim.state.up.weight.step", {"key_prefix": "net"}, Identity(OPTIMIZER, "up.weight", "step")),
        ("decoder.up.weight", {"producer": "megatron"}, Identity(MODEL, "decoder.up.weight")),
        ("optimizer.state.exp_avg.decoder.w", {"producer": "megatron"}, Identity(OPTIMIZER, "decoder.w", "exp_avg")),
        ("up.weight", {}, None),
        ("up.weight", {"producer": "somebody"}, None),
    ],
)
def test_a_key_without_a_path_needs_a_producer_or_a_prefix(
    key: str, options: dict[str, str], expected: Identity | None
) -> None:
    assert identify_key(key, frozenset({"up.weight"}), **options) == expected


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore::FutureWarning")
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("nest", [False, True])
def test_both_optimizer_encodings_of_torch_mean_the_same(
    tmp_path_factory: pytest.TempPathFactory, flat: bool, nest: bool
) -> None:
    folder = tmp_path_factory.mktemp("identity")
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    weights, moments = get_state_dict(model, optimizer, options=options)
    state = {"model": weights, "optim": moments} if nest else {**weights, **moments}
    dcp.save(state, checkpoint_id=folder)
    metadata = FileSystemReader(folder).read_metadata()
    tensors = {key for key, entry in metadata.state_dict_metadata.items() if hasattr(entry, "size")}
    objects = set(metadata.state_dict_metadata) - tensors
    named = identities(metadata.planner_data, objects=objects)
    fqns = [name for name, _ in model.named_parameters()]
    expected = {Identity(MODEL, fqn) for fqn in fqns}
    expected |= {Identity(OPTIMIZER, fqn, slot) for fqn in fqns for slot in ("step", "exp_avg", "exp_avg_sq")}
    assert {named[key] for key in tensors} == expected
    assert all(named[key].section is OPTIMIZER and named[key].slot is None for key in objects)
    assert len(set(named.values())) == len(named)
