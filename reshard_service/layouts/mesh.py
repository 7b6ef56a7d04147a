"""Named axes over ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import numpy as np
from numpy.typing import NDArray

Int64s = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Mesh:
    """All ranks of a world arranged along named axes, row-major: the last axis is fastest over ranks."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    coordinates: Int64s = field(init=False, repr=False)
    """Row ``r``: the coordinate of rank ``r`` on each axis."""

    def __post_init__(self) -> None:
        ranks = np.arange(prod(self.sizes), dtype=np.int64)
        columns = np.unravel_index(ranks, self.sizes) if self.sizes else ()
        table = np.stack(columns, axis=1) if columns else np.zeros((1, 0), dtype=np.int64)
        object.__setattr__(self, "coordinates", table.astype(np.int64))

    @property
    def world(self) -> int:
        return prod(self.sizes)

    def size(self, name: str) -> int:
        """Size of an axis; 1 for one that this mesh does not have."""
        return self.sizes[self.names.index(name)] if name in self.names else 1

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in zip(self.names, self.sizes, strict=True))
