"""What a command loads before it does anything: never torch, and for help hardly anything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.engine.checkpoints import save_dcp, save_safetensors
from tests.oracles.gang import ROOT

_LOADED = """
import json, sys
from reshard_service.cli import main
loaded = {}
for command in json.loads(sys.argv[1]):
    sys.argv = ["reshard", *command]
    stdout, sys.stdout = sys.stdout, sys.stderr
    try:
        main()
    except SystemExit as left:
        loaded[" ".join(command)] = [left.code, sorted(name for name in sys.modules if "." not in name)]
    finally:
        sys.stdout = stdout
print(json.dumps(loaded))
"""
HEAVY = {
    "torch",
    "transformers",
    "s3fs",
    "botocore",
    "fsspec",
    "asyncio",
    "pandas",
    "fastapi",
    "uvicorn",
    "api",
    "workers",
}


def loaded_by(commands: list[list[str]], folder: Path) -> dict[str, tuple[int, set[str]]]:
    """Exit code of each command and the top-level modules that are loaded after it, all in one process."""
    done = subprocess.run(
        [sys.executable, "-c", _LOADED, json.dumps(commands)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {name: (code, set(modules)) for name, (code, modules) in json.loads(done.stdout).items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_safetensors({"w": torch.ones(4, 2)}, tmp_path / "weights")
    save_dcp({"model": {"w": torch.ones(4, 2)}}, tmp_path / "training")  # type: ignore[dict-item]
    torch.save({"w": torch.ones(4, 2)}, tmp_path / "weights.pt")
    (tmp_path / "config.json").write_text('{"hidden_size": 8, "num_attention_heads": 2}')
    return tmp_path


def test_no_command_on_local_files_loads_torch_or_a_driver_of_remote_stores(folder: Path) -> None:
    commands = [
        ["inspect", "weights"],
        ["inspect", "training"],
        ["inspect", "weights.pt"],
        ["plan", "training", "out", "--to", "dcp", "--layout", "fsdp=2"],
        ["layout", "check", "fsdp=2", "--model", "config.json"],
        ["convert", "training", "out", "--to", "dcp", "--layout", "fsdp=2", "--verify", "full"],
        ["convert", "weights.pt", "ranks", "--to", "rank-safetensors", "--layout", "fsdp=2"],
        ["convert", "out", "out.safetensors", "--dtype", "bf16"],
        ["verify", "out"],
        ["diff", "training", "weights"],
        ["doctor"],
    ]
    for command, (code, modules) in loaded_by(commands, folder).items():
        assert code == 0, command
        assert not modules & HEAVY, command


@pytest.mark.parametrize("command", [["--help"], ["convert", "--help"], ["--version"], ["nonsense"]], ids=" ".join)
def test_help_loads_hardly_anything(command: list[str], folder: Path) -> None:
    [(_, modules)] = loaded_by([command], folder).values()
    assert not modules & (HEAVY | {"numpy", "yaml", "xxhash", "zstandard", "isal", "safetensors"})


def test_importing_the_package_loads_nothing_but_itself() -> None:
    code = "import sys; before = set(sys.modules); import reshard_service; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "reshard_service" in done.stdout.split()
    assert not {name.partition(".")[0] for name in done.stdout.split()} & (HEAVY | {"numpy", "pydantic", "yaml"})


@pytest.mark.parametrize(
    "command", [["inspect", "weights", "--json"], ["inspect", "weights"], ["--help"]], ids=" ".join
)
def test_a_reader_that_went_away_is_no_error(command: list[str], folder: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "reshard_service.cli", *command],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert done.stderr == ""
    assert done.returncode == 0
