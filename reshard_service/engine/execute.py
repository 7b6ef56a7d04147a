"""Runs a plan with a few threads against a target, checks the source again, and commits."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from reshard_service.engine.checksums import RunningSegments
from reshard_service.engine.mover import Mover
from reshard_service.engine.source import Source
from reshard_service.engine.source_digests import SourceDigests
from reshard_service.engine.targets import Finished, Target, design_bytes_of_files
from reshard_service.errors import Cancelled
from reshard_service.manifest import ALGORITHM, Manifest, ManifestFile, manifest_file
from reshard_service.planning.batches import Batch
from reshard_service.planning.budget import Budget
from reshard_service.planning.plan import Plan

SideFiles = tuple[tuple[str, bytes], ...]


@dataclass(frozen=True, slots=True)
class Execution:
    """What one run did. ``adopted_files`` were finished by an earlier attempt."""

    read_bytes: int
    written_bytes: int
    adopted_files: int
    seconds: float
    manifest: Manifest


def execute(
    plan: Plan,
    target: Target,
    budget: Budget,
    *,
    side_files: SideFiles = (),
    algorithm: str = ALGORITHM,
    progress: Callable[[int], None] = lambda written: None,
    phase: Callable[[str], None] = lambda name: None,
    cancelled: Callable[[], bool] = lambda: False,
    check: Callable[[Manifest], None] = lambda manifest: None,
) -> Execution:
    """Copy, verify the source is unchanged, commit. On any error the target cleans up and nothing is visible."""
    started = time.monotonic()
    source = Source(plan.source, SourceDigests(plan.source))
    try:
        adopted = target.begin(plan.design, source, algorithm)
        source.scratch = target.scratch
        phase("copying")
        target.write_fixed()
        skip = frozenset(adopted)
        progress(sum(plan.design.files[number].bytes for number in skip))
        _run_batches(plan, target, source, budget, progress, cancelled, skip, algorithm)
        phase("verifying")
        source.check_unchanged()
        for path, data in side_files:
            target.write_small(path, data)
        closing = [(file.path, file.make()) for file in plan.design.closing]
        finished = target.finished()
        _require_digests(plan, finished)
        manifest = Manifest(
            format=plan.design.format,
            algorithm=algorithm,
            plan=plan.digest,
            files=tuple(
                manifest_file(file.path, file.bytes, finished[number], algorithm)
                for number, file in enumerate(plan.design.files)
            )
            + tuple(_small_file(path, data, algorithm) for path, data in (*side_files, *closing)),
            left_out=plan.design.left_out,
            world=plan.design.world,
        )
        check(manifest)
        phase("committing")
        target.commit(manifest.to_bytes(), closing)
    except BaseException as error:
        target.fail(error)
        raise
    finally:
        source.close()
    return Execution(
        read_bytes=source.read_bytes,
        written_bytes=sum(file.bytes for file in manifest.files),
        adopted_files=len(adopted),
        seconds=time.monotonic() - started,
        manifest=manifest,
    )


def _require_digests(plan: Plan, finished: Finished) -> None:
    """Every byte that is no padding has a digest; anything else would be a manifest that proves nothing."""
    for number, claimed in enumerate(design_bytes_of_files(plan.design)):
        digested = sum(length for _, length, _ in finished[number])
        if digested != claimed:
            raise AssertionError(f"{plan.design.files[number].path!r}: {digested} of {claimed} bytes have a digest")


def _small_file(path: str, data: bytes, algorithm: str) -> ManifestFile:
    running = RunningSegments(0, algorithm)
    running.add(0, memoryview(data))
    return manifest_file(path, len(data), running.finish(), algorithm)


def _run_batches(
    plan: Plan,
    target: Target,
    source: Source,
    budget: Budget,
    progress: Callable[[int], None],
    cancelled: Callable[[], bool],
    skip: frozenset[int],
    algorithm: str,
) -> None:
    """Threads take batches from one queue; the first error stops all of them and is raised here."""
    queue: deque[Batch] = deque(batch for part in plan.parts for batch in part)
    errors: list[BaseException] = []
    stop = threading.Event()

    def work() -> None:
        mover: Mover | None = None
        try:
            mover = Mover(
                plan,
                source,
                target.sink(),
                budget,
                progress,
                lambda: stop.is_set() or cancelled(),
                skip,
                algorithm,
            )
            while not stop.is_set():
                try:
                    batch = queue.popleft()
                except IndexError:
                    return
                mover.run(batch)
        except BaseException as error:
            errors.append(error)
            stop.set()
        finally:
            if mover is not None:
                mover.close()

    threads = [
        threading.Thread(target=work, name=f"mover-{number}", daemon=True)
        for number in range(min(budget.threads, max(1, len(queue))))
    ]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)
    finally:
        stop.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    real = [error for error in errors if not isinstance(error, Cancelled)] or errors
    if real:
        raise real[0]
