"""Fixtures of the storage tests; those of the S3 server are shared, in ``tests/conftest.py``."""

import uuid

import pytest


@pytest.fixture
def memory_uri() -> str:
    """A folder of the process-wide memory store that no other test uses."""
    return f"memory://{uuid.uuid4().hex}/prefix"
