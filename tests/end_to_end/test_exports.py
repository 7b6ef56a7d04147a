"""Trained checkpoints written in the other formats, read back by safetensors, transformers and torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.oracles.checkpoints import Checkpoints
from tests.oracles.command import reshard, visible
from tests.oracles.gang import Outcome, Task, run_gangs
from tests.oracles.models import LAYOUTS, Run

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

SHARDED = (
    (Run("llama", "fsdp3"), "nested"),
    (Run("llama", "hsdp2x2"), "flat"),
    (Run("llama", "fsdp2-tp2"), "nested"),
    (Run("llama", "fsdp4"), "zstd"),
    (Run("llama", "fsdp4"), "per-rank-metadata"),
    (Run("llama", "fsdp4"), "titan"),
    (Run("moe", "fsdp2-tp2"), "flat"),
    (Run("moe", "fsdp4-ep2"), "nested"),
    (Run("moe", "fsdp4-ep2"), "transformers"),
    (Run("moe", "fsdp2-tp2"), "transformers"),
    (Run("llama", "fsdp3"), "torch-hf"),
)


def _truth(checkpoints: Checkpoints, run: Run) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(checkpoints.truth(run), weights_only=True)
    return loaded


def _assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert found[name].numpy().tobytes() == tensor.contiguous().numpy().tobytes(), name


@pytest.mark.parametrize(("run", "form"), SHARDED, ids=lambda value: getattr(value, "name", value))
def test_a_gathered_file_holds_the_models_bits(run: Run, form: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    target = tmp_path / "weights.safetensors"
    reshard("convert", checkpoints.of(run, form), target).succeeded()
    _assert_same(load_file(target), _truth(checkpoints, run)["model"])


@pytest.mark.parametrize("run", [Run("moe", "fsdp2-tp2"), Run("llama", "hsdp2x2")], ids=lambda run: run.name)
def test_transformers_loads_a_gathered_folder_of_small_shards(
    run: Run, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    target = tmp_path / "folder"
    source, config = checkpoints.of(run), checkpoints.initial(run.model)
    options = ("--to", "safetensors", "--model", config, "--max-shard-size", "10KB")
    reshard("convert", source, target, *options).succeeded()
    index = json.loads((target / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert len(set(index["weight_map"].values())) > 2
    expected = _truth(checkpoints, run)["model"]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    model, report = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    _assert_same(model.state_dict(), expected)


def test_optimizer_state_becomes_tensors_named_by_parameter_and_slot(checkpoints: Checkpoints, tmp_path: Path) -> None:
    run, target = Run("moe", "fsdp4-ep2"), tmp_path / "optimizer.safetensors"
    source = checkpoints.of(run)
    reshard("convert", source, target, "--part", "optimizer").refused(3, "target_cannot_hold", "param_groups")
    reshard("convert", source, target, "--part", "optimizer", "--exclude", "param_groups.**").succeeded()
    expected = {
        f"optimizer.state.{name}.{slot}": tensor
        for name, slots in _truth(checkpoints, run)["optim"]["state"].items()
        for slot, tensor in slots.items()
    }
    _assert_same(load_file(target), expected)


def test_tied_weights_are_written_once_when_the_config_says_so(checkpoints: Checkpoints, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    run, target = Run("llama-tied", "fsdp4"), tmp_path / "folder"
    config = checkpoints.initial(run.model)
    reshard("convert", checkpoints.of(run), target, "--to", "safetensors", "--model", config).succeeded()
    expected = _truth(checkpoints, run)["model"]
    written = load_file(target / "model.safetensors")
    _assert_same(written, {name: tensor for name, tensor in expected.items() if name != "lm_head.weight"})
    model = AutoModelForCausalLM.from_pretrained(target)
    assert torch.equal(model.lm_head.weight, expected["lm_head.weight"])


@pytest.mark.parametrize("run", [Run("moe", "fsdp2-tp2"), Run("llama-tied", "fsdp4")], ids=lambda run: run.name)
def test_our_gathering_equals_transformers_own(run: Run, checkpoints: Checkpoints) -> None:
    gathered = checkpoints.of(run, "transformers-gathered")
    done = reshard("diff", checkpoints.of(run, "transformers"), gathered, "--json").succeeded()
    assert done.document["same"] is True


def test_a_torch_save_file_becomes_sharded_and_gathered(checkpoints: Checkpoints, tmp_path: Path) -> None:
    run = Run("llama", "fsdp3")
    reshard("convert", checkpoints.truth(run), tmp_path / "w.safetensors").succeeded()
    expected = _truth(checkpoints, run)
    _assert_same(load_file(tmp_path / "w.safetensors"), expected["model"])
    source = checkpoints.truth(run)
    reshard("convert", source, tmp_path / "dcp", "--to", "dcp", "--layout", "fsdp=4", "--part", "model").succeeded()
    done = reshard("diff", source, tmp_path / "dcp", "--part", "model", "--json").succeeded()
    assert done.document["same"] is True


@pytest.mark.parametrize(
    ("run", "layout"),
    [(Run("llama", "fsdp4"), "llama-tp2"), (Run("moe", "fsdp4-ep2"), "moe-tp2-memory")],
    ids=["llama", "packed-experts"],
)
def test_rank_files_hold_what_each_rank_of_an_engine_holds(
    run: Run, layout: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    target = tmp_path / "ranks"
    document = LAYOUTS / f"{layout}.yaml"
    reshard("convert", checkpoints.of(run), target, "--to", "rank-safetensors", "--layout", document).succeeded()
    full = _truth(checkpoints, run)["model"]
    for rank in range(2):
        held = {}
        for file in target.glob(f"model-rank-{rank}-part-*.safetensors"):
            held |= load_file(file)
        _assert_same(held, {name: _tensor_parallel(name, tensor, rank) for name, tensor in full.items()})
    done = reshard("diff", checkpoints.of(run), target, "--json").succeeded()
    assert done.document["same"] is True


def _tensor_parallel(name: str, full: torch.Tensor, rank: int) -> torch.Tensor:
    """What transformers' tensor parallel styles leave on one of two ranks: column, row and packed column."""
    part = name.removesuffix(".weight").rpartition(".")[2]
    if part == "gate_up_proj":
        gate, up = full.chunk(2, dim=1)
        return torch.cat([gate.chunk(2, dim=1)[rank], up.chunk(2, dim=1)[rank]], dim=1)
    if part in ("o_proj", "down_proj"):
        return full.chunk(2, dim=-1)[rank]
    if part in ("embed_tokens", "lm_head", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
        return full.chunk(2, dim=0)[rank]
    return full


TO_RESUME = ("fsdp3", "fsdp4-ep2", "tp4")


@pytest.fixture(scope="module")
def distributed(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """transformers' own distributed folders, converted to other layouts, loaded by torch and by transformers."""
    folder = tmp_path_factory.mktemp("distributed")
    source, truth = Run("moe", "fsdp2-tp2"), checkpoints.truth(Run("moe", "fsdp2-tp2"))
    initial = checkpoints.initial("moe")
    tasks = []
    for spread in TO_RESUME:
        run = Run("moe", spread)
        model, optimizer = folder / f"model-{spread}", folder / f"optimizer-{spread}"
        layout = ("--layout", run.layout)
        made = (
            reshard("convert", checkpoints.of(source, "transformers"), model, "--to", "dcp-safetensors", *layout),
            reshard("convert", checkpoints.of(source, "transformers-optimizer"), optimizer, "--to", "dcp", *layout),
        )
        assert [done.code for done in made] == [0, 0], made
        arguments = {
            "model": run.model,
            "spread": spread,
            "initial": str(initial),
            "checkpoint": str(model),
            "optimizer_checkpoint": str(optimizer),
            "truth": str(truth),
        }
        tasks.append(Task(f"transformers {spread}", run.world, "resuming:resume_transformers", arguments))
        loading = {"checkpoint": str(model), "truth": str(truth), "form": "model"}
        tasks.append(Task(f"torch {spread}", 3, "resuming:load_elsewhere", loading))
    return run_gangs(tasks)


@pytest.mark.parametrize("spread", TO_RESUME)
def test_transformers_resumes_from_our_distributed_folder(spread: str, distributed: dict[str, Outcome]) -> None:
    for rank in distributed[f"transformers {spread}"].result():
        assert rank["differences"] == []
        assert rank["losses"] == rank["reference_losses"]


@pytest.mark.parametrize("spread", TO_RESUME)
def test_torchs_hugging_face_reader_loads_our_distributed_folder(spread: str, distributed: dict[str, Outcome]) -> None:
    for rank in distributed[f"torch {spread}"].result():
        assert rank["differences"] == []
        assert rank["compared"] == 25


def test_a_checkpoint_survives_the_way_into_a_store_and_back(
    checkpoints: Checkpoints, tmp_path: Path, s3_storage_uri: str
) -> None:
    run, remote = Run("moe", "fsdp2-tp2"), f"{s3_storage_uri}/resume"
    source, layout = checkpoints.of(run), Run("moe", "fsdp4-ep2").layout
    into = ("convert", source, remote, "--to", "dcp", "--layout", layout)
    reshard(*into).succeeded()
    assert reshard("diff", source, remote, "--part", "all", "--json").succeeded().document["same"] is True
    reshard("verify", remote).succeeded()
    reshard(*into).refused(4, "target_exists")
    reshard(*into, "--overwrite", "same").succeeded()
    reshard("convert", remote, tmp_path / "weights.safetensors").succeeded()
    _assert_same(load_file(tmp_path / "weights.safetensors"), _truth(checkpoints, run)["model"])


def test_training_state_of_each_rank_is_dropped_only_when_told(checkpoints: Checkpoints, tmp_path: Path) -> None:
    source, target = checkpoints.of(Run("llama", "fsdp4"), "titan"), tmp_path / "other"
    layout = ("--to", "dcp", "--layout", "fsdp=3")
    reshard("convert", source, target, *layout).refused(3, "state_not_portable", "dp_rank_")
    assert visible(tmp_path) == []
    reshard("convert", source, target, *layout, "--state", "drop").succeeded()
    kept = _keys(target)
    assert not any("dp_rank_" in key for key in kept)
    assert {"lr_scheduler.last_epoch", "train_state.step", "train_state.ntokens_seen"} <= kept


def test_training_state_of_each_rank_is_kept_where_the_ranks_stay(checkpoints: Checkpoints, tmp_path: Path) -> None:
    source, target = checkpoints.of(Run("llama", "fsdp4"), "titan"), tmp_path / "same"
    reshard("convert", source, target, "--to", "dcp", "--layout", "fsdp=4").succeeded()
    assert _keys(target) == _keys(source)
    done = reshard("diff", source, target, "--part", "all", "--json").succeeded()
    assert done.document["same"] is True


def _keys(folder: Path) -> set[str]:
    """All keys of a DCP, tensors and objects, as torch reads them."""
    from torch.distributed.checkpoint import FileSystemReader

    return set(FileSystemReader(folder).read_metadata().state_dict_metadata)
