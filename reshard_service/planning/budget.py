"""How much memory a worker may use: the one place where buffer sizes are decided (decision 31)."""

from __future__ import annotations

import os
from dataclasses import dataclass

PROCESS_BYTES = 70_000_000
"""A worker before it moves anything: interpreter, numpy, pydantic, the command line (measured resident size)."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Threads of one worker and the sizes of each thread's two reused buffers."""

    threads: int = 2
    staging_bytes: int = 8 << 20
    """What one round may read, zip framing and coalesced gaps included."""
    output_bytes: int = 12 << 20
    """What one round may write, alignment included."""

    @property
    def panel_bytes(self) -> int:
        """Largest panel: leaves room in both buffers for framing, gaps and alignment."""
        return self.staging_bytes - (1 << 20)

    @property
    def buffer_bytes(self) -> int:
        return self.threads * (self.staging_bytes + self.output_bytes)


def default_budget(threads: int | None = None, *, remote: bool = False) -> Budget:
    """``min(4, cores)`` threads unless told otherwise (decision 23).

    A remote store has three, which mostly wait, with smaller buffers: its driver holds parts on their way as well.
    """
    if remote:
        return Budget(threads=threads or 3, staging_bytes=4 << 20, output_bytes=6 << 20)
    return Budget(threads=threads or min(4, os.cpu_count() or 1))
