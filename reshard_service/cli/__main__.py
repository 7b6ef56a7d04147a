"""``python -m reshard_service.cli`` is ``reshard``."""

from reshard_service.cli.app import main

main()
