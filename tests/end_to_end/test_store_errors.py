"""What a user is told when a store is not there or does not let them in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.oracles.command import reshard
from tests.s3_server import S3Server

pytestmark = pytest.mark.faults


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_file({"model.norm.weight": np.arange(40, dtype=np.float32)}, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_a_missing_bucket_is_named_as_source_and_as_target(source: Path, s3_storage_uri: str) -> None:
    reshard("inspect", "s3://no-such-bucket-here/x").refused(3, "source_not_found")
    target = ("s3://no-such-bucket-here/x", "--to", "safetensors")
    reshard("convert", source, *target).refused(4, "target_failed", "bucket")


def test_wrong_keys_are_told_with_the_way_out_and_never_shown(
    s3_storage_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-and-never-shown")
    done = reshard("inspect", f"{s3_storage_uri}/x")
    done.refused(4, "storage_denied", "AWS_ACCESS_KEY_ID")
    assert "wrong-and-never-shown" not in done.out + done.err


def test_credentials_in_a_uri_are_refused_and_not_repeated() -> None:
    done = reshard("inspect", "s3://user:password@bucket/x")
    done.refused(2, "uri_refused", "RESHARD_PROFILES")
    assert "password@" not in done.out + done.err


def test_a_profile_file_lets_the_command_line_in(
    source: Path, s3_storage_uri: str, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in s3_server.environment():
        monkeypatch.delenv(name)
    (tmp_path / "secret").write_text(s3_server.secret_key)
    (tmp_path / "profiles.toml").write_text(
        f'[profiles.t]\nprefixes = ["{s3_storage_uri}"]\n[profiles.t.options]\nendpoint_url = "{s3_server.endpoint}"\n'
        f'key = "{s3_server.access_key}"\nsecret = {{ file = "{tmp_path / "secret"}" }}\n'
    )
    monkeypatch.setenv("RESHARD_PROFILES", str(tmp_path / "profiles.toml"))
    reshard("convert", source, f"{s3_storage_uri}/x", "--to", "safetensors").succeeded()
    assert s3_server.keys(f"{s3_storage_uri}/x") == ["model.safetensors", "reshard.manifest.json"]
