"""Which key a tensor gets in a target (decision 2)."""

from __future__ import annotations

import re
from collections.abc import Iterable

from reshard_service.catalogue import Identity, Path, Section
from reshard_service.errors import NameCollision
from reshard_service.identity import strip_wrappers

_NUMBER = re.compile(r"(\d+)")


def bare_name(identity: Identity) -> str:
    """Name in the safetensors family: the bare FQN, ``optimizer.state.<fqn>.<slot>`` for optimizer slots."""
    fqn = strip_wrappers(identity.fqn)
    if identity.section is Section.OPTIMIZER and identity.slot is not None:
        return f"optimizer.state.{fqn}.{identity.slot}"
    return fqn


def dcp_key(identity: Identity, key_prefix: str | None) -> tuple[str, Path]:
    """Key and ``planner_data`` path in a DCP made from another format.

    Bare keys, as torch's default planner gives for a flat state dict; ``key_prefix`` nests the model's tensors.
    Optimizer slots get the path of a nested optimizer, which has the same key and says where the parameter's name ends.
    """
    name = bare_name(identity)
    if identity.section is Section.OPTIMIZER and identity.slot is not None:
        return name, ("optimizer", "state", strip_wrappers(identity.fqn), identity.slot)
    if key_prefix and identity.section is Section.MODEL:
        return f"{key_prefix}.{name}", (key_prefix, name)
    return name, (name,)


def natural_order(names: Iterable[str]) -> list[int]:
    """Positions of ``names`` in the order of a model's modules: ``layers.2`` before ``layers.10``."""
    keys = [tuple(int(p) if p.isdigit() else p for p in _NUMBER.split(name)) for name in names]
    return sorted(range(len(keys)), key=lambda i: keys[i])


def require_distinct(named: Iterable[tuple[str, str]]) -> None:
    """Raise :class:`NameCollision` if two source keys get one target key; pairs are (target key, source key)."""
    seen: dict[str, str] = {}
    for target, source in named:
        other = seen.setdefault(target, source)
        if other != source:
            raise NameCollision(
                f"tensors {other!r} and {source!r} would both be named {target!r}",
                tensor=source,
                hint="leave one out with --exclude",
            )
