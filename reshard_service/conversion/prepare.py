"""From a job document to plans: nothing is written here."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

from reshard_service.catalogue import Catalogue, Notice, Section
from reshard_service.conversion.tied import drop_tied_output
from reshard_service.documents.job import (
    JobDocument,
    LayoutSpec,
    SourceDocument,
    TargetDocument,
    parse_size,
)
from reshard_service.documents.layout import LayoutDocument
from reshard_service.dtypes import by_name
from reshard_service.errors import CheckpointIncomplete, UriRefused, UsageError
from reshard_service.formats.detect import open_checkpoint
from reshard_service.formats.options import OpenOptions, WriteOptions
from reshard_service.formats.side_files import carried_side_files
from reshard_service.formats.target import Design, OutputFile, Selection
from reshard_service.formats.writers import WRITERS
from reshard_service.layouts.layout import Layout, layout_from_document
from reshard_service.layouts.shorthand import parse_layout
from reshard_service.manifest import digest_bytes
from reshard_service.planning.budget import Budget, default_budget
from reshard_service.planning.plan import Plan, make_plan
from reshard_service.planning.selection import DTYPES, Selected, SelectionRequest, select
from reshard_service.storage.base import Storage
from reshard_service.storage.uri import CLI_POLICY, UriPolicy, open_storage, split_scheme

LAYOUT_FORMATS = ("dcp", "dcp-safetensors", "rank-safetensors")
_POLL_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Place:
    """A target's storage, and its name in it if it is a single file."""

    uri: str
    storage: Storage
    single_file: str | None

    @property
    def local_path(self) -> Path | None:
        """The folder or file on this machine, if it is on this machine."""
        if not self.storage.is_local:
            return None
        folder = Path(self.storage.uri)
        return folder / self.single_file if self.single_file else folder


@dataclass(frozen=True, slots=True)
class Prepared:
    """One target, planned: everything that is known before a byte moves."""

    document: TargetDocument
    place: Place
    layout: Layout | None
    selected: Selected
    plan: Plan
    budget: Budget
    side_files: tuple[tuple[str, bytes], ...] = field(repr=False)

    @property
    def design(self) -> Design:
        return self.plan.design

    def output_files(self) -> tuple[OutputFile, ...]:
        """Every file of the target but the manifest, which is known only when its digests are."""
        small = [(file.path, file.make()) for file in self.design.closing]
        return (
            *self.design.files,
            *(OutputFile(path, len(data)) for path, data in (*self.side_files, *small)),
        )

    @property
    def notices(self) -> tuple[Notice, ...]:
        return (*self.plan.source.notices, *self.selected.notices, *self.plan.design.notices)


def open_source(document: SourceDocument, policy: UriPolicy = CLI_POLICY) -> Catalogue:
    """The catalogue of a job's source; with ``wait_complete`` as soon as its writer is done."""
    while True:
        try:
            return _open_source(document, policy)
        except CheckpointIncomplete:
            if not document.wait_complete:
                raise
        time.sleep(_POLL_SECONDS)


def _open_source(document: SourceDocument, policy: UriPolicy) -> Catalogue:
    options = OpenOptions(
        format=document.format,
        producer=document.producer,
        key_prefix=document.key_prefix,
        layout=None if document.layout is None else layout_of(document.layout),
        step=document.step,
        world=document.world,
        strict=document.strict,
        repair=document.repair,
    )
    return open_checkpoint(open_storage(document.uri, policy), options)


def layout_of(spec: LayoutSpec) -> Layout:
    """The layout that a shorthand, a document's path or a document means."""
    if isinstance(spec, LayoutDocument):
        return layout_from_document(spec)
    return parse_layout(spec)


def open_place(uri: str, policy: UriPolicy = CLI_POLICY) -> Place:
    """A target's storage. A URI that ends in ``.safetensors`` is one file, anything else a folder (decision 23)."""
    trimmed = uri.rstrip("/")
    if not trimmed.endswith(".safetensors"):
        return Place(trimmed, open_storage(trimmed, policy), None)
    scheme, rest = split_scheme(trimmed)
    folder, slash, name = rest.rpartition("/")
    if scheme == "file":
        return Place(trimmed, open_storage(folder or slash or ".", policy), name)
    if not slash:
        raise UriRefused(f"{trimmed!r} names a bucket or host and no file in it")
    return Place(trimmed, open_storage(f"{scheme}://{folder}", policy), name)


def prepare_target(
    job: JobDocument, target: TargetDocument, source: Catalogue, policy: UriPolicy = CLI_POLICY
) -> Prepared:
    """Select, design and plan one target; problems of coverage are in ``plan.problems``."""
    if target.names is not None:
        raise UsageError("--names: mapping between hub and runtime names is not built yet; names are kept as they are")
    layout = _target_layout(target)
    place = open_place(target.uri, policy)
    if place.single_file is not None and target.format != "safetensors":
        raise UsageError(
            f"{target.uri!r} is the name of one safetensors file, but what --to {target.format} writes is a folder",
            hint="name the target without .safetensors",
        )
    _require_apart(place, source)
    part = target.part or ("all" if target.format == "dcp" else "model")
    selected = select(
        source,
        SelectionRequest(
            format=target.format,
            part=part,
            include=target.include,
            exclude=target.exclude,
            dtype=target.dtype,
            optimizer_dtype=target.optimizer_dtype,
            key_prefix=target.key_prefix,
            state=target.state,
            data_ranks=_data_ranks(layout, target, source),
        ),
    )
    side_files = _side_files(target, source, policy)
    if target.format == "safetensors":
        selected = drop_tied_output(source, selected, dict(side_files).get("config.json"))
    if layout is not None:
        layout = _bound(layout, selected.selection)
    options = WriteOptions(max_shard_bytes=parse_size(target.max_shard_size), single_file=place.single_file)
    design = WRITERS[target.format](selected.selection, layout, options)
    remote = not (place.storage.is_local and source.storage.is_local)
    budget = default_budget(job.options.threads, remote=remote)
    side_files = () if place.single_file is not None else side_files
    plan = make_plan(
        source,
        design,
        workers=job.options.workers or 1,
        budget=budget,
        in_order=not place.storage.is_local,
        options_key=_options_key(target, layout, side_files),
    )
    return Prepared(target, place, layout, selected, plan, budget, side_files)


def _target_layout(target: TargetDocument) -> Layout | None:
    if target.layout is None:
        if target.format == "rank-safetensors":
            raise UsageError("--to rank-safetensors needs --layout: it says what each rank's file holds")
        return None
    if target.format not in LAYOUT_FORMATS:
        raise UsageError(
            f"--to {target.format} gathers whole tensors and takes no --layout",
            hint=f"for sharded files use --to {', '.join(LAYOUT_FORMATS)}",
        )
    return layout_of(target.layout)


def _data_ranks(layout: Layout | None, target: TargetDocument, source: Catalogue) -> int | None:
    """How many ranks share the data in the target; None where a DCP's own chunks and files are kept."""
    if layout is None:
        return None if target.format == source.format == "dcp" else 1
    axes = dict(layout.document.mesh.axes)
    return axes.get("fsdp", 1) * axes.get("dp_replicate", 1)


def _bound(layout: Layout, selection: Selection) -> Layout:
    """Flat placements pack whole groups of parameters, so the layout has to know them all."""
    if not any("flat" in rule.placements.values() for rule in layout.document.rules):
        return layout
    return layout.bind(
        (tensor.identity.fqn, tensor.shape, tensor.dtype.name)
        for tensor in selection.source.tensors
        if tensor.identity.section is Section.MODEL
    )


def _require_apart(place: Place, source: Catalogue) -> None:
    """A target inside its source would be read as part of it the next time, one around it would hide it."""
    path = place.local_path
    if path is not None and path.resolve() == Path.cwd():
        raise UsageError("the folder you are in can't be the target", hint="name a new folder in it")
    if path is None or not source.storage.is_local:
        return
    target, origin = path.resolve(), Path(source.storage.uri).resolve()
    if target == origin or origin in target.parents or target in origin.parents:
        raise UsageError(
            f"target {str(path)!r} and source {source.storage.uri!r} lie in one another",
            hint="name a target beside the source",
        )


def _side_files(target: TargetDocument, source: Catalogue, policy: UriPolicy) -> tuple[tuple[str, bytes], ...]:
    if target.format not in ("safetensors", "dcp-safetensors"):
        return ()
    storage = open_storage(target.model, policy) if target.model is not None else source.storage
    dtype = None if target.dtype == "keep" else by_name(DTYPES[target.dtype])
    return tuple(carried_side_files(storage, dtype=dtype))


def _options_key(target: TargetDocument, layout: Layout | None, side_files: tuple[tuple[str, bytes], ...]) -> str:
    """Whatever decides bytes of the target beyond source and design."""
    return json.dumps(
        {
            "dtype": target.dtype,
            "optimizer_dtype": target.optimizer_dtype,
            "digest": target.digest,
            "layout": None if layout is None else layout.digest(),
            "side_files": [(path, digest_bytes(data)) for path, data in side_files],
        },
        sort_keys=True,
    )
