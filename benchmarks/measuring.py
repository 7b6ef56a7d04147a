"""Runs one command and says what it took: wall time until its bytes are on disk, CPU time, memory of its processes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

_EVERY_SECONDS = 0.02
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Run:
    """``cpu_seconds`` is user and system time of the command and its children, without the kernel's own threads."""

    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int


class MeasurementFailed(Exception):  # noqa: N818 - named like the errors of the package
    """A command that was to be measured failed; the message ends with what it printed."""


def run(command: list[str], log: Path) -> Run:
    """Run it and ``sync``. What it prints goes to ``log``."""
    with log.open("wb") as output:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        tree = _Tree(process.pid)
        tree.start()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        os.sync()
        wall = time.perf_counter() - started
        tree.stop()
    if process.returncode:
        raise MeasurementFailed(
            f"{' '.join(command)}\nended with {process.returncode}\n{log.read_text(errors='replace')[-2000:]}"
        )
    own_peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Run(wall, usage.ru_utime + usage.ru_stime, max(tree.peak_bytes, own_peak))


class _Tree(threading.Thread):
    """Samples the resident size of a process and its descendants, summed."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.peak_bytes = 0
        self._pid = pid
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(_EVERY_SECONDS):
            self.peak_bytes = max(self.peak_bytes, resident_bytes(self._pid))

    def stop(self) -> None:
        self._done.set()
        self.join()


def resident_bytes(pid: int) -> int:
    """Of a process and its descendants, now; 0 where there is no ``/proc`` or no such process."""
    try:
        status = Path(f"/proc/{pid}/statm").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return 0
    return int(status.split()[1]) * _PAGE + sum(resident_bytes(int(child)) for child in children.split())


def make_cold(folder: Path) -> None:
    """Forget what is cached: everything if we are root, else this folder's files."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        for path in folder.rglob("*"):
            _each_page(path, os.POSIX_FADV_DONTNEED)


def make_warm(folder: Path) -> None:
    """Read every file once."""
    os.sync()
    buffer = bytearray(1 << 20)
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def _each_page(path: Path, advice: int) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, advice)
        finally:
            os.close(descriptor)
