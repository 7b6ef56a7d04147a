"""Ctrl-C and SIGTERM, kept out of the few steps that may not be left half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uninterrupted() -> Iterator[None]:
    """SIGINT and SIGTERM have no effect inside the block, which should be short.

    They are dropped, not kept: whatever the block does is then either done or undone, and both are better told than an
    interruption. Python handles signals in the main thread only, so in other threads this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    ours = {number: handler for number, handler in before.items() if handler is not None}
    for number in ours:
        signal.signal(number, _drop)
    try:
        yield
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)


def _drop(number: int, frame: object) -> None:
    """Not SIG_IGN, which programs started meanwhile would inherit."""
