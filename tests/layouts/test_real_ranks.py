"""Our rectangles against what real gloo ranks hold: torch's own DTensor and FSDP2 are the oracle."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reshard_service.layouts.holdings import Holdings
from reshard_service.layouts.layout import Layout
from tests.layouts.pieces import joined, locals_of, make_layout, rule

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
Case = dict[str, Any]


def distribute_cases() -> list[Case]:
    """Every pair of placements on 2x2, 2x3, 3x2 and 2x4 meshes and some triples, even and uneven shapes."""
    found: list[Case] = []
    simple = ["replicate", "shard(0)", "shard(1)"]
    grids: dict[tuple[int, ...], list[tuple[int, ...]]] = {
        (4,): [(8, 4), (7, 3), (2, 5), (1, 4), (0, 4), (9,)],
        (2, 2): [(8, 4), (7, 5), (3, 2), (1, 3), (5, 1)],
        (2, 3): [(12, 6), (7, 5), (4, 9)],
        (3, 2): [(12, 6), (7, 5), (5, 8)],
        (2, 4): [(16, 8), (11, 7)],
        (2, 2, 2): [(16, 8), (9, 7)],
    }
    for sizes, shapes in grids.items():
        for shape, chosen in itertools.product(shapes, itertools.product(simple, repeat=len(sizes))):
            if len(shape) == 1 and "shard(1)" in chosen:
                continue
            found.append(_distribute(sizes, shape, chosen))
    # Strided as FSDP2 x TP writes it, and packed alone on its dim (also with another axis on the other dim).
    for (left, right), rows in {(2, 2): 8, (3, 2): 12, (2, 3): 12, (2, 4): 16, (4, 2): 16}.items():
        found.append(_distribute((left, right), (rows, 3), (f"strided(0,{right})", "shard(0)")))
        found.append(_distribute((left, right), (3, rows), (f"strided(1,{right})", "shard(-1)")))
        found.append(_distribute((left, right), (rows, 2 * right * 3), ("shard(0)", "strided(1,3)")))
        found.append(_distribute((left, right), (3 * left * 2, rows), ("strided(0,3)", "replicate")))
    found.append(_distribute((2, 2, 2), (16, 2), ("strided(0,4)", "strided(0,2)", "shard(0)")))
    found.append(_distribute((2, 2, 2), (16, 2), ("strided(0,4)", "shard(0)", "shard(0)")))
    found.append(_distribute((2, 2, 2), (16, 2), ("shard(0)", "strided(0,2)", "shard(0)")))
    found.append(_distribute((2, 2, 2), (16, 2), ("replicate", "strided(0,2)", "shard(0)")))
    found += [_distribute((4,), (rows, 2), ("strided(0,2)",)) for rows in (8, 16)]
    found += [_distribute((4,), (2, columns), ("strided(-1,3)",)) for columns in (12, 24)]
    return found


def _distribute(sizes: tuple[int, ...], shape: tuple[int, ...], placements: tuple[str, ...]) -> Case:
    axes = [[f"axis{at}", size] for at, size in enumerate(sizes)]
    return {
        "kind": "distribute",
        "world": prod(sizes),
        "axes": axes,
        "shape": list(shape),
        "placements": list(placements),
    }


TORCH_NEVER_ANSWERS = [
    ([("fsdp", 4), ("tp", 2)], (13, 2)),
    ([("fsdp", 2), ("tp", 4)], (7, 5)),
]
"""Uneven cases where torch 2.13's full_tensor() leaves its ranks waiting for each other; what they hold is fine."""


def fsdp_cases() -> list[Case]:
    """FSDP2 alone, over tensor or expert parallelism and with replicas; rows 1 to 13 are uneven in all ways."""
    found: list[Case] = []

    def add(axes: list[tuple[str, int]], shape: tuple[int, ...], **more: object) -> None:
        world = prod(size for _, size in axes)
        gather = (axes, shape) not in TORCH_NEVER_ANSWERS
        found.append({"kind": "fsdp", "world": world, "axes": axes, "shape": list(shape), "gather": gather, **more})

    for rows in range(1, 14):
        add([("fsdp", 4)], (rows, 2))
        add([("dp_replicate", 2), ("fsdp", 2)], (rows, 2))
        # Eight processes take their time on few cores.
        for dp, tp in [(2, 2), (3, 2), (2, 3), *([(4, 2), (2, 4)] if rows in (1, 2, 5, 7, 11, 13) else [])]:
            add([("fsdp", dp), ("tp", tp)], (rows, 2), inner="shard(0)")
    for dp, tp in [(2, 2), (3, 2), (2, 3), (2, 4)]:
        for columns in (5, 8):
            add([("fsdp", dp), ("tp", tp)], (7, columns), inner="shard(1)")
        add([("fsdp", dp), ("tp", tp)], (7,), inner="shard(0)")
        add([("fsdp", dp), ("tp", tp)], (7, 3), inner="replicate")
        # Packed gate/up rows of stacked experts, fsdp on dim 0.
        add([("fsdp", dp), ("tp", tp)], (5, 4 * tp, 2), inner="strided(1,2)", gather=False)
        # Expert parallelism with efsdp on dim 1, as torchtitan and Twinkle can have it.
        add([("efsdp", dp), ("ep", tp)], (2 * tp, 3 * dp, 2), inner="shard(0)", dim=1)
    for rows in (3, 7, 10):
        add([("dp_replicate", 2), ("fsdp", 2), ("tp", 2)], (rows, 2), inner="shard(0)")
    return found


def ask_torch(cases: list[Case]) -> list[list[Any]]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    if Path("/sys/class/net/lo").exists():
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    done = subprocess.run(
        [sys.executable, "-m", "tests.layouts.dtensors"],
        cwd=ROOT,
        env=environment,
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answers: list[list[Any]] = json.loads(done.stdout)
    return answers


@pytest.fixture(scope="module")
def answers() -> list[tuple[Case, list[Any]]]:
    cases = [*distribute_cases(), *fsdp_cases()]
    return list(zip(cases, ask_torch(cases), strict=True))


def layout_of(case: Case) -> Layout:
    if case["kind"] == "distribute":
        names = [name for name, _ in case["axes"]]
        return make_layout(case["axes"], rule("**", **dict(zip(names, case["placements"], strict=True))))
    axis = case["axes"][-1][0]
    rules = [rule("**", **{axis: case["inner"]})] if "inner" in case else []
    if axis == "ep":
        return make_layout(
            [("fsdp", case["world"])],
            *rules,
            expert_mesh={"axes": case["axes"], "match": ["**"], "efsdp_dim": case["dim"]},
        )
    return make_layout(case["axes"], *rules)


def as_held(case: Case, ranks: list[Any]) -> tuple[Holdings, list[Any]]:
    holdings = layout_of(case).holdings("weight", tuple(case["shape"]))
    return holdings, [np.array(values, dtype=np.int64).reshape(shape) for shape, values, _ in ranks]


def same(ours: np.ndarray[Any, Any], theirs: np.ndarray[Any, Any]) -> bool:
    # torch keeps (0, 2) or (2, 0) for a rank with nothing as it happens to come; there is nothing in it.
    return np.array_equal(ours, theirs) or ours.size == theirs.size == 0


def test_every_rank_holds_what_we_say_it_holds(answers: list[tuple[Case, list[Any]]]) -> None:
    compared, wrong = 0, []
    for case, ranks in answers:
        if any(isinstance(rank, str) for rank in ranks):
            continue
        holdings, theirs = as_held(case, ranks)
        compared += 1
        ours = locals_of(holdings, tuple(case["shape"]))
        if not all(same(mine, other) for mine, other in zip(ours, theirs, strict=True)):
            wrong.append((case, [piece.tolist() for piece in ours], [piece.tolist() for piece in theirs]))
    assert not wrong, f"{len(wrong)} of {compared}: {wrong[:2]}"
    assert compared >= 300


def test_torch_refuses_none_of_the_cases(answers: list[tuple[Case, list[Any]]]) -> None:
    refused = [(case, ranks[0]) for case, ranks in answers if any(isinstance(rank, str) for rank in ranks)]
    assert not refused, refused[:3]


def test_real_local_tensors_join_to_the_full_tensor_where_our_rectangles_say(
    answers: list[tuple[Case, list[Any]]],
) -> None:
    for case, ranks in answers:
        if case["kind"] == "fsdp":
            holdings, theirs = as_held(case, ranks)
            shape = tuple(case["shape"])
            assert np.array_equal(joined(holdings, shape, theirs), np.arange(prod(shape)).reshape(shape)), case
            if case["gather"]:
                assert all(full for _, _, full in ranks), f"torch's own full_tensor differs: {case}"


def test_explicit_strided_is_the_default_of_fsdp_over_tensor_parallelism(
    answers: list[tuple[Case, list[Any]]],
) -> None:
    for case, _ in answers:
        if case["kind"] == "fsdp" and case.get("inner") == "shard(0)" and case["axes"][-1][0] == "tp":
            shape = tuple(case["shape"])
            tp = case["axes"][-1][1]
            explicit = make_layout(case["axes"], rule("**", fsdp=f"strided(0,{tp})", tp="shard(0)"))
            default = layout_of(case).holdings("weight", shape)
            assert np.array_equal(explicit.holdings("weight", shape).offsets, default.offsets)
            assert np.array_equal(explicit.holdings("weight", shape).local_shape, default.local_shape)
