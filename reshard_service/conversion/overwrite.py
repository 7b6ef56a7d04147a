"""What to do where something lies at the target already (decision 19)."""

from __future__ import annotations

import os
from enum import Enum

from reshard_service.conversion.prepare import Prepared
from reshard_service.engine.object_claims import CLAIM_NAME, claimed_plan
from reshard_service.errors import InputRefused, ReshardError, TargetExists
from reshard_service.formats.detect import open_checkpoint
from reshard_service.formats.options import OpenOptions
from reshard_service.manifest import Manifest, manifest_path, parse_manifest


class Decision(Enum):
    """What the conversion does."""

    WRITE = "write"
    REPLACE = "replace"
    SAME = "same"


def decide(prepared: Prepared) -> Decision:
    """Write, replace, or leave what is there because it is this very result; else :class:`TargetExists`."""
    choice = prepared.document.overwrite
    if not _occupied(prepared) or _is_unfinished(prepared):
        return Decision.WRITE
    if choice == "never":
        raise TargetExists(
            f"something lies at {prepared.place.uri!r} already",
            hint="name another target, or say --overwrite same (free if it is this very result) or always",
        )
    if choice == "same":
        _require_same(prepared)
        return Decision.SAME
    _require_checkpoint(prepared)
    return Decision.REPLACE


def _occupied(prepared: Prepared) -> bool:
    place = prepared.place
    if place.local_path is not None and os.path.islink(place.local_path):
        return True  # even if it leads nowhere
    if place.single_file is not None:
        return place.storage.stat(place.single_file) is not None
    status = place.storage.stat("")
    if status is not None and not status.is_dir:
        return True
    return any(entry.name != CLAIM_NAME for entry in place.storage.list_dir())


def _is_unfinished(prepared: Prepared) -> bool:
    """Whether objects of this very conversion lie at the target, left by an attempt that was killed."""
    place = prepared.place
    if place.storage.is_local or claimed_plan(place.storage, place.single_file) != prepared.plan.digest:
        return False
    try:
        _require_same(prepared)
    except TargetExists:
        return True
    return False


def existing_manifest(prepared: Prepared) -> Manifest | None:
    """The manifest at the target; None if there is none, or none of ours."""
    place = prepared.place
    path = manifest_path(place.single_file is not None, place.single_file or "")
    if place.storage.stat(path) is None:
        return None
    try:
        return parse_manifest(place.storage.read_bytes(path), named=path)
    except InputRefused:  # damaged: what lies here is not our input, and proves nothing
        return None


def _require_same(prepared: Prepared) -> None:
    place = prepared.place
    manifest = existing_manifest(prepared)
    if manifest is None or manifest.plan != prepared.plan.digest:
        raise TargetExists(
            f"what lies at {place.uri!r} is not the result of this conversion: source, layout or options differ",
            hint="name another target, or say --overwrite always to replace it",
        )
    for file in manifest.files:
        status = place.storage.stat(file.path)
        if status is None or status.bytes != file.bytes:
            raise TargetExists(
                f"the result at {place.uri!r} is damaged: {file.path!r} "
                + ("is missing" if status is None else f"has {status.bytes} bytes instead of {file.bytes}"),
                file=file.path,
                hint="say --overwrite always to write it again",
            )


def _require_checkpoint(prepared: Prepared) -> None:
    """``always`` replaces checkpoints only, so that a mistyped path never deletes anything else."""
    place = prepared.place
    try:
        open_checkpoint(place.storage.child(place.single_file or ""), OpenOptions())
    except ReshardError as error:
        if existing_manifest(prepared) is None:
            unfinished = not place.storage.is_local and claimed_plan(place.storage, place.single_file) is not None
            raise TargetExists(
                f"{place.uri!r} is not recognised as a checkpoint, so it is not replaced ({error.code})",
                hint="another conversion was interrupted there: repeat that one, or remove what it left"
                if unfinished
                else "remove it yourself if it may go",
            ) from None
