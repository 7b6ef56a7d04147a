"""What one mesh axis does to one tensor."""

from __future__ import annotations

import re
from dataclasses import dataclass

from reshard_service.documents.layout import PLACEMENT_FORMS, PLACEMENT_PATTERN
from reshard_service.errors import UsageError


@dataclass(frozen=True, slots=True)
class Replicate:
    """Every coordinate of the axis holds the same."""

    def __str__(self) -> str:
        return "replicate"


@dataclass(frozen=True, slots=True)
class Shard:
    """The dim is split into ceil-sized pieces, one a coordinate, as ``torch.chunk`` does; later ones may be empty.

    Where several axes shard one dim, the leftmost splits first (torch's DTensor).
    """

    dim: int

    def __str__(self) -> str:
        return f"shard({self.dim})"


@dataclass(frozen=True, slots=True)
class StridedShard:
    """Two things under the one name that torch gives them, told apart by ``split_factor``.

    If it is the product of the sizes of the axes to the right that shard the same dim, those axes split first and this
    one splits what they leave (FSDP2 over tensor parallelism). Otherwise the shard is *packed*: the dim is
    ``split_factor`` equal blocks, such as gate and up, each of which is sharded, and a coordinate holds its pieces of
    all blocks one after the other.
    """

    dim: int
    split_factor: int

    def __str__(self) -> str:
        return f"strided({self.dim},{self.split_factor})"


@dataclass(frozen=True, slots=True)
class Flat:
    """The rows of a whole group of tensors lie in one flat buffer that is cut evenly (Megatron-FSDP's DBuffer)."""

    def __str__(self) -> str:
        return "flat"


@dataclass(frozen=True, slots=True)
class Innermost:
    """The default of fsdp and efsdp: a shard of ``dim`` that splits after all other axes, wherever its axis stands.

    No document can write it. FSDP2 does this: with tp on the same dim it is ``strided(dim, tp)``.
    """

    dim: int

    def __str__(self) -> str:
        return f"shard({self.dim}) within the other axes' shards"


Placement = Replicate | Shard | StridedShard | Flat | Innermost


def parse_placement(text: str) -> Placement:
    """The placement that a document writes as ``text``; the document's own check has the same pattern."""
    if not re.fullmatch(PLACEMENT_PATTERN, text):
        raise UsageError(f"placement {text!r} is none of {PLACEMENT_FORMS}")
    name, _, arguments = text.rstrip(")").partition("(")
    numbers = [int(number) for number in arguments.split(",")] if arguments else []
    match name:
        case "shard":
            return Shard(numbers[0])
        case "strided":
            return StridedShard(numbers[0], numbers[1])
        case "flat":
            return Flat()
        case _:
            return Replicate()
