"""The tiny models, the ways they are spread over ranks, and the layouts that say the same to us.

Sizes are odd on purpose: 66 vocabulary rows over 4 ranks are 17, 17, 17, 15; 30 over 4 are 8, 8, 8, 6; 20 over 3 are
7, 7, 6.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

LAYOUTS = Path(__file__).parent.parent / "layouts"

_LLAMA = {
    "vocab_size": 66,
    "hidden_size": 20,
    "intermediate_size": 30,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 6,
    "max_position_embeddings": 64,
}

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_LLAMA},
    # Even vocabulary: transformers 5.23 trains stale weights when tied rows are unevenly sharded by FSDP2, because
    # two parameter groups then pad the one tensor, each for itself.
    "llama-tied": {"model_type": "llama", **_LLAMA, "vocab_size": 64, "tie_word_embeddings": True},
    "moe": {
        "model_type": "qwen3_moe",
        **_LLAMA,
        "moe_intermediate_size": 12,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
}

_SIZES: dict[str, dict[str, int]] = {
    "fsdp4": {"fsdp_size": 4},
    "fsdp3": {"fsdp_size": 3},
    "hsdp2x2": {"dp_replicate_size": 2, "fsdp_size": 2},
    "tp2": {"tp_size": 2},
    "tp4": {"tp_size": 4},
    "fsdp2-tp2": {"fsdp_size": 2, "tp_size": 2},
    "fsdp4-ep2": {"fsdp_size": 4, "ep_size": 2},
    "fsdp2-tp2-ep4": {"fsdp_size": 2, "tp_size": 2, "ep_size": 4},
}

_SHORTHANDS = {"fsdp4": "fsdp=4", "fsdp3": "fsdp=3", "hsdp2x2": "dp_replicate=2,fsdp=2"}


@dataclass(frozen=True, slots=True)
class Run:
    """A model spread over ranks in one of the known ways."""

    model: str
    spread: str

    @property
    def name(self) -> str:
        return f"{self.model}-{self.spread}"

    @property
    def sizes(self) -> dict[str, int]:
        """Arguments of transformers' ``DistributedConfig``."""
        return _SIZES[self.spread]

    @property
    def replicas_and_shards(self) -> int:
        """How many ranks see different rows of a batch."""
        return self.sizes.get("dp_replicate_size", 1) * self.sizes.get("fsdp_size", 1)

    @property
    def world(self) -> int:
        return self.replicas_and_shards * self.sizes.get("tp_size", 1)

    @property
    def asks_for_plain_shards(self) -> bool:
        """Whether strided shards become plain ones before torch saves or loads them.

        transformers does so (5.23, ``distributed/checkpoint.py``), and must where a packed shard is several rectangles.
        """
        return self.model == "moe"

    @property
    def layout(self) -> str:
        """The same for ``--layout``: shorthand where it says enough, else a document."""
        if self.spread in _SHORTHANDS:
            return _SHORTHANDS[self.spread]
        return str(LAYOUTS / f"{self.model.removesuffix('-tied')}-{self.spread}.yaml")


TRAINED = (
    Run("llama", "fsdp4"),
    Run("llama", "fsdp3"),
    Run("llama", "hsdp2x2"),
    Run("llama", "tp2"),
    Run("llama", "fsdp2-tp2"),
    Run("llama-tied", "fsdp4"),
    Run("moe", "fsdp2-tp2"),
    Run("moe", "fsdp4-ep2"),
)
"""The runs that make checkpoints."""
