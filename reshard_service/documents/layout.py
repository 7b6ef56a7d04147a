"""The layout document (decision 12): meshes and rules, as a user writes them in YAML or JSON.

Only form is checked here. What placements mean for a tensor is the business of :mod:`reshard_service.layouts`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from reshard_service.documents.reading import document_data, read_document_text, validated
from reshard_service.errors import UsageError
from reshard_service.globs import MAX_PATTERN_LENGTH, compile_glob

MAX_WORLD = 1 << 20
PLACEMENT_PATTERN = r"^(replicate|flat|shard\(-?[0-9]{1,2}\)|strided\(-?[0-9]{1,2}, ?[1-9][0-9]{0,5}\))$"
PLACEMENT_FORMS = "replicate, shard(DIM), strided(DIM,SPLIT_FACTOR) or flat"
KNOWN_AXES = ("pp", "dp_replicate", "fsdp", "tp", "efsdp", "ep")
"""Axes that a rule may always name: one that a layout doesn't have has size 1, so that one set of rules serves many."""


def _glob(pattern: str) -> str:
    try:
        compile_glob(pattern)
    except UsageError as error:
        raise ValueError(f"{error.message}{f' ({error.hint})' if error.hint else ''}") from None
    return pattern


def _placement(text: str) -> str:
    if not re.fullmatch(PLACEMENT_PATTERN, text):
        raise ValueError(f"placement {text!r} is none of {PLACEMENT_FORMS}")
    return text


def _unique_names(axes: tuple[tuple[str, int], ...]) -> tuple[tuple[str, int], ...]:
    names = [name for name, _ in axes]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"axis {name!r} twice")
    world = 1
    for _, size in axes:
        world *= size
    if world > MAX_WORLD:
        raise ValueError(f"a mesh of {world} ranks is larger than {MAX_WORLD}")
    return axes


AxisName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=32)]
AxisSize = Annotated[int, Field(strict=True, ge=1, le=MAX_WORLD)]
Axes = Annotated[
    tuple[tuple[AxisName, AxisSize], ...],
    Field(min_length=1, max_length=8, description="[name, size] of each axis; the last axis is fastest over ranks"),
    AfterValidator(_unique_names),
]
GlobText = Annotated[str, Field(min_length=1, max_length=MAX_PATTERN_LENGTH), AfterValidator(_glob)]
PlacementText = Annotated[str, Field(json_schema_extra={"pattern": PLACEMENT_PATTERN}), AfterValidator(_placement)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MeshDocument(_Part):
    """Named axes over all ranks, row-major: the last axis is fastest."""

    axes: Axes


class ExpertMeshDocument(_Part):
    """A second mesh over the same ranks, for the expert tensors."""

    axes: Axes
    match: Annotated[tuple[GlobText, ...], Field(min_length=1, description="globs: which FQNs lie on this mesh")] = (
        "**.experts.**",
    )
    efsdp_dim: Annotated[int, Field(strict=True, ge=0, le=1, description="dim that efsdp shards without a rule")] = 0


class RuleDocument(_Part):
    """How tensors whose FQN matches are placed; the first rule that matches within a view wins."""

    match: GlobText
    placements: Annotated[
        dict[AxisName, PlacementText], Field(description=f"mesh axis to {PLACEMENT_FORMS}; negative dims from the end")
    ]
    view: Annotated[
        Literal["checkpoint", "memory"] | None,
        Field(description="the rule holds for what a framework asks of a checkpoint, or for what it holds in memory"),
    ] = None
    unit: Annotated[
        GlobText | None, Field(description="for flat: the modules that share one flat buffer, e.g. model.layers.*")
    ] = None


class LayoutDocument(_Part):
    """A layout: version 1."""

    version: Literal[1]
    mesh: MeshDocument
    expert_mesh: ExpertMeshDocument | None = None
    rules: Annotated[tuple[RuleDocument, ...], Field(max_length=10_000)] = ()

    @model_validator(mode="after")
    def _rules_name_axes(self) -> LayoutDocument:
        present = [name for name, _ in self.mesh.axes]
        if self.expert_mesh is not None:
            present += [name for name, _ in self.expert_mesh.axes if name not in present]
        for at, rule in enumerate(self.rules):
            for axis in rule.placements:
                if axis not in present and axis not in KNOWN_AXES:
                    raise _wrong(
                        f"/rules/{at}/placements/{axis}", f"no axis {axis!r}; the layout has {', '.join(present)}"
                    )
            if rule.unit is not None and "flat" not in rule.placements.values():
                raise _wrong(f"/rules/{at}/unit", "a unit means something only beside a flat placement")
        return self


def _wrong(pointer: str, reason: str) -> PydanticCustomError:
    # Braces of the reason would be read as a template, hence the placeholder.
    return PydanticCustomError("layout", "{reason}", {"pointer": pointer, "reason": reason})


def parse_layout_document(text: str, name: str = "layout document") -> LayoutDocument:
    """The document in a YAML or JSON text, or :class:`DocumentInvalid` with the JSON pointer of what is wrong."""
    return validated(LayoutDocument, document_data(text, name), name)


def read_layout_document(path: Path) -> LayoutDocument:
    """The document in a local file; a missing file is a :class:`UsageError`."""
    return parse_layout_document(read_document_text(path), str(path))


def layout_document(data: object, name: str = "layout document") -> LayoutDocument:
    """A document from plain data, such as a part of a job document."""
    return validated(LayoutDocument, data, name)


def with_document_rules(document: LayoutDocument, rules: Iterable[RuleDocument]) -> LayoutDocument:
    """The same meshes with other rules, checked again."""
    return layout_document({**document.model_dump(), "rules": [rule.model_dump() for rule in rules]})


def layout_schema() -> dict[str, Any]:
    """The JSON Schema committed as ``layout.schema.json``."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **LayoutDocument.model_json_schema()}
