"""Fixtures of the storage tests."""

import uuid

import pytest

from tests.s3_server import s3_bucket, s3_server, s3_storage_uri

__all__ = ["memory_uri", "s3_bucket", "s3_server", "s3_storage_uri"]


@pytest.fixture
def memory_uri() -> str:
    """A folder of the process-wide memory store that no other test uses."""
    return f"memory://{uuid.uuid4().hex}/prefix"
