"""The same contract against a real S3 server, where uploads, conditions and credentials are real."""

from __future__ import annotations

import gc
import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from reshard_service.errors import SourceCorrupt, SourceNotFound, StorageDenied, StorageFailed, TargetError
from reshard_service.storage import uploads
from reshard_service.storage.base import DirEntry, Storage
from reshard_service.storage.faults import Retry
from reshard_service.storage.remote import FsspecStorage
from reshard_service.storage.uri import open_storage
from tests.s3_server import S3Server

PART = 5 << 20
"""The least part that S3 takes, so that uploads by parts stay small here."""


@pytest.fixture
def storage(s3_storage_uri: str, monkeypatch: pytest.MonkeyPatch) -> Storage:
    monkeypatch.setattr(uploads, "PART_BYTES", PART)
    return open_storage(s3_storage_uri)


def write(storage: Storage, path: str, data: bytes) -> None:
    writer = storage.create(path)
    writer.write(memoryview(data))
    writer.close()


@pytest.mark.parametrize("size", [0, 1, PART - 1, PART, PART + 1, 2 * PART, 3 * PART + 7])
def test_what_is_written_is_read_back_and_no_upload_stays_open(
    storage: Storage, s3_server: S3Server, size: int
) -> None:
    data = os.urandom(size)
    writer = storage.create("a/file")
    for start in range(0, size, 3_000_000):
        writer.write(memoryview(data)[start : start + 3_000_000])
    assert s3_server.keys(storage.uri) == []
    writer.close()
    assert storage.read_bytes("a/file") == data
    assert not s3_server.pending_uploads(storage.uri)
    assert s3_server.keys(storage.uri) == ["a/file"]


def test_the_identity_is_the_stores_own_tag(storage: Storage) -> None:
    write(storage, "f", b"abc")
    first = storage.stat("f")
    assert first is not None
    assert "ETag" in first.identity
    assert first == storage.stat("f")
    write(storage, "f", b"abd")
    assert first != storage.stat("f")


def test_stat_and_listing_tell_files_from_folders_and_are_never_stale(
    storage: Storage, s3_server: S3Server, s3_bucket: str
) -> None:
    assert storage.stat("") is None
    assert storage.list_dir() == []
    write(storage, "f", b"abc")
    write(storage, "folder/g", b"g")
    assert storage.list_dir() == [DirEntry("f", False, 3), DirEntry("folder", True, 0)]
    assert storage.list_dir("f") == []
    folder = storage.stat("folder")
    assert folder is not None
    assert folder.is_dir
    prefix = storage.uri.rpartition("/")[2]
    s3_server.call("put_object", Bucket=s3_bucket, Key=f"{prefix}/by-someone-else", Body=b"12")
    s3_server.call("put_object", Bucket=s3_bucket, Key=f"{prefix}/folder/", Body=b"")
    assert [entry.name for entry in storage.list_dir()] == ["by-someone-else", "f", "folder"]
    assert storage.list_dir("folder") == [DirEntry("g", False, 1)]
    s3_server.call("delete_object", Bucket=s3_bucket, Key=f"{prefix}/f")
    assert storage.stat("f") is None


def test_a_bucket_itself_can_be_the_root_and_is_emptied_but_never_removed(
    storage: Storage, s3_server: S3Server
) -> None:
    s3_server.call("create_bucket", Bucket="another-bucket")
    bucket = open_storage("s3://another-bucket")
    write(bucket, "folder/f", b"abc")
    assert bucket.list_dir() == [DirEntry("folder", True, 0)]
    assert bucket.read_bytes("folder/f") == b"abc"
    bucket.remove("")
    assert s3_server.keys("s3://another-bucket") == []
    s3_server.call("head_bucket", Bucket="another-bucket")


def test_an_aborted_upload_leaves_no_object_and_no_pending_parts(storage: Storage, s3_server: S3Server) -> None:
    writer = storage.create("f")
    writer.write(memoryview(bytes(2 * PART + 1)))
    assert list(s3_server.pending_uploads(storage.uri)) == ["f"]
    writer.abort()
    assert not s3_server.pending_uploads(storage.uri)
    assert s3_server.keys(storage.uri) == []


def test_an_abandoned_writer_never_completes_its_upload(storage: Storage, s3_server: S3Server) -> None:
    writer = storage.create("f")
    writer.write(memoryview(bytes(PART + 1)))
    del writer
    gc.collect()
    assert s3_server.keys(storage.uri) == []


def test_an_upload_that_fails_while_it_is_completed_leaves_nothing(storage: Storage, s3_server: S3Server) -> None:
    """The fault: somebody aborts our upload behind our back."""
    writer = storage.create("f")
    writer.write(memoryview(bytes(2 * PART)))
    bucket, prefix = storage.uri.removeprefix("s3://").split("/")
    upload = s3_server.pending_uploads(storage.uri)["f"]
    s3_server.call("abort_multipart_upload", Bucket=bucket, Key=f"{prefix}/f", UploadId=upload)
    with pytest.raises(TargetError, match="finishing 'f'"):
        writer.close()
    assert s3_server.keys(storage.uri) == []


def test_one_of_sixteen_threads_wins_a_create_once(storage: Storage) -> None:
    data = [str(number).encode() for number in range(16)]
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda each: storage.create_once("claim", each), data))
    assert won.count(True) == 1
    assert storage.read_bytes("claim") == data[won.index(True)]


def test_big_reads_by_several_threads_are_exact(storage: Storage) -> None:
    data = os.urandom(30 << 20)
    write(storage, "big", data)
    reader = storage.open("big")

    def read(start: int) -> bool:
        buffer = bytearray(min(13 << 20, len(data) - start))
        reader.read_into(start, memoryview(buffer))
        return buffer == data[start : start + len(buffer)]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(0, len(data), 7 << 20)))


@pytest.mark.parametrize(("start", "length"), [(99, 2), (100, 1), (500, 1), (0, 9 << 20), (0, 40 << 20)])
def test_a_short_object_is_corruption(storage: Storage, start: int, length: int) -> None:
    write(storage, "f", bytes(100))
    with pytest.raises(SourceCorrupt, match="ends"):
        storage.read_bytes("f", start, length)
    with pytest.raises(SourceCorrupt, match="ends"):
        storage.open("f").read_into(start, memoryview(bytearray(length)))


def test_a_missing_bucket_reads_as_nothing_and_can_not_be_written(storage: Storage) -> None:
    nowhere = open_storage("s3://no-such-bucket-here/prefix")
    assert nowhere.stat("") is None
    assert nowhere.list_dir() == []
    nowhere.remove("f")
    with pytest.raises(SourceNotFound):
        nowhere.read_bytes("f", 0, 3)
    with pytest.raises(TargetError, match="bucket"):
        write(nowhere, "f", b"abc")
    with pytest.raises(TargetError, match="bucket"):
        write(nowhere, "f", bytes(PART + 1))
    with pytest.raises(TargetError, match="bucket"):
        nowhere.create_once("f", b"abc")


def test_a_wrong_key_is_refused_without_showing_it(
    storage: Storage, s3_storage_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(storage, "f", b"abc")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-wrong-and-secret-key")
    wrong = open_storage(s3_storage_uri)
    for use in (
        lambda: wrong.stat("f"),
        lambda: wrong.list_dir(),
        lambda: wrong.read_bytes("f", 0, 3),
        lambda: write(wrong, "g", b"abc"),
        lambda: write(wrong, "g", bytes(PART + 1)),
        lambda: wrong.create_once("g", b"abc"),
    ):
        with pytest.raises(StorageDenied) as caught:
            use()
        assert "a-wrong-and-secret-key" not in str(caught.value)


def test_missing_credentials_are_named_as_such(s3_storage_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageDenied, match="AWS_ACCESS_KEY_ID"):
        open_storage(s3_storage_uri).stat("f")


def test_a_server_that_is_not_there_is_a_passing_fault(s3_storage_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    waits: list[float] = []
    storage = FsspecStorage(s3_storage_uri, retry=Retry(attempts=2, sleep=waits.append))
    with pytest.raises(StorageFailed, match="looking at 'f'"):
        storage.stat("f")
    assert len(waits) == 1


def test_a_profile_gives_endpoint_and_keys(
    s3_server: S3Server, s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in s3_server.environment():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TEST_S3_SECRET", s3_server.secret_key)
    (tmp_path / "profiles.toml").write_text(
        f'[profiles.t]\nprefixes = ["s3://{s3_bucket}"]\n[profiles.t.options]\nendpoint_url = "{s3_server.endpoint}"\n'
        f'key = "{s3_server.access_key}"\nsecret = {{ env = "TEST_S3_SECRET" }}\n'
        'client_kwargs = { region_name = "us-east-1" }\n'
    )
    monkeypatch.setenv("RESHARD_PROFILES", str(tmp_path / "profiles.toml"))
    storage = open_storage(f"s3://{s3_bucket}/by-profile")
    write(storage, "f", b"abc")
    assert storage.read_bytes("f") == b"abc"


def _read_in_child(storage: Storage, answer: Any) -> None:
    answer.put(storage.read_bytes("f", 0, 3))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 on, for any process with threads
def test_a_store_used_before_a_fork_works_after_it(storage: Storage) -> None:
    write(storage, "f", b"abc")
    context = multiprocessing.get_context("fork")
    answer = context.SimpleQueue()
    child = context.Process(target=_read_in_child, args=(storage, answer))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert answer.get() == b"abc"
    assert storage.read_bytes("f", 0, 3) == b"abc"
