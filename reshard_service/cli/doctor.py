"""Checks of the installation itself."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import reshard_service
from reshard_service.engine.checksums import crc32
from reshard_service.engine.files import takes_direct_writes

_PACKAGES = ("numpy", "safetensors", "fsspec", "pydantic", "xxhash", "zstandard")
_OPTIONAL = ("torch", "isal", "s3fs", "transformers")


@dataclass(frozen=True, slots=True)
class Finding:
    """One check and what it found."""

    name: str
    ok: bool
    detail: str

    def document(self) -> dict[str, Any]:
        return asdict(self)


def examine() -> list[Finding]:
    """Every check; none of them imports torch or anything else that is heavy."""
    return list(_checks())


def _checks() -> Iterator[Finding]:
    yield Finding("python", True, f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in _PACKAGES:
        version = _version(name)
        yield Finding(name, version is not None, version or "missing: install reshard-service again")
    for name in _OPTIONAL:
        yield Finding(name, True, _version(name) or "not installed (optional)")
    yield _siblings()
    yield Finding("crc32", True, "isal (vectorised)" if "isal" in crc32.__module__ else "zlib (slower; install isal)")
    for label, folder in (("working folder", Path.cwd()), ("temporary folder", Path(tempfile.gettempdir()))):
        yield _folder(label, folder)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _siblings() -> Finding:
    """``workers`` and ``api`` are common names: the ones found must be those that lie beside this package."""
    home = Path(reshard_service.__file__).resolve().parent.parent
    for name in ("workers", "api"):
        spec = importlib.util.find_spec(name)
        origin = None if spec is None or spec.origin is None else Path(spec.origin).resolve()
        if origin is None or origin.parent.parent != home:
            return Finding(
                "package names",
                False,
                f"package {name!r} is found at {origin}, expected in {home}: another one hides ours",
            )
    return Finding("package names", True, "workers and api are ours")


def _folder(label: str, folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    writable = os.access(folder, os.W_OK)
    direct = writable and takes_direct_writes(folder)
    detail = f"{free / 1e9:.1f} GB free, {'direct' if direct else 'buffered'} writes" if writable else "not writable"
    return Finding(label, writable, detail)
