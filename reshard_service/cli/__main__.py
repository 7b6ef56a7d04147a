"""``python -m reshard_service.cli`` is ``reshard``."""

from reshard_service.cli import main

main()
