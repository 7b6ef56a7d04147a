"""Is this layout valid for this checkpoint? Answered from names and shapes, before any job runs.

The same question for a model whose checkpoint is not at hand is :func:`check_config`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from reshard_service.documents.layout import LayoutDocument
from reshard_service.errors import LayoutInvalid
from reshard_service.globs import compile_glob
from reshard_service.layouts.config_check import check_config
from reshard_service.layouts.holdings import Holdings, View
from reshard_service.layouts.layout import Layout, Shape
from reshard_service.layouts.placements import Innermost, Replicate
from reshard_service.layouts.problems import LayoutProblem, Severity, nearest_sizes
from reshard_service.layouts.rules import DATA_PARALLEL_AXES, Placed
from reshard_service.layouts.splits import DimSplits, Fault

__all__ = ["LayoutProblem", "Severity", "check_config", "check_layout"]


def check_layout(
    layout: Layout, tensors: Iterable[tuple[str, Sequence[int]]], view: View = View.CHECKPOINT
) -> list[LayoutProblem]:
    """What is wrong or surprising about a layout for the parameters (FQN, shape) of a checkpoint.

    Tensors that are placed and shaped alike are one finding, named by the first of them. Flat placements are checked
    only in a bound layout. Only findings of severity ERROR make the layout unusable.
    """
    alike: dict[tuple[Placed, Shape], list[str]] = {}
    names = []
    for fqn, shape in tensors:
        names.append(fqn)
        alike.setdefault((layout.place(fqn, view), tuple(shape)), []).append(fqn)
    found: list[LayoutProblem] = []
    shards: set[str] = set()
    for (placed, shape), members in alike.items():
        if shape:
            found += _check_alike(layout, placed, shape, members, view, shards)
    # A rule for both views may well be the one that counts in the other view only.
    counting = {layout.place(name, each).rule for each in View for name in names}
    found += _idle_rules(layout.document, counting, names, view)
    found += _idle_axes(layout, shards)
    return found


def _check_alike(
    layout: Layout, placed: Placed, shape: Shape, members: list[str], view: View, shards: set[str]
) -> list[LayoutProblem]:
    name = members[0]
    what = f"tensor {name!r} {list(shape)}" + (f" and {len(members) - 1} more like it" if len(members) > 1 else "")
    at = None if placed.rule is None else f"/rules/{placed.rule}"

    def problem(code: str, reason: str, severity: Severity, fix: str | None = None) -> LayoutProblem:
        return LayoutProblem(code, name, f"{what}: {reason}", severity, at, fix)

    found = []
    explicit = any(not isinstance(placement, (Replicate, Innermost)) for placement in placed.placements)
    if placed.elsewhere and not explicit:
        mine, other = ("expert", "dense") if placed.expert else ("dense", "expert")
        found.append(
            problem(
                "axis_elsewhere",
                f"lies on the {mine} mesh; its rule speaks only of {', '.join(placed.elsewhere)} of the {other} mesh",
                Severity.WARNING,
                "check expert_mesh.match, or name axes of the tensor's own mesh",
            )
        )
    splits = layout.splits(name, shape, view)
    if isinstance(splits, Fault):
        return [*found, problem(splits.code, splits.reason, Severity.ERROR, splits.fix)]
    shards.update(placed.mesh.names[axis] for split in splits for axis in split.axes)
    shards.update(placed.mesh.names[axis] for axis in placed.flat_axes)
    found += [
        problem(code, reason, severity, fix)
        for split in splits
        for code, reason, severity, fix in _divisibility(placed, split, shape)
    ]
    if placed.flat_axes and layout.bound is None:
        reason = "is flat, and without the list of all tensors its rows were not checked"
        return [*found, problem("flat_not_checked", reason, Severity.NOTICE)]
    try:
        holdings = layout.holdings(name, shape, view)
    except LayoutInvalid as error:
        return [*found, problem("flat_invalid", error.message, Severity.ERROR, error.hint)]
    if idle := _idle_ranks(holdings):
        # Ranks without rows are as normal as uneven ones: the notice is for people who wonder about file sizes.
        reason = f"leaves {idle} of {layout.world} ranks with nothing"
        found.append(problem("ranks_left_empty", reason, Severity.NOTICE))
    return found


def _divisibility(placed: Placed, split: DimSplits, shape: Shape) -> Iterable[tuple[str, str, Severity, str]]:
    size = shape[split.dim]
    mesh = placed.mesh
    for axis in split.axes:
        name, parts = mesh.names[axis], mesh.sizes[axis]
        if name == "ep" and size % parts:
            over = parts * mesh.size("efsdp")
            fits = nearest_sizes(parts, lambda ep: size % ep == 0 and over % ep == 0)  # noqa: B023 - used at once
            reason = f"dim {split.dim} ({size} experts) is not divisible by ep={parts}"
            yield "experts_not_divisible", reason, Severity.ERROR, f"nearest valid ep over the same ranks: {fits}"
        elif name not in DATA_PARALLEL_AXES and name != "ep" and (size // split.blocks) % parts:
            run = size // split.blocks
            fits = nearest_sizes(parts, lambda tp: run % tp == 0)  # noqa: B023
            block = f"each of {split.blocks} blocks of " if split.blocks > 1 else ""
            reason = f"{block}dim {split.dim} ({size}) is not divisible by {name}={parts}, so shards are uneven"
            yield "uneven_shards", reason, Severity.NOTICE, f"nearest even {name}: {fits}"


def _idle_ranks(holdings: Holdings) -> int:
    empty = (holdings.local_shape == 0).any(axis=1)
    return int(empty.sum()) if not empty.all() else 0


def _idle_rules(
    document: LayoutDocument, used: set[int | None], names: list[str], view: View
) -> Iterable[LayoutProblem]:
    for at, rule in enumerate(document.rules):
        if at in used or rule.view not in (None, view):
            continue
        glob = compile_glob(rule.match)
        shadowed = next((name for name in names if glob.matches(name)), None)
        if shadowed is None:
            reason, code = f"rule {at} ({rule.match!r}) matches no tensor", "rule_matches_nothing"
        else:
            reason = f"rule {at} ({rule.match!r}) never counts: earlier rules match all it would, such as {shadowed!r}"
            code = "rule_shadowed"
        fix = "compare the pattern with the names that inspect prints" if shadowed is None else "move it up"
        yield LayoutProblem(code, rule.match, reason, Severity.WARNING, f"/rules/{at}", fix)


def _idle_axes(layout: Layout, shards: set[str]) -> Iterable[LayoutProblem]:
    for mesh in (layout.mesh, layout.expert_mesh):
        for axis, size in zip(mesh.names, mesh.sizes, strict=True) if mesh else ():
            if size > 1 and axis not in shards and axis != "dp_replicate":
                at = "/mesh" if mesh is layout.mesh else "/expert_mesh"
                reason = f"no tensor is sharded along {axis}={size}: its {size} coordinates hold the same"
                yield LayoutProblem("axis_unused", axis, reason, Severity.WARNING, at, f"add a rule that names {axis}")
