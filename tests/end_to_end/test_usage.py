"""What makes no sense is refused with exit code 2, before anything is read or written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.oracles.checkpoints import Checkpoints
from tests.oracles.command import reshard, visible
from tests.oracles.models import Run

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


@pytest.mark.parametrize(
    "options",
    [
        ("target",),
        ("target", "--to", "nonsense"),
        ("target", "--to", "rank-safetensors"),
        ("target", "--to", "dcp", "--layout", "tp=2"),
        ("target", "--to", "dcp", "--layout", "fsdp=0"),
        ("target", "--to", "dcp", "--layout", "sdp=2"),
        ("target", "--to", "dcp", "--layout", "fsdp=2,fsdp=2"),
        ("target", "--to", "dcp", "--layout", "absent.yaml"),
        ("target.safetensors", "--layout", "fsdp=2"),
        ("target", "--to", "dcp", "--overwrite", "perhaps"),
    ],
    ids=" ".join,
)
def test_a_contradictory_request_is_refused(options: tuple[str, ...], checkpoints: Checkpoints, tmp_path: Path) -> None:
    target, *others = options
    reshard("convert", checkpoints.of(Run("llama", "fsdp4")), tmp_path / target, *others).refused(2)
    assert visible(tmp_path) == []


def test_json_output_is_one_document_even_when_refused(tmp_path: Path) -> None:
    done = reshard("inspect", tmp_path / "absent", "--json")
    done.refused(3)
    assert done.document["error"]["code"] == "source_not_found"
