"""The command line: ``reshard``. One module a command; heavy imports happen inside the commands that need them."""

from reshard_service.cli.app import main

__all__ = ["main"]
