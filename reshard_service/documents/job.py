"""The job document: what the command line builds, the service accepts and the report repeats. Version 1."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from reshard_service.documents.layout import GlobText, LayoutDocument
from reshard_service.documents.reading import document_data, read_document_text, validated

SourceFormat = Literal["safetensors", "dcp", "dcp-safetensors", "rank-safetensors", "torch"]
TargetFormat = Literal["safetensors", "dcp", "dcp-safetensors", "rank-safetensors"]
Part = Literal["model", "optimizer", "all"]
DTypeChoice = Literal["bf16", "fp16", "fp32", "keep"]
Overwrite = Literal["never", "same", "always"]
Verify = Literal["none", "sample", "full"]

_SIZE = re.compile(r"([0-9]{1,15})(?:\.([0-9]{1,3}))?\s*(B|KB|MB|GB|TB|KIB|MIB|GIB|TIB)?", re.IGNORECASE)
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(text: str) -> int:
    """Bytes meant by ``5GB`` (5·10⁹) or ``5GiB`` (5·2³⁰); raises ``ValueError`` for anything else."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size such as 5GB, 500MB or 2GiB")
    whole, fraction, unit = match.groups()
    size = int(float(f"{whole}.{fraction or 0}") * _UNITS[(unit or "").upper()])
    if size < 1:
        raise ValueError("a size must be at least one byte")
    return size


def _size_text(text: str) -> str:
    parse_size(text)
    return text


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Uri = Annotated[str, Field(min_length=1, max_length=4096)]
LayoutSpec = Annotated[str, Field(min_length=1, max_length=4096)] | LayoutDocument


class SourceDocument(_Part):
    """Where the checkpoint lies and how to read it; what is absent is detected."""

    uri: Uri
    format: SourceFormat | None = None
    layout: Annotated[LayoutSpec | None, Field(description="layout that wrote it: rank-local files, repair")] = None
    producer: str | None = None
    key_prefix: Annotated[str | None, Field(description="key under which the model lies")] = None
    step: Annotated[str | None, Field(pattern=r"^(latest|[0-9]{1,18})$")] = None
    world: Annotated[int | None, Field(ge=1)] = None
    strict: bool = False
    repair: bool = False
    wait_complete: Annotated[bool, Field(description="wait while the checkpoint is still being written")] = False


class TargetDocument(_Part):
    """One target: where, in which format and layout, which tensors, how."""

    uri: Uri
    format: TargetFormat
    layout: LayoutSpec | None = None
    part: Part | None = None
    include: tuple[GlobText, ...] = ()
    exclude: tuple[GlobText, ...] = ()
    dtype: DTypeChoice = "keep"
    optimizer_dtype: DTypeChoice = "keep"
    max_shard_size: Annotated[str, AfterValidator(_size_text)] = "5GB"
    key_prefix: str | None = None
    model: Annotated[Uri | None, Field(description="folder with the config and tokenizer to carry along")] = None
    names: Literal["hub", "runtime"] | None = None
    overwrite: Overwrite = "never"
    verify: Verify = "sample"
    state: Literal["drop", "refuse"] = "refuse"
    digest: Literal["xxh3-128", "sha256"] = "xxh3-128"


class OptionsDocument(_Part):
    """How to run it; nothing here changes a byte of the result."""

    workers: Annotated[int | None, Field(ge=1, le=4096)] = None
    threads: Annotated[int | None, Field(ge=1, le=256)] = None


class JobDocument(_Part):
    """One source, one or more targets."""

    version: Literal[1] = 1
    source: SourceDocument
    targets: Annotated[tuple[TargetDocument, ...], Field(min_length=1, max_length=16)]
    options: OptionsDocument = OptionsDocument()


def parse_job_document(text: str, name: str = "job document") -> JobDocument:
    """The job in a YAML or JSON text, or ``DocumentInvalid`` with the JSON pointer of what is wrong."""
    return validated(JobDocument, document_data(text, name), name)


def read_job_document(path: Path) -> JobDocument:
    """The job in a local file."""
    return parse_job_document(read_document_text(path), str(path))


def job_document(data: object, name: str = "job") -> JobDocument:
    """A job from plain data, such as the command line's options."""
    return validated(JobDocument, data, name)


def job_schema() -> dict[str, Any]:
    """The JSON Schema that is committed beside this module."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **JobDocument.model_json_schema()}
