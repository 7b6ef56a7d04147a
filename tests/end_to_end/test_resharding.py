"""Trained checkpoints converted to another layout, judged by torch: its loader, its training, its full-state route."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.end_to_end.resharding_cases import CASES, Case, Verdict, judge_all, read_verdicts
from tests.oracles.checkpoints import Checkpoints
from tests.oracles.command import reshard
from tests.oracles.sharing import once

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

# Relative. Layouts reduce in different orders; two steps of these models differ by 5e-7 at most.
_TOLERANCE = 1e-5

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture(scope="session")
def converted(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory, worker: str) -> Path:
    """Folder of all converted cases and their verdicts."""
    return once(tmp_path_factory, worker, "resharded", lambda folder: judge_all(checkpoints, folder))


@pytest.fixture(scope="session")
def verdicts(converted: Path) -> dict[str, Verdict]:
    return read_verdicts(converted)


@every_case
def test_plain_torch_loads_the_new_layout_bit_for_bit(case: Case, verdicts: dict[str, Verdict]) -> None:
    ranks = verdicts[case.name].resumed()
    assert len(ranks) == case.resumed.world
    assert [rank["differences"] for rank in ranks] == [[]] * len(ranks)


@pytest.mark.parametrize("case", [case for case in CASES if case.elsewhere], ids=lambda case: case.name)
def test_plain_torch_loads_any_other_layout_bit_for_bit(case: Case, verdicts: dict[str, Verdict]) -> None:
    for rank in verdicts[case.name].loaded_elsewhere():
        assert rank["differences"] == []
        assert rank["compared"] > 80


@every_case
def test_the_next_losses_equal_those_of_a_resume_from_the_full_state(case: Case, verdicts: dict[str, Verdict]) -> None:
    for rank in verdicts[case.name].resumed():
        assert rank["losses"] == rank["reference_losses"]
        assert rank["after"] == [], "weights or moments differ after two more steps"


@every_case
def test_the_next_losses_are_those_of_the_uninterrupted_run_but_for_rounding(
    case: Case, verdicts: dict[str, Verdict], checkpoints: Checkpoints
) -> None:
    uninterrupted = json.loads(checkpoints.losses(case.saved).read_text(encoding="utf-8"))
    for rank in verdicts[case.name].resumed():
        assert rank["losses"] == pytest.approx(uninterrupted, rel=_TOLERANCE)


@every_case
def test_each_rank_reads_whole_chunks_of_its_own_file_and_replicated_ones(
    case: Case, verdicts: dict[str, Verdict]
) -> None:
    ranks = verdicts[case.name].resumed()
    readers = Counter((key, tuple(offset)) for rank in ranks for key, offset, *_ in rank["reads"])
    for number, rank in enumerate(ranks):
        for key, offset, file, _, nbytes, whole in rank["reads"]:
            assert whole or nbytes == 0, f"rank {number} needs only a part of a chunk of {key}"
            if readers[key, tuple(offset)] == 1:
                assert file.startswith(f"__{number}_"), f"rank {number} reads {key} at {offset} from {file}"


@every_case
def test_a_rank_reads_its_own_file_from_front_to_back(case: Case, verdicts: dict[str, Verdict]) -> None:
    for number, rank in enumerate(verdicts[case.name].resumed()):
        places = [start for _, _, file, start, _, _ in rank["reads"] if file.startswith(f"__{number}_")]
        assert places == sorted(places)


@every_case
def test_diff_finds_source_and_target_the_same(case: Case, converted: Path, checkpoints: Checkpoints) -> None:
    done = reshard("diff", checkpoints.of(case.saved, case.form), converted / case.name, "--part", "all", "--json")
    assert done.succeeded().document["same"] is True


@pytest.mark.parametrize("case", [case for case in CASES if case.elsewhere], ids=lambda case: case.name)
def test_what_was_written_matches_its_manifest(case: Case, converted: Path) -> None:
    reshard("verify", converted / case.name).succeeded()
