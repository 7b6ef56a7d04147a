"""A layout: world, meshes and rules, and from them every rank's rectangles of any tensor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from pydantic import ValidationError

from reshard_service.documents.layout import Axes, LayoutDocument, RuleDocument, with_document_rules
from reshard_service.documents.reading import document_invalid
from reshard_service.errors import LayoutInvalid, LayoutRulesMissing
from reshard_service.layouts.flat import flat_holdings
from reshard_service.layouts.geometry import rectangles
from reshard_service.layouts.holdings import Holdings, View
from reshard_service.layouts.mesh import Mesh
from reshard_service.layouts.placements import Flat, parse_placement
from reshard_service.layouts.rules import DATA_PARALLEL_AXES, Placed, RuleBook
from reshard_service.layouts.splits import DimSplits, Fault, order_splits

Shape = tuple[int, ...]
BoundTensor = tuple[str, Shape, str]
"""FQN, shape and the name of the dtype."""


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Which rank owns which rectangles of which tensor. Made by :func:`layout_from_document` or ``parse_layout``.

    Layouts are equal if their digests are and they are bound to the same tensors. Answers are cached by what decides
    them, so tensors that are placed and shaped alike get the *same* :class:`Holdings` object; callers may key on it.
    """

    document: LayoutDocument
    world: int
    mesh: Mesh
    expert_mesh: Mesh | None
    bound: tuple[BoundTensor, ...] | None = None
    _rules: RuleBook = field(init=False, repr=False)
    _splits: dict[tuple[Placed, Shape], tuple[DimSplits, ...] | Fault] = field(init=False, repr=False)
    _holdings: dict[tuple[Mesh, tuple[DimSplits, ...], Shape], Holdings] = field(init=False, repr=False)
    _flat: dict[View, dict[str, tuple[Shape, Holdings]]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_rules", RuleBook(self.document, self.mesh, self.expert_mesh))
        for name in ("_splits", "_holdings", "_flat"):
            object.__setattr__(self, name, {})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self.digest() == other.digest() and self.bound == other.bound

    def __hash__(self) -> int:
        return hash(self.digest())

    def digest(self) -> str:
        """SHA-256 of the canonical form: equal for the same layout however it was written down."""
        return hashlib.sha256(json.dumps(self._canonical(), sort_keys=True).encode()).hexdigest()

    def place(self, fqn: str, view: View = View.CHECKPOINT) -> Placed:
        """The mesh and placements that the rules and defaults give a tensor."""
        return self._rules.place(fqn, view)

    def splits(self, fqn: str, shape: Shape, view: View = View.CHECKPOINT) -> tuple[DimSplits, ...] | Fault:
        """How a tensor's dims are split, flat axes aside, or what is wrong with placing a tensor of this shape."""
        return self._split(self.place(fqn, view), tuple(shape)) if shape else ()

    def holdings(
        self, fqn: str, shape: Shape, view: View = View.CHECKPOINT, parameter_shape: Shape | None = None
    ) -> Holdings:
        """Every rank's rectangles of one tensor.

        For an optimizer slot ``fqn`` is the parameter's and ``parameter_shape`` its shape: a slot of another shape is
        replicated (decision 11), like every tensor without dims. :class:`LayoutInvalid` names the tensor that the
        layout can't be applied to. A flat tensor needs :meth:`bind` first.
        """
        shape = tuple(shape)
        if not shape or (parameter_shape is not None and tuple(parameter_shape) != shape):
            return self._rectangles(self.mesh, (), shape)
        placed = self.place(fqn, view)
        if placed.flat_axes:
            return self._flat_holdings(fqn, shape, view)
        return self._rectangles(placed.mesh, self._split_or_raise(fqn, placed, shape, view), shape)

    def bind(self, tensors: Iterable[tuple[str, Sequence[int], str]]) -> Layout:
        """The same layout, told all parameters (FQN, shape, dtype name), as flat placements need.

        A flat buffer packs whole groups of tensors, so give exactly the parameters that the framework packs, in its
        ``named_parameters()`` order. Of an FQN given twice the first counts.
        """
        bound: dict[str, BoundTensor] = {}
        for fqn, shape, dtype in tensors:
            known = bound.setdefault(fqn, (fqn, tuple(shape), dtype))
            if known[1] != tuple(shape):
                raise LayoutInvalid(f"tensor {fqn!r} is given with two shapes, {list(known[1])} and {list(shape)}")
        return Layout(self.document, self.world, self.mesh, self.expert_mesh, tuple(bound.values()))

    def _split(self, placed: Placed, shape: Shape) -> tuple[DimSplits, ...] | Fault:
        found = self._splits.get((placed, shape))
        if found is None:
            found = self._splits[placed, shape] = order_splits(placed.mesh, placed.placements, shape)
        return found

    def _split_or_raise(self, fqn: str, placed: Placed, shape: Shape, view: View) -> tuple[DimSplits, ...]:
        splits = self._split(placed, shape)
        if isinstance(splits, Fault):
            by = f"rule {placed.rule}" if placed.rule is not None else "the defaults"
            raise LayoutInvalid(
                f"tensor {fqn!r} {list(shape)}, placed by {by} of {self} in the {view} view: {splits.reason}",
                tensor=fqn,
                hint=splits.fix,
            )
        return splits

    def _rectangles(self, mesh: Mesh, splits: tuple[DimSplits, ...], shape: Shape) -> Holdings:
        # What is replicated is the same on both meshes, and then it is the same object.
        key = (mesh if splits else self.mesh, splits, shape)
        found = self._holdings.get(key)
        if found is None:
            found = self._holdings[key] = rectangles(*key)
        return found

    def _flat_holdings(self, fqn: str, shape: Shape, view: View) -> Holdings:
        if self.bound is None:
            raise LayoutInvalid(
                f"tensor {fqn!r} is flat in the {view} view, and where it lies depends on all tensors of its group",
                tensor=fqn,
                hint="name the checkpoint whose tensors are meant (in Python: Layout.bind first)",
            )
        if view not in self._flat:
            self._flat[view] = self._pack_groups(self.bound, view)
        known = self._flat[view].get(fqn)
        if known is None or known[0] != shape:
            said = "is not among" if known is None else f"has shape {list(known[0])} among"
            raise LayoutInvalid(
                f"tensor {fqn!r} {list(shape)} {said} the tensors that the layout was bound to", tensor=fqn
            )
        return known[1]

    def _pack_groups(self, tensors: Iterable[BoundTensor], view: View) -> dict[str, tuple[Shape, Holdings]]:
        groups: dict[tuple[Mesh, tuple[int, ...], str, str], list[tuple[str, Shape, Placed]]] = {}
        for fqn, shape, dtype in tensors:
            placed = self.place(fqn, view)
            if placed.flat_axes and shape:
                key = (placed.mesh, placed.flat_axes, _unit_of(fqn, placed), dtype)
                groups.setdefault(key, []).append((fqn, shape, placed))
        found: dict[str, tuple[Shape, Holdings]] = {}
        # Layers repeat: groups of the same shapes, split alike, share their holdings.
        packed: dict[object, list[Holdings]] = {}
        for (mesh, axes, _, _), members in groups.items():
            splits = [self._split_or_raise(fqn, placed, shape, view) for fqn, shape, placed in members]
            for (fqn, _, _), split in zip(members, splits, strict=True):
                if any(dim.blocks > 1 for dim in split):
                    raise LayoutInvalid(
                        f"tensor {fqn!r} is packed and flat at once, whose order of rows is not defined",
                        tensor=fqn,
                        hint="let other axes shard it plainly, or place it without flat",
                    )
            shapes = [shape for _, shape, _ in members]
            key_of_group = (mesh, axes, tuple(splits), tuple(shapes))
            if key_of_group not in packed:
                replicas = mesh.size("dp_replicate") if "dp_replicate" not in [mesh.names[axis] for axis in axes] else 1
                padding_ranks = replicas * prod(mesh.sizes[axis] for axis in axes)
                within = [self._rectangles(mesh, split, shape) for split, shape in zip(splits, shapes, strict=True)]
                names = [fqn for fqn, _, _ in members]
                packed[key_of_group] = flat_holdings(mesh, axes, padding_ranks, names, shapes, within)
            for (fqn, shape, _), holdings in zip(members, packed[key_of_group], strict=True):
                found[fqn] = (shape, holdings)
        return found

    def _canonical(self) -> dict[str, Any]:
        """The document without what makes no difference: axes of size 1, spelling, the order of a set."""
        named = {*self.mesh.names, *(self.expert_mesh.names if self.expert_mesh else ())}
        split = {axis for axis in named if max(self.mesh.size(axis), _size(self.expert_mesh, axis)) > 1}
        expert = self.document.expert_mesh

        def kept(axes: Axes) -> list[list[str | int]]:
            return [[name, size] for name, size in axes if size > 1]

        def placed(rule: RuleDocument) -> dict[str, str]:
            texts = {axis: parse_placement(text) for axis, text in rule.placements.items()}
            return {axis: str(found) for axis, found in texts.items() if axis in split or isinstance(found, Flat)}

        return {
            "version": self.document.version,
            "mesh": kept(self.document.mesh.axes),
            "expert_mesh": expert and [kept(expert.axes), sorted(set(expert.match)), expert.efsdp_dim],
            "rules": [[rule.match, placed(rule), rule.view, rule.unit] for rule in self.document.rules],
        }

    def __str__(self) -> str:
        return f"{self.mesh}{f' with experts on {self.expert_mesh}' if self.expert_mesh else ''}"


def _size(mesh: Mesh | None, axis: str) -> int:
    return 1 if mesh is None else mesh.size(axis)


def _unit_of(fqn: str, placed: Placed) -> str:
    """The innermost module of the FQN's path that the rule's unit names; "" for the root group."""
    if placed.unit is not None:
        path = fqn
        while "." in path:
            path = path.rpartition(".")[0]
            if placed.unit.matches(path):
                return path
    return ""


def layout_from_document(document: LayoutDocument, *, rules_known: bool = False) -> Layout:
    """The layout of a document.

    :class:`LayoutRulesMissing` if it splits along tp, ep, pp or an axis of its own without any rules, unless
    ``rules_known`` says that they will come from elsewhere (see :func:`with_rules`). :class:`LayoutInvalid` if its two
    meshes are of different worlds.
    """
    mesh = _mesh(document.mesh.axes)
    expert_mesh = _mesh(document.expert_mesh.axes) if document.expert_mesh else None
    if expert_mesh is not None and expert_mesh.world != mesh.world:
        raise LayoutInvalid(
            f"the mesh {mesh} has {mesh.world} ranks and the expert mesh {expert_mesh} has {expert_mesh.world}",
            hint="both arrange the same ranks: efsdp is fsdp*tp/ep",
        )
    needing = [
        f"{axis}={size}"
        for part in (mesh, expert_mesh)
        if part is not None
        for axis, size in zip(part.names, part.sizes, strict=True)
        if size > 1 and axis not in DATA_PARALLEL_AXES
    ]
    if needing and not document.rules and not rules_known:
        raise LayoutRulesMissing(
            f"the layout has {', '.join(dict.fromkeys(needing))}, but no rule says which tensors are split how",
            hint="give a layout document with rules; docs/layouts.md shows how",
        )
    return Layout(document, mesh.world, mesh, expert_mesh)


def with_rules(layout: Layout, rules: Iterable[RuleDocument]) -> Layout:
    """The same meshes under other rules, which replace the layout's own; checked like a new document."""
    try:
        document = with_document_rules(layout.document, rules)
    except ValidationError as error:  # rules made without validation
        raise document_invalid(error, "layout rules") from None
    found = layout_from_document(document)
    return found if layout.bound is None else found.bind(layout.bound)


def _mesh(axes: Axes) -> Mesh:
    return Mesh(tuple(name for name, _ in axes), tuple(size for _, size in axes))
