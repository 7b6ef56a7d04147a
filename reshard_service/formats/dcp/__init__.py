"""torch.distributed.checkpoint folders: ``.metadata`` and ``*.distcp`` files of concatenated ``torch.save`` zips."""
