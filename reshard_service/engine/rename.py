"""Renames that never replace anything by accident. They last once their folder is synced."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

from reshard_service.errors import TargetExists

_libc = ctypes.CDLL(None, use_errno=True)
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2


def rename_no_replace(source: Path, target: Path) -> None:
    """Move ``source`` to ``target`` in one step, or :class:`TargetExists` if something lies there.

    ``renameat2(RENAME_NOREPLACE)`` where the system has it; otherwise a check, then a rename, which for folders can
    replace nothing but an empty folder.
    """
    if not _renameat2(source, target, _RENAME_NOREPLACE):
        if os.path.lexists(target):
            raise _exists(target)
        os.rename(source, target)


def replace_by(source: Path, target: Path) -> None:
    """Let ``source`` and what lies at ``target`` change places.

    One step with ``renameat2(RENAME_EXCHANGE)``. Otherwise three, the target's name being free for a moment; what lay
    there is put back if one of them fails.
    """
    if not _renameat2(source, target, _RENAME_EXCHANGE):
        aside = replaced_name(source)
        os.rename(target, aside)
        try:
            os.rename(source, target)
            try:
                os.rename(aside, source)
            except OSError:
                os.rename(target, source)
                raise
        except OSError:
            os.rename(aside, target)
            raise


def replaced_name(source: Path) -> Path:
    """Where :func:`replace_by` keeps what it replaces for a moment; a process that is killed then leaves it there."""
    return source.with_name(f"{source.name}.replaced")


def _renameat2(source: Path, target: Path, how: int) -> bool:
    """False where the system or the file system does not know the call or the flag."""
    call = getattr(_libc, "renameat2", None)
    if call is None:
        return False
    failed = call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), ctypes.c_uint(how))
    if not failed:
        return True
    code = ctypes.get_errno()
    if how == _RENAME_NOREPLACE and code in (errno.EEXIST, errno.ENOTEMPTY):
        raise _exists(target)
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(target))


def _exists(target: Path) -> TargetExists:
    return TargetExists(
        f"{str(target)!r} appeared while the conversion ran; it was not touched",
        hint="choose another target, or --overwrite always",
    )
