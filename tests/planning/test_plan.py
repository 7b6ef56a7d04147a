"""The plan of real designs: its figures, its proof, and a digest that tells apart whatever gives other bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from reshard_service.catalogue import ByteObject, Catalogue, Chunks, FileEntry, Identity, Section
from reshard_service.errors import CoverageError
from reshard_service.formats.dcp.writer import design_dcp
from reshard_service.formats.options import OpenOptions, WriteOptions
from reshard_service.formats.rank_safetensors.writer import design_rank_safetensors
from reshard_service.formats.safetensors.reader import open_safetensors
from reshard_service.formats.safetensors.writer import design_safetensors
from reshard_service.formats.target import Design, Selection
from reshard_service.layouts.shorthand import parse_layout
from reshard_service.planning.plan import array_lengths, make_plan, require_sound
from reshard_service.storage.local import LocalStorage
from tests.formats.dcp_safetensors.test_writer import layout_with

FULL = {
    "layers.0.up": torch.zeros(8, 6),
    "layers.1.up": torch.zeros(8, 6),
    "head": torch.zeros(11, 4, dtype=torch.bfloat16),
    "none": torch.zeros(0, 4),
    "scale": torch.zeros(()),
}
BYTES = 2 * 192 + 88 + 0 + 4


@pytest.fixture
def source(tmp_path: Path) -> Catalogue:
    save_file(FULL, tmp_path / "model.safetensors")
    return open_safetensors(LocalStorage(tmp_path), OpenOptions())


def selection(source: Catalogue, objects: Sequence[ByteObject] = ()) -> Selection:
    return Selection(source, source.tensors, np.arange(len(source.tensors), dtype=np.int64), tuple(objects))


def dcp(source: Catalogue, layout: str = "fsdp=2", objects: Sequence[ByteObject] = ()) -> Design:
    return design_dcp(selection(source, objects), parse_layout(layout), WriteOptions())


def without_rows(chunks: Chunks, rows: Sequence[int]) -> Chunks:
    keep = np.setdiff1d(np.arange(len(chunks)), rows)
    counts = np.bincount(chunks.tensor_of_row()[keep], minlength=len(chunks.first) - 1)
    columns = {name: getattr(chunks, name)[keep] for name in ("offsets", "sizes", "file", "start", "length", "storing")}
    return Chunks(first=np.concatenate([[0], np.cumsum(counts)]), **columns)


def test_a_plan_knows_what_it_reads_and_writes(source: Catalogue) -> None:
    design = dcp(source)
    plan = make_plan(source, design, workers=3)
    assert plan.problems == ()
    assert plan.read_bytes == BYTES
    assert plan.write_bytes == sum(file.bytes for file in design.files)
    assert [share.rank for share in plan.shares()] == [0, 1, 2]
    assert sum(share.read_bytes for share in plan.shares()) == BYTES
    assert sum(share.write_bytes for share in plan.shares()) == array_lengths(design.chunks).sum()
    assert plan.peak_memory_bytes < 200_000_000


def test_layers_of_equal_shape_share_a_pattern(source: Catalogue) -> None:
    plan = make_plan(source, dcp(source))
    keys = [tensor.key for tensor in plan.design.tensors]
    first, second = (int(plan.pattern_of[keys.index(f"layers.{n}.up")]) for n in range(2))
    assert first == second
    assert len(plan.patterns) == 4


def test_in_order_plans_give_every_row_of_every_file_to_one_batch(source: Catalogue) -> None:
    design = dcp(source, "fsdp=4")
    plan = make_plan(source, design, in_order=True, workers=2)
    rows = [row for batch in plan.batches for row in batch.rows.tolist()]
    assert sorted(rows) == list(range(len(design.chunks)))
    assert sum(batch.write_bytes for batch in plan.batches) == design.chunks.length.sum()


def test_replicas_in_rank_files_count_as_often_as_they_are_read_and_written(source: Catalogue) -> None:
    layout = parse_layout("dp_replicate=2")
    design = design_rank_safetensors(selection(source), layout, WriteOptions())
    plan = make_plan(source, design)
    assert plan.read_bytes == 2 * BYTES
    assert sum(batch.write_bytes for batch in plan.batches) == 2 * BYTES


def test_arrays_of_several_rectangles_count_once(tmp_path: Path) -> None:
    """Also where an empty tensor lies at the place of the array behind it."""
    (tmp_path / "in").mkdir()
    save_file({"up": torch.zeros(8, 6), "none": torch.zeros(0, 4)}, tmp_path / "in" / "model.safetensors")
    source = open_safetensors(LocalStorage(tmp_path / "in"), OpenOptions())
    layout = layout_with([("tp", 2)], [("up", {"tp": "strided(0,2)"})])
    for keys in (["up", "none"], ["none", "up"]):
        indices = np.array([[t.key for t in source.tensors].index(key) for key in keys], dtype=np.int64)
        chosen = Selection(source, tuple(source.tensors[i] for i in indices), indices)
        design = design_rank_safetensors(chosen, layout, WriteOptions())
        assert design.chunks.stored is not None
        payload = sum(file.bytes for file in design.files) - sum(len(literal.data) for literal in design.literals)
        assert array_lengths(design.chunks).sum() == payload == 192, keys
        for in_order in (False, True):
            plan = make_plan(source, design, in_order=in_order)
            assert sum(batch.write_bytes for batch in plan.batches) == 192
            assert sum(batch.read_bytes for batch in plan.batches) == 192


@pytest.mark.parametrize("lost", ["a source chunk", "a target chunk"])
def test_a_chunk_too_few_on_either_side_is_a_problem(source: Catalogue, lost: str) -> None:
    whole = dcp(source)
    middle = replace(source, chunks=whole.chunks, format="dcp")
    design = design_dcp(selection(middle), parse_layout("fsdp=3"), WriteOptions())
    tensor = [t.key for t in source.tensors].index("head")
    if lost == "a source chunk":
        middle = replace(middle, chunks=without_rows(middle.chunks, [middle.chunks.rows(tensor).start]))
        words = "no chunk holds [0:6, 0:4] of shape [11, 4]"
    else:
        design = replace(design, chunks=without_rows(design.chunks, [design.chunks.rows(tensor).start]))
        words = "no chunk holds [0:4, 0:4] of shape [11, 4]"
    plan = make_plan(middle, design)
    [problem] = plan.problems
    assert problem.code == "coverage"
    assert problem.name == "head"
    assert words in problem.reason
    with pytest.raises(CoverageError, match="'head'"):
        require_sound(plan)


def test_a_target_of_another_shape_is_a_problem(source: Catalogue) -> None:
    design = dcp(source)
    tensors = tuple(replace(t, shape=(8, 7)) if t.key == "layers.0.up" else t for t in design.tensors)
    problems = make_plan(source, replace(design, tensors=tensors)).problems
    assert {(problem.code, problem.name) for problem in problems} >= {("shape", "layers.0.up")}


def test_only_objects_make_a_plan_too(source: Catalogue) -> None:
    item = ByteObject("step", Identity(Section.EXTRA, "step"), ("step",), 0, 3, 5)
    chosen = Selection(source, (), np.zeros(0, dtype=np.int64), (item,))
    design = design_dcp(chosen, None, WriteOptions())
    for in_order in (False, True):
        plan = make_plan(source, design, in_order=in_order, workers=2)
        assert plan.batches == ()
        assert plan.read_bytes == plan.write_bytes == 5
        assert [share.write_bytes for share in plan.shares()] == [0, 0]


def test_the_digest_tells_apart_what_gives_other_bytes_and_nothing_else(source: Catalogue) -> None:
    def plan(source: Catalogue, design: Design, **options: object) -> str:
        return make_plan(source, design, **options).digest  # type: ignore[arg-type]

    base = plan(source, dcp(source))
    assert plan(source, dcp(source), workers=4, in_order=True) == base
    moved = replace(source, files=tuple(replace(entry, identity="later") for entry in source.files))
    first, second = (
        ByteObject(key, Identity(Section.EXTRA, key), (key,), 0, 3, 5) for key in ("rng.rank_0", "rng.rank_1")
    )
    nested = replace(dcp(source), tensors=tuple(replace(t, path=("a", t.key)) for t in source.tensors))
    others = [
        plan(source, dcp(source, "fsdp=3")),
        plan(source, design_safetensors(selection(source), None, WriteOptions())),
        plan(source, design_safetensors(selection(source), None, WriteOptions(max_shard_bytes=200))),
        plan(moved, dcp(moved)),
        plan(replace(source, metadata_digest="other"), dcp(source)),
        plan(source, dcp(source), options_key="cast"),
        plan(source, dcp(source, objects=[first])),
        plan(source, dcp(source, objects=[second])),
        plan(source, nested),
    ]
    assert len({base, *others}) == len(others) + 1


def test_an_entry_of_a_file_is_part_of_the_sources_identity(source: Catalogue) -> None:
    longer = replace(source, files=(*source.files, FileEntry("more", 1, "x")))
    assert make_plan(longer, dcp(source)).digest != make_plan(source, dcp(source)).digest
