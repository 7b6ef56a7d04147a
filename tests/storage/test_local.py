"""Local files: exact reads, whole or no files, and names that can't lead out."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from reshard_service.errors import SourceCorrupt, SourceNotFound, TargetError, UnsafeSource
from reshard_service.storage.base import DirEntry
from reshard_service.storage.local import LocalStorage


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    (tmp_path / "root" / "folder").mkdir(parents=True)
    (tmp_path / "root" / "f").write_bytes(bytes(range(100)))
    return LocalStorage(tmp_path / "root")


def test_ranges_are_exact(storage: LocalStorage) -> None:
    assert storage.read_bytes("f", 10, 5) == bytes(range(10, 15))
    assert storage.read_bytes("f", 95) == bytes(range(95, 100))
    assert storage.read_bytes("f", 100) == b""


@pytest.mark.parametrize(("start", "length"), [(99, 2), (101, 1), (0, 1 << 50), (1 << 70, 1), (-1, 1), (0, -1)])
def test_a_range_outside_the_file_is_corruption_and_takes_no_memory(
    storage: LocalStorage, start: int, length: int
) -> None:
    with pytest.raises(SourceCorrupt):
        storage.read_bytes("f", start, length)


@pytest.mark.parametrize("start", [99, 1000, 1 << 70, -1])
def test_a_short_read_into_a_buffer_says_where_the_file_ends(storage: LocalStorage, start: int) -> None:
    reader = storage.open("f")
    with pytest.raises(SourceCorrupt, match="ends at byte"):
        reader.read_into(start, memoryview(bytearray(2)))
    reader.close()


def test_a_missing_file_is_named(storage: LocalStorage) -> None:
    assert storage.stat("nothing") is None
    assert storage.stat("f/below") is None
    for read in (storage.open, storage.read_bytes):
        with pytest.raises(SourceNotFound, match="nothing"):
            read("nothing")


def test_a_pipe_is_refused_instead_of_waited_for(storage: LocalStorage) -> None:
    os.mkfifo(storage.root / "pipe")
    with pytest.raises(UnsafeSource, match="not a regular file"):
        storage.open("pipe")


def test_a_listing_is_sorted_and_leaves_out_dead_links(storage: LocalStorage) -> None:
    (storage.root / "dead").symlink_to("nowhere")
    assert storage.list_dir() == [DirEntry("f", False, 100), DirEntry("folder", True, storage.list_dir()[1].bytes)]
    assert storage.list_dir("nothing") == []
    assert storage.list_dir("f") == []


def test_the_identity_changes_with_the_content(storage: LocalStorage) -> None:
    before = storage.stat("f")
    assert before == storage.stat("f")
    os.utime(storage.root / "f", ns=(1, 1))
    assert before != storage.stat("f")


@pytest.mark.parametrize("name", ["../secret", "out/secret", "folder/../../secret"])
def test_names_that_lead_out_are_refused_for_reading_and_writing(storage: LocalStorage, name: str) -> None:
    outside = storage.root.parent / "secret"
    outside.write_bytes(b"1")
    (storage.root / "out").symlink_to(storage.root.parent)
    for use in (storage.open, storage.stat, storage.create, storage.remove, storage.child, storage.list_dir):
        with pytest.raises(UnsafeSource):
            use(name)
    with pytest.raises(UnsafeSource):
        storage.create_once(name, b"")
    assert outside.read_bytes() == b"1"


def test_a_file_appears_whole_on_close_and_replaces_a_link_not_its_target(storage: LocalStorage) -> None:
    (storage.root / "new").symlink_to(storage.root / "f")
    writer = storage.create("new")
    writer.write(memoryview(b"abc"))
    assert storage.read_bytes("new", 0, 1) == b"\0"
    writer.close()
    assert storage.read_bytes("new") == b"abc"
    assert storage.read_bytes("f", 0, 3) == bytes(range(3))
    assert [entry.name for entry in storage.list_dir()] == ["f", "folder", "new"]


def test_an_aborted_file_leaves_nothing(storage: LocalStorage) -> None:
    writer = storage.create("folder/deep/new")
    writer.write(memoryview(b"abc"))
    writer.abort()
    assert storage.list_dir("folder/deep") == []


def test_one_of_sixteen_threads_wins_a_create_once_and_its_data_is_whole(storage: LocalStorage) -> None:
    data = [bytes([number]) * 100_000 for number in range(16)]
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda each: storage.create_once("claim", each), data))
    assert won.count(True) == 1
    assert storage.read_bytes("claim") == data[won.index(True)]
    assert [entry.name for entry in storage.list_dir()] == ["claim", "f", "folder"]


def test_create_once_works_without_hard_links(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert storage.create_once("claim", b"a")
    assert not storage.create_once("claim", b"b")
    assert storage.read_bytes("claim") == b"a"


def test_remove_takes_files_folders_and_links_and_nothing_behind_links(storage: LocalStorage) -> None:
    (storage.root / "link").symlink_to(storage.root / "folder")
    storage.remove("link")
    assert (storage.root / "folder").is_dir()
    storage.remove("folder")
    storage.remove("f")
    storage.remove("never there")
    assert storage.list_dir() == []


def test_a_folder_that_can_not_be_removed_is_an_error(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "rmdir", refuse)
    with pytest.raises(TargetError, match="removing"):
        storage.remove("folder")
