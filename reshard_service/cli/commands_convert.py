"""``reshard convert`` and ``reshard plan``: the same options, the same preparation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from reshard_service.cli.options import Json, job_from_options
from reshard_service.cli.output import (
    ProgressBar,
    error_document,
    human_bytes,
    notice_document,
    print_json,
    print_notices,
    say,
)

if TYPE_CHECKING:
    from reshard_service.conversion import JobReport, Prepared, TargetReport
    from reshard_service.documents.job import JobDocument


def _job_command(run: Callable[[JobDocument, bool], int]) -> Callable[..., int]:
    """A command with the options of :func:`job_from_options` and ``--json``."""

    @functools.wraps(job_from_options)
    def command(*, json: bool = False, **options: Any) -> int:
        return run(job_from_options(**options), json)

    import inspect

    # What it gives is no option, and its type would be imported before a command is known to need it.
    signature = inspect.signature(job_from_options, eval_str=True, locals={"JobDocument": object})
    parameters = [
        *signature.parameters.values(),
        inspect.Parameter("json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Json),
    ]
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del command.__wrapped__
    command.__doc__ = run.__doc__
    return command


def _plan(job: JobDocument, json: bool) -> int:
    """Dry run: what would be read and written, by whom, in how much memory, and what stands in the way."""
    from reshard_service.conversion import open_source, prepare_target

    source = open_source(job.source)
    prepared = [prepare_target(job, target, source) for target in job.targets]
    if json:
        documents = [plan_document(one) for one in prepared]
        print_json(
            {
                "source": source.uri,
                "format": source.format,
                **documents[0],
                "read_bytes": sum(one["read_bytes"] for one in documents),
                "write_bytes": sum(one["write_bytes"] for one in documents),
                "peak_memory_bytes": max(one["peak_memory_bytes"] for one in documents),
                "problems": [problem for one in documents for problem in one["problems"]],
                "targets": documents,
            }
        )
    else:
        for one in prepared:
            _say_plan(one)
    return 1 if any(one.plan.problems for one in prepared) else 0


def plan_document(prepared: Prepared) -> dict[str, Any]:
    """One target of ``plan --json``."""
    plan, files = prepared.plan, prepared.output_files()
    return {
        "uri": prepared.place.uri,
        "to": prepared.document.format,
        "plan": plan.digest,
        "tensors": len(plan.design.tensors),
        "read_bytes": plan.read_bytes,
        "write_bytes": sum(file.bytes for file in files),
        "files": [{"path": file.path, "bytes": file.bytes} for file in files],
        "workers": [
            {"rank": share.rank, "read_bytes": share.read_bytes, "write_bytes": share.write_bytes}
            for share in plan.shares()
        ],
        "peak_memory_bytes": plan.peak_memory_bytes,
        "problems": [notice_document(problem) for problem in plan.problems],
        "notices": [notice_document(notice) for notice in prepared.notices],
        "casts": [{"name": name, "from": before, "to": after} for name, before, after in prepared.selected.casts],
        "left_out": list(plan.design.left_out),
    }


def _say_plan(prepared: Prepared) -> None:
    plan = prepared.plan
    files = prepared.output_files()
    say(f"{plan.source.uri} ({plan.source.format}) → {prepared.place.uri} ({prepared.document.format})")
    if prepared.layout is not None:
        say(f"  layout    {prepared.layout.world} ranks")
    say(f"  tensors   {len(plan.design.tensors)}, {len(plan.design.chunks)} chunks")
    say(f"  reads     {human_bytes(plan.read_bytes)}")
    largest = max((file.bytes for file in files), default=0)
    written = human_bytes(sum(file.bytes for file in files))
    say(f"  writes    {written} in {len(files)} files, the largest {human_bytes(largest)}")
    say(f"  memory    {human_bytes(plan.peak_memory_bytes)} at most, per worker")
    for share in plan.shares() if len(plan.shares()) > 1 else ():
        say(f"  worker {share.rank:<3} reads {human_bytes(share.read_bytes)}, writes {human_bytes(share.write_bytes)}")
    if prepared.selected.casts:
        say(f"  casts     {len(prepared.selected.casts)} tensors")
    if plan.design.left_out:
        say(f"  left out  {len(plan.design.left_out)} objects that this format can't hold")
    print_notices(prepared.notices, "Worth knowing")
    print_notices(plan.problems, "Problems")


def _convert(job: JobDocument, json: bool) -> int:
    """Convert a checkpoint here and now; the target appears whole or not at all."""
    from reshard_service.conversion import convert

    with ProgressBar(enabled=not json) as bar:
        report = convert(job, watcher=bar)
    if json:
        print_json(report_document(report))
    else:
        for target in report.targets:
            _say_report(target)
        for uri, error in report.errors:
            say(f"{uri}: {error}")
    return max((error.exit_code for _, error in report.errors), default=0)


def report_document(report: JobReport) -> dict[str, Any]:
    """The document of ``convert --json``."""
    return {
        "source": report.source,
        "format": report.source_format,
        "targets": [_target_document(target) for target in report.targets],
        "errors": [{"uri": uri, **error_document(error)} for uri, error in report.errors],
    }


def _target_document(target: TargetReport) -> dict[str, Any]:
    return {
        "uri": target.uri,
        "format": target.format,
        "status": target.status,
        "tensors": target.tensors,
        "read_bytes": target.read_bytes,
        "written_bytes": target.written_bytes,
        "files": target.files,
        "adopted_files": target.adopted_files,
        "seconds": round(target.seconds, 3),
        "plan": target.plan,
        "casts": [{"name": name, "from": before, "to": after} for name, before, after in target.casts],
        "left_out": list(target.left_out),
        "notices": [notice_document(notice) for notice in target.notices],
        "ranks": [
            {"rank": rank.rank, "own_bytes": rank.own_bytes, "foreign_bytes": rank.foreign_bytes}
            for rank in target.ranks
        ],
    }


def _say_report(target: TargetReport) -> None:
    if target.status == "same":
        say(f"{target.uri}: this very result is there already, nothing to do")
        return
    rate = human_bytes(target.written_bytes / target.seconds) if target.seconds else "?"
    say(
        f"{target.uri}: {target.tensors} tensors, {human_bytes(target.written_bytes)} in {target.files} files, "
        f"{target.seconds:.1f} s ({rate}/s)"
    )
    if target.adopted_files:
        say(f"  {target.adopted_files} files were finished by an earlier run")
    if target.casts:
        say(
            f"  cast {len(target.casts)} tensors, e.g. {target.casts[0][0]} {target.casts[0][1]} → {target.casts[0][2]}"
        )
    if target.left_out:
        say(f"  left out {len(target.left_out)} objects that this format can't hold, e.g. {target.left_out[0]}")
    print_notices(target.notices, "Worth knowing")


plan_command = _job_command(_plan)
convert_command = _job_command(_convert)
