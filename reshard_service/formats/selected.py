"""A selection as layouts want to see it: per tensor its FQN, shape, its parameter's shape and element size."""

from __future__ import annotations

from reshard_service.formats.dcp.writer import parameter_shapes
from reshard_service.formats.target import Selection

OwnershipItem = tuple[str, tuple[int, ...], tuple[int, ...] | None, int]


def ownership_items(selection: Selection) -> list[OwnershipItem]:
    """Items for ``layouts.ownership.own_chunks`` and ``Layout.holdings``, in selection order."""
    return [
        (tensor.identity.fqn, tensor.shape, parameter, tensor.dtype.itemsize)
        for tensor, parameter in zip(selection.tensors, parameter_shapes(selection), strict=True)
    ]
