"""What lies at a URI: real folders of torch, safetensors, the Trainer and accelerate, whole and half-written."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save, save_file

from reshard_service.catalogue import Catalogue, Section
from reshard_service.errors import (
    AmbiguousSource,
    CheckpointIncomplete,
    NotACheckpoint,
    ReshardError,
    SourceCorrupt,
    SourceNotFound,
    UsageError,
)
from reshard_service.formats.detect import open_checkpoint
from reshard_service.formats.options import OpenOptions, WriteOptions
from reshard_service.formats.rank_safetensors.writer import design_rank_safetensors
from reshard_service.formats.safetensors.reader import open_safetensors
from reshard_service.layouts.shorthand import parse_layout
from reshard_service.storage.local import LocalStorage
from tests.formats.materialise import materialise, select, tensor_bytes

MODEL = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
STATE = {name: {"exp_avg": torch.zeros_like(value), "step": torch.tensor(1.0)} for name, value in MODEL.items()}


def opened(path: Path, **options: object) -> Catalogue:
    return open_checkpoint(LocalStorage(path), OpenOptions(**options))  # type: ignore[arg-type]


def codes(catalogue: Catalogue) -> list[str]:
    return [notice.code for notice in catalogue.notices]


def fqns(catalogue: Catalogue, section: Section) -> set[str]:
    return {tensor.identity.fqn for tensor in catalogue.tensors if tensor.identity.section is section}


def save_dcp(state: dict[str, object], folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=str(folder), no_dist=True)
    return folder


def save_safetensors(folder: Path, name: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(MODEL, folder / name, {"format": "pt"})
    return folder


def save_shards(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    info = {name: {"saved_offsets": [0] * tensor.dim()} for name, tensor in MODEL.items()}
    save_file(MODEL, folder / "shard-00001-model-00001-of-00001.safetensors", {"DCP_SHARDING_INFO": json.dumps(info)})
    return folder


def save_ranks(folder: Path, source: Path) -> Path:
    selection = select(open_safetensors(LocalStorage(save_safetensors(source)), OpenOptions()))
    materialise(design_rank_safetensors(selection, parse_layout("fsdp=2"), WriteOptions()), selection, folder)
    return folder


def test_every_format_is_recognised(tmp_path: Path) -> None:
    torch.save(MODEL, tmp_path / "weights.pt")
    (tmp_path / "bin").mkdir()
    torch.save(MODEL, tmp_path / "bin" / "pytorch_model.bin")
    cases = {
        "dcp": [save_dcp({"model": MODEL}, tmp_path / "dcp")],
        "safetensors": [save_safetensors(tmp_path / "st"), tmp_path / "st" / "model.safetensors"],
        "dcp-safetensors": [save_shards(tmp_path / "shards")],
        "rank-safetensors": [save_ranks(tmp_path / "ranks", tmp_path / "source")],
        "torch": [tmp_path / "weights.pt", tmp_path / "bin"],
    }
    for name, paths in cases.items():
        for path in paths:
            catalogue = opened(path)
            assert catalogue.format == name
            assert fqns(catalogue, Section.MODEL) == set(MODEL)


def test_a_safetensors_file_is_recognised_under_any_name(tmp_path: Path) -> None:
    save_safetensors(tmp_path, "weights")
    assert opened(tmp_path / "weights").format == "safetensors"


def test_the_manifest_decides_before_anything_else(tmp_path: Path) -> None:
    save_shards(save_safetensors(tmp_path))
    assert opened(tmp_path).format == "dcp-safetensors"
    manifest = {"version": 1, "format": "safetensors", "algo": "xxh3-128", "plan": "", "request": "", "files": []}
    (tmp_path / "reshard.manifest.json").write_text(json.dumps(manifest, indent=1))
    (tmp_path / "shard-00001-model-00001-of-00001.safetensors").rename(tmp_path / "other.safetensors")
    assert opened(tmp_path).format == "safetensors"
    (tmp_path / "reshard.manifest.json").write_text(json.dumps({**manifest, "format": "unheard"}))
    with pytest.raises(SourceCorrupt, match="unheard"):
        opened(tmp_path)


def test_metadata_comes_before_safetensors_beside_it(tmp_path: Path) -> None:
    save_safetensors(save_dcp({"model": MODEL}, tmp_path / "x"))
    assert opened(tmp_path / "x").format == "dcp"
    assert opened(tmp_path / "x", format="safetensors").format == "safetensors"


def test_an_unknown_format_name_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="dcp-safetensors"):
        opened(tmp_path, format="zip")


def test_nothing_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFound):
        opened(tmp_path / "absent")


def test_what_is_no_checkpoint_is_listed(tmp_path: Path) -> None:
    with pytest.raises(NotACheckpoint, match="it is empty"):
        opened(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "sub").mkdir()
    with pytest.raises(NotACheckpoint, match=r"notes\.txt, sub/.*dcp-safetensors"):
        opened(tmp_path)
    with pytest.raises(NotACheckpoint):
        opened(tmp_path / "notes.txt")


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_one_file_of_a_folder_is_no_source(tmp_path: Path, name: str) -> None:
    save_dcp({"model": MODEL}, tmp_path / "x")
    with pytest.raises(NotACheckpoint, match="name the folder"):
        opened(tmp_path / "x" / name)


def test_half_written_checkpoints_are_incomplete(tmp_path: Path) -> None:
    folder = save_dcp({"model": MODEL}, tmp_path / "x")
    (folder / ".metadata").rename(folder / ".metadata.tmp")
    with pytest.raises(CheckpointIncomplete, match="--wait-complete"):
        opened(folder)
    (folder / ".metadata.tmp").unlink()
    with pytest.raises(CheckpointIncomplete):
        opened(folder)
    staging = save_safetensors(tmp_path / ".out.reshard-0123456789ab")
    with pytest.raises(CheckpointIncomplete, match="staging"):
        opened(staging)


def test_a_run_folder_needs_a_step(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        save_dcp({"model": MODEL}, tmp_path / f"step-{step}")
    with pytest.raises(AmbiguousSource, match=r"step-9, step-10, step-100.*--step"):
        opened(tmp_path)
    assert opened(tmp_path, step="10").uri.endswith("step-10")
    assert opened(tmp_path, step="latest").uri.endswith("step-100")
    with pytest.raises(SourceNotFound, match="9, 10, 100"):
        opened(tmp_path, step="11")
    for wrong in ("newest", "-1", "1e3", "", "9" * 30):
        with pytest.raises(UsageError):
            opened(tmp_path, step=wrong)


def test_latest_is_the_highest_complete_step(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_dcp({"model": MODEL}, tmp_path / f"iter_{step:07d}")
    (tmp_path / "iter_0000003" / ".metadata").unlink()
    (tmp_path / "iter_0000004").mkdir()
    catalogue = opened(tmp_path, step="latest")
    assert catalogue.uri.endswith("iter_0000002")
    assert codes(catalogue)[:2] == ["step_skipped", "step_skipped"]
    with pytest.raises(CheckpointIncomplete):
        opened(tmp_path, step="3")
    for step in (1, 2):
        (tmp_path / f"iter_{step:07d}" / ".metadata").unlink()
    with pytest.raises(CheckpointIncomplete, match="none of the 4 steps"):
        opened(tmp_path, step="latest")


@pytest.mark.parametrize("name", ["step-7", "checkpoint-7", "global_step7", "global_step_7", "iter_0000007", "7"])
def test_the_frameworks_names_of_steps_are_known(tmp_path: Path, name: str) -> None:
    save_safetensors(tmp_path / name)
    (tmp_path / "logs").mkdir()
    assert opened(tmp_path, step="latest").uri.endswith(name)
    assert opened(tmp_path, step="7").uri.endswith(name)


def test_a_step_of_something_that_has_none_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no folders of steps"):
        opened(save_safetensors(tmp_path), step="latest")


def test_final_weights_win_over_the_steps_beside_them(tmp_path: Path) -> None:
    save_safetensors(tmp_path)
    save_safetensors(tmp_path / "checkpoint-5")
    assert codes(opened(tmp_path)) == ["steps_beside"]
    assert opened(tmp_path, step="5").uri.endswith("checkpoint-5")


def accelerate_folder(folder: Path) -> Path:
    """As ``accelerate.save_state`` with sharded state dicts leaves it."""
    groups = [{"lr": 0.1, "params": list(MODEL)}]
    save_dcp({"model": MODEL}, folder / "pytorch_model_fsdp_0")
    save_dcp({"optimizer": {"state": STATE, "param_groups": groups}}, folder / "optimizer_0")
    torch.save({"last_epoch": 3}, folder / "scheduler.bin")
    torch.save({"cpu": torch.get_rng_state()}, folder / "rng_state_0.pth")
    (folder / "random_states_0.pkl").write_bytes(b"\x80\x04N.")
    (folder / "trainer_state.json").write_text("{}")
    return folder


def test_accelerates_folder_is_one_catalogue_with_sections(tmp_path: Path) -> None:
    catalogue = opened(accelerate_folder(tmp_path / "x"))
    assert catalogue.format == "dcp"
    assert fqns(catalogue, Section.MODEL) == fqns(catalogue, Section.OPTIMIZER) == set(MODEL)
    assert {entry.path.split("/")[0] for entry in catalogue.files} == {
        "pytorch_model_fsdp_0", "optimizer_0", "scheduler.bin", "rng_state_0.pth",
    }  # fmt: skip
    for entry in catalogue.files:
        status = catalogue.storage.stat(entry.path)
        assert status is not None
        assert status.bytes == entry.bytes
    assert [leaf.key for leaf in catalogue.objects if leaf.identity.section is Section.EXTRA] == [
        "rng_state_0.pth",
        "scheduler.bin",
    ]
    assert codes(catalogue).count("training_state") == 2
    first = catalogue.chunks.first
    assert len(first) == len(catalogue.tensors) + 1
    for i, tensor in enumerate(catalogue.tensors):
        path = catalogue.files[int(catalogue.chunks.file[first[i]])].path
        assert path.startswith("optimizer" if tensor.identity.section is Section.OPTIMIZER else "pytorch")


def test_a_half_written_part_makes_the_whole_incomplete(tmp_path: Path) -> None:
    folder = accelerate_folder(tmp_path / "x")
    (folder / "optimizer_0" / ".metadata").unlink()
    with pytest.raises(CheckpointIncomplete):
        opened(folder)


def test_two_models_in_one_folder_are_ambiguous(tmp_path: Path) -> None:
    folder = accelerate_folder(tmp_path / "x")
    shutil.copytree(folder / "pytorch_model_fsdp_0", folder / "pytorch_model_fsdp_1")
    with pytest.raises(AmbiguousSource, match="2 models"):
        opened(folder)


@pytest.mark.parametrize("weights", [save_safetensors, save_shards])
def test_weights_with_an_optimizer_folder_are_one_catalogue(tmp_path: Path, weights) -> None:  # type: ignore[no-untyped-def]
    weights(tmp_path)
    save_dcp({"optimizer": {f"state.{name}.exp_avg": value for name, value in MODEL.items()}}, tmp_path / "optimizer")
    catalogue = opened(tmp_path)
    assert catalogue.format == "composite"
    assert fqns(catalogue, Section.MODEL) == fqns(catalogue, Section.OPTIMIZER) == set(MODEL)


def test_a_full_optimizer_by_name_joins_and_one_by_number_is_noticed(tmp_path: Path) -> None:
    save_safetensors(tmp_path)
    torch.save({"state": STATE, "param_groups": [{"lr": 0.1, "params": list(MODEL)}]}, tmp_path / "optimizer.bin")
    catalogue = opened(tmp_path)
    assert fqns(catalogue, Section.OPTIMIZER) == set(MODEL)
    (tmp_path / "optimizer.bin").unlink()
    parameters = [torch.nn.Parameter(value.float()) for value in MODEL.values()]
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    catalogue = opened(tmp_path)
    assert fqns(catalogue, Section.OPTIMIZER) == set()
    assert "optimizer_not_read" in codes(catalogue)


def test_an_indexed_set_of_torch_files_is_one_catalogue(tmp_path: Path) -> None:
    files = {name: f"pytorch_model-{i:05d}-of-00002.bin" for i, name in enumerate(MODEL, start=1)}
    for name, file in files.items():
        torch.save({name: MODEL[name]}, tmp_path / file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    catalogue = opened(tmp_path)
    assert catalogue.format == "torch"
    assert fqns(catalogue, Section.MODEL) == set(MODEL)
    assert [entry.path for entry in catalogue.files] == sorted(files.values())
    (tmp_path / files["b"]).unlink()
    with pytest.raises(CheckpointIncomplete, match="pytorch_model-00002"):
        opened(tmp_path)


def test_several_torch_files_are_ambiguous(tmp_path: Path) -> None:
    for name in ("x.pt", "y.pt"):
        torch.save(MODEL, tmp_path / name)
    with pytest.raises(AmbiguousSource, match=r"x\.pt, y\.pt"):
        opened(tmp_path)


def test_the_real_trainer_folder_opens(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    folder = tmp_path / "checkpoint-3"
    LlamaForCausalLM(config).save_pretrained(folder)
    torch.save({"last_epoch": 3}, folder / "scheduler.pt")
    torch.save({"any": 1}, folder / "training_args.bin")
    (folder / "trainer_state.json").write_text("{}")
    catalogue = opened(tmp_path, step="latest")
    assert catalogue.format == "safetensors"
    assert catalogue.side_files == ("config.json", "generation_config.json")
    assert [leaf.key for leaf in catalogue.objects] == ["scheduler.pt"]
    assert codes(catalogue) == ["training_state", "training_state"]


@pytest.mark.parametrize("name", [".metadata", "model.safetensors", "x.pt", "pytorch_model.bin.index.json"])
def test_rubbish_under_a_known_name_is_an_error_of_ours(tmp_path: Path, name: str) -> None:
    for rubbish in (b"", b"\0" * 64, b"\xff" * 64, b"PK\x03\x04" + b"\0" * 60, b"{" * 64):
        (tmp_path / name).write_bytes(rubbish)
        with pytest.raises(ReshardError):
            opened(tmp_path)


def test_a_file_per_rank_needs_the_layout_that_cut_it(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(4, 3)
    for rank in range(2):
        piece = whole.chunk(2)[rank].clone()
        torch.save({"a.weight": piece}, tmp_path / f"pytorch_model_fsdp_0_rank{rank}.bin")
        torch.save({"state": {"a.weight": {"exp_avg": piece * 2}}}, tmp_path / f"optimizer_0_rank{rank}.bin")
    with pytest.raises(AmbiguousSource, match="--source-layout"):
        opened(tmp_path)
    catalogue = opened(tmp_path, layout=parse_layout("fsdp=2"))
    assert catalogue.format == "torch"
    assert catalogue.world == 2
    assert len(catalogue.files) == 4
    for i, tensor in enumerate(catalogue.tensors):
        truth = whole if tensor.identity.section is Section.MODEL else whole * 2
        assert tensor.shape == (4, 3)
        assert tensor_bytes(catalogue, i).tobytes() == truth.numpy().tobytes()
    (tmp_path / "x_rank0.bin").write_bytes(b"")
    with pytest.raises(AmbiguousSource, match="name the one file"):
        opened(tmp_path, layout=parse_layout("fsdp=2"))


def test_an_object_store_is_looked_at_in_the_same_way(tmp_path: Path) -> None:
    import fsspec

    from reshard_service.storage.uri import open_storage

    store = fsspec.filesystem("memory")
    root = f"detect-{tmp_path.name}"
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for (name, tensor), file in zip(MODEL.items(), names, strict=True):
        store.pipe(f"/{root}/step-1/{file}", save({name: tensor}))
    index = {"weight_map": dict(zip(MODEL, names, strict=True))}
    store.pipe(f"/{root}/step-1/model.safetensors.index.json", json.dumps(index).encode())
    store.pipe(f"/{root}/step-2/.metadata.tmp", b"")
    catalogue = open_checkpoint(open_storage(f"memory://{root}"), OpenOptions(step="latest"))
    assert catalogue.uri == f"memory://{root}/step-1"
    assert [entry.path for entry in catalogue.files] == names
    assert codes(catalogue) == ["step_skipped"]
    with pytest.raises(AmbiguousSource, match="step-1, step-2"):
        open_checkpoint(open_storage(f"memory://{root}"), OpenOptions())
    with pytest.raises(SourceNotFound):
        open_checkpoint(open_storage(f"memory://{root}/absent"), OpenOptions())
