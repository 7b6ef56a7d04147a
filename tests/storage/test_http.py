"""Plain web servers as read-only stores: one that knows ranges, one that ignores them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from reshard_service.errors import SourceCorrupt, SourceNotFound, StorageDenied, StorageFailed, TargetReadOnly
from reshard_service.storage.uri import open_storage

DATA = bytes(range(256)) * 4


class Handler(BaseHTTPRequestHandler):
    """Serves ``DATA`` as ``/ranged`` and ``/whole``; ``/locked`` wants credentials."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        if self.path not in ("/ranged", "/whole"):
            self.send_response(403 if self.path == "/locked" else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body, wanted = DATA, self.headers.get("Range")
        if self.path == "/ranged" and wanted is not None:
            first, last = (int(part) for part in wanted.removeprefix("bytes=").split("-"))
            body = DATA[first : last + 1]
            self.send_response(206 if body else 416)
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Accept-Ranges", "bytes" if self.path == "/ranged" else "none")
        self.send_header("ETag", '"one"')
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_ranges_of_a_web_file_are_exact(web: str) -> None:
    storage = open_storage(web)
    assert storage.read_bytes("ranged", 100, 50) == DATA[100:150]
    found = storage.stat("ranged")
    assert found is not None
    assert (found.bytes, "one" in found.identity) == (len(DATA), True)
    with pytest.raises(SourceCorrupt):
        storage.read_bytes("ranged", 1000, 50)
    with pytest.raises(SourceCorrupt):
        storage.read_bytes("ranged", 5000, 50)


def test_a_web_server_without_ranges_is_noticed(web: str) -> None:
    with pytest.raises(StorageFailed, match="ignores ranged reads"):
        open_storage(web).read_bytes("whole", 100, 50)


def test_missing_and_locked_web_files_are_told_apart(web: str) -> None:
    storage = open_storage(web)
    assert storage.stat("nothing") is None
    with pytest.raises(SourceNotFound):
        storage.read_bytes("nothing", 0, 3)
    with pytest.raises(StorageDenied):
        storage.read_bytes("locked", 0, 3)


def test_a_web_server_can_not_be_a_target(web: str) -> None:
    storage = open_storage(web)
    for write in (lambda: storage.create("x"), lambda: storage.create_once("x", b""), lambda: storage.remove("x")):
        with pytest.raises(TargetReadOnly):
            write()
