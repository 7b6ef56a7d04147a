"""A source with a manifest of ours is compared with it while it is read; links that a user made are followed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.oracles.command import reshard


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """What we wrote ourselves, as two kinds of folder and as a file; one tensor is larger than a round."""
    random = np.random.default_rng(1)
    tensors = {"small": random.standard_normal(300), "large": random.standard_normal((1200, 1300))}
    save_file(tensors, tmp_path / "given.safetensors")
    reshard("convert", tmp_path / "given.safetensors", tmp_path / "hf", "--to", "safetensors").succeeded()
    reshard("convert", tmp_path / "given.safetensors", tmp_path / "one.safetensors").succeeded()
    reshard("convert", tmp_path / "hf", tmp_path / "dcp", "--to", "dcp", "--layout", "fsdp=4").succeeded()
    return tmp_path


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["hf/model.safetensors", "one.safetensors"])
@pytest.mark.parametrize("at", [-5, -4_000_000, -12_480_100])
def test_a_flipped_bit_is_noticed_while_converting(written: Path, name: str, at: int) -> None:
    path = written / name
    _flip(path, path.stat().st_size + at)
    source = path.parent if name.startswith("hf") else path
    reshard("convert", source, written / "out", "--to", "safetensors").refused(3, "source_corrupt", "manifest")
    assert not (written / "out").exists()


def test_a_rank_file_put_in_the_place_of_another_is_noticed(written: Path) -> None:
    shutil.copy(written / "dcp" / "__1_0.distcp", written / "dcp" / "__2_0.distcp")
    reshard("convert", written / "dcp", written / "out", "--to", "safetensors").refused(3, "source_corrupt", "manifest")


def test_a_file_that_another_tool_replaced_is_taken_as_it_is(written: Path) -> None:
    save_file({"other": np.arange(9)}, written / "hf" / "model.safetensors")
    reshard("convert", written / "hf", written / "out", "--to", "safetensors").succeeded()


def test_a_link_to_weights_elsewhere_is_followed_but_not_one_that_an_index_names(written: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "model.safetensors").symlink_to(written / "given.safetensors")
    reshard("convert", linked, tmp_path / "out", "--to", "safetensors").succeeded()
    names = {"small": "model.safetensors", "large": "model.safetensors"}
    (linked / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    reshard("inspect", linked).refused(3, "unsafe_source", "leads out")
