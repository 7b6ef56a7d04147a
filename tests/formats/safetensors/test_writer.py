"""Designed safetensors files, loaded by the libraries that users load them with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from reshard_service.catalogue import ByteObject, Catalogue, Identity, Section, Tensor
from reshard_service.dtypes import by_name
from reshard_service.errors import CannotHold, NameCollision, UsageError
from reshard_service.formats.options import OpenOptions, WriteOptions
from reshard_service.formats.safetensors.reader import open_safetensors
from reshard_service.formats.safetensors.writer import aligned_order, design_safetensors
from reshard_service.formats.target import Selection
from reshard_service.layouts.shorthand import parse_layout
from reshard_service.storage.local import LocalStorage
from tests.formats.materialise import materialise, select

TENSORS = {
    "w": torch.arange(20, dtype=torch.float32).reshape(4, 5),
    "odd": torch.arange(3, dtype=torch.uint8),
    "h": torch.ones(5, dtype=torch.bfloat16),
    "step": torch.tensor(7.0),
    "flag": torch.tensor([True, False]),
    "n": torch.arange(4, dtype=torch.int64),
    "none": torch.zeros(0, 3),
    "fp8": torch.ones(3, 3).to(torch.float8_e5m2),
}


@pytest.fixture
def source(tmp_path: Path) -> Catalogue:
    folder = tmp_path / "source"
    folder.mkdir()
    save_file(TENSORS, folder / "model.safetensors")
    return open_safetensors(LocalStorage(folder), OpenOptions())


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))
    )


def test_one_file_loads_with_the_library_bit_for_bit(source: Catalogue, tmp_path: Path) -> None:
    selection = select(source)
    design = design_safetensors(selection, None, WriteOptions())
    materialise(design, selection, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    loaded = load_file(tmp_path / "out" / "model.safetensors")
    assert set(loaded) == set(TENSORS)
    assert all(same(loaded[name], TENSORS[name]) for name in TENSORS)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert design.closing == ()


def test_a_single_file_bears_the_name_it_was_given(source: Catalogue) -> None:
    design = design_safetensors(select(source), None, WriteOptions(single_file="x.safetensors", max_shard_bytes=1))
    assert [file.path for file in design.files] == ["x.safetensors"]


def test_shards_keep_to_the_limit_and_the_index_tells_the_truth(source: Catalogue, tmp_path: Path) -> None:
    selection = select(source)
    design = design_safetensors(selection, None, WriteOptions(max_shard_bytes=40))
    folder = tmp_path / "out"
    materialise(design, selection, folder)
    assert design.closing[-1].path == "model.safetensors.index.json"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    loaded = {}
    for file in sorted(folder.glob("*.safetensors")):
        part = load_file(file)
        assert sum(tensor.nbytes for tensor in part.values()) <= 40 or len(part) == 1
        assert {name for name, path in index["weight_map"].items() if path == file.name} == set(part)
        loaded |= part
    count = len(list(folder.glob("*.safetensors")))
    assert count > 2
    assert all(f"-of-{count:05d}.safetensors" in path for path in index["weight_map"].values())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
    assert all(same(loaded[name], TENSORS[name]) for name in TENSORS)
    again = open_safetensors(LocalStorage(folder), OpenOptions(strict=True))
    assert again.notices == ()


def test_shards_follow_the_selections_order(source: Catalogue) -> None:
    keys = [tensor.key for tensor in source.tensors]
    design = design_safetensors(select(source), None, WriteOptions(max_shard_bytes=40))
    files = {tensor.key: int(design.chunks.file[i]) for i, tensor in enumerate(design.tensors)}
    assert [files[key] for key in keys] == sorted(files.values())
    assert all(source.tensors[int(at)].key == t.key for at, t in zip(design.sources, design.tensors, strict=True))


def test_what_was_resharded_loads_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=67, hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "a")
    selection = select(open_safetensors(LocalStorage(tmp_path / "a"), OpenOptions()))
    materialise(design_safetensors(selection, None, WriteOptions(max_shard_bytes=9000)), selection, tmp_path / "b")
    (tmp_path / "b" / "config.json").write_bytes((tmp_path / "a" / "config.json").read_bytes())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from([1, 2, 4, 8])), max_size=12))
def test_every_tensor_starts_at_a_multiple_of_its_element_size(found: list[tuple[int, int]]) -> None:
    extents = [(count * size, size) for count, size in found]
    order = aligned_order(range(len(extents)), extents)
    assert sorted(order) == list(range(len(extents)))
    at = 0
    for i in order:
        assert at % extents[i][1] == 0
        at += extents[i][0]
    even = [i for i in order if extents[i][0] % 8 == 0]
    assert even == sorted(even)


def tensor(key: str, dtype: str = "F32", shape: tuple[int, ...] = (2,)) -> Tensor:
    return Tensor(key, Identity(Section.MODEL, key), by_name(dtype), shape, (key,))


def invented(source: Catalogue, *tensors: Tensor, objects: tuple[ByteObject, ...] = ()) -> Selection:
    return Selection(source, tensors, np.zeros(len(tensors), dtype=np.int64), objects)


def test_a_layout_makes_no_sense_for_whole_tensors(source: Catalogue) -> None:
    with pytest.raises(UsageError, match="--layout"):
        design_safetensors(select(source), parse_layout("fsdp=2"), WriteOptions())


def test_two_tensors_of_one_name_are_refused(source: Catalogue) -> None:
    with pytest.raises(NameCollision, match="'a'"):
        design_safetensors(invented(source, tensor("a"), tensor("a")), None, WriteOptions())


def test_a_type_that_the_format_lacks_is_refused_by_name(source: Catalogue) -> None:
    with pytest.raises(CannotHold, match=r"'z'.*C128.*--exclude"):
        design_safetensors(invented(source, tensor("z", "C128")), None, WriteOptions())


def test_objects_are_left_out_and_named(source: Catalogue) -> None:
    entry = ByteObject("lr_scheduler", Identity(Section.EXTRA, "lr_scheduler"), ("lr_scheduler",), 0, 0, 4)
    design = design_safetensors(invented(source, tensor("a"), objects=(entry,)), None, WriteOptions())
    assert design.left_out == ("lr_scheduler",)


def test_many_small_tensors_close_a_shard_before_its_header_is_too_large(
    source: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reshard_service.formats.safetensors.writer.HEADER_BUDGET_BYTES", 1000)
    design = design_safetensors(invented(source, *(tensor(f"t{i}") for i in range(100))), None, WriteOptions())
    assert len(design.files) > 5
    assert max(len(literal.data) for literal in design.literals) < 1100
