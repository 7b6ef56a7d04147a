"""Options that several commands share, and the job document that they make."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reshard_service.errors import UsageError

if TYPE_CHECKING:
    from reshard_service.documents.job import JobDocument

Json = Annotated[bool, typer.Option("--json", help="one JSON document on stdout, nothing else")]
From = Annotated[
    str | None, typer.Option("--from", metavar="FORMAT", help="format of the source, where detection errs")
]
SourceLayout = Annotated[str | None, typer.Option(metavar="SPEC", help="layout that wrote the source")]
Producer = Annotated[str | None, typer.Option(metavar="NAME", help="what wrote the source, where keys have no paths")]
Step = Annotated[str | None, typer.Option(metavar="latest|N", help="which step of a run folder")]
World = Annotated[int | None, typer.Option(metavar="N", help="how many ranks wrote the source")]
Strict = Annotated[bool, typer.Option("--strict", help="what can't be proved complete is an error")]
KeyPrefix = Annotated[str | None, typer.Option(metavar="P", help="key under which the model lies, or shall lie")]
Include = Annotated[list[str] | None, typer.Option(metavar="GLOB", help="only these FQNs: * in one part, ** across")]
Exclude = Annotated[list[str] | None, typer.Option(metavar="GLOB", help="not these FQNs; wins over --include")]


def source_document(
    uri: str,
    *,
    format: str | None,
    layout: str | None,
    producer: str | None,
    key_prefix: str | None,
    step: str | None,
    world: int | None,
    strict: bool,
    repair: bool = False,
    wait_complete: bool = False,
) -> dict[str, Any]:
    """The source part of a job document, from options."""
    return {
        "uri": uri,
        "format": format,
        "layout": layout,
        "producer": producer,
        "key_prefix": key_prefix,
        "step": step,
        "world": world,
        "strict": strict,
        "repair": repair,
        "wait_complete": wait_complete,
    }


def job_from_options(
    src: Annotated[str | None, typer.Argument(help="checkpoint: path or URI", metavar="SRC")] = None,
    dst: Annotated[str | None, typer.Argument(help="target: path or URI", metavar="DST")] = None,
    to: Annotated[
        str | None,
        typer.Option(metavar="FORMAT", help="safetensors, dcp, dcp-safetensors or rank-safetensors"),
    ] = None,
    layout: Annotated[
        str | None, typer.Option(metavar="SPEC", help="fsdp=4,tp=2,… or a layout document's path")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="PATH", help="model folder whose config and tokenizer are carried along")
    ] = None,
    job: Annotated[
        Path | None, typer.Option(metavar="FILE", help="a job document instead of SRC, DST, options")
    ] = None,
    part: Annotated[str | None, typer.Option(metavar="model|optimizer|all")] = None,
    include: Include = None,
    exclude: Exclude = None,
    dtype: Annotated[str, typer.Option(metavar="bf16|fp16|fp32|keep", help="cast floating model tensors")] = "keep",
    optimizer_dtype: Annotated[str, typer.Option(metavar="bf16|fp16|fp32|keep", help="cast optimizer state")] = "keep",
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="largest safetensors file, e.g. 5GB")] = "5GB",
    workers: Annotated[int | None, typer.Option(metavar="N", help="balance the work over N workers")] = None,
    threads: Annotated[int | None, typer.Option(metavar="N", help="threads of a worker")] = None,
    verify: Annotated[str, typer.Option(metavar="none|sample|full", help="what to read again")] = "sample",
    names: Annotated[str | None, typer.Option(metavar="hub|runtime", help="whose tensor names the target uses")] = None,
    overwrite: Annotated[str, typer.Option(metavar="never|same|always", help="if the target exists")] = "never",
    from_format: From = None,
    source_layout: SourceLayout = None,
    producer: Producer = None,
    key_prefix: KeyPrefix = None,
    step: Step = None,
    world: World = None,
    strict: Strict = False,
    repair: Annotated[bool, typer.Option("--repair", help="mend chunk geometry that torch recorded wrong")] = False,
    wait_complete: Annotated[
        bool, typer.Option("--wait-complete", help="wait while the source is still being written")
    ] = False,
    state: Annotated[
        str, typer.Option(metavar="drop|refuse", help="per-rank training state in a new world")
    ] = "refuse",
    digest: Annotated[str, typer.Option(metavar="xxh3-128|sha256", help="digest of the manifest")] = "xxh3-128",
) -> JobDocument:
    """The job that the options describe, checked."""
    stated = dict(locals())
    from reshard_service.documents.job import job_document, read_job_document

    if job is not None:
        if src is not None or dst is not None:
            raise UsageError("--job names source and targets itself; leave SRC and DST out")
        _require_alone(stated)
        return read_job_document(job)
    if src is None or dst is None:
        raise UsageError("SRC and DST are needed", hint="reshard convert SRC DST --to FORMAT, or --job FILE")
    if to is None:
        if not dst.rstrip("/").endswith(".safetensors"):
            raise UsageError(
                f"--to is needed: {dst!r} does not end in .safetensors",
                hint="--to safetensors, dcp, dcp-safetensors or rank-safetensors",
            )
        to = "safetensors"
    target = {
        "uri": dst,
        "format": to,
        "layout": layout,
        "part": part,
        "include": include or [],
        "exclude": exclude or [],
        "dtype": dtype,
        "optimizer_dtype": optimizer_dtype,
        "max_shard_size": max_shard_size,
        "key_prefix": key_prefix,
        "model": model,
        "names": names,
        "overwrite": overwrite,
        "verify": verify,
        "state": state,
        "digest": digest,
    }
    source = source_document(
        src,
        format=from_format,
        layout=source_layout,
        producer=producer,
        key_prefix=key_prefix,
        step=step,
        world=world,
        strict=strict,
        repair=repair,
        wait_complete=wait_complete,
    )
    return job_document(
        {"source": source, "targets": [target], "options": {"workers": workers, "threads": threads}}, "options"
    )


def _require_alone(stated: dict[str, Any]) -> None:
    """Nothing beside ``--job``: an option that the document doesn't know of would do nothing."""
    parameters = inspect.signature(job_from_options).parameters
    others = [
        "--" + ("from" if name == "from_format" else name.replace("_", "-"))
        for name, parameter in parameters.items()
        if name != "job" and stated[name] != parameter.default and stated[name] != []
    ]
    if others:
        raise UsageError(
            f"--job says everything itself; it does not go with {', '.join(others)}",
            hint="write them into the document",
        )
