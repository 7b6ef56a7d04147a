"""The same conversions into and out of an S3-compatible store, through its real protocol."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.oracles.checkpoints import Checkpoints
from tests.oracles.command import reshard
from tests.oracles.models import Run

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


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
    truth = torch.load(checkpoints.truth(run), weights_only=True)["model"]
    found = load_file(tmp_path / "weights.safetensors")
    assert found.keys() == truth.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in truth.items())


def test_a_gathered_folder_is_written_to_a_store(checkpoints: Checkpoints, s3_storage_uri: str) -> None:
    run, remote = Run("llama", "fsdp3"), f"{s3_storage_uri}/folder"
    source, config = checkpoints.of(run), checkpoints.initial(run.model)
    options = ("--to", "safetensors", "--model", config, "--max-shard-size", "10KB")
    reshard("convert", source, remote, *options).succeeded()
    assert reshard("diff", source, remote, "--json").succeeded().document["same"] is True


def test_a_missing_bucket_is_named_without_a_traceback(checkpoints: Checkpoints, s3_storage_uri: str) -> None:
    remote = "s3://no-such-bucket-anywhere/resume"
    reshard("convert", checkpoints.of(Run("llama", "fsdp4")), remote, "--to", "dcp").refused(4, "no-such-bucket")
    reshard("inspect", remote).refused(3)
