"""Every format that can be written, by the name that ``--to`` takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from reshard_service.formats.dcp.writer import design_dcp
from reshard_service.formats.dcp_safetensors.writer import design_dcp_safetensors
from reshard_service.formats.options import WriteOptions
from reshard_service.formats.rank_safetensors.writer import design_rank_safetensors
from reshard_service.formats.safetensors.writer import design_safetensors
from reshard_service.formats.target import Design, Selection
from reshard_service.layouts.layout import Layout

Designer = Callable[[Selection, Layout | None, WriteOptions], Design]

WRITERS: Mapping[str, Designer] = {
    "safetensors": design_safetensors,
    "dcp": design_dcp,
    "dcp-safetensors": design_dcp_safetensors,
    "rank-safetensors": design_rank_safetensors,
}
