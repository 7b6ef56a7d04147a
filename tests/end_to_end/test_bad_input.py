"""Damaged and hostile checkpoints: refused with exit code 3, by name, no traceback, nothing left at the target."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end import damage
from tests.oracles.checkpoints import Checkpoints
from tests.oracles.command import reshard, visible
from tests.oracles.models import Run

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.faults]

EXISTING_RUN = Run("llama", "fsdp4")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An empty folder to write into."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def _assert_refused(source: Path, out: Path, code: str, *words: str, options: tuple[str | Path, ...] = ()) -> None:
    reshard("convert", source, out / "w.safetensors", "--part", "model", *options).refused(3, code, *words)
    assert visible(out) == []


@pytest.mark.parametrize(("spoil", "code", "words"), damage.DCP, ids=lambda value: getattr(value, "__name__", None))
def test_a_spoilt_dcp_is_refused(
    spoil: Callable[[Path], None],
    code: str,
    words: tuple[str, ...],
    checkpoints: Checkpoints,
    tmp_path: Path,
    out: Path,
) -> None:
    source = tmp_path / "in" / "source"
    shutil.copytree(checkpoints.of(EXISTING_RUN), source)
    spoil(source)
    _assert_refused(source, out, code, *words)
    assert not source.with_suffix(".marker").exists(), "a pickle was executed"


@pytest.mark.parametrize("spoil", [damage.truncate_data, damage.flip_a_bit], ids=lambda spoil: spoil.__name__)
def test_damage_found_only_while_copying_leaves_no_sharded_target(
    spoil: Callable[[Path], None], checkpoints: Checkpoints, tmp_path: Path, out: Path
) -> None:
    source = tmp_path / "in" / "source"
    shutil.copytree(checkpoints.of(EXISTING_RUN), source)
    spoil(source)
    reshard("convert", source, out / "sharded", "--to", "dcp", "--layout", "fsdp=2").refused(3, "source_corrupt")
    assert visible(out) == []


def test_a_good_copy_is_not_refused(checkpoints: Checkpoints, tmp_path: Path, out: Path) -> None:
    source = tmp_path / "in" / "source"
    shutil.copytree(checkpoints.of(EXISTING_RUN), source)
    reshard("convert", source, out / "w.safetensors").succeeded()
    (source.parent / "m.safetensors").write_bytes(damage.good_safetensors())
    reshard("convert", source.parent / "m.safetensors", out / "n.safetensors").succeeded()


@pytest.mark.parametrize("name", damage.SAFETENSORS)
def test_a_spoilt_safetensors_file_is_refused(name: str, tmp_path: Path, out: Path) -> None:
    source = tmp_path / "weights.safetensors"
    source.write_bytes(damage.SAFETENSORS[name])
    reshard("convert", source, out / "w.safetensors").refused(3, "weights.safetensors")
    assert visible(out) == []


@pytest.mark.parametrize(("spoil", "code", "words"), damage.INDEXES, ids=lambda value: getattr(value, "__name__", None))
def test_a_spoilt_index_is_refused(
    spoil: Callable[[Path], None], code: str, words: tuple[str, ...], tmp_path: Path, out: Path
) -> None:
    source = tmp_path / "in" / "source"
    source.mkdir(parents=True)
    spoil(source)
    _assert_refused(source, out, code, *words)


def test_a_hub_cache_is_made_of_links_and_not_refused(tmp_path: Path, out: Path) -> None:
    blobs, snapshot = tmp_path / "models--some--one" / "blobs", tmp_path / "models--some--one" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "0123").write_bytes(damage.good_safetensors())
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    reshard("convert", snapshot, out / "w.safetensors").succeeded()


@pytest.mark.parametrize("rank", ["00001", "00002", "00003"])
def test_a_distributed_folder_without_one_ranks_file_is_refused(
    rank: str, checkpoints: Checkpoints, tmp_path: Path, out: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoints.of(Run("moe", "fsdp4-ep2"), "transformers"), source)
    (source / f"shard-{rank}-model-00001-of-00001.safetensors").unlink()
    _assert_refused(source, out, "", "shard-")


def test_a_missing_last_rank_is_proved_by_config_or_world_and_suspected_otherwise(
    checkpoints: Checkpoints, tmp_path: Path, out: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoints.of(Run("moe", "fsdp4-ep2"), "transformers"), source)
    (source / "shard-00004-model-00001-of-00001.safetensors").unlink()
    _assert_refused(source, out, "")
    (source / "config.json").unlink()
    _assert_refused(source, out, "checkpoint_incomplete", options=("--strict",))
    done = reshard("inspect", source, "--json").succeeded()
    assert "completeness_unproven" in done.out


def test_per_rank_metadata_with_a_rank_missing_is_refused(checkpoints: Checkpoints, tmp_path: Path, out: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoints.of(EXISTING_RUN, "per-rank-metadata"), source)
    for path in source.glob("__2*"):
        path.unlink()
    _assert_refused(source, out, "")


@pytest.mark.parametrize("name", ["absent", "empty"])
def test_what_is_no_checkpoint_is_refused(name: str, tmp_path: Path, out: Path) -> None:
    (tmp_path / "empty").mkdir()
    _assert_refused(tmp_path / name, out, "source_not_found" if name == "absent" else "not_a_checkpoint")
