"""The checkpoints that are measured: names, shapes and sizes. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Model:
    """What one checkpoint holds. Weights are bf16; ``moments`` adds AdamW's two in fp32 and its step."""

    name: str
    shapes: Shapes
    moments: bool = False

    @property
    def tensors(self) -> int:
        return len(self.shapes) * (4 if self.moments else 1)

    @property
    def bytes(self) -> int:
        elements = sum(prod(shape) for shape in self.shapes.values())
        return elements * (10 if self.moments else 2)


def llama(layers: int, hidden: int, vocabulary: int) -> Shapes:
    """The parameters of a Llama with grouped queries and tied embeddings."""
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    inner = hidden * 15 // 4
    for layer in range(layers):
        block = f"model.layers.{layer}"
        shapes |= {
            f"{block}.input_layernorm.weight": (hidden,),
            f"{block}.self_attn.q_proj.weight": (hidden, hidden),
            f"{block}.self_attn.k_proj.weight": (hidden // 2, hidden),
            f"{block}.self_attn.v_proj.weight": (hidden // 2, hidden),
            f"{block}.self_attn.o_proj.weight": (hidden, hidden),
            f"{block}.post_attention_layernorm.weight": (hidden,),
            f"{block}.mlp.gate_proj.weight": (inner, hidden),
            f"{block}.mlp.up_proj.weight": (inner, hidden),
            f"{block}.mlp.down_proj.weight": (hidden, inner),
        }
    return shapes | {"model.norm.weight": (hidden,)}


def experts(layers: int, count: int) -> Shapes:
    """Nothing but experts, three matrices of 98 KB each."""
    return {
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight": (64, 768) if part != "down" else (768, 64)
        for layer in range(layers)
        for expert in range(count)
        for part in ("gate", "up", "down")
    }


def expert_of(name: str) -> int | None:
    """The expert's number in its layer; None for any other parameter."""
    parts = name.split(".")
    return int(parts[parts.index("experts") + 1]) if "experts" in parts else None


def models(quick: bool, scale: float) -> dict[str, Model]:
    """The three checkpoints. ``scale`` multiplies layers; 1.0 is 4.0 GB, 6.1 GB and 18,432 tensors of 1.8 GB."""

    def times(layers: int) -> int:
        return max(1, round(layers * scale))

    if quick:
        return {
            "weights": Model("weights", llama(times(4), 512, 16384)),
            "training": Model("training", llama(times(2), 512, 4096), moments=True),
            "experts": Model("experts", experts(times(4), 32)),
        }
    return {
        "weights": Model("weights", llama(times(28), 2048, 151936)),
        "training": Model("training", llama(times(8), 2048, 65536), moments=True),
        "experts": Model("experts", experts(times(48), 128)),
    }
