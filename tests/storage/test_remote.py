"""Remote stores through fsspec, with the memory store and drivers that misbehave in ways seen in real ones."""

from __future__ import annotations

import multiprocessing
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from reshard_service.errors import (
    EnvironmentUnfit,
    SourceCorrupt,
    SourceNotFound,
    StorageDenied,
    StorageFailed,
    UnsafeSource,
)
from reshard_service.storage import ranges
from reshard_service.storage.base import DirEntry
from reshard_service.storage.faults import Retry
from reshard_service.storage.remote import FsspecStorage
from reshard_service.storage.uploads import part_bytes
from reshard_service.storage.uri import open_storage

NO_WAIT = Retry(attempts=3, sleep=lambda _: None)


def write(storage: FsspecStorage, path: str, data: bytes) -> None:
    writer = storage.create(path)
    writer.write(memoryview(data))
    writer.close()


@pytest.fixture
def storage(memory_uri: str) -> FsspecStorage:
    found = open_storage(memory_uri)
    assert isinstance(found, FsspecStorage)
    write(found, "f", bytes(range(100)))
    write(found, "folder/g", b"g")
    return found


def test_ranges_are_exact(storage: FsspecStorage) -> None:
    assert storage.read_bytes("f") == bytes(range(100))
    assert storage.read_bytes("f", 10, 5) == bytes(range(10, 15))
    assert storage.read_bytes("f", 95) == bytes(range(95, 100))
    assert storage.read_bytes("f", 100) == b""
    assert storage.read_bytes("f", 3, 0) == b""


@pytest.mark.parametrize(("start", "length"), [(99, 2), (101, 1), (0, 1 << 50), (-1, 1), (0, -1)])
def test_a_range_outside_the_file_is_corruption_and_takes_no_memory(
    storage: FsspecStorage, start: int, length: int
) -> None:
    with pytest.raises(SourceCorrupt):
        storage.read_bytes("f", start, length)


def test_big_reads_are_split_into_ranges_and_read_by_many_threads(
    storage: FsspecStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(1_000_003)
    write(storage, "big", data)
    monkeypatch.setattr(ranges, "RANGE_BYTES", 64_000)
    reader = storage.open("big")

    def read(start: int) -> bool:
        buffer = bytearray(min(333_333, len(data) - start))
        reader.read_into(start, memoryview(buffer))
        return buffer == data[start : start + len(buffer)]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(0, len(data), 33_333)))
    with pytest.raises(SourceCorrupt, match="ends at byte 1000003"):
        reader.read_into(900_000, memoryview(bytearray(100_004)))
    reader.close()


def test_what_is_on_its_way_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = ranges._ByteBudget(10)
    inside, most, lock = 0, 0, threading.Lock()

    def use(amount: int) -> None:
        nonlocal inside, most
        with budget.taken(amount):
            with lock:
                inside += amount
                most = max(most, inside)
            with lock:
                inside -= amount

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, [3, 4, 5, 10] * 50))
    assert most <= 10
    assert inside == 0


def test_stat_and_listing_tell_files_from_folders(storage: FsspecStorage) -> None:
    found = storage.stat("f")
    assert found is not None
    assert (found.bytes, found.is_dir) == (100, False)
    folder, root = storage.stat("folder"), storage.stat("")
    assert folder is not None
    assert folder.is_dir
    assert root is not None
    assert root.is_dir
    assert storage.stat("nothing") is None
    assert storage.list_dir() == [DirEntry("f", False, 100), DirEntry("folder", True, 0)]
    assert storage.list_dir("folder") == [DirEntry("g", False, 1)]
    assert storage.list_dir("f") == []
    assert storage.list_dir("nothing") == []


def test_a_single_file_can_be_the_root(storage: FsspecStorage) -> None:
    file = open_storage(f"{storage.uri}/f")
    found = file.stat("")
    assert found is not None
    assert found.bytes == 100
    assert file.read_bytes("", 1, 2) == b"\1\2"
    assert file.list_dir() == []


def test_a_child_is_the_same_store_beneath(storage: FsspecStorage) -> None:
    child = storage.child("folder")
    assert child.uri == f"{storage.uri}/folder"
    assert child.read_bytes("g") == b"g"
    assert storage.child("") is storage


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/hostname", "a//b", "a\nb"])
def test_names_that_lead_out_are_refused(storage: FsspecStorage, name: str) -> None:
    for use in (storage.open, storage.stat, storage.create, storage.remove, storage.child, storage.list_dir):
        with pytest.raises(UnsafeSource):
            use(name)


def test_the_identity_changes_when_a_file_is_written_again(storage: FsspecStorage) -> None:
    before = storage.stat("f")
    assert before == storage.stat("f")
    write(storage, "f", bytes(100))
    assert before != storage.stat("f")


def test_a_file_appears_whole_on_close(storage: FsspecStorage) -> None:
    writer = storage.create("new")
    writer.write(memoryview(b"abc"))
    assert storage.stat("new") is None
    writer.write(memoryview(b"def"))
    writer.close()
    assert storage.read_bytes("new") == b"abcdef"
    assert [entry.name for entry in storage.list_dir()] == ["f", "folder", "new"]


def test_an_aborted_file_leaves_nothing(storage: FsspecStorage) -> None:
    writer = storage.create("new")
    writer.write(memoryview(b"abc"))
    writer.abort()
    assert [entry.name for entry in storage.list_dir()] == ["f", "folder"]


def test_one_of_sixteen_threads_wins_a_create_once(storage: FsspecStorage) -> None:
    data = [str(number).encode() for number in range(16)]
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda each: storage.create_once("claim", each), data))
    assert won.count(True) == 1
    assert storage.read_bytes("claim") == data[won.index(True)]


def test_remove_takes_files_and_folders(storage: FsspecStorage) -> None:
    storage.remove("f")
    storage.remove("never there")
    assert storage.list_dir() == [DirEntry("folder", True, 0)]
    storage.remove("")
    assert storage.list_dir() == []


def test_a_missing_file_is_named(storage: FsspecStorage) -> None:
    for read in (lambda: storage.read_bytes("nothing"), lambda: storage.read_bytes("nothing", 0, 3)):
        with pytest.raises(SourceNotFound, match="nothing"):
            read()


def test_parts_grow_so_that_ten_thousand_of_them_hold_any_file() -> None:
    assert part_bytes(0) == part_bytes(1249) == 6 << 20
    assert part_bytes(1250) == 12 << 20
    assert sum(part_bytes(index) for index in range(10_000)) > 1 << 40


# --- drivers that misbehave -----------------------------------------------------------------------------------


def broken(memory_uri: str, **methods: Any) -> FsspecStorage:
    """The memory store with some of its driver's methods replaced."""
    driver = type("Broken", (MemoryFileSystem,), methods)
    return FsspecStorage(memory_uri, retry=NO_WAIT, make=driver)


def failing(times: int, error: Exception, method: str) -> tuple[Any, list[int]]:
    calls: list[int] = []

    def replaced(self: MemoryFileSystem, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) <= times:
            raise error
        return getattr(MemoryFileSystem, method)(self, *args, **kwargs)

    return replaced, calls


def test_a_throttled_read_is_repeated(storage: FsspecStorage) -> None:
    cat_file, calls = failing(2, TimeoutError("slow down"), "cat_file")
    assert broken(storage.uri, cat_file=cat_file).read_bytes("f", 0, 3) == b"\0\1\2"
    assert len(calls) == 3


def test_a_store_that_stays_away_is_an_error_after_bounded_tries(storage: FsspecStorage) -> None:
    info, calls = failing(99, ConnectionResetError("reset"), "info")
    with pytest.raises(StorageFailed, match="looking at 'f'"):
        broken(storage.uri, info=info).stat("f")
    assert len(calls) == 3


def test_a_refused_read_is_not_repeated_and_hints_at_credentials(storage: FsspecStorage) -> None:
    cat_file, calls = failing(99, PermissionError("Forbidden"), "cat_file")
    with pytest.raises(StorageDenied, match="RESHARD_PROFILES"):
        broken(storage.uri, cat_file=cat_file).read_bytes("f", 0, 3)
    assert len(calls) == 1


def test_an_error_of_one_range_among_several_is_never_taken_for_data(
    storage: FsspecStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "RANGE_BYTES", 10)

    def cat_file(self: MemoryFileSystem, path: str, start: int, end: int) -> bytes:
        if start == 20:
            raise PermissionError("Forbidden")
        return MemoryFileSystem.cat_file(self, path, start=start, end=end)

    with pytest.raises(StorageDenied):
        broken(storage.uri, cat_file=cat_file).open("f").read_into(0, memoryview(bytearray(40)))


def test_a_server_that_ignores_ranges_is_noticed(storage: FsspecStorage) -> None:
    def cat_file(self: MemoryFileSystem, path: str, **_: Any) -> bytes:
        return MemoryFileSystem.cat_file(self, path)

    with pytest.raises(StorageFailed, match="ignores ranged reads"):
        broken(storage.uri, cat_file=cat_file).read_bytes("f", 10, 5)


def test_a_failed_write_leaves_nothing(storage: FsspecStorage) -> None:
    mv, _ = failing(99, OSError("moved away"), "mv")
    with pytest.raises(StorageFailed, match="finishing 'new'"):
        write(broken(storage.uri, mv=mv), "new", b"abc")
    assert [entry.name for entry in storage.list_dir()] == ["f", "folder"]


def test_a_driver_is_made_once_in_a_process_and_its_options_are_asked_for_late(memory_uri: str) -> None:
    made: list[dict[str, Any]] = []

    def make(**options: Any) -> MemoryFileSystem:
        made.append(options)
        return MemoryFileSystem(skip_instance_cache=True)

    storage = FsspecStorage(memory_uri, options=lambda: {"token": "topsecret"}, make=make)
    assert made == []
    assert "topsecret" not in f"{storage!r} {vars(storage)!r} {vars(storage._connection)!r}"
    storage.child("a").stat("")
    storage.stat("b")
    assert [options["token"] for options in made] == ["topsecret"]


def test_secrets_of_a_profile_do_not_reach_an_error(memory_uri: str) -> None:
    def info(self: MemoryFileSystem, path: str) -> None:
        raise OSError("signed with topsecret")

    driver = type("Chatty", (MemoryFileSystem,), {"info": info})
    storage = FsspecStorage(memory_uri, options=lambda: {"secret": "topsecret"}, retry=NO_WAIT, make=driver)
    with pytest.raises(StorageFailed) as caught:
        storage.stat("f")
    assert "topsecret" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_a_profile_whose_secret_is_missing_says_so_when_the_store_is_used(
    memory_uri: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    profiles = tmp_path / "profiles.toml"
    profiles.write_text(
        '[profiles.m]\nprefixes = ["memory://"]\n[profiles.m.options]\ntoken = { env = "NOT_SET_HERE" }'
    )
    monkeypatch.setenv("RESHARD_PROFILES", str(profiles))
    storage = open_storage(memory_uri)
    with pytest.raises(EnvironmentUnfit, match="NOT_SET_HERE"):
        storage.stat("")


def _read_in_child(storage: FsspecStorage, answer: Any) -> None:
    answer.put(storage.read_bytes("f", 0, 3))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 on, for any process with threads
def test_a_store_used_before_a_fork_works_after_it(storage: FsspecStorage) -> None:
    context = multiprocessing.get_context("fork")
    answer = context.SimpleQueue()
    child = context.Process(target=_read_in_child, args=(storage, answer))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert answer.get() == b"\0\1\2"


def test_the_memory_store_of_the_tests_is_fsspecs_own() -> None:
    assert fsspec.get_filesystem_class("memory") is MemoryFileSystem
