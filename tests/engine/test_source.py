"""The source side: damage is noticed in every way of storing, unpacking is bounded, what is shared is not torn away."""

from __future__ import annotations

import io
import os
import pickle
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard

from reshard_service.catalogue import Catalogue, FileEntry
from reshard_service.conversion import open_source
from reshard_service.documents.job import SourceDocument
from reshard_service.engine.source import OPEN_FILES, Source, Unpacked
from reshard_service.errors import ReshardError, SourceChanged, SourceCorrupt, TargetFull
from reshard_service.storage.local import LocalStorage
from tests.engine.checkpoints import (
    COLUMNS,
    SOURCES,
    State,
    assert_equal,
    compare,
    filled,
    model,
    quiet,
    read,
    run,
    save_dcp,
    save_strided_dcp,
    save_zstd_dcp,
    tiny_budget,
)


def opened(path: Path) -> Catalogue:
    return open_source(SourceDocument(uri=str(path), producer="plain"))


@pytest.fixture(autouse=True)
def _small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reshard_service.conversion.prepare.default_budget", lambda *_, **__: tiny_budget(2))


# --- damage -------------------------------------------------------------------------------------------------

SIZES = {"in one round": (20, 30), "in many rounds": (200, 60)}


def flip(folder: Path, key: str, needle: bytes) -> None:
    """Flip the lowest bit of the last byte of ``needle`` in the item of a tensor."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    [place] = [place for index, place in metadata.storage_data.items() if index.fqn == key]
    path = folder / place.relative_path
    data = bytearray(path.read_bytes())
    at = data.index(needle, place.offset, place.offset + place.length) + len(needle) - 1
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.faults
@pytest.mark.parametrize("target", ["safetensors", "dcp"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("save", [save_dcp, save_strided_dcp], ids=["plain", "strided"])
def test_a_flipped_bit_in_an_item_is_noticed_by_its_crc(
    save: Callable[[State, Path], Path], size: str, target: str, tmp_path: Path
) -> None:
    state = {"a": filled((7, 5), torch.int16, 1), "w": filled(SIZES[size], torch.float32, 2)}
    folder = save(state, tmp_path / "in")
    stored = state["w"] if save is save_dcp else state["w"].T.contiguous()
    flip(folder, "w", bytes(stored.reshape(-1)[-4:].view(torch.uint8).numpy()))
    with pytest.raises(SourceCorrupt, match=r"tensor 'w' in '__0_0\.distcp' has CRC32"):
        run(folder, tmp_path / "out", target, COLUMNS if target == "dcp" else None, producer="plain")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    with pytest.raises(SourceCorrupt, match="'w'"):
        compare(folder, save_zstd_dcp(state, tmp_path / "copy"))


@pytest.mark.faults
@pytest.mark.parametrize("at", range(0, 1000, 100))
def test_a_flipped_bit_anywhere_in_a_compressed_item_is_noticed(at: int, tmp_path: Path) -> None:
    state = {"w": filled((100, 60), torch.float32, 2)}
    folder = save_zstd_dcp(state, tmp_path / "in")
    path = folder / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[len(data) * at // 1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(SourceCorrupt, match="'w'"):
        run(folder, tmp_path / "out", "safetensors", producer="plain")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.faults
@pytest.mark.parametrize("rows", [20, 200])
def test_items_without_a_recorded_crc_are_taken_as_they_are(rows: int, tmp_path: Path) -> None:
    state = {"w": filled((rows, 60), torch.float32, 2)}
    torch.serialization.set_crc32_options(False)
    try:
        folder = save_dcp(state, tmp_path / "in")
    finally:
        torch.serialization.set_crc32_options(True)
    flip(folder, "w", bytes(state["w"].reshape(-1)[-4:].view(torch.uint8).numpy()))
    run(folder, tmp_path / "out", "safetensors", producer="plain")
    found = read(tmp_path / "out", "safetensors", {})["w"].view(torch.int32)
    assert (found != state["w"].view(torch.int32)).sum() == 1


@pytest.mark.faults
@pytest.mark.parametrize("save", SOURCES.values(), ids=list(SOURCES))
def test_a_file_that_is_cut_off_after_it_was_opened_is_noticed(
    save: Callable[[State, Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(model(), tmp_path / "in")
    files = [folder] if folder.is_file() else [path for path in folder.iterdir() if path.stat().st_size > 10_000]

    def cut(document: SourceDocument, policy: object = None) -> Catalogue:
        catalogue = open_source(document)
        for path in files:
            os.truncate(path, path.stat().st_size // 3)
        return catalogue

    monkeypatch.setattr("reshard_service.conversion.run.open_source", cut)
    with pytest.raises(ReshardError) as caught:
        run(folder, tmp_path / "out", "safetensors", producer="plain")
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.glob(".out*")) == []


@pytest.mark.faults
@pytest.mark.parametrize("change", ["touched", "longer", "gone", "replaced"])
def test_a_source_that_changes_before_the_commit_is_refused(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_dcp(model(), tmp_path / "in")
    path = folder / "__0_0.distcp"
    before = Source.check_unchanged

    def check(self: Source) -> None:
        if change == "touched":
            later = path.stat().st_mtime_ns + 10**9
            os.utime(path, ns=(later, later))
        elif change == "longer":
            path.write_bytes(path.read_bytes() + b"x")
        elif change == "gone":
            path.unlink()
        else:
            (tmp_path / "new").write_bytes(path.read_bytes())
            (tmp_path / "new").replace(path)
        before(self)

    monkeypatch.setattr(Source, "check_unchanged", check)
    with pytest.raises(SourceChanged, match=r"__0_0\.distcp"):
        run(folder, tmp_path / "out", "safetensors", producer="plain")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


# --- unpacking ----------------------------------------------------------------------------------------------


def test_a_compressed_item_many_times_the_buffers_comes_out_whole(tmp_path: Path) -> None:
    state = {"w": filled((300, 1000), torch.float32, 2), "zeros": torch.zeros(2000, 300)}
    folder = save_zstd_dcp(state, tmp_path / "in")
    for target, layout in (("safetensors", None), ("dcp", "fsdp=7")):
        run(folder, tmp_path / target, target, layout, producer="plain")
        assert_equal(read(tmp_path / target, target, state), state)


@pytest.mark.faults
def test_a_few_bytes_that_unpack_to_gigabytes_are_refused_without_unpacking_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"w": filled((100, 60), torch.float32, 2)}
    folder = save_zstd_dcp(state, tmp_path / "in")
    [path] = folder.glob("*.distcp")
    size = path.stat().st_size
    packer = zstandard.ZstdCompressor().compressobj()
    bomb = b"".join(packer.compress(bytes(1 << 24)) for _ in range(64)) + packer.flush()
    assert len(bomb) < 200_000
    path.write_bytes((bomb + bytes(size))[: max(size, len(bomb))])
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for index, place in metadata.storage_data.items():
        metadata.storage_data[index] = replace(place, length=path.stat().st_size)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    blocks: list[int] = []
    whole = Unpacked.append
    monkeypatch.setattr(Unpacked, "append", lambda self, data: (blocks.append(len(data)), whole(self, data))[1])
    with pytest.raises(SourceCorrupt, match="'w' unpacks to more than"):
        run(folder, tmp_path / "out", "safetensors", producer="plain")
    assert max(blocks) <= 1 << 20
    assert sum(blocks) <= state["w"].nbytes + (2 << 20)


@pytest.mark.faults
def test_a_scratch_file_that_finds_no_space_is_a_full_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_zstd_dcp({"w": filled((100, 60), torch.float32, 2)}, tmp_path / "in")
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: open("/dev/full", "r+b", buffering=0))  # noqa: SIM115
    with pytest.raises(TargetFull, match="scratch"):
        run(folder, tmp_path / "out", "safetensors", producer="plain")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


BASE = filled((40, 50), torch.int16, 3)


def test_views_of_larger_storages_are_the_view_and_nothing_else(tmp_path: Path) -> None:
    views = {"rows": BASE[3:30], "row": BASE[7], "all": BASE}
    torch.save(views, tmp_path / "views.pt")
    run(tmp_path / "views.pt", tmp_path / "out", "safetensors", producer="plain")
    assert_equal(read(tmp_path / "out", "safetensors", {}), views)


def test_dcp_items_that_hold_more_than_their_array_are_unpacked(tmp_path: Path) -> None:
    view = BASE[5:20, 7:31]
    folder = save_dcp({"part": torch.zeros(15, 24, dtype=torch.int16)}, tmp_path / "in")
    file = io.BytesIO()
    with quiet():
        torch.save(view, file)
    (folder / "__0_0.distcp").write_bytes(file.getvalue())
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for index, place in metadata.storage_data.items():
        metadata.storage_data[index] = replace(place, length=len(file.getvalue()))
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    run(folder, tmp_path / "out", "safetensors", producer="plain")
    assert_equal(read(tmp_path / "out", "safetensors", {}), {"part": view})


# --- sharing ------------------------------------------------------------------------------------------------


def test_what_one_thread_is_done_with_stays_while_another_holds_it(tmp_path: Path) -> None:
    catalogue = opened(save_zstd_dcp({"w": filled((100, 60), torch.float32, 2)}, tmp_path / "in"))
    source, rows, tensor = Source(catalogue), range(1), catalogue.tensors[0]
    source.hold(rows)
    source.hold(rows)
    unpacked = source.unpacked(0, tensor)
    source.forget(rows)
    assert source.unpacked(0, tensor) is unpacked
    unpacked.read_into(0, memoryview(bytearray(10)))
    source.forget(rows)
    again = source.unpacked(0, tensor)
    assert again is not unpacked
    source.close()


def test_more_files_than_may_be_open_are_read_by_several_threads(tmp_path: Path) -> None:
    count = OPEN_FILES + 40
    folder = tmp_path / "in"
    folder.mkdir()
    catalogue = opened(save_dcp({"w": torch.zeros(3)}, tmp_path / "other"))
    for number in range(count):
        (folder / str(number)).write_bytes(number.to_bytes(4, "little") * 10)
    many = replace(
        catalogue, storage=LocalStorage(folder), files=tuple(FileEntry(str(n), 40, "") for n in range(count))
    )
    source = Source(many)
    wrong: list[int] = []

    def work(seed: int) -> None:
        for number in np.random.default_rng(seed).permutation(count).tolist() * 3:
            buffer = bytearray(4)
            source.read_into(number, 8, memoryview(buffer))
            if int.from_bytes(buffer, "little") != number:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert source.read_bytes == 4 * 3 * count * 4
    source.close()
