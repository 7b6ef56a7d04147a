"""Folders of the safetensors family with mutated metadata: an error of ours, or a catalogue within the files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from reshard_service.errors import ReshardError
from reshard_service.formats.detect import open_checkpoint
from reshard_service.formats.options import OpenOptions, WriteOptions
from reshard_service.formats.rank_safetensors.writer import design_rank_safetensors
from reshard_service.formats.safetensors.reader import open_safetensors
from reshard_service.layouts.shorthand import parse_layout
from reshard_service.storage.local import LocalStorage
from tests.formats.materialise import materialise, select

TENSORS = {"a.w": torch.arange(12.0).reshape(4, 3), "b": torch.ones(3, dtype=torch.uint8)}
SHARD = "shard-{:05d}-model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each format whose metadata is to be mutated."""
    root = tmp_path_factory.mktemp("folders")
    indexed, sharded, ranks = root / "indexed", root / "sharded", root / "ranks"
    for folder in (indexed, sharded, ranks):
        folder.mkdir()
    for number, (name, tensor) in enumerate(TENSORS.items(), start=1):
        save_file({name: tensor}, indexed / f"model-{number:05d}-of-00002.safetensors")
    files = {name: f"model-{number:05d}-of-00002.safetensors" for number, name in enumerate(TENSORS, start=1)}
    index = {"metadata": {"total_size": 51}, "weight_map": files}
    (indexed / "model.safetensors.index.json").write_text(json.dumps(index))
    for rank, piece in enumerate(TENSORS["a.w"].chunk(2)):
        info = {"a.w": {"saved_offsets": [2 * rank, 0]}}
        save_file({"a.w": piece.clone()}, sharded / SHARD.format(rank + 1), {"DCP_SHARDING_INFO": json.dumps(info)})
    selection = select(open_safetensors(LocalStorage(indexed), OpenOptions()))
    materialise(design_rank_safetensors(selection, parse_layout("fsdp=2"), WriteOptions()), selection, ranks)
    return {
        "model.safetensors.index.json": indexed,
        SHARD.format(2): sharded,
        "reshard.layout.json": ranks,
        "model-rank-1-part-0.safetensors": ranks,
    }


@pytest.mark.parametrize(
    "name",
    ["model.safetensors.index.json", SHARD.format(2), "reshard.layout.json", "model-rank-1-part-0.safetensors"],
)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_metadata_is_refused_or_stays_within_the_files(
    folders: dict[str, Path], tmp_path: Path, name: str, data: st.DataObject
) -> None:
    folder = tmp_path / "mutated"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(folders[name], folder)
    content = bytearray((folder / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["flip", "drop", "digit", "insert"]))
        if kind == "flip":
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "drop" and len(content) > 8:
            del content[at : at + data.draw(st.integers(1, 6))]
        elif kind == "insert":
            content[at:at] = data.draw(st.sampled_from([b'"', b"..", b"/", b"-", b"9" * 20, b"{", b"[", b"null"]))
        else:
            digits = [i for i, byte in enumerate(content) if 48 <= byte < 58]
            if digits:
                content[data.draw(st.sampled_from(digits))] = 48 + data.draw(st.integers(0, 9))
    (folder / name).write_bytes(content)
    try:
        catalogue = open_checkpoint(LocalStorage(folder), OpenOptions())
    except ReshardError:
        return
    chunks = catalogue.chunks
    sizes = np.array([entry.bytes for entry in catalogue.files])
    assert (chunks.start >= 0).all()
    assert (chunks.start + chunks.length <= sizes[chunks.file]).all()
    for i, tensor in enumerate(catalogue.tensors):
        rows, dims = chunks.rows(i), len(tensor.shape)
        ends = chunks.offsets[rows, :dims] + chunks.sizes[rows, :dims]
        assert (chunks.offsets[rows] >= 0).all()
        assert (ends <= np.array(tensor.shape, dtype=np.int64)).all()
