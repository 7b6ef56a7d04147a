"""Every dtype that torch's DCP can save, unevenly sharded over three ranks, through the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import deserialize

from tests.oracles.checkpoints import Checkpoints
from tests.oracles.command import reshard
from tests.oracles.gang import Task, run_gangs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
]

# Not in safetensors' table.
NOT_HELD = ("plain.complex32", "plain.complex128")


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def test_every_dtype_is_loaded_by_torch_in_another_layout(checkpoints: Checkpoints, tmp_path: Path) -> None:
    source, target = checkpoints.of_all_dtypes, tmp_path / "dcp"
    reshard("convert", source, target, "--to", "dcp", "--layout", "fsdp=2").succeeded()
    arguments = {"checkpoint": str(target), "truth": str(checkpoints.truth_of_all_dtypes), "form": "nested"}
    outcome = run_gangs([Task("load", 2, "resuming:load_elsewhere", arguments)])["load"]
    for rank in outcome.result():
        assert rank["differences"] == []
        assert rank["compared"] == 29
    assert reshard("diff", source, target, "--json").succeeded().document["same"] is True


def test_every_dtype_that_safetensors_knows_is_written_to_it(checkpoints: Checkpoints, tmp_path: Path) -> None:
    target = tmp_path / "all.safetensors"
    source = checkpoints.of_all_dtypes
    reshard("convert", source, target).refused(3, "target_cannot_hold", "plain.complex")
    reshard("convert", source, target, "--exclude", "plain.complex{32,128}").succeeded()
    truth = torch.load(checkpoints.truth_of_all_dtypes, weights_only=True)["model"]
    written = {name: (tuple(entry["shape"]), bytes(entry["data"])) for name, entry in deserialize(target.read_bytes())}
    expected = {name: (tuple(tensor.shape), _bits(tensor)) for name, tensor in truth.items() if name not in NOT_HELD}
    assert written == expected


def test_casts_are_those_of_torch_and_leave_everything_else_alone(checkpoints: Checkpoints, tmp_path: Path) -> None:
    target = tmp_path / "cast.safetensors"
    options = ("--exclude", "plain.complex{32,128}", "--dtype", "bf16", "--json")
    done = reshard("convert", checkpoints.of_all_dtypes, target, *options).succeeded()
    truth = torch.load(checkpoints.truth_of_all_dtypes, weights_only=True)["model"]
    cast = {name for name, tensor in truth.items() if tensor.dtype in (torch.float64, torch.float32, torch.float16)}
    [report] = done.document["targets"]
    assert {entry["name"] for entry in report["casts"]} == cast
    for name, entry in deserialize(target.read_bytes()):
        tensor = truth[name].to(torch.bfloat16) if name in cast else truth[name]
        if name in cast:
            assert entry["dtype"] == "BF16"
        found = torch.frombuffer(bytearray(entry["data"]), dtype=torch.uint8) if entry["data"] else torch.empty(0)
        # A NaN stays one, whatever its payload.
        if name in cast and tensor.isnan().any():
            torch.testing.assert_close(found.view(torch.bfloat16), tensor.reshape(-1), rtol=0, atol=0, equal_nan=True)
        else:
            assert bytes(entry["data"]) == _bits(tensor), name
