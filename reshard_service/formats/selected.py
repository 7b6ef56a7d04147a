"""A selection as layouts want to see it: per tensor its FQN, shape, its parameter's shape and element size."""

from __future__ import annotations

from reshard_service.catalogue import Section
from reshard_service.formats.target import Selection

OwnershipItem = tuple[str, tuple[int, ...], tuple[int, ...] | None, int]


def parameter_shapes(selection: Selection) -> dict[str, tuple[int, ...]]:
    """Shape of each model tensor by FQN, of the source and of what is selected: what slots are compared with."""
    shapes = {
        tensor.identity.fqn: tensor.shape
        for tensor in selection.source.tensors
        if tensor.identity.section is Section.MODEL
    }
    shapes.update(
        (tensor.identity.fqn, tensor.shape) for tensor in selection.tensors if tensor.identity.section is Section.MODEL
    )
    return shapes


def ownership_items(selection: Selection) -> list[OwnershipItem]:
    """Items for ``layouts.ownership.own_chunks``, in selection order.

    A slot whose parameter is not in the checkpoint counts as having its parameter's shape, unless another slot of the
    same parameter is larger (a 0-dim ``step`` beside a full ``exp_avg``).
    """
    known = parameter_shapes(selection)
    largest: dict[str, tuple[int, ...]] = {}
    for tensor in selection.tensors:
        if tensor.identity.slot is not None and tensor.identity.fqn not in known:
            other = largest.get(tensor.identity.fqn)
            if other is None or tensor.numel > _numel(other):
                largest[tensor.identity.fqn] = tensor.shape
    known.update(largest)
    return [
        (
            tensor.identity.fqn,
            tensor.shape,
            known.get(tensor.identity.fqn) if tensor.identity.slot is not None else None,
            tensor.dtype.itemsize,
        )
        for tensor in selection.tensors
    ]


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
