"""Reads tensors out of a catalogue of raw chunks in the plainest way, to compare them with torch's."""

from pathlib import Path

import numpy as np
import torch

from reshard_service.catalogue import Catalogue, Storing


def tensor_of(catalogue: Catalogue, key: str, root: Path) -> torch.Tensor:
    """The tensor ``key``, put together from its chunks; overlapping chunks have to agree."""
    at = next(i for i, tensor in enumerate(catalogue.tensors) if tensor.key == key)
    tensor, chunks = catalogue.tensors[at], catalogue.chunks
    itemsize, dims = tensor.dtype.itemsize, len(tensor.shape)
    whole = np.zeros((*tensor.shape, itemsize), dtype=np.uint8)
    covered = np.zeros(tensor.shape, dtype=bool)
    for row in range(chunks.rows(at).start, chunks.rows(at).stop):
        assert chunks.storing[row] == Storing.RAW
        sizes = chunks.sizes[row, :dims].tolist()
        stored = sizes if chunks.stored is None else chunks.stored[row, :dims].tolist()
        local = [0] * dims if chunks.local is None else chunks.local[row, :dims].tolist()
        offsets = chunks.offsets[row, :dims].tolist()
        path = root / catalogue.files[chunks.file[row]].path
        with path.open("rb") as file:
            file.seek(int(chunks.start[row]))
            data = np.frombuffer(file.read(int(chunks.length[row])), dtype=np.uint8).reshape(*stored, itemsize)
        box = tuple(slice(begin, begin + size) for begin, size in zip(offsets, sizes, strict=True))
        piece = data[tuple(slice(begin, begin + size) for begin, size in zip(local, sizes, strict=True))]
        assert (whole[box][covered[box]] == piece[covered[box]]).all()
        whole[box] = piece
        covered[box] = True
    assert covered.all()
    raw = torch.tensor(whole.reshape(-1).tolist(), dtype=torch.uint8)
    return raw.view(getattr(torch, tensor.dtype.torch or "")).reshape(tensor.shape)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal in type, shape and bits."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    flat = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return torch.equal(*flat)
