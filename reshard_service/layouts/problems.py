"""What a check of a layout finds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

_LARGEST_SIZE = 4096


class Severity(StrEnum):
    """How bad a finding is."""

    ERROR = "error"
    """The layout can't be used for this checkpoint or model."""
    WARNING = "warning"
    """Probably not what its author meant."""
    NOTICE = "notice"
    """Allowed and exact, but good to know."""


@dataclass(frozen=True, slots=True)
class LayoutProblem:
    """One finding: ``name`` is a tensor, a rule's pattern or a config key, ``at`` a place in the document or config."""

    code: str
    name: str
    reason: str
    severity: Severity = Severity.ERROR
    at: str | None = None
    fix: str | None = None


def nearest_sizes(wanted: int, fits: Callable[[int], bool], each_side: int = 3) -> str:
    """The sizes nearest to ``wanted`` for which ``fits`` holds, ascending, as text for a person."""
    below = [size for size in range(min(wanted, _LARGEST_SIZE), 0, -1) if fits(size)][:each_side]
    above: list[int] = []
    for size in range(wanted + 1, _LARGEST_SIZE + 1):
        if fits(size):
            above.append(size)
            if len(above) == each_side:
                break
    return ", ".join(str(size) for size in [*reversed(below), *above]) or "none"
