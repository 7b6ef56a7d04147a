"""Folders of one run's steps (``step-100/``, ``checkpoint-200/``, ``iter_0000300/``): which one is meant."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from reshard_service.catalogue import Catalogue, Notice
from reshard_service.errors import (
    AmbiguousSource,
    CheckpointIncomplete,
    NotACheckpoint,
    SourceNotFound,
    UsageError,
)
from reshard_service.storage.base import DirEntry, Storage

if TYPE_CHECKING:
    from reshard_service.formats.options import OpenOptions

_STEP = re.compile(r"(?:(?:step|checkpoint|ckpt|global_?step|iter(?:ation)?|epoch)[-_=]?)?(\d{1,18})\Z")
"""torchtitan ``step-N``, Trainer ``checkpoint-N``, DeepSpeed ``global_stepN``, verl ``global_step_N``, Megatron
``iter_000000N``, and bare numbers."""


def step_folders(entries: Sequence[DirEntry]) -> dict[int, str]:
    """Step number to folder name, ascending."""
    found = {int(match[1]): entry.name for entry in entries if entry.is_dir and (match := _STEP.match(entry.name))}
    return dict(sorted(found.items()))


def choose_a_step(storage: Storage, steps: dict[int, str]) -> AmbiguousSource:
    """The error that asks for ``--step``."""
    return AmbiguousSource(
        f"{storage.uri!r} is a run folder with {len(steps)} steps: {_some(list(steps.values()))}",
        hint="choose with --step latest or --step N, or name one of the folders",
    )


def mention_steps(catalogue: Catalogue, steps: dict[int, str]) -> Catalogue:
    """The catalogue of a folder that has weights of its own, with a notice of the steps beside them."""
    if not steps:
        return catalogue
    reason = f"the folder's own weights are read; beside them lie the steps {_some(list(steps.values()))} (--step)"
    return replace(catalogue, notices=(*catalogue.notices, Notice("steps_beside", reason)))


def open_step(
    storage: Storage,
    entries: Sequence[DirEntry],
    options: OpenOptions,
    open_checkpoint: Callable[[Storage, OpenOptions], Catalogue],
) -> Catalogue:
    """Open the step that ``options.step`` names; ``latest`` is the highest one that is complete."""
    steps = step_folders(entries)
    if not steps:
        raise UsageError(
            f"--step {options.step} was given, but {storage.uri!r} has no folders of steps",
            hint="leave --step out",
        )
    inner = replace(options, step=None)
    if options.step != "latest":
        if options.step is None or not options.step.isdecimal() or len(options.step) > 18:
            raise UsageError(f"--step takes 'latest' or a number, not {options.step!r}")
        name = steps.get(int(options.step))
        if name is None:
            raise SourceNotFound(
                f"{storage.uri!r} has no step {options.step}; it has {_some([str(step) for step in steps])}"
            )
        return open_checkpoint(storage.child(name), inner)
    skipped: list[Notice] = []
    for name in reversed(steps.values()):
        try:
            catalogue = open_checkpoint(storage.child(name), inner)
        except (CheckpointIncomplete, NotACheckpoint) as error:
            skipped.append(Notice("step_skipped", error.message, name))
            continue
        return replace(catalogue, notices=(*skipped, *catalogue.notices))
    raise CheckpointIncomplete(
        f"none of the {len(steps)} steps of {storage.uri!r} is complete; the latest: {skipped[0].reason}"
    )


def _some(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 12 else f"{', '.join(names[:4])}, …, {', '.join(names[-4:])}"
