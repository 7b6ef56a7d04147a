"""Every format into every other, with buffers of a few pages and of the usual size, read back by others' libraries."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint._hf_utils import DTYPE_MAP

from reshard_service.planning.budget import Budget
from tests.engine.checkpoints import (
    COLUMNS,
    PACKED,
    SOURCES,
    State,
    assert_equal,
    compare,
    contents,
    model,
    read,
    run,
    tiny_budget,
)

TARGETS: dict[str, tuple[str, object, dict[str, object]]] = {
    "safetensors": ("safetensors", None, {}),
    "safetensors-sharded": ("safetensors", None, {"max_shard_size": "9KB"}),
    "dcp": ("dcp", None, {}),
    "dcp-rows": ("dcp", "fsdp=3", {}),
    "dcp-replicas": ("dcp", "dp_replicate=2,fsdp=2", {}),
    "dcp-columns": ("dcp", COLUMNS, {}),
    "dcp-safetensors": ("dcp-safetensors", "fsdp=2", {}),
    "dcp-safetensors-columns": ("dcp-safetensors", COLUMNS, {}),
    "rank-safetensors": ("rank-safetensors", PACKED, {}),
    "rank-safetensors-rows": ("rank-safetensors", "fsdp=5", {}),
}


@pytest.fixture(scope="module")
def full() -> State:
    return model()


@pytest.fixture(scope="module")
def sources(full: State, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    return {name: save(full, folder / name) for name, save in SOURCES.items()}


def use(budget: Budget, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reshard_service.conversion.prepare.default_budget", lambda *_, **__: budget)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", SOURCES)
def test_every_source_becomes_every_target(
    source: str, target: str, full: State, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(tiny_budget(), monkeypatch)
    format, layout, options = TARGETS[target]
    report = run(sources[source], tmp_path / "out", format, layout, producer="plain", verify="full", **options)
    [done] = report.targets
    assert done.status == "written"
    assert done.tensors == len(full)
    assert compare(tmp_path / "out", sources["safetensors"]).same
    if format in ("safetensors", "dcp"):
        assert_equal(read(tmp_path / "out", format, full), full)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("target", ["dcp-safetensors", "dcp-safetensors-columns"])
@pytest.mark.parametrize("source", ["safetensors", "dcp-of-ranks", "torch"])
def test_torch_reads_shard_folders_of_the_types_it_knows(
    source: str, target: str, full: State, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(tiny_budget(), monkeypatch)
    format, layout, _ = TARGETS[target]
    known = {name: tensor for name, tensor in full.items() if tensor.dtype in DTYPE_MAP.values()}
    assert len(known) == 20
    others = sorted(full.keys() - known.keys())
    run(sources[source], tmp_path / "out", format, layout, producer="plain", exclude=others)
    assert_equal(read(tmp_path / "out", format, known), known)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", ["safetensors", "dcp-of-ranks", "dcp-zstd"])
def test_buffers_and_threads_change_no_byte(
    source: str, target: str, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    format, layout, options = TARGETS[target]
    written = []
    for number, budget in enumerate((tiny_budget(), tiny_budget(8), Budget(1), Budget(3, 40 << 10, 24 << 10))):
        use(budget, monkeypatch)
        run(sources[source], tmp_path / str(number), format, layout, producer="plain", **options)
        written.append(contents(tmp_path / str(number)))
    assert all(one == written[0] for one in written)


def test_a_chain_of_all_formats_ends_where_it_began(
    full: State, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(tiny_budget(2), monkeypatch)
    at = sources["safetensors"]
    for number, (format, layout, options) in enumerate(TARGETS.values()):
        at, before = tmp_path / str(number), at
        run(before, at, format, layout, producer="plain", **options)
    run(at, tmp_path / "end.safetensors", "safetensors")
    assert_equal(read(tmp_path / "end.safetensors", "safetensors", full), full)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("source", ["safetensors", "dcp-of-ranks", "dcp-strided"])
def test_casts_in_the_stream_are_torchs(
    source: str, dtype: str, full: State, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(tiny_budget(), monkeypatch)
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    castable = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    expected = {name: tensor.to(wanted) if tensor.dtype in castable else tensor for name, tensor in full.items()}
    for target, layout in (("safetensors", None), ("dcp", COLUMNS)):
        run(sources[source], tmp_path / target, target, layout, producer="plain", dtype=dtype)
        assert_equal(read(tmp_path / target, target, expected), expected)
