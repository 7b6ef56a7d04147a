"""Shard folders written by torch's own HuggingFaceStorageWriter, read here; what torch would read wrong is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.tensor import Replicate, Shard

from reshard_service.catalogue import Catalogue
from reshard_service.errors import (
    CheckpointIncomplete,
    NotACheckpoint,
    ReshardError,
    SourceCorrupt,
)
from reshard_service.formats.dcp_safetensors.completeness import prove_by_config
from reshard_service.formats.dcp_safetensors.reader import open_dcp_safetensors
from reshard_service.formats.options import OpenOptions
from reshard_service.layouts.shorthand import parse_layout
from reshard_service.storage.local import LocalStorage
from tests.formats.dcp_safetensors.saving import save
from tests.formats.materialise import tensor_bytes

FULL = {
    "embed_tokens.weight": torch.arange(44, dtype=torch.float32).reshape(11, 4),
    "cols": torch.arange(30, dtype=torch.bfloat16).reshape(3, 10),
    "norm": torch.arange(5, dtype=torch.float64),
    "step": torch.tensor(3.0),
    "tiny": torch.arange(2, dtype=torch.uint8).reshape(2, 1),
    "flags": torch.tensor([True, False, True]),
    "empty": torch.zeros(0, 3),
}
PLACEMENTS = {
    "embed_tokens.weight": (Shard(0),),
    "cols": (Shard(1),),
    "norm": (Replicate(),),
    "tiny": (Shard(0),),
    "empty": (Shard(0),),
}


def opened(path: Path, **options: object) -> Catalogue:
    return open_dcp_safetensors(LocalStorage(path), OpenOptions(**options))  # type: ignore[arg-type]


def codes(catalogue: Catalogue) -> list[str]:
    return [notice.code for notice in catalogue.notices]


def shard(rank: int, file: int = 1, files: int = 1) -> str:
    return f"shard-{rank + 1:05d}-model-{file:05d}-of-{files:05d}.safetensors"


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save(FULL, PLACEMENTS, (4,), folder)
    return folder


@pytest.fixture
def saved(saved_once: Path, tmp_path: Path) -> Path:
    """A save of four ranks, to be damaged."""
    return Path(shutil.copytree(saved_once, tmp_path / "saved"))


def assert_holds_the_truth(catalogue: Catalogue) -> None:
    assert {tensor.key for tensor in catalogue.tensors} == set(FULL)
    for i, tensor in enumerate(catalogue.tensors):
        truth = FULL[tensor.key]
        assert tensor.shape == tuple(truth.shape)
        assert tensor_bytes(catalogue, i).tobytes() == bytes(truth.reshape(-1).view(torch.uint8).numpy())


def test_what_torch_writes_is_read_bit_for_bit(saved: Path) -> None:
    catalogue = opened(saved)
    assert catalogue.format == "dcp-safetensors"
    assert catalogue.world == 4
    assert_holds_the_truth(catalogue)
    assert codes(catalogue) == ["completeness_unproven"]


def test_a_two_dimensional_mesh_is_read_bit_for_bit(tmp_path: Path) -> None:
    placements = {
        "embed_tokens.weight": (Shard(0), Shard(1)),
        "cols": (Replicate(), Shard(1)),
        "norm": (Shard(0), Replicate()),
    }
    save(FULL, placements, (2, 3), tmp_path)
    assert_holds_the_truth(opened(tmp_path, world=6))


def test_several_files_a_rank_are_read(tmp_path: Path) -> None:
    files = {name: 1 + (name in ("cols", "embed_tokens.weight")) for name in FULL}
    every = {name: PLACEMENTS.get(name, (Shard(0),)) for name in FULL if name != "step"}
    save({name: FULL[name] for name in every}, every, (2,), tmp_path, files)
    assert (tmp_path / shard(1, 2, 2)).exists()
    catalogue = opened(tmp_path)
    assert {tensor.key for tensor in catalogue.tensors} == set(every)
    (tmp_path / shard(0, 2, 2)).unlink()
    with pytest.raises(CheckpointIncomplete, match="shard-00001-model-00002-of-00002"):
        opened(tmp_path)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_gap_in_the_ranks_is_refused(saved: Path, rank: int) -> None:
    (saved / shard(rank)).unlink()
    with pytest.raises(CheckpointIncomplete, match=shard(rank)):
        opened(saved)


def test_a_missing_last_rank_is_noticed_by_the_world(saved: Path) -> None:
    assert codes(opened(saved, world=4)) == []
    assert codes(opened(saved, layout=parse_layout("fsdp=4"))) == []
    (saved / shard(3)).unlink()
    assert codes(opened(saved)) == ["completeness_unproven"]
    for options in ({"world": 4}, {"layout": parse_layout("fsdp=4")}, {"strict": True}):
        with pytest.raises(CheckpointIncomplete):
            opened(saved, **options)


def test_a_missing_last_rank_is_noticed_by_config_json(saved: Path) -> None:
    (saved / "config.json").write_text(json.dumps({"vocab_size": 11, "hidden_size": 4}))
    assert codes(opened(saved)) == ["completeness_unproven"]
    (saved / shard(3)).unlink()
    with pytest.raises(CheckpointIncomplete, match=r"'embed_tokens\.weight' has shape \[9, 4\].*\[11, 4\]"):
        opened(saved)


def test_a_missing_last_rank_is_noticed_by_the_manifest(saved: Path) -> None:
    files = [{"path": shard(rank), "bytes": 1, "digest": "", "segments": []} for rank in range(4)]
    manifest = {
        "version": 1,
        "format": "dcp-safetensors",
        "algo": "xxh3-128",
        "plan": "",
        "request": "",
        "files": files,
    }
    (saved / "reshard.manifest.json").write_text(json.dumps(manifest))
    assert codes(opened(saved)) == []
    (saved / shard(3)).unlink()
    with pytest.raises(CheckpointIncomplete, match=shard(3)):
        opened(saved)


def test_stale_files_of_a_larger_world_are_refused_where_the_world_is_known(saved: Path) -> None:
    with pytest.raises(SourceCorrupt, match="older save"):
        opened(saved, world=3)


def test_stale_files_of_another_number_of_files_are_refused(saved: Path) -> None:
    shutil.copy(saved / shard(0), saved / shard(0, 1, 2))
    with pytest.raises(SourceCorrupt, match="mixes shard files"):
        opened(saved)


def test_a_consolidated_file_beside_the_shards_is_not_read_twice(saved: Path) -> None:
    save_file({"norm": torch.zeros(5)}, saved / "consolidated.safetensors")
    catalogue = opened(saved, world=4)
    assert codes(catalogue) == ["files_ignored"]
    assert_holds_the_truth(catalogue)


@pytest.mark.parametrize(
    ("info", "says"),
    [
        (None, "no DCP_SHARDING_INFO"),
        ("{", "can't be parsed"),
        ("[]", "not an object"),
        ("{}", "saved_offsets None"),
        ('{"w": {}}', "saved_offsets None"),
        ('{"w": {"saved_offsets": [0]}}', "no position in its 2 dims"),
        ('{"w": {"saved_offsets": [0, -1]}}', "no position"),
        ('{"w": {"saved_offsets": [0, 1.0]}}', "no position"),
        ('{"w": {"saved_offsets": [0, 99999999999999999999]}}', "no position"),
        ('{"w": {"saved_offsets": [4611686018427387900, 0]}}', "impossible shape"),
        ('{"w": {"saved_offsets": [0, 0]}, "w": {"saved_offsets": [2, 0]}}', "twice"),
        ('{"w": {"saved_offsets": [0, 0]}, "x": {"saved_offsets": [0]}}', "'x', which the file lacks"),
    ],
)
def test_wrong_sharding_info_is_refused(tmp_path: Path, info: str | None, says: str) -> None:
    metadata = {"format": "pt"} if info is None else {"DCP_SHARDING_INFO": info}
    save_file({"w": torch.zeros(2, 2)}, tmp_path / shard(0), metadata)
    with pytest.raises(ReshardError, match=says) as caught:
        opened(tmp_path)
    assert caught.value.code == "source_corrupt"


def test_ranks_that_disagree_about_a_tensor_are_refused(tmp_path: Path) -> None:
    for rank, tensor in enumerate((torch.zeros(2), torch.zeros(2, dtype=torch.int32))):
        info = {"w": {"saved_offsets": [2 * rank]}}
        save_file({"w": tensor}, tmp_path / shard(rank), {"DCP_SHARDING_INFO": json.dumps(info)})
    with pytest.raises(SourceCorrupt, match=r"'w' is I32.*F32"):
        opened(tmp_path)


def test_a_folder_without_shards_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(NotACheckpoint):
        opened(tmp_path)


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_the_config_accounts_for_every_tensor_of_a_real_model(kind: str) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

    sizes = {
        "vocab_size": 66, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    }  # fmt: skip
    config = (
        LlamaConfig(**sizes)
        if kind == "llama"
        else Qwen3MoeConfig(**sizes, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12)
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    document = json.loads(config.to_json_string(use_diff=False))
    assert prove_by_config(document, shapes)
    for name, shape in shapes.items():
        smaller = {**shapes, name: (shape[0] - 1, *shape[1:])}
        with pytest.raises(CheckpointIncomplete, match=name.replace(".", r"\.")):
            prove_by_config(document, smaller)
    lost = {name: shape for name, shape in shapes.items() if name != "model.layers.1.input_layernorm.weight"}
    assert not prove_by_config(document, lost)
    assert not prove_by_config({**document, "model_type": "another"}, shapes)
