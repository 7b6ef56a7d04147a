"""Safetensors files: one, or a folder of shards with an index. The header parser is stricter than the library."""
