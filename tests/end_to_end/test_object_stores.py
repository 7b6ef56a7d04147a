"""The same conversions with a real S3-compatible server on either side."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from reshard_service.storage.uri import open_storage
from tests.oracles.command import reshard
from tests.s3_server import S3Server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(3)
    source = tmp_path / "hub"
    source.mkdir()
    tensors = {f"layers.{i}.w": torch.randn((65, 33), generator=generator).to(torch.bfloat16) for i in range(5)}
    save_file({**tensors, "scale": torch.tensor(2.5), "ids": torch.arange(7)}, source / "model.safetensors")
    (source / "config.json").write_text('{"model_type": "llama"}')
    return source


@pytest.mark.parametrize("options", [("--layout", "fsdp=3"), ()])
def test_a_checkpoint_goes_through_a_store_and_back_unchanged(
    folder: Path, s3_storage_uri: str, tmp_path: Path, options: tuple[str, ...]
) -> None:
    stored, back = f"{s3_storage_uri}/sharded", tmp_path / "back"
    reshard("convert", folder, stored, "--to", "dcp", *options).succeeded()
    reshard("diff", folder, stored).succeeded()
    reshard("verify", stored).succeeded()
    reshard("convert", stored, back, "--to", "safetensors").succeeded()
    before, after = load_file(folder / "model.safetensors"), load_file(back / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_is_written_to_a_store_is_what_is_written_locally(
    folder: Path, s3_storage_uri: str, tmp_path: Path
) -> None:
    reshard("convert", folder, f"{s3_storage_uri}/x", "--to", "dcp", "--layout", "fsdp=2").succeeded()
    reshard("convert", folder, tmp_path / "x", "--to", "dcp", "--layout", "fsdp=2").succeeded()
    stored = open_storage(f"{s3_storage_uri}/x")
    for name in ("__0_0.distcp", "__1_0.distcp", ".metadata", "reshard.manifest.json"):
        assert stored.read_bytes(name) == (tmp_path / "x" / name).read_bytes(), name


def test_a_store_to_store_conversion_gives_one_file_with_its_manifest_beside(
    folder: Path, s3_storage_uri: str, s3_server: S3Server
) -> None:
    reshard("convert", folder, f"{s3_storage_uri}/a", "--to", "dcp-safetensors", "--layout", "fsdp=2").succeeded()
    reshard("convert", f"{s3_storage_uri}/a", f"{s3_storage_uri}/one.safetensors").succeeded()
    reshard("diff", folder, f"{s3_storage_uri}/one.safetensors").succeeded()
    reshard("verify", f"{s3_storage_uri}/one.safetensors").succeeded()
    assert not [key for key in s3_server.keys(s3_storage_uri) if "claim" in key]


def test_overwrite_means_the_same_as_on_a_disk(folder: Path, s3_storage_uri: str, s3_server: S3Server) -> None:
    target = f"{s3_storage_uri}/x"
    command = ("convert", folder, target, "--to", "dcp", "--layout")
    reshard(*command, "fsdp=4").succeeded()
    reshard(*command, "fsdp=4").refused(4, "target_exists")
    assert "nothing to do" in reshard(*command, "fsdp=4", "--overwrite", "same").succeeded().out
    reshard(*command, "fsdp=2", "--overwrite", "same").refused(4, "target_exists")
    reshard(*command, "fsdp=2", "--overwrite", "always").succeeded()
    assert not [key for key in s3_server.keys(target) if "__2_0" in key or "__3_0" in key]
    reshard("diff", folder, target).succeeded()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_source_that_is_refused_leaves_no_object_behind(
    s3_storage_uri: str, s3_server: S3Server, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    dcp.save({"a": torch.randn(4000), "b": torch.randn(4000)}, checkpoint_id=source, no_dist=True)
    data = bytearray((source / "__0_0.distcp").read_bytes())
    data[len(data) - 6000] ^= 1
    (source / "__0_0.distcp").write_bytes(data)
    target = f"{s3_storage_uri}/x"
    reshard("convert", source, target, "--to", "safetensors").refused(3, "source_corrupt", "CRC32")
    assert s3_server.keys(target) == []
    assert not s3_server.pending_uploads(target)
