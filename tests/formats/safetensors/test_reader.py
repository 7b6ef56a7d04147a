"""Safetensors folders into catalogues, with files that the safetensors library and transformers wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from reshard_service.catalogue import Catalogue, Identity, Section
from reshard_service.errors import (
    AmbiguousSource,
    CheckpointIncomplete,
    NotACheckpoint,
    SourceCorrupt,
    UnsafeSource,
    UnsupportedSource,
)
from reshard_service.formats.options import OpenOptions
from reshard_service.formats.safetensors.reader import open_safetensors
from reshard_service.storage.local import LocalStorage
from tests.formats.materialise import tensor_bytes

INDEX = "model.safetensors.index.json"


def opened(path: Path, **options: object) -> Catalogue:
    return open_safetensors(LocalStorage(path), OpenOptions(**options))  # type: ignore[arg-type]


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def codes(catalogue: Catalogue) -> list[str]:
    return [notice.code for notice in catalogue.notices]


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two shards and their index."""
    save_file({"a": torch.ones(3), "b": torch.zeros(2, 2)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"c": torch.full((5,), 2.0)}, tmp_path / "model-00002-of-00002.safetensors")
    write_index(tmp_path, {"a": 1, "b": 1, "c": 2}, 12 + 16 + 20)
    return tmp_path


def write_index(folder: Path, numbers: dict[str, int | str], total: int | None = None) -> None:
    files = {
        name: file if isinstance(file, str) else f"model-{file:05d}-of-00002.safetensors"
        for name, file in numbers.items()
    }
    document = {"metadata": {"total_size": total} if total is not None else {}, "weight_map": files}
    (folder / INDEX).write_text(json.dumps(document))


def test_a_single_file_is_read_as_folder_and_as_file(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "s": torch.tensor(1, dtype=torch.int64), "e": torch.zeros(0, 2)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    for catalogue in (opened(tmp_path), opened(tmp_path / "model.safetensors")):
        assert catalogue.format == "safetensors"
        assert catalogue.producer == "transformers"
        assert {tensor.key: tensor.shape for tensor in catalogue.tensors} == {
            name: tuple(tensor.shape) for name, tensor in tensors.items()
        }
        for i, tensor in enumerate(catalogue.tensors):
            assert tensor_bytes(catalogue, i).tobytes() == raw(tensors[tensor.key])
    assert opened(tmp_path).files[0].path == "model.safetensors"
    assert opened(tmp_path / "model.safetensors").files[0].path == ""


def test_an_index_and_its_shards_are_one_catalogue(sharded: Path) -> None:
    catalogue = opened(sharded)
    assert [tensor.key for tensor in catalogue.tensors] == ["a", "b", "c"]
    assert [entry.path for entry in catalogue.files] == [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert catalogue.payload_bytes == 48
    assert catalogue.notices == ()
    assert tensor_bytes(catalogue, 2).tobytes() == raw(torch.full((5,), 2.0))


def test_the_digest_follows_every_metadata_byte(sharded: Path) -> None:
    before = opened(sharded).metadata_digest
    assert opened(sharded).metadata_digest == before
    write_index(sharded, {"a": 1, "b": 1, "c": 2}, 47)
    after = opened(sharded)
    assert after.metadata_digest != before
    assert codes(after) == ["total_size_wrong"]


def test_a_file_that_the_index_names_but_is_missing_is_an_incomplete_checkpoint(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointIncomplete, match="model-00002-of-00002"):
        opened(sharded)


def test_a_tensor_that_its_shard_lacks_is_refused_by_name(sharded: Path) -> None:
    write_index(sharded, {"a": 1, "b": 2, "c": 2})
    with pytest.raises(SourceCorrupt, match=r"'b'.*model-00002"):
        opened(sharded)


def test_a_tensor_that_the_index_does_not_list_is_taken_with_a_notice(sharded: Path) -> None:
    write_index(sharded, {"a": 1, "c": 2})
    assert [tensor.key for tensor in opened(sharded).tensors] == ["a", "b", "c"]
    assert codes(opened(sharded)) == ["not_in_index"]
    with pytest.raises(SourceCorrupt, match="'b'"):
        opened(sharded, strict=True)


def test_a_tensor_in_two_shards_is_taken_from_where_the_index_says(sharded: Path) -> None:
    save_file({"c": torch.full((5,), 2.0), "a": torch.zeros(3)}, sharded / "model-00002-of-00002.safetensors")
    catalogue = opened(sharded)
    assert codes(catalogue) == ["duplicate_in_shards"]
    assert sorted(tensor.key for tensor in catalogue.tensors) == ["a", "b", "c"]
    at = [tensor.key for tensor in catalogue.tensors].index("a")
    assert tensor_bytes(catalogue, at).tobytes() == raw(torch.ones(3))


def test_files_that_the_index_does_not_name_are_not_read(sharded: Path) -> None:
    (sharded / "consolidated.safetensors").write_bytes(b"anything")
    catalogue = opened(sharded)
    assert len(catalogue.files) == 2
    assert codes(catalogue) == ["files_ignored"]


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "a/../../x.safetensors", "", "a\\x"])
def test_a_path_out_of_the_folder_in_an_index_is_unsafe(sharded: Path, name: str) -> None:
    write_index(sharded, {"a": name})
    with pytest.raises(UnsafeSource, match="index"):
        opened(sharded)


def test_a_link_out_of_the_folder_is_unsafe(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside") / "x.safetensors"
    (sharded / "model-00002-of-00002.safetensors").rename(outside)
    (sharded / "model-00002-of-00002.safetensors").symlink_to(outside)
    with pytest.raises(UnsafeSource):
        opened(sharded)


def test_an_index_of_pickles_is_not_read(sharded: Path) -> None:
    write_index(sharded, {"a": "pytorch_model-00001-of-00002.bin"})
    with pytest.raises(UnsupportedSource, match="no safetensors file"):
        opened(sharded)


@pytest.mark.parametrize(
    "text",
    [
        b"{}",
        b"[]",
        b"{",
        b'{"weight_map": {"a": 1}}',
        b'{"weight_map": {"a": "model-00001-of-00002.safetensors", "a": "model-00002-of-00002.safetensors"}}',
        b'{"weight_map": "\xff"}',
    ],
)
def test_a_broken_index_is_refused(sharded: Path, text: bytes) -> None:
    (sharded / INDEX).write_bytes(text)
    with pytest.raises(SourceCorrupt, match=r"index\.json|index"):
        opened(sharded)


def test_another_index_is_used_if_it_is_the_only_one(sharded: Path) -> None:
    (sharded / INDEX).rename(sharded / "diffusion_pytorch_model.safetensors.index.json")
    assert len(opened(sharded).tensors) == 3
    (sharded / "second.safetensors.index.json").write_text("{}")
    with pytest.raises(AmbiguousSource, match="several indices"):
        opened(sharded)


def test_a_complete_numbered_set_without_index_is_taken_with_a_notice(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    catalogue = opened(sharded)
    assert len(catalogue.tensors) == 3
    assert codes(catalogue) == ["index_missing"]
    (sharded / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointIncomplete, match="1 of the 2 files"):
        opened(sharded)


def test_model_safetensors_is_the_model_whatever_lies_beside_it(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    save_file({"x": torch.ones(2)}, tmp_path / "consolidated.safetensors")
    catalogue = opened(tmp_path)
    assert [tensor.key for tensor in catalogue.tensors] == ["a"]
    assert codes(catalogue) == ["files_ignored"]


def test_files_with_different_tensors_are_joined_and_others_are_ambiguous(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "one.safetensors")
    save_file({"b": torch.ones(1)}, tmp_path / "two.safetensors")
    assert codes(opened(tmp_path)) == ["index_missing"]
    save_file({"a": torch.ones(1)}, tmp_path / "two.safetensors")
    with pytest.raises(AmbiguousSource, match=r"'a' is both in 'one\.safetensors' and in 'two\.safetensors'"):
        opened(tmp_path)
    (tmp_path / "two.safetensors").rename(tmp_path / "consolidated.safetensors")
    with pytest.raises(AmbiguousSource, match="consolidated"):
        opened(tmp_path)


def test_a_folder_without_safetensors_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(NotACheckpoint):
        opened(tmp_path)


def test_optimizer_keys_are_split_where_a_known_fqn_ends(tmp_path: Path) -> None:
    names = [
        "a.b",
        "a.b.c",
        "optimizer.state.a.b.exp_avg",
        "optimizer.state.a.b.c.exp_avg",
        "optimizer.state.a.b.0.factor.inv",
        "optimizer.state.lonely.x.exp_avg_sq",
        "optimizer.weight",
        "state.proj.weight",
    ]
    save_file({name: torch.ones(1) for name in names}, tmp_path / "model.safetensors")
    found = {tensor.key: tensor for tensor in opened(tmp_path).tensors}
    optimizer = {
        "optimizer.state.a.b.exp_avg": ("a.b", "exp_avg"),
        "optimizer.state.a.b.c.exp_avg": ("a.b.c", "exp_avg"),
        "optimizer.state.a.b.0.factor.inv": ("a.b", "0.factor.inv"),
        "optimizer.state.lonely.x.exp_avg_sq": ("lonely.x", "exp_avg_sq"),
    }
    for name in names:
        expected = Identity(Section.OPTIMIZER, *optimizer[name]) if name in optimizer else Identity(Section.MODEL, name)
        assert found[name].identity == expected
    assert found["optimizer.state.a.b.exp_avg"].path == ("optimizer", "state", "a.b", "exp_avg")


def test_a_key_prefix_is_no_part_of_the_fqn(tmp_path: Path) -> None:
    save_file({"model.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "model.safetensors")
    found = {tensor.key: tensor for tensor in opened(tmp_path, key_prefix="model").tensors}
    assert found["model.a"].identity == Identity(Section.MODEL, "a")
    assert found["model.a"].path == ("model", "a")
    assert found["b"].identity == Identity(Section.MODEL, "b")


def test_what_transformers_saves_is_read_bit_for_bit(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=66, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="10KB")
    catalogue = opened(tmp_path)
    assert len(catalogue.files) > 2
    assert catalogue.notices == ()
    assert catalogue.side_files == ("config.json", "generation_config.json")
    truth = {name: tensor for entry in catalogue.files for name, tensor in load_file(tmp_path / entry.path).items()}
    assert {tensor.key for tensor in catalogue.tensors} == set(truth)
    for i, tensor in enumerate(catalogue.tensors):
        assert tensor_bytes(catalogue, i).tobytes() == raw(truth[tensor.key])
