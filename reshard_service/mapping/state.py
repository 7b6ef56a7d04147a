"""Training state that is no tensor of the model: what may follow into another world (decision 5)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from reshard_service.catalogue import ByteObject, Section

_PER_RANK = re.compile(
    r"(?:^|[._/])(dp_rank|rank|rng_state|rng_states|random_states?|random_state)[_.]?(\d+)(?=$|[._/])"
)


class Policy(StrEnum):
    """What happens to an object when the world changes."""

    KEEP = "keep"
    """The same for every rank: kept byte for byte."""
    PER_RANK = "per_rank"
    """One per rank: follows only where the number of ranks stays the same."""


@dataclass(frozen=True, slots=True)
class PerRank:
    """Objects of one kind that exist once per rank: ``dataloader.dp_rank_*`` and the like."""

    family: str
    ranks: int
    """How many ranks have one."""


def policy_of(key: str) -> Policy:
    """The policy of one object, from its key."""
    return Policy.PER_RANK if _PER_RANK.search(key) else Policy.KEEP


def per_rank_families(objects: Sequence[ByteObject]) -> dict[str, PerRank]:
    """For every per-rank object's key the family it belongs to."""
    ranks: dict[str, set[int]] = {}
    family_of: dict[str, str] = {}
    for item in objects:
        match = _PER_RANK.search(item.key) if item.identity.section is Section.EXTRA else None
        if match is not None:
            family = family_of[item.key] = f"{item.key[: match.start(2)]}*"
            ranks.setdefault(family, set()).add(int(match.group(2)))
    return {key: PerRank(family, len(ranks[family])) for key, family in family_of.items()}
