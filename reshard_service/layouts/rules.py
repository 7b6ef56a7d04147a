"""Which rule places a tensor: document rules, then the defaults of decision 11."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from reshard_service.documents.layout import LayoutDocument, RuleDocument
from reshard_service.globs import Glob, compile_glob
from reshard_service.layouts.holdings import View
from reshard_service.layouts.mesh import Mesh
from reshard_service.layouts.placements import Flat, Innermost, Placement, Replicate, parse_placement

DATA_PARALLEL_AXES = ("dp_replicate", "fsdp", "efsdp")
"""Axes that need no rules: what they do to a tensor does not depend on the model."""


@dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """How one rule (or none) places a tensor on its mesh; one object for all tensors that share both."""

    mesh: Mesh
    placements: tuple[Placement, ...]
    """In the order of the mesh's axes."""
    expert: bool
    rule: int | None
    """Index of the rule in the document; None where only defaults apply."""
    unit: Glob | None = None
    elsewhere: tuple[str, ...] = ()
    """Axes that the rule shards along and that only the layout's other mesh has."""

    @property
    def flat_axes(self) -> tuple[int, ...]:
        """Positions of the flat axes; size 1 counts, as the buffer is packed all the same."""
        return tuple(axis for axis, placement in enumerate(self.placements) if isinstance(placement, Flat))


def _default(axis: str, efsdp_dim: int) -> Placement:
    if axis == "fsdp":
        return Innermost(0)
    return Innermost(efsdp_dim) if axis == "efsdp" else Replicate()


@dataclass(frozen=True, slots=True, eq=False)
class RuleBook:
    """The compiled rules of one layout; answers are remembered per FQN, for a model has each name in several slots."""

    document: LayoutDocument
    mesh: Mesh
    expert_mesh: Mesh | None
    _expert: tuple[Glob, ...] = field(init=False, repr=False)
    _rules: Mapping[View, tuple[tuple[int, Glob], ...]] = field(init=False, repr=False)
    _by_name: dict[tuple[View, str], Placed] = field(init=False, repr=False)
    _by_rule: dict[tuple[int | None, bool], Placed] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        expert = self.document.expert_mesh
        rules = {
            view: tuple(
                (at, compile_glob(rule.match))
                for at, rule in enumerate(self.document.rules)
                if rule.view is None or rule.view == view
            )
            for view in View
        }
        object.__setattr__(self, "_expert", tuple(compile_glob(text) for text in expert.match) if expert else ())
        object.__setattr__(self, "_rules", rules)
        object.__setattr__(self, "_by_name", {})
        object.__setattr__(self, "_by_rule", {})

    def place(self, fqn: str, view: View) -> Placed:
        """How the tensor ``fqn`` is placed; a tensor without dims is replicated whatever this says."""
        found = self._by_name.get((view, fqn))
        if found is None:
            rule = next((at for at, glob in self._rules[view] if glob.matches(fqn)), None)
            expert = any(glob.matches(fqn) for glob in self._expert)
            found = self._by_rule.get((rule, expert))
            if found is None:
                found = self._by_rule[rule, expert] = self._placed(rule, expert)
            self._by_name[view, fqn] = found
        return found

    def _placed(self, at: int | None, expert: bool) -> Placed:
        mesh = self.expert_mesh if expert and self.expert_mesh is not None else self.mesh
        efsdp_dim = self.document.expert_mesh.efsdp_dim if self.document.expert_mesh else 0
        rule: RuleDocument | None = None if at is None else self.document.rules[at]
        given = {} if rule is None else {axis: parse_placement(text) for axis, text in rule.placements.items()}
        placements = tuple(given[axis] if axis in given else _default(axis, efsdp_dim) for axis in mesh.names)
        other = self.mesh if mesh is self.expert_mesh else self.expert_mesh
        elsewhere = tuple(
            axis
            for axis, placement in given.items()
            if axis not in mesh.names and other and other.size(axis) > 1 and not isinstance(placement, Replicate)
        )
        unit = compile_glob(rule.unit) if rule is not None and rule.unit is not None else None
        return Placed(mesh, placements, expert, at, unit, elsewhere)
