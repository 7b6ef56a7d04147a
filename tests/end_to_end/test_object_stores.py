"""Source and target in an object store, by the command line alone: the same results as on a local disk."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.numpy import load_file, save_file

from tests.oracles.command import reshard
from tests.s3_server import S3Server

pytestmark = pytest.mark.slow

SHAPES = {
    "model.embed_tokens.weight": (67, 40),
    "model.layers.0.mlp.up_proj.weight": (1300, 1200),
    "model.norm.weight": (40,),
    "step": (),
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small safetensors file, large enough for an upload in parts."""
    random = np.random.default_rng(0)
    path = tmp_path / "model.safetensors"
    save_file(
        {name: np.asarray(random.standard_normal(shape), dtype=np.float32) for name, shape in SHAPES.items()}, path
    )
    return path


def test_a_checkpoint_goes_through_a_store_and_comes_back_the_same(
    source: Path, s3_storage_uri: str, s3_server: S3Server, tmp_path: Path
) -> None:
    reshard("convert", source, f"{s3_storage_uri}/dcp", "--to", "dcp", "--layout", "fsdp=3").succeeded()
    names = s3_server.keys(f"{s3_storage_uri}/dcp")
    assert sorted(names) == [".metadata", "__0_0.distcp", "__1_0.distcp", "__2_0.distcp", "reshard.manifest.json"]
    assert not s3_server.pending_uploads(s3_storage_uri)
    reshard("verify", f"{s3_storage_uri}/dcp").succeeded()
    reshard("diff", source, f"{s3_storage_uri}/dcp").succeeded()
    reshard("convert", f"{s3_storage_uri}/dcp", tmp_path / "back.safetensors").succeeded()
    before, after = load_file(source), load_file(tmp_path / "back.safetensors")
    assert {name: tensor.tobytes() for name, tensor in before.items()} == {
        name: tensor.tobytes() for name, tensor in after.items()
    }


def test_the_objects_are_byte_for_byte_the_files_that_a_local_target_has(
    source: Path, s3_storage_uri: str, s3_server: S3Server, tmp_path: Path
) -> None:
    options = ("--to", "dcp", "--layout", "fsdp=2")
    reshard("convert", source, f"{s3_storage_uri}/dcp", *options).succeeded()
    reshard("convert", source, tmp_path / "dcp", *options).succeeded()
    bucket, prefix = s3_storage_uri.removeprefix("s3://").split("/")
    for name in os.listdir(tmp_path / "dcp"):
        body = s3_server.call("get_object", Bucket=bucket, Key=f"{prefix}/dcp/{name}")["Body"].read()
        assert body == (tmp_path / "dcp" / name).read_bytes(), name


def test_an_existing_target_in_a_store_is_left_alone_and_a_same_one_is_free(
    source: Path, s3_storage_uri: str, s3_server: S3Server
) -> None:
    again = ("convert", source, f"{s3_storage_uri}/hf", "--to", "safetensors", "--overwrite", "same")
    reshard(*again).succeeded()
    bucket, prefix = s3_storage_uri.removeprefix("s3://").split("/")
    before = s3_server.call("list_objects_v2", Bucket=bucket, Prefix=prefix)["Contents"]
    reshard(*again).succeeded()
    reshard("convert", source, f"{s3_storage_uri}/hf", "--to", "safetensors").refused(4, "target_exists")
    assert s3_server.call("list_objects_v2", Bucket=bucket, Prefix=prefix)["Contents"] == before


def test_a_refused_source_leaves_nothing_in_the_store(s3_storage_uri: str, s3_server: S3Server, tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 100)
    reshard("convert", tmp_path / "bad.safetensors", f"{s3_storage_uri}/x", "--to", "safetensors").refused(
        3, "source_corrupt"
    )
    assert s3_server.keys(s3_storage_uri) == []


def test_missing_buckets_and_wrong_keys_have_their_own_errors(
    source: Path, s3_storage_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reshard("inspect", "s3://no-such-bucket-here/x").refused(3, "source_not_found")
    reshard("convert", source, "s3://no-such-bucket-here/x", "--to", "safetensors").refused(
        4, "target_failed", "bucket"
    )
    reshard("inspect", "s3://user:password@bucket/x").refused(2, "uri_refused")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-and-never-shown")
    reshard("inspect", f"{s3_storage_uri}/x").refused(4, "storage_denied", "AWS_ACCESS_KEY_ID")


def test_one_file_goes_from_store_to_store_with_its_manifest_beside(
    source: Path, s3_storage_uri: str, s3_server: S3Server
) -> None:
    sharded, one = f"{s3_storage_uri}/a", f"{s3_storage_uri}/one.safetensors"
    reshard("convert", source, sharded, "--to", "dcp-safetensors", "--layout", "fsdp=2").succeeded()
    reshard("convert", sharded, one).succeeded()
    reshard("diff", source, one).succeeded()
    reshard("verify", one).succeeded()
    assert not [key for key in s3_server.keys(s3_storage_uri) if "claim" in key]


def test_always_replaces_a_larger_world_without_leaving_any_of_it(
    source: Path, s3_storage_uri: str, s3_server: S3Server
) -> None:
    target = f"{s3_storage_uri}/x"
    command = ("convert", source, target, "--to", "dcp", "--layout")
    reshard(*command, "fsdp=4").succeeded()
    reshard(*command, "fsdp=2", "--overwrite", "same").refused(4, "target_exists")
    reshard(*command, "fsdp=2", "--overwrite", "always").succeeded()
    assert not [key for key in s3_server.keys(target) if "__2_0" in key or "__3_0" in key]
    reshard("diff", source, target).succeeded()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_damage_found_while_copying_leaves_nothing_in_the_store(
    s3_storage_uri: str, s3_server: S3Server, tmp_path: Path
) -> None:
    dcp.save({"a": torch.randn(4000), "b": torch.randn(4000)}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    data = bytearray((tmp_path / "dcp" / "__0_0.distcp").read_bytes())
    data[len(data) - 6000] ^= 1
    (tmp_path / "dcp" / "__0_0.distcp").write_bytes(data)
    reshard("convert", tmp_path / "dcp", f"{s3_storage_uri}/x", "--to", "safetensors").refused(3, "CRC32")
    assert s3_server.keys(f"{s3_storage_uri}/x") == []
    assert not s3_server.pending_uploads(s3_storage_uri)
