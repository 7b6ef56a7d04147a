"""Does a checkpoint still match its manifest, and are two checkpoints the same tensors?"""
