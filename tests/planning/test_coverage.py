"""The coverage proof finds every gap, overlap and overhang, and nothing else."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from reshard_service.planning.coverage import tiling_fault, uncovered_target
from reshard_service.planning.intersect import intersect
from tests.planning.tilings import Box, plain, shapes, tilings, unhurried


def _fault(shape: tuple[int, ...], boxes: list[Box], padding: int = 0) -> str | None:
    dims = len(shape)
    offsets = np.array([box[0] for box in boxes], dtype=np.int64).reshape(len(boxes), dims)
    sizes = np.array([box[1] for box in boxes], dtype=np.int64).reshape(len(boxes), dims)
    return tiling_fault(
        shape,
        np.pad(offsets, ((0, 0), (0, padding)), constant_values=0),
        np.pad(sizes, ((0, 0), (0, padding)), constant_values=1),
    )


def _brute(shape: tuple[int, ...], boxes: list[Box]) -> bool:
    """Whether each element is covered once, equal rectangles counting once."""
    counts: Counter[tuple[int, ...]] = Counter()
    for offsets, sizes in set(boxes):
        if any(o < 0 or o + s > extent for o, s, extent in zip(offsets, sizes, shape, strict=True)):
            return False
        counts.update(tuple(np.add(offsets, index).tolist()) for index in np.ndindex(*sizes))
    return all(counts[index] == 1 for index in np.ndindex(*shape))


@unhurried
@given(st.data(), shapes(), st.integers(0, 2))
def test_what_tiles_a_shape_has_no_fault(data: st.DataObject, shape: tuple[int, ...], padding: int) -> None:
    tiling = data.draw(tilings(shape))
    assert _fault(shape, list(tiling.boxes), padding) is None


@unhurried
@given(st.data(), shapes(3, 5), st.integers(0, 2))
def test_a_fault_is_found_exactly_where_counting_finds_one(
    data: st.DataObject, shape: tuple[int, ...], padding: int
) -> None:
    boxes = list(data.draw(plain(shape)).boxes)
    at = data.draw(st.integers(0, len(boxes) - 1))
    spoil = data.draw(st.sampled_from(["drop", "shift", "grow", "add", "keep"]))
    offsets, sizes = boxes[at]
    if spoil == "drop":
        boxes = [box for box in boxes if box != boxes[at]]
    elif spoil != "keep" and shape:
        dim = data.draw(st.integers(0, len(shape) - 1))
        by = data.draw(st.sampled_from([-1, 1]))
        moved = (*offsets[:dim], offsets[dim] + by, *offsets[dim + 1 :]) if spoil == "shift" else offsets
        grown = (*sizes[:dim], max(0, sizes[dim] + by), *sizes[dim + 1 :]) if spoil == "grow" else sizes
        boxes[at : at + (spoil != "add")] = [(moved, grown)]
    fault = _fault(shape, boxes, padding)
    assert (fault is None) == _brute(shape, boxes), (boxes, fault)


@unhurried
@given(st.data(), shapes(3, 5))
def test_the_gap_that_is_named_is_really_empty(data: st.DataObject, shape: tuple[int, ...]) -> None:
    assume(shape and 0 not in shape)
    boxes = list(data.draw(plain(shape)).boxes)
    lost = data.draw(st.sampled_from(boxes))
    fault = _fault(shape, [box for box in boxes if box != lost])
    assert fault is not None
    assert fault.startswith("no chunk holds [")
    ranges = fault.removeprefix("no chunk holds [").partition("]")[0].split(", ")
    corners = [tuple(map(int, text.split(":"))) for text in ranges]
    for (begin, end), offset, size in zip(corners, *lost, strict=True):
        assert offset <= begin < end <= offset + size


@pytest.mark.parametrize(
    ("boxes", "words"),
    [
        ([((0, 0), (2, 4)), ((2, 0), (3, 4))], "[2:5, 0:4] reaches out of shape [4, 4]"),
        ([((0, 0), (4, 2)), ((0, -1), (4, 3))], "[0:4, -1:2] reaches out"),
        ([((0, 0), (3, 4)), ((2, 0), (2, 4))], "[0:3, 0:4] and [2:4, 0:4] overlap"),
        ([((0, 0), (2, 4))], "no chunk holds [2:4, 0:4] of shape [4, 4]"),
        ([], "no chunk holds [0:4, 0:4]"),
    ],
)
def test_faults_say_which_elements(boxes: list[Box], words: str) -> None:
    fault = _fault((4, 4), boxes)
    assert fault is not None
    assert words in fault


def test_a_tensor_without_dims_needs_its_one_element() -> None:
    assert _fault((), []) is not None
    assert _fault((), [((), ())]) is None
    assert _fault((), [((), ()), ((), ())], padding=1) is None


@unhurried
@given(st.data(), shapes())
def test_a_target_that_lacks_copies_is_named(data: st.DataObject, shape: tuple[int, ...]) -> None:
    source, target = data.draw(plain(shape)), data.draw(tilings(shape))
    pattern = intersect(source.offsets, source.sizes, target.offsets, target.sizes)
    assert uncovered_target(target.sizes, pattern.target, pattern.volumes()) is None
    assume(len(pattern) > 0)
    lost = data.draw(st.integers(0, len(pattern) - 1))
    kept = np.arange(len(pattern)) != lost
    missing = uncovered_target(target.sizes, pattern.target[kept], pattern.volumes()[kept])
    assert missing == pattern.target[lost]
