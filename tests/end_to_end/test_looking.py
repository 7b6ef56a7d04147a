"""What ``inspect`` and ``plan`` say about real checkpoints, against torch's own reading of them and the real result."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tests.oracles.checkpoints import Checkpoints
from tests.oracles.command import reshard, visible
from tests.oracles.models import Run

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


@pytest.mark.parametrize("run", [Run("llama", "fsdp2-tp2"), Run("moe", "fsdp4-ep2")], ids=lambda run: run.name)
@pytest.mark.parametrize("form", ["nested", "flat"])
def test_inspect_lists_what_torch_reads(run: Run, form: str, checkpoints: Checkpoints) -> None:
    source = checkpoints.of(run, form)
    document = reshard("inspect", source, "--json").succeeded().document
    entries = FileSystemReader(source).read_metadata().state_dict_metadata
    tensors = {key: entry for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
    found = {tensor["name"]: tensor for tensor in document["tensors"]}
    assert {name: tensor["shape"] for name, tensor in found.items()} == {k: list(t.size) for k, t in tensors.items()}
    assert {tensor["dtype"] for tensor in found.values()} == {"F32"}
    assert {entry["name"] for entry in document["objects"]} == entries.keys() - tensors.keys()
    for key, entry in tensors.items():
        assert found[key]["chunks"] == sum(1 for chunk in entry.chunks if chunk.sizes.numel()), key
        assert found[key]["nbytes"] == entry.size.numel() * 4
    assert document["total_bytes"] == sum(tensor["nbytes"] for tensor in found.values())
    assert document["format"] == "dcp"
    assert {file["path"]: file["bytes"] for file in document["files"]} == {
        path.name: path.stat().st_size for path in source.glob("*.distcp")
    }


def test_inspect_tells_model_optimizer_and_the_rest_apart(checkpoints: Checkpoints) -> None:
    document = reshard("inspect", checkpoints.of(Run("llama", "fsdp4"), "titan"), "--json").succeeded().document
    truth = torch.load(checkpoints.truth(Run("llama", "fsdp4")), weights_only=True)
    sections: dict[str, set[tuple[str, str | None]]] = {}
    for tensor in document["tensors"]:
        sections.setdefault(tensor["section"], set()).add((tensor["fqn"], tensor["slot"]))
    assert sections["model"] == {(name, None) for name in truth["model"]}
    assert sections["optimizer"] == {(name, slot) for name, slots in truth["optim"]["state"].items() for slot in slots}
    assert {fqn for fqn, _ in sections["extra"]} == {"train_state.step", "train_state.ntokens_seen"}


@pytest.mark.parametrize(
    "options",
    [("--to", "dcp", "--layout", "fsdp=3"), ("--to", "safetensors", "--max-shard-size", "10KB")],
    ids=["dcp", "safetensors"],
)
def test_a_plan_says_what_a_conversion_then_does(
    options: tuple[str, ...], checkpoints: Checkpoints, tmp_path: Path
) -> None:
    source, target = checkpoints.of(Run("llama", "fsdp4")), tmp_path / "target"
    plan = reshard("plan", source, target, *options, "--json").succeeded().document
    assert visible(tmp_path) == []
    assert plan["problems"] == []
    assert plan["peak_memory_bytes"] <= 200_000_000
    done = reshard("convert", source, target, *options, "--json").succeeded().document
    [report] = done["targets"]
    for file in plan["files"]:
        assert (target / file["path"]).stat().st_size == file["bytes"]
    # The report also counts what closes a target: .metadata or an index.
    assert plan["write_bytes"] == sum(file["bytes"] for file in plan["files"]) <= report["written_bytes"]
    # The plan counts payload. What is really read has framing around it, but nothing is read twice.
    stored = sum(file.stat().st_size for file in source.glob("*.distcp"))
    assert plan["read_bytes"] <= report["read_bytes"] <= stored


def test_one_job_writes_several_targets_from_one_document(checkpoints: Checkpoints, tmp_path: Path) -> None:
    source, job = checkpoints.of(Run("moe", "fsdp2-tp2")), tmp_path / "job.yaml"
    job.write_text(
        f"""
        version: 1
        source: {{uri: {source}}}
        targets:
          - {{uri: {tmp_path / "weights.safetensors"}, format: safetensors}}
          - {{uri: {tmp_path / "resume"}, format: dcp, layout: {Run("moe", "fsdp4-ep2").layout}}}
        """,
        encoding="utf-8",
    )
    done = reshard("convert", "--job", job, "--json").succeeded()
    assert [target["format"] for target in done.document["targets"]] == ["safetensors", "dcp"]
    for target in ("weights.safetensors", "resume"):
        assert reshard("diff", source, tmp_path / target, "--json").succeeded().document["same"] is True


def test_a_layout_is_checked_against_a_real_checkpoint(checkpoints: Checkpoints) -> None:
    source, run = checkpoints.of(Run("moe", "fsdp2-tp2")), Run("moe", "fsdp4-ep2")
    reshard("layout", "check", "--model", source, run.layout).succeeded()
    config = checkpoints.initial("moe") / "config.json"
    reshard("layout", "check", "--model", config, "tp=3").refused(1, "num_attention_heads")
