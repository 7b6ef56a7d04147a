"""Load one pickle held in memory."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any

from reshard_service.errors import ReshardError, SourceCorrupt, UnsafeSource
from reshard_service.formats.pickles.scan import DEFAULT_LIMITS, PickleLimits, scan


def safe_load(
    data: bytes | memoryview,
    *,
    allowed: Mapping[str, Callable[..., Any]],
    persistent: Callable[[Any], Any] | None = None,
    file: str,
    limits: PickleLimits = DEFAULT_LIMITS,
) -> object:
    """What the pickle ``data`` holds, made of plain values and of the stand-ins in ``allowed``.

    ``allowed`` maps a dotted global (``torch.Size``) to what is put in its place, and is the whole of what the pickle
    can reach. Each stand-in should be a class whose instances define ``__setstate__`` (see
    :class:`~reshard_service.formats.pickles.standins.Opaque`): a plain Python function or a class without one lets the
    pickle hang attributes on it. It is called with arguments of the pickle's choice, so it must be cheap for any.
    ``persistent`` gets each persistent id (a zip's storages); without it a persistent id is refused. ``file`` is named
    in errors.

    The result may hold one container in many places (a DAG) or within itself: walk it by identity, or with a bound.

    Raises :class:`UnsafeSource` for a name that is not allowed, an opcode no checkpoint needs or a bound overrun, and
    :class:`SourceCorrupt` for anything else a pickle can have wrong. Takes about 0.3 s per MB, in this process.
    """
    scan(data, persistent=persistent is not None, file=file, limits=limits)
    try:
        return _Unpickler(data, allowed, persistent, file).load()
    except ReshardError:
        raise
    except MemoryError:
        raise UnsafeSource(f"the pickle in {file!r} asks for more memory than there is", file=file) from None
    except Exception as error:
        raise SourceCorrupt(
            f"the pickle in {file!r} does not follow the rules of its format: {type(error).__name__}: {error}",
            file=file,
        ) from None


class _Unpickler(pickle.Unpickler):
    def __init__(
        self,
        data: bytes | memoryview,
        allowed: Mapping[str, Callable[..., Any]],
        persistent: Callable[[Any], Any] | None,
        file: str,
    ) -> None:
        super().__init__(io.BytesIO(data))
        self._allowed = allowed
        self._persistent = persistent
        self._file = file

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed[f"{module}.{name}"]
        except KeyError:
            raise forbidden_global(f"{module}.{name}", self._file) from None

    def persistent_load(self, pid: Any) -> Any:
        if self._persistent is None:
            raise UnsafeSource(f"{self._file!r} refers to objects outside itself", file=self._file)
        return self._persistent(pid)


def forbidden_global(dotted: str, file: str) -> UnsafeSource:
    """The error for a global outside the allow-list."""
    return UnsafeSource(
        f"{file!r} wants to import {dotted!r}, which no checkpoint we know needs; nothing of it was run",
        file=file,
        hint="if you did not write this file, don't load it with torch either; if your framework needs that name, "
        "tell us and it will get an inert stand-in",
    )
