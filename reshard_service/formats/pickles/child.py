"""Load a pickle too large to scan in a child process that can claim only so much memory and time.

The child is this Python, isolated (``-I -S``: no environment, no site, no user's code), given the pickle on its
standard input; what it answers on its standard output is never a pickle. Nothing it names can be imported either; the
limits are against a pickle that is well-formed and merely enormous once loaded.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from reshard_service.errors import EnvironmentUnfit, ReshardError, SourceCorrupt, UnsafeSource
from reshard_service.formats.pickles.load import forbidden_global

_T = TypeVar("_T")

_BOOT = (
    "import sys; sys.path.append(sys.argv[1]); from importlib import import_module; "
    "getattr(import_module(sys.argv[2]), sys.argv[3])(*map(int, sys.argv[4:]))"
)
_ROOT = Path(__file__).resolve().parents[3]
_KEPT_ENVIRONMENT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")
"""What a Python outside the usual places needs to start at all."""


@dataclass(frozen=True, slots=True)
class ChildLimits:
    """What the child may claim: address space and processor time."""

    memory_bytes: int
    cpu_seconds: int

    @classmethod
    def for_pickle(cls, nbytes: int) -> ChildLimits:
        """Twice what a real ``.metadata`` of this size needs (measured: 7.7 bytes and 30 ns for each of its bytes)."""
        return cls(memory_bytes=(512 << 20) + 16 * nbytes, cpu_seconds=30 + (nbytes >> 22))


def run_child(
    entry: tuple[str, str],
    limits: ChildLimits,
    feed: Iterable[bytes | bytearray | memoryview],
    receive: Callable[[dict[str, Any], IO[bytes]], _T],
    *,
    file: str,
) -> _T:
    """Feed a child running ``entry`` (module, function; it gets the two limits) and hand its answer to ``receive``.

    The answer begins with one line of JSON, which ``receive`` gets parsed; columns may follow. Raises
    :class:`UnsafeSource` if the child met a name outside its allow-list or died of its limits, and
    :class:`SourceCorrupt` if it could make nothing of the pickle. ``file`` is named in errors.
    """
    if not sys.executable:
        raise EnvironmentUnfit("there is no Python executable to load a large pickle with")
    command = [sys.executable, "-I", "-S", "-B", "-c", _BOOT, str(_ROOT), *entry]
    with subprocess.Popen(
        [*command, str(limits.memory_bytes), str(limits.cpu_seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ},
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # it refused early; its answer says why
                for window in feed:
                    child.stdin.write(window)
            with contextlib.suppress(BrokenPipeError):
                child.stdin.close()
            line = child.stdout.readline()
            answer: dict[str, Any] = json.loads(line) if line.endswith(b"\n") else {}
            if answer and "error" not in answer:
                return receive(answer, child.stdout)
        finally:
            if child.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(1)
                child.kill()
            with contextlib.suppress(BrokenPipeError, ValueError):
                child.stdin.close()
    raise _failure(answer, child.returncode, limits, file)


def receive_exactly(stream: IO[bytes], buffer: memoryview, *, file: str) -> None:
    """Fill ``buffer`` from the child; one that dies before that is an error."""
    done = 0
    while done < len(buffer):
        count = stream.readinto(buffer[done:])  # type: ignore[attr-defined]
        if not count:
            raise UnsafeSource(f"the process loading {file!r} died while it answered", file=file)
        done += count


def _failure(answer: dict[str, Any], status: int, limits: ChildLimits, file: str) -> ReshardError:
    kind, what = answer.get("error"), str(answer.get("what", ""))
    if kind == "global":
        return forbidden_global(what, file)
    if kind == "corrupt":
        return SourceCorrupt(f"the pickle in {file!r} does not follow the rules of its format: {what}", file=file)
    if kind == "memory" or status in (-signal.SIGKILL, -getattr(signal, "SIGXCPU", signal.SIGKILL)):
        return UnsafeSource(
            f"loading {file!r} takes more than {limits.memory_bytes >> 20} MiB of memory or {limits.cpu_seconds} s of "
            "processor time, many times what a real file of its size needs",
            file=file,
            hint="don't trust this file; if it is real, free memory and tell us how it was made",
        )
    if status < 0:
        return UnsafeSource(f"the process loading {file!r} crashed (signal {-status})", file=file)
    return EnvironmentUnfit(f"the process that loads {file!r} could not be started (exit status {status})", file=file)
