"""Claims: one living process of a host at a time; the dead, and other hosts, are taken over and then fenced."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from reshard_service.engine.claims import Claims
from reshard_service.errors import TargetBusy
from tests.oracles.gang import ROOT

_HOLDER = """
import sys
from pathlib import Path
from reshard_service.engine.claims import Claims
Claims(Path(sys.argv[1])).take("it")
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that holds the claim until its input ends."""
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(tmp_path / "claims")],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_a_claim_of_a_living_process_is_respected(tmp_path: Path, holder: subprocess.Popen[bytes]) -> None:
    claims = Claims(tmp_path / "claims")
    with pytest.raises(TargetBusy, match=f"process {holder.pid} on this host"):
        claims.take("it")
    assert not claims.are_held
    with pytest.raises(TargetBusy):
        claims.check()


def test_a_claim_of_a_dead_process_is_taken_over(tmp_path: Path, holder: subprocess.Popen[bytes]) -> None:
    holder.kill()
    holder.wait()
    claims = Claims(tmp_path / "claims")
    claims.take("it")
    assert claims.epoch == 2
    assert claims.are_held


def test_a_number_that_the_kernel_gave_to_another_process_is_not_the_holder(
    tmp_path: Path, holder: subprocess.Popen[bytes]
) -> None:
    """Process numbers come again: the holder is known by when it began, too."""
    path = tmp_path / "claims" / "1"
    claim = json.loads(path.read_text())
    path.write_text(json.dumps(claim | {"started": "1"}))
    claims = Claims(tmp_path / "claims")
    claims.take("it")
    assert claims.epoch == 2


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"host": "elsewhere", "pid": 1, "started": "5"}', '{"host": null, "pid": "x"}'],
)
def test_claims_that_prove_no_living_process_here_are_taken_over(content: str, tmp_path: Path) -> None:
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims" / "7").write_text(content)
    (tmp_path / "claims" / "note.txt").write_text("no claim")
    claims = Claims(tmp_path / "claims")
    claims.take("it")
    assert claims.epoch == 8


def test_whoever_was_taken_over_may_do_nothing_more(tmp_path: Path) -> None:
    first, second = Claims(tmp_path / "claims"), Claims(tmp_path / "claims")
    first.take("it")
    first.check()
    second.take("it")  # the same process: an attempt of its own that it gave up
    second.check()
    assert not first.are_held
    with pytest.raises(TargetBusy, match="newer attempt"):
        first.check()


def test_claims_that_were_removed_are_held_by_nobody(tmp_path: Path) -> None:
    claims = Claims(tmp_path / "claims")
    claims.take("it")
    (tmp_path / "claims" / "1").unlink()
    (tmp_path / "claims").rmdir()
    assert not claims.are_held
    with pytest.raises(TargetBusy):
        claims.check()


def test_of_many_that_claim_at_once_each_gets_an_epoch_of_its_own(tmp_path: Path) -> None:
    claims = [Claims(tmp_path / "claims") for _ in range(16)]
    together = threading.Barrier(len(claims))

    def take(one: Claims) -> None:
        together.wait()
        one.take("it")

    threads = [threading.Thread(target=take, args=(one,)) for one in claims]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(one.epoch for one in claims) == list(range(1, 17))
    assert [one.epoch for one in claims if one.are_held] == [16]
    # A claim is whole from the moment it exists.
    assert all(json.loads((tmp_path / "claims" / str(n)).read_text())["pid"] == os.getpid() for n in range(1, 17))
