"""Page-aligned memory that is taken once and used again: fresh pages cost more than the disk does."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

PAGE = 4096


class Buffer:
    """``size`` bytes of anonymous memory, as a memoryview for I/O and as bytes of a numpy array for copies."""

    def __init__(self, size: int) -> None:
        self.size = -(-size // PAGE) * PAGE
        self._memory = mmap.mmap(-1, self.size)
        self.view = memoryview(self._memory)
        self.array: NDArray[Any] = np.frombuffer(self.view, dtype=np.uint8)

    def close(self) -> None:
        """Give the memory back; views that are still alive keep it until they go."""
        del self.array
        self.view.release()


def align_up(position: int, alignment: int = PAGE) -> int:
    return -(-position // alignment) * alignment
