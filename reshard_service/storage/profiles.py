"""Storage profiles: which endpoint and credentials a driver gets for which URIs.

A profile belongs to the person or administrator who runs us, never to a job: a request that could name its own endpoint
could point us at anything (service policy, decision 30). The file is TOML::

    [profiles.lab]
    prefixes = ["s3://lab-checkpoints", "s3://scratch/mine"]
    [profiles.lab.options]                       # passed to the fsspec driver as they are
    endpoint_url = "https://s3.lab.example"
    key = { env = "LAB_S3_KEY" }                 # read when the store is first used
    secret = { file = "/run/secrets/lab-s3" }
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from reshard_service.errors import DocumentInvalid, EnvironmentUnfit, UsageError

PROFILES_VARIABLE = "RESHARD_PROFILES"

# Ours to set: they decide about threads and caches, which the storage package relies on.
_RESERVED = frozenset({"asynchronous", "loop", "session", "skip_instance_cache", "use_listings_cache"})


@dataclass(frozen=True, slots=True)
class StorageProfile:
    """Driver options for every URI that is one of ``prefixes`` or lies beneath one."""

    name: str
    prefixes: tuple[str, ...]
    options: Mapping[str, object] = field(repr=False)

    def covers(self, uri: str) -> int:
        """Length of the longest prefix that ``uri`` lies beneath; 0 if none. ``s3://a`` does not cover ``s3://ab``."""
        lengths = [
            len(prefix)
            for prefix in (given if given.endswith("://") else given.rstrip("/") for given in self.prefixes)
            if uri == prefix or uri.startswith(prefix if prefix.endswith("://") else prefix + "/")
        ]
        return max(lengths, default=0)

    def resolved_options(self) -> dict[str, object]:
        """The options with ``{env = …}`` and ``{file = …}`` replaced by what they name; EnvironmentUnfit if absent."""
        return {name: self._resolve(name, value) for name, value in self.options.items()}

    def _resolve(self, option: str, value: object) -> object:
        if not isinstance(value, Mapping):
            return value
        if set(value) == {"env"}:
            found = os.environ.get(str(value["env"]))
            if found is None:
                raise EnvironmentUnfit(
                    f"storage profile {self.name!r}: option {option!r} reads the environment variable "
                    f"{value['env']!r}, which is not set"
                )
            return found
        if set(value) == {"file"}:
            try:
                return Path(str(value["file"])).read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise EnvironmentUnfit(
                    f"storage profile {self.name!r}: option {option!r} can't be read from {value['file']!r}: "
                    f"{type(error).__name__}"
                ) from None
        return {name: self._resolve(f"{option}.{name}", inner) for name, inner in value.items()}


def profile_for(uri: str, profiles: tuple[StorageProfile, ...]) -> StorageProfile | None:
    """The profile with the longest prefix that covers ``uri``."""
    best = max(profiles, key=lambda profile: profile.covers(uri), default=None)
    return best if best is not None and best.covers(uri) else None


def profiles_path() -> Path | None:
    """The user's profile file: what RESHARD_PROFILES names, else ``~/.config/reshard/profiles.toml`` if it is there."""
    named = os.environ.get(PROFILES_VARIABLE)
    if named:
        return Path(named)
    folder = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
    usual = Path(folder) / "reshard" / "profiles.toml"
    return usual if usual.is_file() else None


def load_profiles(path: Path | None) -> tuple[StorageProfile, ...]:
    """The profiles of a file, in its order; DocumentInvalid names the entry that is wrong, never its values."""
    if path is None:
        return ()
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(
            f"the storage profile file {str(path)!r} does not exist", hint=f"{PROFILES_VARIABLE} names it"
        ) from None
    except OSError as error:
        raise UsageError(f"the storage profile file {str(path)!r} can't be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        # tomllib quotes the offending text, which may be a key.
        raise DocumentInvalid(f"the storage profile file {str(path)!r} is not valid TOML") from None
    entries = document.get("profiles")
    if not isinstance(entries, dict) or set(document) != {"profiles"}:
        raise DocumentInvalid(f"{str(path)!r} must hold [profiles.<name>] tables and nothing else")
    return tuple(parse_profile(name, entry) for name, entry in entries.items())


def parse_profile(name: str, entry: object) -> StorageProfile:
    """One ``[profiles.<name>]`` table."""
    if not isinstance(entry, dict) or not set(entry) <= {"prefixes", "options"}:
        raise DocumentInvalid(f"storage profile {name!r} may hold 'prefixes' and 'options' only")
    prefixes = entry.get("prefixes")
    if (
        not isinstance(prefixes, list)
        or not prefixes
        or not all(isinstance(prefix, str) and "://" in prefix for prefix in prefixes)
    ):
        raise DocumentInvalid(
            f"storage profile {name!r} needs 'prefixes': a list of URIs such as \"s3://bucket/folder\""
        )
    options = entry.get("options", {})
    if not isinstance(options, dict):
        raise DocumentInvalid(f"storage profile {name!r}: 'options' must be a table")
    reserved = sorted(_RESERVED & set(options))
    if reserved:
        raise DocumentInvalid(f"storage profile {name!r} may not set {', '.join(reserved)}: we set them ourselves")
    return StorageProfile(name, tuple(prefixes), MappingProxyType(options))
