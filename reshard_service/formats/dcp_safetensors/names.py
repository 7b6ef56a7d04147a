"""File names and metadata keys of the format, spelled as torch 2.13 spells them (``_hf_utils.py``)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

SHARDING_INFO = "DCP_SHARDING_INFO"
SAVED_OFFSETS = "saved_offsets"

_SHARD = re.compile(r"shard-(\d{5,9})-model-(\d{5,9})-of-(\d{5,9})\.safetensors\Z")


def shard_name(rank: int, file: int, files: int) -> str:
    """Name of file ``file`` (from 1) of ``files`` of a rank (from 0)."""
    return f"shard-{rank + 1:05d}-model-{file:05d}-of-{files:05d}.safetensors"


def parse_shard_name(name: str) -> tuple[int, int, int] | None:
    """(rank from 0, file from 1, files) of a shard's name; None for any other name."""
    match = _SHARD.match(name)
    return None if match is None else (int(match[1]) - 1, int(match[2]), int(match[3]))


def sharding_metadata(offsets: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """The ``__metadata__`` of a file whose tensors begin at these global offsets."""
    info = {name: {SAVED_OFFSETS: list(begin)} for name, begin in offsets.items()}
    return {SHARDING_INFO: json.dumps(info), "DCP_VERSION": "1.0", "format": "pt"}
