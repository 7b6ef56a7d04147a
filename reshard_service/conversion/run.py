"""Runs a job: each target is planned, refused or executed, verified and committed by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from reshard_service.catalogue import Catalogue, Notice
from reshard_service.conversion.overwrite import Decision, decide
from reshard_service.conversion.prepare import Prepared, open_source, prepare_target
from reshard_service.documents.job import JobDocument, TargetDocument
from reshard_service.engine.execute import execute
from reshard_service.engine.staging import Staging
from reshard_service.engine.targets import LocalTarget, ObjectTarget, Target
from reshard_service.errors import Cancelled, InputRefused, ReshardError
from reshard_service.manifest import Manifest
from reshard_service.planning.plan import require_sound
from reshard_service.storage.uri import CLI_POLICY, UriPolicy
from reshard_service.verify.check import check_staged


class Watcher(Protocol):
    """Told what happens, so that a person can be shown."""

    def begin(self, target: TargetDocument, total_bytes: int) -> None: ...

    def phase(self, name: str) -> None: ...

    def advance(self, written: int) -> None: ...


class Silent:
    """Watches nothing."""

    def begin(self, target: TargetDocument, total_bytes: int) -> None:
        pass

    def phase(self, name: str) -> None:
        pass

    def advance(self, written: int) -> None:
        pass


@dataclass(frozen=True, slots=True)
class RankBytes:
    """What one rank of the target layout will read when it resumes: from its own file, and from others'."""

    rank: int
    own_bytes: int
    foreign_bytes: int


@dataclass(frozen=True, slots=True)
class TargetReport:
    """What became of one target. ``status``: written, or same (it was there already, nothing was done)."""

    uri: str
    format: str
    status: str
    tensors: int
    read_bytes: int
    written_bytes: int
    files: int
    adopted_files: int
    seconds: float
    plan: str
    casts: tuple[tuple[str, str, str], ...] = ()
    left_out: tuple[str, ...] = ()
    notices: tuple[Notice, ...] = ()
    ranks: tuple[RankBytes, ...] = ()


@dataclass(frozen=True, slots=True)
class JobReport:
    """What became of a job. A target that failed is in ``errors`` and not in ``targets``."""

    source: str
    source_format: str
    targets: tuple[TargetReport, ...]
    errors: tuple[tuple[str, ReshardError], ...] = field(default=())


def convert(
    job: JobDocument,
    *,
    policy: UriPolicy = CLI_POLICY,
    watcher: Watcher | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> JobReport:
    """Run a job. With one target its error is raised; with several each commits alone and errors are reported."""
    watcher = watcher or Silent()
    source = open_source(job.source, policy)
    reports: list[TargetReport] = []
    errors: list[tuple[str, ReshardError]] = []
    for document in job.targets:
        try:
            watcher.phase("planning")
            prepared = prepare_target(job, document, source, policy)
            reports.append(_convert_one(prepared, watcher, cancelled))
        except ReshardError as error:
            if len(job.targets) == 1 or isinstance(error, Cancelled):
                raise
            errors.append((document.uri, error))
    return JobReport(source.uri, source.format, tuple(reports), tuple(errors))


def _convert_one(prepared: Prepared, watcher: Watcher, cancelled: Callable[[], bool]) -> TargetReport:
    require_sound(prepared.plan)
    if (path := prepared.place.local_path) is not None:
        Staging(path, prepared.plan.digest, single_file=prepared.place.single_file is not None).clear_rubbish()
    decision = decide(prepared)
    if decision is Decision.SAME:
        return _report(prepared, "same")
    target = _target(prepared, replace=decision is Decision.REPLACE)
    watcher.begin(prepared.document, prepared.plan.write_bytes)
    execution = execute(
        prepared.plan,
        target,
        prepared.budget,
        side_files=prepared.side_files,
        algorithm=prepared.document.digest,
        progress=watcher.advance,
        phase=watcher.phase,
        cancelled=cancelled,
        check=_checker(prepared, target),
    )
    return _report(
        prepared,
        "written",
        read_bytes=execution.read_bytes,
        written_bytes=execution.written_bytes,
        adopted_files=execution.adopted_files,
        seconds=execution.seconds,
        files=len(execution.manifest.files),
    )


def _target(prepared: Prepared, *, replace: bool) -> Target:
    place, digest = prepared.place, prepared.plan.digest
    path = place.local_path
    if path is not None:
        return LocalTarget(path, digest, place.single_file is not None, replace)
    return ObjectTarget(place.storage, digest, place.single_file is not None, replace)


def _checker(prepared: Prepared, target: Target) -> Callable[[Manifest], None]:
    """Re-read what was written before it becomes visible, as much as ``--verify`` says."""
    choice = prepared.document.verify
    data_files = len(prepared.design.files)
    return lambda manifest: check_staged(target.written(), manifest, data_files, choice)


def _report(
    prepared: Prepared,
    status: str,
    *,
    read_bytes: int = 0,
    written_bytes: int = 0,
    adopted_files: int = 0,
    seconds: float = 0.0,
    files: int = 0,
) -> TargetReport:
    return TargetReport(
        uri=prepared.place.uri,
        format=prepared.document.format,
        status=status,
        tensors=len(prepared.design.tensors),
        read_bytes=read_bytes,
        written_bytes=written_bytes,
        files=files,
        adopted_files=adopted_files,
        seconds=seconds,
        plan=prepared.plan.digest,
        casts=prepared.selected.casts,
        left_out=prepared.design.left_out,
        notices=prepared.notices,
        ranks=rank_bytes(prepared),
    )


def rank_bytes(prepared: Prepared) -> tuple[RankBytes, ...]:
    """Own-file and foreign bytes of every rank of a DCP target (decision 13)."""
    layout, design = prepared.layout, prepared.design
    if layout is None or prepared.document.format != "dcp":
        return ()
    needed = np.zeros(layout.world, dtype=np.int64)
    shapes = {tensor.identity.fqn: tensor.shape for tensor in design.tensors if tensor.identity.slot is None}
    volume_of: dict[int, np.ndarray[tuple[int], np.dtype[np.int64]]] = {}
    for tensor in design.tensors:
        fqn = tensor.identity.fqn
        parameter = shapes.get(fqn) if tensor.identity.slot is not None else None
        holdings = layout.holdings(fqn, tensor.shape, parameter_shape=parameter)
        if id(holdings) not in volume_of:
            volumes = holdings.sizes.prod(axis=1) if holdings.sizes.shape[1] else np.ones(len(holdings.rank))
            volume_of[id(holdings)] = np.bincount(holdings.rank, weights=volumes, minlength=layout.world).astype(
                np.int64
            )
        needed += volume_of[id(holdings)] * tensor.dtype.itemsize
    own = np.zeros(layout.world, dtype=np.int64)
    rank_of_file = [int(file.path.removeprefix("__").split("_")[0]) for file in design.files]
    itemsizes = np.array([tensor.dtype.itemsize for tensor in design.tensors], dtype=np.int64)
    np.add.at(own, np.array(rank_of_file)[design.chunks.file], design.chunks.nbytes_of_rows(itemsizes))
    return tuple(
        RankBytes(rank, min(mine, total), max(0, total - mine))
        for rank, (mine, total) in enumerate(zip(own.tolist(), needed.tolist(), strict=True))
    )


def require_convertible(source: Catalogue) -> None:
    """Raise for a source that can be inspected but not converted."""
    if not source.tensors and not source.objects:
        raise InputRefused(f"{source.uri!r} holds no tensors")
