"""What a user may say about how a source is to be read, and how a target is to be written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reshard_service.layouts.layout import Layout


@dataclass(frozen=True, slots=True)
class OpenOptions:
    """How to read a source. All optional: detection answers what is not said."""

    format: str | None = None
    producer: str | None = None
    key_prefix: str | None = None
    """Key under which the model lies, where nothing in the checkpoint tells (decision 1)."""
    layout: Layout | None = None
    """Layout that wrote it: for rank-local files, and for ``repair``."""
    step: str | None = None
    """``latest`` or a number, for a run folder."""
    world: int | None = None
    strict: bool = False
    repair: bool = False


@dataclass(frozen=True, slots=True)
class WriteOptions:
    """How to write a target."""

    max_shard_bytes: int = 5_000_000_000
    single_file: str | None = None
    """File name, if the target is one safetensors file."""
