"""Commands that only look: ``inspect``, ``diff``, ``verify``, ``doctor``."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reshard_service.cli.options import (
    Exclude,
    From,
    Include,
    Json,
    KeyPrefix,
    Producer,
    SourceLayout,
    Step,
    Strict,
    World,
    source_document,
)
from reshard_service.cli.output import ProgressBar, human_bytes, notice_document, print_json, print_notices, say

if TYPE_CHECKING:
    from reshard_service.catalogue import Catalogue, Section

Uri = Annotated[str, typer.Argument(help="checkpoint: path or URI", metavar="URI")]
_SHOWN_LINES = 40


def inspect_command(
    uri: Uri,
    json: Json = False,
    chunks: Annotated[bool, typer.Option("--chunks", help="list every chunk of every tensor")] = False,
    from_format: From = None,
    source_layout: SourceLayout = None,
    producer: Producer = None,
    key_prefix: KeyPrefix = None,
    step: Step = None,
    world: World = None,
    strict: Strict = False,
    repair: Annotated[bool, typer.Option("--repair", help="mend chunk geometry that torch recorded wrong")] = False,
) -> int:
    """What is in a checkpoint: format, producer, tensors, chunks, bytes, training state."""
    from reshard_service.conversion import open_source
    from reshard_service.documents.job import SourceDocument
    from reshard_service.documents.reading import validated

    given = source_document(
        uri,
        format=from_format,
        layout=source_layout,
        producer=producer,
        key_prefix=key_prefix,
        step=step,
        world=world,
        strict=strict,
        repair=repair,
    )
    catalogue = open_source(validated(SourceDocument, given, "options"))
    if json:
        print_json(catalogue_document(catalogue, with_chunks=chunks))
    else:
        _say_catalogue(catalogue)
    return 0


def catalogue_document(catalogue: Catalogue, *, with_chunks: bool = False) -> dict[str, Any]:
    """The document of ``inspect --json`` (decision 25)."""
    from reshard_service.mapping.state import policy_of

    counts = (catalogue.chunks.first[1:] - catalogue.chunks.first[:-1]).tolist()
    tensors = []
    for index, tensor in enumerate(catalogue.tensors):
        entry: dict[str, Any] = {
            "name": tensor.key,
            "section": tensor.identity.section.value,
            "fqn": tensor.identity.fqn,
            "slot": tensor.identity.slot,
            "dtype": tensor.dtype.name,
            "shape": list(tensor.shape),
            "nbytes": tensor.nbytes,
            "chunks": counts[index],
        }
        if with_chunks:
            entry["chunk_list"] = _chunk_list(catalogue, index)
        tensors.append(entry)
    return {
        "uri": catalogue.uri,
        "format": catalogue.format,
        "producer": catalogue.producer,
        "world": catalogue.world,
        "total_bytes": catalogue.payload_bytes,
        "file_bytes": catalogue.file_bytes,
        "files": [{"path": entry.path, "bytes": entry.bytes} for entry in catalogue.files],
        "tensors": tensors,
        "objects": [
            {
                "name": item.key,
                "section": item.identity.section.value,
                "fqn": item.identity.fqn,
                "bytes": item.length,
                "policy": policy_of(item.key).value,
            }
            for item in catalogue.objects
        ],
        "notices": [notice_document(notice) for notice in catalogue.notices],
    }


def _chunk_list(catalogue: Catalogue, index: int) -> list[dict[str, Any]]:
    chunks, rank = catalogue.chunks, len(catalogue.tensors[index].shape)
    rows = chunks.rows(index)
    return [
        {
            "offsets": chunks.offsets[row, :rank].tolist(),
            "sizes": chunks.sizes[row, :rank].tolist(),
            "file": catalogue.files[int(chunks.file[row])].path,
            "start": int(chunks.start[row]),
            "length": int(chunks.length[row]),
        }
        for row in range(rows.start, rows.stop)
    ]


def _say_catalogue(catalogue: Catalogue) -> None:
    from reshard_service.catalogue import Section

    say(f"{catalogue.uri}")
    say(f"  format    {catalogue.format}" + (f", written by {catalogue.producer}" if catalogue.producer else ""))
    if catalogue.world:
        say(f"  ranks     {catalogue.world}")
    counts = f"{len(catalogue.tensors)} tensors, {len(catalogue.chunks)} chunks"
    say(f"  payload   {human_bytes(catalogue.payload_bytes)} in {counts}")
    say(f"  on disk   {human_bytes(catalogue.file_bytes)} in {len(catalogue.files)} files")
    for section in Section:
        _say_section(catalogue, section)
    print_notices(catalogue.notices, "Worth knowing")


def _say_section(catalogue: Catalogue, section: Section) -> None:
    """One section: its size, then kinds of tensors (layers folded into one line; optimizer state by slot)."""
    tensors = [tensor for tensor in catalogue.tensors if tensor.identity.section is section]
    objects = [item for item in catalogue.objects if item.identity.section is section]
    if not tensors and not objects:
        return
    size = human_bytes(sum(tensor.nbytes for tensor in tensors))
    say(f"\n  {section.value}: {len(tensors)} tensors, {size}" + (f", {len(objects)} objects" if objects else ""))
    kinds: dict[tuple[str, str, str], int] = {}
    for tensor in tensors:
        slot = tensor.identity.slot
        kind = (
            (re.sub(r"(?<=\.)\d+(?=\.)", "*", tensor.key), tensor.dtype.name, str(list(tensor.shape)))
            if slot is None
            else (slot, tensor.dtype.name, "of each parameter" if tensor.shape else "[]")
        )
        kinds[kind] = kinds.get(kind, 0) + 1
    shown = list(kinds.items())[:_SHOWN_LINES]
    width = max((len(name) for (name, _, _), _ in shown), default=0)
    for (name, dtype, shape), count in shown:
        say(f"    {name:<{width}}  {dtype:<5} {shape}" + (f" × {count}" if count > 1 else ""))
    if len(kinds) > len(shown):
        say(f"    … and {len(kinds) - len(shown)} more kinds of tensors (--json lists all)")


def diff_command(
    a: Annotated[str, typer.Argument(metavar="A", help="checkpoint: path or URI")],
    b: Annotated[str, typer.Argument(metavar="B", help="checkpoint: path or URI")],
    json: Json = False,
    part: Annotated[
        str | None, typer.Option(metavar="all", help="all: sections that only one side has count too")
    ] = None,
    include: Include = None,
    exclude: Exclude = None,
    key_prefix: KeyPrefix = None,
    producer: Producer = None,
    step: Step = None,
    source_layout: SourceLayout = None,
) -> int:
    """Are two checkpoints the same tensors, bit for bit? Any formats, any layouts."""
    from reshard_service.conversion import open_source
    from reshard_service.documents.job import SourceDocument
    from reshard_service.documents.reading import validated
    from reshard_service.errors import UsageError
    from reshard_service.verify.diff import diff

    if part not in (None, "all", "model", "optimizer"):
        raise UsageError(f"--part {part!r}: say all, model or optimizer")
    sides = [
        open_source(
            validated(
                SourceDocument,
                source_document(
                    uri,
                    format=None,
                    layout=source_layout,
                    producer=producer,
                    key_prefix=key_prefix,
                    step=step,
                    world=None,
                    strict=False,
                ),
                "options",
            )
        )
        for uri in (a, b)
    ]
    with ProgressBar(enabled=not json) as bar:
        bar.start("comparing", sides[0].payload_bytes)
        bar.phase("comparing")
        found = diff(
            *sides,
            everything=part == "all",
            only=part,
            include=include or (),
            exclude=exclude or (),
            progress=bar.advance,
        )
    if json:
        print_json(
            {
                "same": found.same,
                "compared": found.compared,
                "only_in_a": list(found.only_in_a),
                "only_in_b": list(found.only_in_b),
                "different": [notice_document(notice) for notice in found.different],
                "not_compared": list(found.not_compared),
            }
        )
        return 0 if found.same else 1
    verdict = "the same" if found.same else "DIFFERENT"
    say(f"{verdict}: {found.compared} tensors compared, bit for bit")
    for side, names in (("A", found.only_in_a), ("B", found.only_in_b)):
        for name in names[:12]:
            say(f"  only in {side}: {name}")
        if len(names) > 12:
            say(f"  … and {len(names) - 12} more only in {side}")
    print_notices(found.different, "Differences")
    if found.not_compared:
        say(f"  not compared: {', '.join(found.not_compared)}")
    return 0 if found.same else 1


def verify_command(uri: Uri, json: Json = False) -> int:
    """Does a checkpoint still match the manifest that was written with it?"""
    from reshard_service.conversion.prepare import open_place
    from reshard_service.verify.check import find_manifest, verify

    place = open_place(uri)
    manifest, path = find_manifest(place.storage, place.single_file)
    with ProgressBar(enabled=not json) as bar:
        bar.start("verifying", sum(file.bytes for file in manifest.files))
        bar.phase("verifying")
        found = verify(place.storage, manifest, progress=bar.advance)
    if json:
        print_json(
            {
                "ok": not found.faults,
                "uri": uri,
                "manifest": path,
                "algo": found.algorithm,
                "files": found.files,
                "bytes": found.bytes,
                "faults": [notice_document(fault) for fault in found.faults],
            }
        )
    elif found.faults:
        say(f"{uri}: DAMAGED")
        print_notices(found.faults, "Faults")
    else:
        say(
            f"{uri}: intact, {found.files} files, {human_bytes(found.bytes)}, every segment's {found.algorithm} matches"
        )
    return 1 if found.faults else 0


def doctor_command(json: Json = False) -> int:
    """Is this installation sound? Versions, name clashes, free space, fast paths."""
    from reshard_service.cli.doctor import examine

    findings = examine()
    if json:
        print_json(
            {"ok": all(finding.ok for finding in findings), "checks": [finding.document() for finding in findings]}
        )
    else:
        for finding in findings:
            say(f"  {'ok  ' if finding.ok else 'FAIL'}  {finding.name:<18} {finding.detail}")
    return 0 if all(finding.ok for finding in findings) else 4
