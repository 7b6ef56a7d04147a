"""JSON that came with a checkpoint: bounded, UTF-8, no duplicate keys, no NaN, never another exception than ours."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from reshard_service.errors import SourceCorrupt, UnsafeSource
from reshard_service.storage.base import Storage

Pairs = list[tuple[str, Any]]

MAX_JSON_BYTES = 256_000_000
"""Larger than the index of a million tensors (about 100 MB)."""


class DuplicateKeyError(ValueError):
    """Raised by a pairs hook; :func:`parse_json` turns it into :class:`SourceCorrupt`."""


@contextmanager
def paused_gc() -> Iterator[None]:
    """No cycle collection meanwhile: a million small objects make it run for most of the time (measured: 4x)."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def unique_pairs(pairs: Pairs) -> dict[str, Any]:
    """The object as a dict; :class:`DuplicateKeyError` if a key comes twice (``json`` alone lets the last one win)."""
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise DuplicateKeyError(key)
            seen.add(key)
    return table


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")


def parse_json(data: bytes, *, file: str, what: str = "JSON", hook: Callable[[Pairs], Any] = unique_pairs) -> Any:
    """The value that ``data`` spells; anything wrong with it is :class:`SourceCorrupt` naming ``file``."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SourceCorrupt(f"{what} is not UTF-8 at its byte {error.start}", file=file) from None
    try:
        with paused_gc():
            return json.loads(text, object_pairs_hook=hook, parse_constant=_refuse_constant)
    except DuplicateKeyError as error:
        raise SourceCorrupt(f"{what} has the key {str(error)!r} twice", file=file) from None
    except RecursionError:
        raise UnsafeSource(f"{what} is nested too deeply", file=file) from None
    except ValueError as error:
        raise SourceCorrupt(f"{what} can't be parsed: {str(error)[:200]}", file=file) from None


def read_json_object(
    storage: Storage, path: str, *, what: str = "JSON", max_bytes: int = MAX_JSON_BYTES
) -> tuple[dict[str, Any], bytes]:
    """The JSON object in a file and the bytes it was parsed from."""
    data = read_small_file(storage, path, max_bytes=max_bytes)
    value = parse_json(data, file=path, what=what)
    if not isinstance(value, dict):
        raise SourceCorrupt(f"{what} holds a {type(value).__name__} where an object belongs", file=path)
    return value, data


def read_small_file(storage: Storage, path: str, *, max_bytes: int) -> bytes:
    """All bytes of a metadata file; a missing one is corrupt, one above the cap unsafe."""
    status = storage.stat(path)
    if status is None or status.is_dir:
        raise SourceCorrupt(f"file {path!r} is missing", file=path)
    if status.bytes > max_bytes:
        raise UnsafeSource(f"file {path!r} has {status.bytes} bytes; at most {max_bytes} are read", file=path)
    return storage.read_bytes(path, 0, status.bytes)
