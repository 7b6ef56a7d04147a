"""Fixtures that several suites share."""

from __future__ import annotations

import pytest

from tests.oracles.checkpoints import Checkpoints, make_checkpoints
from tests.oracles.sharing import once
from tests.s3_server import s3_bucket, s3_server, s3_storage_uri

__all__ = ["checkpoints", "s3_bucket", "s3_server", "s3_storage_uri", "worker"]


@pytest.fixture(scope="session")
def worker(request: pytest.FixtureRequest) -> str:
    """Name of this pytest-xdist worker, ``master`` without xdist."""
    name: str = getattr(request.config, "workerinput", {}).get("workerid", "master")
    return name


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, worker: str) -> Checkpoints:
    """Real multi-process checkpoints with their truth, trained once a session: see ``oracles/checkpoints.py``."""
    return Checkpoints(once(tmp_path_factory, worker, "checkpoints", make_checkpoints))
