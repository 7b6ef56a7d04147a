"""The error tree: what can go wrong, under one stable code each, with the way out in the message.

An error says what was found, where, which rule it breaks and what to do. The same ``code`` appears on the
command line, in ``--json`` output and in ``docs/errors.md``. ``exit_code`` is the command line's: 2 usage,
3 the input was refused, 4 the target or the environment failed, 5 cancelled or timed out.
"""

from __future__ import annotations

from typing import ClassVar


class ReshardError(Exception):
    """Base of every error this project raises on purpose."""

    code: ClassVar[str] = "internal"
    exit_code: ClassVar[int] = 4
    retryable: ClassVar[bool] = False

    def __init__(
        self, message: str, *, tensor: str | None = None, file: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.tensor = tensor
        self.file = file
        self.hint = hint

    def __str__(self) -> str:
        where = "".join(
            f" [{kind} {name!r}]"
            for kind, name in (("tensor", self.tensor), ("file", self.file))
            if name is not None and name not in self.message
        )
        fix = f" — {self.hint}" if self.hint else ""
        return f"{self.code}: {self.message}{where}{fix}"


# --- 2: usage -----------------------------------------------------------------------------------------------


class UsageError(ReshardError):
    """The request itself makes no sense: contradictory or missing options."""

    code = "usage"
    exit_code = 2


class DocumentInvalid(UsageError):
    """A job or layout document does not follow its schema."""

    code = "document_invalid"


class UriRefused(UsageError):
    """A URI has a form we don't accept, or points where the policy in force does not allow."""

    code = "uri_refused"


class LayoutRulesMissing(UsageError):
    """A layout splits along tp, ep or pp but nothing says which tensors are split how."""

    code = "layout_rules_missing"


# --- 3: the input is refused --------------------------------------------------------------------------------


class InputRefused(ReshardError):
    """Base of everything wrong with the source, or with what is asked of it."""

    code = "input_refused"
    exit_code = 3


class SourceNotFound(InputRefused):
    """Nothing lies at the source URI."""

    code = "source_not_found"


class NotACheckpoint(InputRefused):
    """No format we know is recognised at the source URI."""

    code = "not_a_checkpoint"


class AmbiguousSource(InputRefused):
    """Several checkpoints, or several readings of one, and the user has to choose."""

    code = "ambiguous_source"


class CheckpointIncomplete(InputRefused):
    """The checkpoint is half written: files or the completing marker are missing."""

    code = "checkpoint_incomplete"


class SourceCorrupt(InputRefused):
    """Bytes contradict the rules of their format or their checksum."""

    code = "source_corrupt"


class UnsafeSource(InputRefused):
    """The source tries something no checkpoint needs: code in a pickle, a path out of its folder, a bomb."""

    code = "unsafe_source"


class UnsupportedSource(InputRefused):
    """Well-formed, but holds something that can't be converted exactly."""

    code = "unsupported_source"


class CoverageError(InputRefused):
    """The chunks of a tensor leave a gap, overlap, or reach out of the tensor's shape."""

    code = "coverage"


class GeometryWrong(InputRefused):
    """Recorded chunk sizes contradict the stored payload sizes (torch 2.13, uneven FSDP x TP)."""

    code = "geometry_wrong"


class NameCollision(InputRefused):
    """Two tensors of the source get the same name in the target."""

    code = "name_collision"


class SelectionEmpty(InputRefused):
    """Nothing is left to convert after --part, --include and --exclude."""

    code = "selection_empty"


class CannotHold(InputRefused):
    """The target format has no way to hold this tensor or object."""

    code = "target_cannot_hold"


class TiedWeightsDiffer(InputRefused):
    """The config says two weights are tied, but their bytes differ."""

    code = "tied_weights_differ"


class StateNotPortable(InputRefused):
    """Per-rank training state can't follow into a layout with another world (see --state)."""

    code = "state_not_portable"


class LayoutInvalid(InputRefused):
    """A layout contradicts itself or the tensors it is applied to."""

    code = "layout_invalid"


class SourceChanged(InputRefused):
    """A source file changed between planning and the end of reading."""

    code = "source_changed"


# --- 4: target and environment ------------------------------------------------------------------------------


class TargetError(ReshardError):
    """Base of everything that goes wrong at the target or around us."""

    code = "target_failed"


class TargetExists(TargetError):
    """Something lies at the target and --overwrite does not allow replacing it."""

    code = "target_exists"


class TargetBusy(TargetError):
    """Another process is writing this target."""

    code = "target_busy"
    retryable = True


class TargetFull(TargetError):
    """No space left for the target."""

    code = "target_full"


class TargetReadOnly(TargetError):
    """The target can't be written: permissions or a read-only file system."""

    code = "target_read_only"


class StorageFailed(TargetError):
    """Reading or writing failed for a reason outside the data: I/O error, network, missing credentials."""

    code = "storage_failed"
    retryable = True


class StorageDenied(StorageFailed):
    """The store refused access: wrong, missing or expired credentials, or no permission."""

    code = "storage_denied"
    retryable = False


class EnvironmentUnfit(TargetError):
    """This installation lacks something the request needs (an extra, a driver, an operating system call)."""

    code = "environment_unfit"


# --- 5: cancelled -------------------------------------------------------------------------------------------


class Cancelled(ReshardError):
    """The user or a deadline stopped the work."""

    code = "cancelled"
    exit_code = 5


def all_errors() -> list[type[ReshardError]]:
    """Every class of the tree, parents first: what ``docs/errors.md`` must document."""
    found: list[type[ReshardError]] = []
    queue: list[type[ReshardError]] = [ReshardError]
    while queue:
        error = queue.pop(0)
        found.append(error)
        queue.extend(error.__subclasses__())
    return found
