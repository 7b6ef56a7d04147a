"""Local output files: whole pages past the page cache, the rest through it, many files with few descriptors."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reshard_service.engine import files as files_module
from reshard_service.engine.buffers import PAGE, Buffer
from reshard_service.engine.files import LocalSink, OutputFiles, reserve, takes_direct_writes
from reshard_service.errors import StorageFailed, TargetFull
from reshard_service.formats.target import OutputFile
from reshard_service.manifest import SegmentRow

Finished = dict[int, list[SegmentRow]]


def output(folder: Path, sizes: list[int], claimed: list[int] | None = None) -> tuple[OutputFiles, Finished]:
    finished: Finished = {}

    def note(number: int, segments: list[SegmentRow]) -> None:
        assert number not in finished
        finished[number] = segments

    made = tuple(OutputFile(f"sub/f{number}", size) for number, size in enumerate(sizes))
    return OutputFiles(folder, lambda number: f"{made[number].path}.e1", made, claimed or sizes, note), finished


def pattern(file: int, size: int) -> bytes:
    return bytes((at * 7 + at // 251 + file) % 256 for at in range(size))


def write_runs(sink: LocalSink, file: int, data: bytes, edges: list[int]) -> None:
    """The runs between the edges, one behind the other, as a mover gives them: one page free before each."""
    buffer = Buffer(len(data) + 3 * PAGE)
    for begin, end in pairwise(edges):
        at = PAGE + begin % PAGE
        buffer.view[:] = b"\xee" * buffer.size
        buffer.view[at : at + end - begin] = data[begin:end]
        sink.write(file, begin, buffer, at, end - begin)
    buffer.close()


@pytest.fixture(params=["direct", "buffered"])
def way(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    direct = request.param == "direct"
    if direct and not takes_direct_writes(tmp_path):
        pytest.skip("no O_DIRECT on this file system")
    monkeypatch.setattr(files_module, "takes_direct_writes", lambda folder: direct)
    monkeypatch.setattr(files_module, "DIRECT_BYTES", PAGE)
    return str(request.param)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 9 * PAGE), cuts=st.lists(st.integers(0, 9 * PAGE), max_size=8))
@pytest.mark.parametrize("direct", [True, False])
def test_runs_of_any_length_make_the_file(
    direct: bool, size: int, cuts: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("files")
    if direct and not takes_direct_writes(folder):
        pytest.skip("no O_DIRECT on this file system")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files_module, "takes_direct_writes", lambda folder: direct)
        patch.setattr(files_module, "DIRECT_BYTES", PAGE)
        edges = sorted({0, size, *(cut for cut in cuts if cut < size)})
        data = pattern(0, size)
        made, finished = output(folder, [size])
        sink = LocalSink(made)
        write_runs(sink, 0, data, edges)
        sink.end_batch()
        assert finished == {0: []}
        made.close()
    assert (folder / "sub/f0.e1").read_bytes() == data


def test_threads_share_files_and_their_edges(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thread writes every eighth piece of every file; pages are shared, and only two files may stay open."""
    monkeypatch.setattr(files_module, "OPEN_FILES", 2)
    count, size, piece = 7, 8 * PAGE * 3 + 777, PAGE + 1000
    data = [pattern(file, size) for file in range(count)]
    made, finished = output(tmp_path, [size] * count)
    errors: list[BaseException] = []

    def work(thread: int) -> None:
        try:
            sink = LocalSink(made)
            for begin in range(thread * piece, size, 8 * piece):
                for file in range(count):
                    made.note(file, [(begin, 1, "x")])
                    write_runs(sink, file, data[file], [begin, min(begin + piece, size)])
            sink.end_batch()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert sorted(finished) == list(range(count))
    assert all(segments == [(begin, 1, "x") for begin in range(0, size, piece)] for segments in finished.values())
    for file in range(count):
        assert (tmp_path / f"sub/f{file}.e1").read_bytes() == data[file]
    made.close()


def test_a_file_larger_than_what_is_written_has_zeros_in_between(way: str, tmp_path: Path) -> None:
    size, data = 5 * PAGE, pattern(1, 5 * PAGE)
    made, finished = output(tmp_path, [size], claimed=[PAGE + 200])
    sink = LocalSink(made)
    write_runs(sink, 0, data, [100, 100 + PAGE])
    write_runs(sink, 0, data, [4 * PAGE - 100, 4 * PAGE + 100])
    sink.end_batch()
    assert finished == {0: []}
    expected = bytearray(size)
    for begin, end in ((100, 100 + PAGE), (4 * PAGE - 100, 4 * PAGE + 100)):
        expected[begin:end] = data[begin:end]
    assert (tmp_path / "sub/f0.e1").read_bytes() == bytes(expected)


def test_a_file_of_nothing_is_made_and_finished(tmp_path: Path) -> None:
    made, finished = output(tmp_path, [0, 10], claimed=[0, 0])
    made.create_empty(0)
    made.create_empty(1)
    assert finished == {0: [], 1: []}
    assert [(tmp_path / f"sub/f{number}.e1").stat().st_size for number in (0, 1)] == [0, 10]


def test_hundreds_of_files_in_the_making_leave_descriptors_for_others(tmp_path: Path) -> None:
    count = 700
    made, finished = output(tmp_path, [2] * count)
    sink = LocalSink(made)
    before = len(os.listdir("/proc/self/fd"))
    for begin in range(2):
        for file in range(count):
            write_runs(sink, file, b"ab", [begin, begin + 1])
            if begin == 0:
                sink.end_batch()
        open_now = len(os.listdir("/proc/self/fd")) - before
        assert open_now <= 2 * files_module.OPEN_FILES
    sink.end_batch()
    assert len(finished) == count
    assert len(os.listdir("/proc/self/fd")) == before
    assert all((tmp_path / f"sub/f{file}.e1").read_bytes() == b"ab" for file in range(count))


def _failing(code: int) -> Callable[..., int]:
    def pwrite(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    return pwrite


@pytest.mark.parametrize(("code", "error"), [(errno.ENOSPC, TargetFull), (errno.EIO, StorageFailed)])
def test_a_write_that_fails_says_which_file(
    code: int, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, finished = output(tmp_path, [10])
    monkeypatch.setattr(os, "pwrite", _failing(code))
    with pytest.raises(error, match="sub/f0"):
        made.put(0, 0, memoryview(b"x"), direct=False)
    assert finished == {}
    made.close()


def test_short_writes_are_continued_through_the_cache(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: whole(fd, bytes(data[: max(1, min(len(data), 1000))]), at))
    if way == "direct":
        # A direct write that comes up short of a page can only go on through the page cache.
        monkeypatch.setattr(os, "pwrite", lambda fd, data, at: _short_direct(whole, fd, data, at))
    data = pattern(3, 6 * PAGE + 5)
    made, finished = output(tmp_path, [len(data)])
    sink = LocalSink(made)
    write_runs(sink, 0, data, [0, len(data)])
    sink.end_batch()
    assert finished == {0: []}
    assert (tmp_path / "sub/f0.e1").read_bytes() == data


def _short_direct(whole: Callable[..., int], descriptor: int, data: memoryview, at: int) -> int:
    if len(data) > PAGE and at % PAGE == 0:
        # What the kernel did of a direct write of pages, told short by some bytes.
        return whole(descriptor, data[:PAGE], at) - 96
    return whole(descriptor, data, at)


def test_space_is_taken_up_front_where_the_file_system_can(tmp_path: Path) -> None:
    with open(tmp_path / "file", "wb") as file:
        reserve(file.fileno(), 1 << 20)
        status = os.fstat(file.fileno())
        assert status.st_size == 1 << 20
        reserve(file.fileno(), 0)


def test_without_fallocate_a_file_is_only_made_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "_libc", object())
    with open(tmp_path / "file", "wb") as file:
        reserve(file.fileno(), 12345)
        assert os.fstat(file.fileno()).st_size == 12345


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_a_refused_fallocate_is_no_error(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _libc_that_fails(monkeypatch, code)
    with open(tmp_path / "file", "wb") as file:
        reserve(file.fileno(), 12345)
        assert os.fstat(file.fileno()).st_size == 12345


def test_a_full_disk_shows_when_the_file_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _libc_that_fails(monkeypatch, errno.ENOSPC)
    made, _ = output(tmp_path, [10])
    with pytest.raises(TargetFull, match="sub/f0"):
        made.put(0, 0, memoryview(b"x"), direct=False)


def _libc_that_fails(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    import ctypes

    class Libc:
        @staticmethod
        def fallocate(*_: object) -> int:
            ctypes.set_errno(code)
            return -1

    monkeypatch.setattr(files_module, "_libc", Libc)
