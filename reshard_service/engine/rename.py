"""Renames that never replace anything, and that last."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

from reshard_service.errors import TargetExists
from reshard_service.storage.local import sync_folder

_libc = ctypes.CDLL(None, use_errno=True)
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1


def rename_no_replace(source: Path, target: Path) -> None:
    """Move ``source`` to ``target`` in one step, or :class:`TargetExists` if something lies there.

    ``renameat2(RENAME_NOREPLACE)`` where the system has it; otherwise a check, then a rename, which for folders can
    replace nothing but an empty folder.
    """
    if not _renameat2(source, target):
        if os.path.lexists(target):
            raise _exists(target)
        os.rename(source, target)
    sync_folder(target.parent)


def _renameat2(source: Path, target: Path) -> bool:
    call = getattr(_libc, "renameat2", None)
    if call is None:
        return False
    failed = call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), ctypes.c_uint(_RENAME_NOREPLACE))
    if not failed:
        return True
    code = ctypes.get_errno()
    if code in (errno.EEXIST, errno.ENOTEMPTY):
        raise _exists(target)
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(target))


def _exists(target: Path) -> TargetExists:
    return TargetExists(
        f"{str(target)!r} appeared while the conversion ran; it was not touched",
        hint="choose another target, or --overwrite always",
    )
