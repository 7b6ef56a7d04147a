"""One plain safetensors file (or several parts) per rank, holding what that rank has in memory.

The names are those of vLLM's sharded state (``model-rank-{rank}-part-{part}.safetensors``). Beside them lies
``reshard.layout.json``: the layout that cut the tensors and their global shapes, which local shapes can't prove.
"""
