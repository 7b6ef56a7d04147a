"""``shard-*-model-*`` folders: what torch's HuggingFaceStorageWriter writes with ``save_distributed=True``.

transformers' ``save_pretrained(distributed_checkpoint=True)`` writes the same. Every rank's chunks lie in a safetensors
file of its own whose ``__metadata__`` tells where in the global tensor each chunk begins. Nothing tells how many ranks
there were or how large a tensor is (torch 2.13, ``distributed/checkpoint/hf_storage.py`` and ``_hf_utils.py``).
"""
