"""Global shapes from local ones, for rank files that lie there without ``reshard.layout.json``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from reshard_service.catalogue import Int64s
from reshard_service.errors import LayoutInvalid
from reshard_service.layouts.holdings import View

if TYPE_CHECKING:
    from reshard_service.layouts.layout import Layout

Shape = tuple[int, ...]


def global_shape(layout: Layout, fqn: str, local_shapes: Int64s, name: str) -> Shape:
    """The shape whose pieces under ``layout`` have these local shapes (a row per rank).

    A dim that some axes shard is as long as its pieces along those axes together; which axes do is read off the
    layout's rule. Raises :class:`LayoutInvalid` if no shape fits, naming the tensor.
    """
    dims = local_shapes.shape[1]
    if dims == 0 or not len(local_shapes):
        return ()
    same = tuple(int(size) for size in local_shapes[0])
    candidates = [_summed(layout, fqn, local_shapes)]
    if bool((local_shapes == local_shapes[0]).all()):
        candidates.append(same)
    for shape in candidates:
        try:
            holdings = layout.holdings(fqn, shape, View.MEMORY)
        except LayoutInvalid:
            continue
        if np.array_equal(holdings.local_shape, local_shapes):
            return shape
    raise LayoutInvalid(
        f"tensor {name!r} has local shapes {local_shapes[:8].tolist()} on the first ranks, which no global shape has "
        f"under the layout {layout}",
        tensor=name,
        hint="the layout is not the one that wrote these files",
    )


def _summed(layout: Layout, fqn: str, local_shapes: Int64s) -> Shape:
    placed = layout.place(fqn, View.MEMORY)
    dims = local_shapes.shape[1]
    axes_of: list[list[int]] = [[] for _ in range(dims)]
    for axis, placement in enumerate(placed.placements):
        dim = getattr(placement, "dim", None)
        if dim is not None and -dims <= dim < dims:
            axes_of[dim % dims].append(axis)
    for axis in placed.flat_axes:
        axes_of[0].append(axis)
    coordinates = placed.mesh.coordinates
    shape: list[int] = []
    for dim, axes in enumerate(axes_of):
        others = [axis for axis in range(coordinates.shape[1]) if axis not in axes]
        line = (coordinates[:, others] == 0).all(axis=1)
        shape.append(int(local_shapes[line, dim].sum()))
    return tuple(shape)
