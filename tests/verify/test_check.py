"""verify finds whatever differs from what was written; the check before the commit refuses a disk that lies."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from reshard_service.engine.files import OutputFiles
from reshard_service.errors import InputRefused, NotACheckpoint, SourceCorrupt, StorageFailed
from reshard_service.manifest import ALGORITHM, MANIFEST_NAME, Manifest, manifest_file, parse_manifest
from reshard_service.storage.local import LocalStorage
from reshard_service.verify.check import Verification, find_manifest, verify
from tests.engine.checkpoints import filled, run, save_safetensors, tiny_budget

STATE = {"w": filled((50, 30), torch.float32, 1), "v": filled((9, 5), torch.bfloat16, 2), "none": torch.zeros(0, 2)}
TARGETS: dict[str, tuple[str, object, dict[str, Any]]] = {
    "dcp": ("dcp", "fsdp=3", {}),
    "shards": ("safetensors", None, {"max_shard_size": "5KB"}),
    "ranks": ("rank-safetensors", "fsdp=2", {}),
    "sha256": ("safetensors", None, {"digest": "sha256"}),
}


@pytest.fixture(autouse=True)
def _small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reshard_service.conversion.prepare.default_budget", lambda *_, **__: tiny_budget())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = save_safetensors(STATE, tmp_path / "in")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ x }}")
    return folder


def checked(folder: Path, single: str | None = None) -> Verification:
    storage = LocalStorage(folder)
    manifest, _ = find_manifest(storage, single)
    return verify(storage, manifest)


@pytest.mark.parametrize("target", TARGETS)
def test_what_was_written_is_intact(target: str, source: Path, tmp_path: Path) -> None:
    format, layout, options = TARGETS[target]
    run(source, tmp_path / "out", format, layout, **options)
    found = checked(tmp_path / "out")
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file() and path.name != MANIFEST_NAME]
    assert found.faults == ()
    assert found.files == len(files)
    assert found.bytes == sum(path.stat().st_size for path in files)
    assert found.algorithm == options.get("digest", ALGORITHM)


@pytest.mark.parametrize("target", TARGETS)
def test_a_flipped_bit_in_any_part_of_any_file_is_found(target: str, source: Path, tmp_path: Path) -> None:
    format, layout, options = TARGETS[target]
    run(source, tmp_path / "out", format, layout, **options)
    for path in [path for path in (tmp_path / "out").rglob("*") if path.is_file() and path.name != MANIFEST_NAME]:
        whole = path.read_bytes()
        for at in {0, len(whole) // 3, len(whole) // 2, len(whole) - 1}:
            data = bytearray(whole)
            data[at] ^= 0x10
            path.write_bytes(data)
            [fault] = checked(tmp_path / "out").faults
            assert fault.code == "digest"
            assert fault.name == str(path.relative_to(tmp_path / "out"))
            begin, end = (int(word) for word in fault.reason.split()[1:4:2])
            assert begin <= at < end
            assert fault.at == str(begin)
        path.write_bytes(whole)
    assert checked(tmp_path / "out").faults == ()


@pytest.mark.parametrize(
    ("change", "code"), [("gone", "file_missing"), ("shorter", "file_size"), ("longer", "file_size")]
)
def test_files_that_lack_bytes_or_have_more_are_found(change: str, code: str, source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out", "dcp", "fsdp=3")
    path = tmp_path / "out" / "__1_0.distcp"
    if change == "gone":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size + (1 if change == "longer" else -1))
    [fault] = checked(tmp_path / "out").faults
    assert (fault.code, fault.name) == (code, "__1_0.distcp")


def test_a_file_that_became_a_folder_is_found(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out", "dcp", "fsdp=3")
    (tmp_path / "out" / "__1_0.distcp").unlink()
    (tmp_path / "out" / "__1_0.distcp").mkdir()
    assert [fault.name for fault in checked(tmp_path / "out").faults] == ["__1_0.distcp"]


def test_one_file_is_checked_against_the_manifest_beside_it(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out.safetensors", "safetensors")
    assert checked(tmp_path, "out.safetensors").faults == ()
    with open(tmp_path / "out.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xfe")
    assert [fault.code for fault in checked(tmp_path, "out.safetensors").faults] == ["digest"]


def test_what_has_no_manifest_can_not_be_verified(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="only what this tool wrote"):
        checked(source)
    with pytest.raises(InputRefused, match="only what this tool wrote"):
        checked(source, "model.safetensors")
    with pytest.raises(NotACheckpoint):
        checked(source, "absent.safetensors")


# --- the manifest itself ------------------------------------------------------------------------------------


def test_a_manifest_reads_back_as_it_was_written() -> None:
    segments = [(0, 10, "aa"), (64, 100, "bb")]
    manifest = Manifest(
        "dcp",
        "sha256",
        "plan",
        (manifest_file("a/ü.distcp", 200, segments, "sha256"), manifest_file("empty", 0, [], "sha256")),
        ("rng",),
        4,
    )
    assert parse_manifest(manifest.to_bytes(), named="m") == manifest
    lines = manifest.to_bytes().decode().splitlines()
    assert '[64, 100, "bb"]' in lines  # one line a segment, for text diffs
    for nothing in (Manifest("dcp", ALGORITHM, "plan", ()),):
        assert parse_manifest(nothing.to_bytes(), named="m") == nothing


def _document(**changes: object) -> bytes:
    entry = {"path": "a", "bytes": 3, "digest": "d", "segments": [[0, 3, "x"]]}
    document = {"version": 1, "format": "dcp", "algo": ALGORITHM, "plan": "p", "files": [entry]}
    for name, value in changes.items():
        (entry if name in entry else document)[name] = value
    return json.dumps(document).encode()


@pytest.mark.faults
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        _document(version=2),
        _document(algo="md5"),
        _document(files=3),
        _document(files=[3]),
        _document(bytes="many"),
        _document(segments=[[0, 3]]),
        _document(segments=[["x", 3, "y"]]),
        _document(segments=5),
        _document(world="x"),
    ],
)
def test_anything_else_is_no_manifest(data: bytes) -> None:
    with pytest.raises(SourceCorrupt, match="not a manifest of ours"):
        parse_manifest(data, named="m")


@pytest.mark.faults
@pytest.mark.parametrize("path", ["../a", "/etc/passwd", "a/../../b", ""])
def test_a_manifest_can_not_lead_out_of_its_folder(path: str) -> None:
    with pytest.raises(InputRefused):
        parse_manifest(_document(path=path), named="m")


@pytest.mark.faults
@pytest.mark.parametrize(
    "segments", [[[0, 4, "x"]], [[-1, 3, "x"]], [[0, -3, "x"]], [[1 << 70, 3, "x"]], [[0, 1 << 70, "x"]], []]
)
def test_segments_that_reach_out_of_their_file_are_faults(segments: list[list[object]], tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / MANIFEST_NAME).write_bytes(_document(segments=segments))
    faults = checked(tmp_path).faults
    assert faults
    assert {fault.code for fault in faults} == {"manifest_damaged"}


# --- before the commit --------------------------------------------------------------------------------------


@pytest.mark.faults
@pytest.mark.parametrize(("choice", "noticed"), [("full", True), ("none", False)])
def test_a_disk_that_loses_what_it_was_given_is_noticed_before_the_commit(
    choice: str, noticed: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = OutputFiles.put
    count = [0]

    def put(self: OutputFiles, file: int, start: int, data: memoryview, *, direct: bool) -> None:
        count[0] += 1
        if count[0] == 5:
            data = memoryview(bytes(len(data)))
        whole(self, file, start, data, direct=direct)

    monkeypatch.setattr(OutputFiles, "put", put)
    place = tmp_path / "place"
    if noticed:
        with pytest.raises(StorageFailed, match="reads back differently"):
            run(source, place / "out", "dcp", "fsdp=2", verify=choice)
        assert not (place / "out").exists()
        monkeypatch.undo()
        run(source, place / "out", "dcp", "fsdp=2", verify="full")
    else:
        run(source, place / "out", "dcp", "fsdp=2", verify=choice)
        assert checked(place / "out").faults
        return
    assert checked(place / "out").faults == ()
    assert [path.name for path in place.iterdir()] == ["out"]


def test_a_sample_reads_every_header(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = OutputFiles.put

    def put(self: OutputFiles, file: int, start: int, data: memoryview, *, direct: bool) -> None:
        whole(self, file, start, memoryview(bytes(len(data))) if (file, start) == (1, 0) else data, direct=direct)

    monkeypatch.setattr(OutputFiles, "put", put)
    with pytest.raises(StorageFailed, match="00002-of-00003"):
        run(source, tmp_path / "place" / "out", "safetensors", max_shard_size="5KB")
