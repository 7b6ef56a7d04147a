"""From what a user wrote to a store: which URIs we take, and where they may point.

fsspec accepts much more than a checkpoint ever needs: chains that read local files through a cache
(``simplecache::file:///etc/…``), credentials inside URLs, archives, dozens of protocols. So URIs are parsed here, by
our own rule, and only what passed is handed on. The policy is a value: the command line trusts its user, the service
its administrator (decision 30).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote_to_bytes

from reshard_service.errors import EnvironmentUnfit, UriRefused
from reshard_service.storage.base import Storage
from reshard_service.storage.faults import redact
from reshard_service.storage.local import LocalStorage
from reshard_service.storage.profiles import StorageProfile, load_profiles, profile_for, profiles_path

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)://")
_FORBIDDEN_ESCAPE = re.compile(r"%(?:2e|2f|5c|0[0-9a-f]|1[0-9a-f]|7f)", re.IGNORECASE)
# Not stores but views of others: what they would read is named in options, which a URI can't hold.
_WRAPPERS = frozenset(
    {
        *("dir", "generic", "local", "data", "reference"),
        *("cached", "blockcache", "filecache", "simplecache"),
        *("tar", "zip", "libarchive"),
        *("async_wrapper", "asyncwrapper", "asynclocal"),
    }
)
_DRIVERS = {
    "s3": "reshard-service[s3]",
    "s3a": "reshard-service[s3]",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "hf": "huggingface_hub",
    "http": "aiohttp",
    "https": "aiohttp",
    "sftp": "paramiko",
    "ssh": "paramiko",
    "oss": "ossfs",
}


@dataclass(frozen=True, slots=True)
class UriPolicy:
    """Where URIs may point. The defaults are the command line's: whatever its user can reach."""

    schemes: frozenset[str] | None = None
    """Allowed schemes, ``file`` for local paths; None for every protocol that is installed."""
    roots: tuple[Path, ...] | None = None
    """Folders beneath which the real path of a local file must lie; None for no limit."""
    profiles: tuple[StorageProfile, ...] | None = None
    """Storage profiles; None for the user's own file."""
    needs_profile: bool = False
    """True if a remote URI must be covered by a profile; False to let drivers use the environment's credentials."""


CLI_POLICY = UriPolicy()


def service_policy(
    schemes: Iterable[str], roots: Iterable[str | Path], profiles: Iterable[StorageProfile] = ()
) -> UriPolicy:
    """The policy of a service: these schemes, these local folders, remote stores by the administrator's profiles."""
    return UriPolicy(
        schemes=frozenset(schemes),
        roots=tuple(Path(os.path.realpath(root)) for root in roots),
        profiles=tuple(profiles),
        needs_profile=True,
    )


def open_storage(uri: str, policy: UriPolicy = CLI_POLICY) -> Storage:
    """The store at a plain path, a ``file://`` URI or a URI of an fsspec protocol. Nothing is contacted yet.

    Raises :class:`UriRefused` for a form we don't take or a place the policy does not allow, and
    :class:`EnvironmentUnfit` where the driver is not installed.
    """
    scheme, rest = split_scheme(uri)
    if policy.schemes is not None and scheme not in policy.schemes:
        raise UriRefused(
            f"the scheme {scheme!r} is not allowed here", hint=f"allowed: {', '.join(sorted(policy.schemes)) or 'none'}"
        )
    if scheme == "file":
        return _open_local(rest, policy)
    check_driver(scheme)
    from reshard_service.storage.remote import FsspecStorage  # local paths shall not wait for fsspec's import

    clean = f"{scheme}://{_remote_path(scheme, rest)}"
    profiles = load_profiles(profiles_path()) if policy.profiles is None else policy.profiles
    profile = profile_for(clean, profiles)
    if profile is None and policy.needs_profile:
        raise UriRefused(f"no storage profile covers {clean!r}", hint="ask the administrator of this service for one")
    return FsspecStorage(clean, options=profile.resolved_options if profile is not None else dict)


def split_scheme(uri: str) -> tuple[str, str]:
    """``("file", path)`` for a plain path or ``file://`` URI, else the scheme and what follows ``://``, both checked.

    Messages never repeat a URI that may hold credentials.
    """
    if not uri:
        raise UriRefused("the URI is empty")
    if any(ord(character) < 32 or ord(character) == 127 for character in uri):
        raise UriRefused(f"the URI {redact(uri)!r} holds control characters")
    found = _SCHEME.match(uri)
    if found is None:
        if "::" in uri and "://" in uri:
            raise UriRefused("chained URIs ('::') are not taken", hint="name the inner store itself")
        return "file", uri
    scheme, rest = found.group(1), uri[found.end() :]
    if scheme != scheme.lower():
        raise UriRefused(f"the scheme {scheme!r} must be written in lower case", hint=f"write {scheme.lower()}://…")
    if "::" in uri:
        raise UriRefused("chained URIs ('::') are not taken", hint="name the inner store itself")
    authority = rest.split("/", 1)[0]
    # Azure's own spelling container@account is the one '@' that is no user.
    if "@" in authority and not (scheme in ("abfs", "abfss", "az") and ":" not in authority):
        raise UriRefused(
            f"a {scheme}:// URI may not hold a user or password",
            hint="put credentials into the provider's environment or a profile file (RESHARD_PROFILES)",
        )
    for character, kind in (("?", "a query"), ("#", "a fragment"), ("\\", "a backslash")):
        if character in rest:
            raise UriRefused(f"a {scheme}:// URI may not hold {kind} ({character!r})")
    if _FORBIDDEN_ESCAPE.search(rest):
        raise UriRefused(f"the URI {uri!r} hides a dot, slash or control character behind a % escape")
    if scheme != "file":
        return scheme, rest
    if authority not in ("", "localhost"):
        raise UriRefused(
            f"the URI {uri!r} names the host {authority!r}", hint="a local file has three slashes: file:///folder/file"
        )
    return "file", os.fsdecode(unquote_to_bytes(rest[len(authority) :]))


def _remote_path(scheme: str, rest: str) -> str:
    """What follows ``://`` without trailing slashes; refused if a segment is empty, ``.`` or ``..``."""
    trimmed = rest.rstrip("/")
    segments = trimmed.lstrip("/").split("/") if scheme == "memory" else trimmed.split("/")
    if not trimmed or segments == [""]:
        raise UriRefused(f"'{scheme}://' names no bucket, host or folder")
    for segment in segments:
        if segment in ("", ".", ".."):
            raise UriRefused(f"the path of '{scheme}://{rest}' holds {segment or 'an empty segment'!r}")
    return "/".join(segments)


def _open_local(path: str, policy: UriPolicy) -> Storage:
    if not path:
        raise UriRefused("the URI names no file or folder")
    if policy.roots is None:
        return LocalStorage(Path(path))
    real = Path(os.path.realpath(path))
    # The answer is the same whether or not something lies there: it must not tell what exists outside.
    if not os.path.isabs(path) or not any(real == root or real.is_relative_to(root) for root in policy.roots):
        raise UriRefused(f"{path!r} does not lie beneath a folder that this service may use")
    return LocalStorage(real, roots=policy.roots)


def check_driver(scheme: str) -> None:
    """EnvironmentUnfit, naming what to install, unless a driver for ``scheme`` can be imported."""
    if scheme in _WRAPPERS:
        raise UriRefused(f"'{scheme}://' is a view of another store", hint="name that store itself")
    import fsspec

    try:
        fsspec.get_filesystem_class(scheme)
    except ValueError:
        raise EnvironmentUnfit(
            f"no storage driver knows the scheme {scheme!r}",
            hint="is it spelt right? every protocol that fsspec knows can be used once its driver is installed",
        ) from None
    except ImportError:
        package = _DRIVERS.get(scheme)
        raise EnvironmentUnfit(
            f"the storage driver for {scheme}:// is not installed",
            hint=f"pip install {package!r}" if package else "install the fsspec driver for it",
        ) from None
