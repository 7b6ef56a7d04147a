"""diff finds a flipped bit anywhere and says where, in every format and layout, and says what it did not compare."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from reshard_service.conversion import open_source
from reshard_service.documents.job import SourceDocument
from reshard_service.errors import NameCollision, SelectionEmpty
from reshard_service.planning.budget import Budget
from reshard_service.verify import compare as compare_module
from reshard_service.verify.compare import compare_tensors
from tests.engine.checkpoints import (
    COLUMNS,
    PACKED,
    State,
    bits,
    compare,
    filled,
    model,
    run,
    save_dcp,
    save_safetensors,
    save_torch,
)

LAYOUTS: dict[str, tuple[str, object]] = {
    "safetensors": ("safetensors", None),
    "dcp": ("dcp", "fsdp=3"),
    "dcp-columns": ("dcp", COLUMNS),
    "dcp-safetensors": ("dcp-safetensors", "fsdp=2"),
    "packed": ("rank-safetensors", PACKED),
    "replicas": ("rank-safetensors", "dp_replicate=2,fsdp=3"),
}


@pytest.fixture(autouse=True, params=["usual buffers", "tiny buffers"])
def _buffers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "tiny buffers":
        monkeypatch.setattr(compare_module, "Budget", lambda: Budget(1, 16 << 10, 16 << 10))


def flipped(state: State, name: str, index: tuple[int, ...], bit: int = 0) -> State:
    """A copy with one bit of one element flipped."""
    raw = state[name].clone().contiguous()
    size = raw.dtype.itemsize
    flat = raw.reshape(-1).view(torch.uint8)
    at = int(np.ravel_multi_index(index, tuple(raw.shape))) * size if index else 0
    flat[at + bit // 8] ^= 1 << (bit % 8)
    return state | {name: raw}


@pytest.fixture(scope="module")
def states() -> tuple[State, State, dict[str, str]]:
    """A model, the same with a bit flipped in some tensors, and the places of the flips."""
    full = {name: tensor for name, tensor in model().items() if tensor.dtype != torch.bool}
    random = np.random.default_rng(3)
    other, places = full, {}
    for name, tensor in full.items():
        if tensor.numel() and name != "norm":
            index = tuple(int(random.integers(0, size)) for size in tensor.shape)
            other = flipped(other, name, index, int(random.integers(0, 8 * tensor.dtype.itemsize)))
            places[name] = str(list(index))
    return full, other, places


@pytest.fixture(scope="module")
def folders(states: tuple[State, State, dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diff")
    for which, state in zip("ab", states, strict=False):
        source = save_safetensors(state, folder / f"{which}-source")  # type: ignore[arg-type]
        for name, (format, layout) in LAYOUTS.items():
            run(source, folder / f"{which}-{name}", format, layout, producer="plain")
    return folder


@pytest.mark.parametrize("b", LAYOUTS)
@pytest.mark.parametrize("a", LAYOUTS)
def test_every_flipped_bit_is_found_at_its_index(
    a: str, b: str, states: tuple[State, State, dict[str, str]], folders: Path
) -> None:
    full, _, places = states
    found = compare(folders / f"a-{a}", folders / f"b-{b}")
    assert not found.same
    assert found.compared == len(full)
    assert {notice.name: notice.at for notice in found.different} == places
    assert all(notice.code == "bytes" and str(notice.at) in notice.reason for notice in found.different)
    assert compare(folders / f"a-{a}", folders / f"a-{b}").same


def _flip_in_file(path: Path, name: str, byte: int) -> None:
    data = bytearray(path.read_bytes())
    [length] = struct.unpack("<Q", data[:8])
    entry = json.loads(data[8 : 8 + length])[name]
    data[8 + length + entry["data_offsets"][0] + byte] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damaged", ["A", "B"])
@pytest.mark.parametrize("rank", range(6))
def test_a_replica_that_differs_is_found_on_either_side(rank: int, damaged: str, tmp_path: Path) -> None:
    state = {"w": filled((9, 4), torch.float32, 1), "cube": filled((4, 3, 2), torch.int16, 2)}
    source = save_safetensors(state, tmp_path / "in")
    run(source, tmp_path / "ranks", "rank-safetensors", "dp_replicate=2,fsdp=3")
    _flip_in_file(tmp_path / "ranks" / f"model-rank-{rank}-part-0.safetensors", "w", 4 * 4 + 5 * 0)
    sides = (tmp_path / "ranks", source)
    found = compare(*(sides if damaged == "A" else reversed(sides)))
    [notice] = found.different
    assert notice.name == "w"
    assert notice.at == str([3 * (rank % 3) + 1, 0])


@pytest.mark.parametrize("damaged", ["A", "B"])
def test_a_packed_replica_that_differs_is_found_at_its_global_index(damaged: str, tmp_path: Path) -> None:
    state = {"up": filled((8, 5), torch.float32, 1)}
    layout = {
        "version": 1,
        "mesh": {"axes": [["dp_replicate", 2], ["tp", 2]]},
        "rules": [{"match": "up", "placements": {"tp": "strided(0,2)"}}],
    }
    source = save_safetensors(state, tmp_path / "in")
    run(source, tmp_path / "ranks", "rank-safetensors", layout)
    # Rank 3 is the second replica of tp rank 1: global rows 2, 3, then 6, 7. Its third row is row 6.
    path = tmp_path / "ranks" / "model-rank-3-part-0.safetensors"
    assert bits(load_file(path)["up"]) == bits(state["up"][[2, 3, 6, 7]])
    _flip_in_file(path, "up", (2 * 5 + 4) * 4)
    sides = (tmp_path / "ranks", source)
    [notice] = compare(*(sides if damaged == "A" else reversed(sides))).different
    assert notice.at == "[6, 4]"


def test_many_replicas_fit_the_buffers(tmp_path: Path) -> None:
    state = {"norm": filled((4000,), torch.float32, 1), "scale": filled((), torch.float32, 2)}
    source = save_safetensors(state, tmp_path / "in")
    run(source, tmp_path / "ranks", "rank-safetensors", "dp_replicate=24")
    assert compare(source, tmp_path / "ranks").same
    assert compare(tmp_path / "ranks", source).same


# --- what counts as different -------------------------------------------------------------------------------


def test_types_shapes_and_names_are_told_apart(tmp_path: Path) -> None:
    a = {
        "dtype": torch.zeros(3, 4),
        "shape": torch.zeros(3, 4),
        "same": torch.ones(2),
        "only_a": torch.ones(1),
        "rank": torch.zeros(6),
    }
    b = {
        "dtype": torch.zeros(3, 4, dtype=torch.float16),
        "shape": torch.zeros(4, 3),
        "same": torch.ones(2),
        "only_b": torch.ones(1),
        "rank": torch.zeros(6, 1),
    }
    found = compare(save_safetensors(a, tmp_path / "a"), save_safetensors(b, tmp_path / "b"))
    assert not found.same
    assert found.only_in_a == ("only_a",)
    assert found.only_in_b == ("only_b",)
    assert [(notice.code, notice.name) for notice in found.different] == [
        ("dtype", "dtype"),
        ("shape", "rank"),
        ("shape", "shape"),
    ]
    assert found.compared == 4


def test_nans_and_zeros_are_bits_like_any_other(tmp_path: Path) -> None:
    nan = torch.tensor([0x7FC00000, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    other_nan = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    a = {"nan": nan, "payload": nan.clone(), "zero": torch.tensor([0.0, 0.0])}
    b = {"nan": nan, "payload": other_nan, "zero": torch.tensor([0.0, -0.0])}
    found = compare(save_safetensors(a, tmp_path / "a"), save_safetensors(b, tmp_path / "b"))
    assert {notice.name: notice.at for notice in found.different} == {"payload": "[1]", "zero": "[1]"}


def test_names_are_matched_without_the_segments_of_wrappers(tmp_path: Path) -> None:
    a = {"layers.0._orig_mod.w": torch.ones(3), "_fsdp_wrapped_module.v": torch.ones(2)}
    b = {"layers.0.w": torch.ones(3), "v": torch.ones(2)}
    assert compare(save_safetensors(a, tmp_path / "a"), save_safetensors(b, tmp_path / "b")).same
    both = {"w": torch.ones(3), "_orig_mod.w": torch.ones(3)}
    with pytest.raises(NameCollision, match="same tensor once wrapper names are dropped"):
        compare(save_safetensors(both, tmp_path / "c"), tmp_path / "b")


def test_the_first_of_many_differences_is_named(tmp_path: Path) -> None:
    a = {"w": torch.zeros(70, 60)}
    b = {"w": torch.zeros(70, 60)}
    b["w"][69, 59] = b["w"][31, 8] = b["w"][31, 9] = b["w"][40, 0] = 1
    save_safetensors(b, tmp_path / "b")
    for name, (format, layout) in LAYOUTS.items():
        run(save_safetensors(a, tmp_path / f"{name}-in"), tmp_path / name, format, layout)
        for sides in ((tmp_path / name, tmp_path / "b"), (tmp_path / "b", tmp_path / name)):
            [notice] = compare(*sides).different
            assert notice.at == "[31, 8]", name


def test_a_gap_on_one_side_is_a_difference(tmp_path: Path) -> None:
    source = save_safetensors({"w": filled((9, 4), torch.float32, 1)}, tmp_path / "in")
    run(source, tmp_path / "out", "dcp", "fsdp=3")
    import pickle

    path = tmp_path / "out" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    [lost, *_] = metadata.state_dict_metadata["w"].chunks
    metadata.state_dict_metadata["w"].chunks.remove(lost)
    metadata.storage_data = {i: at for i, at in metadata.storage_data.items() if tuple(i.offset) != tuple(lost.offsets)}
    path.write_bytes(pickle.dumps(metadata))
    for sides, side in (((source, tmp_path / "out"), "B"), ((tmp_path / "out", source), "A")):
        [notice] = compare(*sides).different
        assert notice.code == "coverage"
        assert f"in {side}: no chunk holds [0:3, 0:4]" in notice.reason


# --- what is compared at all --------------------------------------------------------------------------------


def _training(folder: Path, **changes: Any) -> Path:
    state = {
        "model": {"w": torch.ones(3, 2)},
        "optim": {"state": {"w": {"exp_avg": torch.ones(3, 2), "step": torch.tensor(1.0)}}},
        "lr_scheduler": {"last_epoch": 3},
    }
    for path, value in changes.items():
        where: Any = state
        *parents, last = path.split("__")
        for parent in parents:
            where = where[parent]
        where[last] = value
    return save_dcp(state, folder)  # type: ignore[arg-type]


def test_sections_that_one_side_lacks_are_not_compared_and_said_so(tmp_path: Path) -> None:
    full = _training(tmp_path / "full")
    only_model = save_safetensors({"w": torch.ones(3, 2)}, tmp_path / "model")
    found = compare(full, only_model)
    assert found.same
    assert found.compared == 1
    assert set(found.not_compared) == {"a:optimizer", "a:extra"}
    strict = compare(full, only_model, everything=True)
    assert not strict.same
    assert set(strict.only_in_a) == {"optim.state.w.exp_avg", "optim.state.w.step", "lr_scheduler.last_epoch"}
    assert strict.not_compared == ()
    assert not compare(only_model, full, everything=True).same


def test_objects_are_compared_by_their_bytes_where_both_can_hold_them(tmp_path: Path) -> None:
    a = _training(tmp_path / "a")
    assert compare(a, _training(tmp_path / "same")).same
    changed = compare(a, _training(tmp_path / "b", lr_scheduler__last_epoch=4))
    assert [(notice.code, notice.name) for notice in changed.different] == [("object", "lr_scheduler.last_epoch")]
    more = compare(a, _training(tmp_path / "c", lr_scheduler__base=[1]))
    assert more.only_in_b == ("lr_scheduler.base",)
    longer = _training(tmp_path / "d", lr_scheduler__last_epoch=list(range(600_000)))
    assert not compare(a, longer).same
    assert compare(longer, longer).same


def test_a_part_or_a_selection_can_be_compared_alone(tmp_path: Path) -> None:
    a = _training(tmp_path / "a")
    b = _training(tmp_path / "b", optim__state={"w": {"exp_avg": torch.zeros(3, 2), "step": torch.tensor(1.0)}})
    assert not compare(a, b).same
    assert compare(a, b, only="model").same
    assert not compare(a, b, only="optimizer").same
    two = {"w": torch.ones(2), "v": torch.ones(2)}, {"w": torch.ones(2), "v": torch.zeros(2)}
    left, right = (save_safetensors(state, tmp_path / f"s{n}") for n, state in enumerate(two))
    assert compare(left, right, exclude=["v"]).same
    assert compare(left, right, include=["w"]).same
    assert not compare(left, right, include=["v"]).same


@pytest.mark.parametrize(
    "options", [{"only": "optimizer"}, {"include": ["nothing.like.it"]}, {"exclude": ["**"]}], ids=str
)
def test_nothing_in_common_is_not_the_same(options: dict[str, Any], tmp_path: Path) -> None:
    a = save_safetensors({"w": torch.ones(2)}, tmp_path / "a")
    with pytest.raises(SelectionEmpty, match="nothing to compare"):
        compare(a, a, **options)
    save_file({"optimizer.state.w.exp_avg": torch.ones(2)}, tmp_path / "optimizer.safetensors")
    with pytest.raises(SelectionEmpty, match="nothing to compare"):
        compare(a, tmp_path / "optimizer.safetensors")


def test_two_tensors_of_one_checkpoint_can_be_compared(tmp_path: Path) -> None:
    tied = filled((50, 3), torch.bfloat16, 1)
    other = tied.clone()
    other.view(torch.int16)[41, 2] ^= 1
    path = save_torch({"a": tied, "b": tied.clone(), "c": other, "d": tied.clone().float()}, tmp_path / "in")
    catalogue = open_source(SourceDocument(uri=str(path)))
    index = {tensor.key: i for i, tensor in enumerate(catalogue.tensors)}
    assert compare_tensors(catalogue, index["a"], catalogue, index["b"]) is None
    found = compare_tensors(catalogue, index["a"], catalogue, index["c"])
    assert found is not None
    assert found.at == "[41, 2]"
    different = compare_tensors(catalogue, index["a"], catalogue, index["d"])
    assert different is not None
    assert different.code == "dtype"
