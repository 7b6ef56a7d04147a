"""One fsspec driver, made lazily in each process, with every call retried, translated and free of secrets."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from reshard_service.storage.faults import Retry, secrets_in, storage_error

T = TypeVar("T")

OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "hf"})
"""Stores whose objects appear only when an upload is completed, and which the drivers write as uploads."""


class Connection:
    """One driver instance, made lazily and anew in each process, with the options it was configured with.

    ``options`` is called when the driver is made, so that secrets are read late and never kept in a value.
    """

    def __init__(
        self,
        scheme: str,
        uri: str,
        options: Callable[[], Mapping[str, object]],
        retry: Retry,
        make: Callable[..., Any] | None = None,
    ) -> None:
        self.scheme = scheme
        self._uri = uri
        self._options = options
        self._make = make
        self.retry = retry
        self._lock = threading.Lock()
        self._made: tuple[int, Any] | None = None
        self._secrets: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"Connection({self.scheme!r})"

    def filesystem(self) -> Any:
        """The driver of this process."""
        made = self._made
        if made is not None and made[0] == os.getpid():
            return made[1]
        if made is not None:
            self._lock = threading.Lock()  # this process was forked; the parent's threads may have held the old one
        with self._lock:
            if self._made is None or self._made[0] != os.getpid():
                self._made = (os.getpid(), self._connect())
            return self._made[1]

    def _connect(self) -> Any:
        import fsspec

        options = dict(self._options())
        self._secrets = secrets_in(options)
        make = self._make or fsspec.get_filesystem_class(self.scheme)
        from_uri: dict[str, object] = getattr(make, "_get_kwargs_from_urls", lambda _: {})(self._uri)
        if self.scheme in OBJECT_STORES:
            options["use_listings_cache"] = False
        return make(**{**from_uri, **options, "skip_instance_cache": True})

    def key(self, uri: str) -> str:
        """What the driver calls the place at ``uri``."""
        return str(self.filesystem()._strip_protocol(uri)).rstrip("/")

    def call(self, request: Callable[[Any], T], what: str, *, file: str, writing: bool = False) -> T:
        """``request``'s answer; faults that pass by themselves are retried, all others become ours."""
        try:
            return self.retry.call(lambda: request(self.filesystem()))
        except Exception as error:
            raise self.translated(error, what, file=file, writing=writing) from None

    def translated(self, error: BaseException, what: str, *, file: str, writing: bool) -> Exception:
        # The URI holds no secrets: userinfo and query are refused before it comes here.
        return storage_error(error, f"{what} at {self._uri}", file=file, writing=writing, secrets=self._secrets)
