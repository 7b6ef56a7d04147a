"""Whether all ranks' files are there, although the format stores neither world size nor global shapes (decision 27).

A missing last rank leaves no trace in the files: every shape just comes out smaller. It is proved absent or present by
the manifest, by the world size the user names, or by shapes that follow from ``config.json``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reshard_service.catalogue import Notice
from reshard_service.errors import CheckpointIncomplete, SourceCorrupt
from reshard_service.formats.dcp_safetensors.names import shard_name

_LLAMA_LIKE = {"llama", "mistral", "qwen2", "qwen3", "qwen3_moe"}
"""Model types of transformers whose every parameter shape follows from the config by the rules below."""

_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\.(.+)\Z")


@dataclass(frozen=True, slots=True)
class ShardSet:
    """The shard files of a folder: ``ranks`` ranks, each with the files ``1 … files``."""

    ranks: int
    files: int
    names: tuple[str, ...]


def complete_set(parsed: Mapping[str, tuple[int, int, int]], uri: str) -> ShardSet:
    """The files as a set without gaps; ``parsed`` maps names to (rank, file, files)."""
    counts = sorted({files for _, _, files in parsed.values()})
    if len(counts) > 1:
        raise SourceCorrupt(
            f"{uri!r} mixes shard files of different saves: -of-{counts[0]:05d} and -of-{counts[-1]:05d}",
            hint="delete the files of the older save, or save again into an empty folder",
        )
    files = counts[0]
    present = {(rank, file) for rank, file, _ in parsed.values()}
    ranks = max(rank for rank, _ in present) + 1
    for rank in range(ranks):
        for file in range(1, files + 1):
            if (rank, file) not in present:
                raise CheckpointIncomplete(
                    f"{shard_name(rank, file, files)!r} is missing from {uri!r}, which has files up to rank "
                    f"{ranks - 1}",
                    file=shard_name(rank, file, files),
                    hint="copy the missing file; without it tensors would silently come out wrong",
                )
    ordered = sorted(parsed, key=lambda name: parsed[name])
    return ShardSet(ranks, files, tuple(ordered))


def check_world(found: ShardSet, world: int | None, uri: str) -> None:
    """The number of ranks against the one that is known."""
    if world is None or world == found.ranks:
        return
    if found.ranks < world:
        raise CheckpointIncomplete(
            f"{uri!r} has the files of {found.ranks} ranks, but {world} wrote it: "
            f"{shard_name(found.ranks, 1, found.files)!r} is missing",
            file=shard_name(found.ranks, 1, found.files),
            hint="copy the missing files",
        )
    raise SourceCorrupt(
        f"{uri!r} has the files of {found.ranks} ranks, but only {world} wrote it",
        file=shard_name(world, 1, found.files),
        hint="files of an older save with more ranks lie among them; delete those",
    )


def check_manifest(found: ShardSet, listed: Sequence[str], uri: str) -> None:
    """The files against those that the manifest lists."""
    missing = sorted(set(listed) - set(found.names))
    if missing:
        raise CheckpointIncomplete(
            f"{missing[0]!r} is in the manifest of {uri!r} but not in the folder", file=missing[0]
        )
    stale = sorted(set(found.names) - set(listed))
    if stale:
        raise SourceCorrupt(
            f"{stale[0]!r} is not in the manifest of {uri!r}",
            file=stale[0],
            hint="files of another save lie among this one's; delete those",
        )


def prove_by_config(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """True if the config accounts for every model tensor and they all have their full shape.

    ``shapes`` are those inferred for the model's tensors by bare name. Raises :class:`CheckpointIncomplete` for one
    that is smaller than the config says.
    """
    proven = bool(shapes)
    for name, shape in shapes.items():
        expected = expected_shape(config, name)
        if expected is None:
            proven = False
        elif len(expected) == len(shape) and any(a < b for a, b in zip(shape, expected, strict=True)):
            raise CheckpointIncomplete(
                f"tensor {name!r} has shape {list(shape)} in the files, but config.json says {list(expected)}",
                tensor=name,
                hint="the files of the last ranks are missing (or config.json is another model's)",
            )
        elif expected != shape:
            proven = False
    return proven and _layers_complete(config, shapes)


def unproven(found: ShardSet, strict: bool, uri: str) -> Notice:
    """The notice that nothing proves the last rank's presence; with ``strict`` the error."""
    reason = (
        f"nothing proves that rank {found.ranks - 1} was the last: the format stores no world size; "
        f"say --world {found.ranks} if that many ranks wrote it"
    )
    if strict:
        raise CheckpointIncomplete(f"{uri!r}: {reason}")
    return Notice("completeness_unproven", reason)


def expected_shape(config: Mapping[str, Any], name: str) -> tuple[int, ...] | None:
    """The shape that a config gives the parameter ``name``, where it is one of those we know."""
    text = config.get("text_config")
    section: Mapping[str, Any] = text if isinstance(text, dict) else config
    hidden, vocabulary = _size(section, "hidden_size"), _size(section, "vocab_size")
    if name.endswith(("embed_tokens.weight", "wte.weight", "lm_head.weight")):
        return (vocabulary, hidden) if vocabulary and hidden else None
    if section.get("model_type") not in _LLAMA_LIKE or not hidden:
        return None
    return _llama_like(section, name, hidden)


def _llama_like(section: Mapping[str, Any], name: str, hidden: int) -> tuple[int, ...] | None:
    heads = _size(section, "num_attention_heads")
    key_heads = _size(section, "num_key_value_heads") or heads
    head = _size(section, "head_dim") or (hidden // heads if heads else 0)
    inner = _size(section, "intermediate_size")
    experts = _size(section, "num_experts") or _size(section, "num_local_experts")
    expert_inner = _size(section, "moe_intermediate_size")
    match = _LAYER.match(name)
    known: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (heads * head, hidden),
        "self_attn.k_proj": (key_heads * head, hidden),
        "self_attn.v_proj": (key_heads * head, hidden),
        "self_attn.o_proj": (hidden, heads * head),
        "self_attn.q_norm": (head,),
        "self_attn.k_norm": (head,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "mlp.gate": (experts, hidden),
        "mlp.experts.gate_up_proj": (experts, 2 * expert_inner, hidden),
        "mlp.experts.down_proj": (experts, hidden, expert_inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    if match is None:
        return (hidden,) if name in ("model.norm.weight", "norm.weight") else None
    part = match[2]
    shape = known.get(part.removesuffix(".weight").removesuffix(".bias"))
    if shape is None or 0 in shape:
        return None
    return shape[:1] if part.endswith(".bias") else shape


def _layers_complete(config: Mapping[str, Any], names: Mapping[str, tuple[int, ...]]) -> bool:
    """Every layer has the same parameters, and there are as many layers as the config says."""
    text = config.get("text_config")
    section = text if isinstance(text, dict) else config
    parts: dict[int, set[str]] = {}
    for name in names:
        match = _LAYER.match(name)
        if match:
            parts.setdefault(int(match[1]), set()).add(match[2])
    count = _size(section, "num_hidden_layers")
    ends = any(name.endswith("embed_tokens.weight") for name in names) and any(
        name in ("model.norm.weight", "norm.weight") for name in names
    )
    return ends and sorted(parts) == list(range(count)) and len({frozenset(part) for part in parts.values()}) == 1


def _size(section: Mapping[str, Any], key: str) -> int:
    value = section.get(key)
    return value if type(value) is int and value > 0 else 0
