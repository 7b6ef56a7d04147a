"""The command line: ``reshard``. One module a command; heavy imports happen inside the commands that need them."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the console script."""
    try:
        from reshard_service.cli.app import main as run
    except KeyboardInterrupt:  # so early that nobody listens for signals yet
        sys.exit(5)
    run()


__all__ = ["main"]
