"""Which tensors and objects of a source go into a target, under which key and dtype, in which order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from reshard_service.catalogue import ByteObject, Catalogue, Notice, Section, Tensor
from reshard_service.dtypes import DType, by_name
from reshard_service.errors import CannotHold, SelectionEmpty, StateNotPortable
from reshard_service.formats.target import Selection
from reshard_service.globs import compile_glob
from reshard_service.identity import strip_wrappers
from reshard_service.mapping.names import bare_name, dcp_key, natural_order, require_distinct
from reshard_service.mapping.state import per_rank_families

HOLDS_OBJECTS = ("dcp",)
"""Formats that can be written and have a place for byte objects."""
DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}


@dataclass(frozen=True, slots=True)
class SelectionRequest:
    """What a target asks for; see ``TargetDocument`` for the meaning of each field."""

    format: str
    part: str
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    dtype: str = "keep"
    optimizer_dtype: str = "keep"
    key_prefix: str | None = None
    state: str = "refuse"
    data_ranks: int | None = None
    """How many ranks share the data in the target layout; None where the source's layout is kept."""


@dataclass(frozen=True, slots=True)
class Selected:
    """A selection, what was cast, and what a user should know."""

    selection: Selection
    casts: tuple[tuple[str, str, str], ...]
    """Key, dtype before, dtype after."""
    notices: tuple[Notice, ...]


def select(source: Catalogue, request: SelectionRequest) -> Selected:
    """Apply part, globs, names, dtypes and the training-state policy to a catalogue."""
    wanted = _Wanted(request)
    chosen = [i for i, tensor in enumerate(source.tensors) if wanted(tensor.identity.section, tensor.identity.fqn)]
    objects = [item for item in source.objects if wanted(item.identity.section, item.identity.fqn)]
    _require_holdable(objects, request)
    objects, notices = _portable(source, objects, request)
    if not chosen and not objects:
        raise SelectionEmpty(
            f"nothing of {source.uri!r} is left to convert (part {request.part!r})",
            hint="check --part, --include and --exclude against `reshard inspect`",
        )
    named = [_named(source, source.tensors[i], request) for i in chosen]
    require_distinct((tensor.key, source.tensors[i].key) for i, tensor in zip(chosen, named, strict=True))
    if request.format in ("dcp", "rank-safetensors") and source.format not in ("dcp", "torch"):
        order = natural_order([tensor.key for tensor in named])
        chosen, named = [chosen[i] for i in order], [named[i] for i in order]
    casts = tuple(
        (tensor.key, source.tensors[i].dtype.name, tensor.dtype.name)
        for i, tensor in zip(chosen, named, strict=True)
        if tensor.dtype != source.tensors[i].dtype
    )
    selection = Selection(source, tuple(named), np.array(chosen, dtype=np.int64), tuple(objects))
    return Selected(selection, casts, tuple(notices))


class _Wanted:
    """``--part``, ``--include`` and ``--exclude``: exclude wins (decision 8), globs see bare FQNs."""

    def __init__(self, request: SelectionRequest) -> None:
        self._sections = {
            "model": {Section.MODEL},
            "optimizer": {Section.OPTIMIZER},
            "all": set(Section),
        }[request.part]
        self._include = [compile_glob(pattern) for pattern in request.include]
        self._exclude = [compile_glob(pattern) for pattern in request.exclude]

    def __call__(self, section: Section, fqn: str) -> bool:
        if section not in self._sections:
            return False
        bare = strip_wrappers(fqn)
        if any(glob.matches(bare) for glob in self._exclude):
            return False
        return not self._include or any(glob.matches(bare) for glob in self._include)


def _require_holdable(objects: Sequence[ByteObject], request: SelectionRequest) -> None:
    """Objects asked for by ``--part all|optimizer`` must be excluded by hand where a format has no place for them."""
    if not objects or request.format in HOLDS_OBJECTS or request.part == "model":
        return
    raise CannotHold(
        f"{len(objects)} objects that are no tensors can't be held by {request.format}, e.g. {objects[0].key!r}",
        tensor=objects[0].key,
        hint=f"leave them out: {' '.join(_excluding(objects))}; or write a dcp, which holds everything",
    )


def _excluding(objects: Sequence[ByteObject]) -> list[str]:
    """``--exclude`` options that cover these objects, one per first part of their names."""
    heads = sorted({strip_wrappers(item.identity.fqn).split(".")[0] for item in objects})
    return [f"--exclude '{head}.**' --exclude '{head}'" for head in heads]


def _named(source: Catalogue, tensor: Tensor, request: SelectionRequest) -> Tensor:
    dtype = _dtype(tensor, request)
    if request.format == "dcp" and source.format == "dcp":
        return replace(tensor, dtype=dtype)
    if request.format == "dcp":
        key, path = dcp_key(tensor.identity, request.key_prefix)
        return replace(tensor, key=key, path=path, dtype=dtype)
    name = bare_name(tensor.identity)
    return replace(tensor, key=name, path=(name,), dtype=dtype)


def _dtype(tensor: Tensor, request: SelectionRequest) -> DType:
    """Model tensors follow ``--dtype``, optimizer state ``--optimizer-dtype``; step counters are never cast."""
    choice = "keep"
    if tensor.identity.section is Section.MODEL:
        choice = request.dtype
    elif tensor.identity.section is Section.OPTIMIZER and tensor.shape:
        choice = request.optimizer_dtype
    if choice == "keep" or not tensor.dtype.castable:
        return tensor.dtype
    return by_name(DTYPES[choice])


def _portable(
    source: Catalogue, objects: Sequence[ByteObject], request: SelectionRequest
) -> tuple[list[ByteObject], list[Notice]]:
    """Per-rank objects follow only where as many ranks will ask for them (decision 5)."""
    families = per_rank_families(objects)
    if request.data_ranks is None or not families:
        return list(objects), []
    stranded = {key: family for key, family in families.items() if family.ranks != request.data_ranks}
    if not stranded:
        return list(objects), []
    names = ", ".join(sorted({f"{family.family} ({family.ranks} ranks)" for family in stranded.values()}))
    if request.state == "refuse":
        raise StateNotPortable(
            f"per-rank training state can't follow to {request.data_ranks} data-parallel ranks: {names}",
            hint="--state drop leaves it out, so that the trainer starts it anew; or --exclude it",
        )
    notices = [Notice("state_dropped", f"one per rank, {families[key].ranks} ranks wrote it", key) for key in stranded]
    return [item for item in objects if item.key not in stranded], notices
