"""What goes wrong in a remote store, in our own words: which faults pass by themselves, and which never will.

Drivers raise whatever their SDK raises. Here that becomes one error of the tree, with the way out and without secrets:
the driver's own exception is not chained, because its text and its frames may hold keys and signed URLs.
"""

from __future__ import annotations

import errno
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from reshard_service.errors import (
    EnvironmentUnfit,
    ReshardError,
    SourceNotFound,
    StorageDenied,
    StorageFailed,
    TargetError,
    TargetFull,
    TargetReadOnly,
)

T = TypeVar("T")

_PASSING_STATUS = frozenset({408, 429, 500, 502, 503, 504})
_PASSING_ERRNO = frozenset(
    {errno.EBUSY, errno.EAGAIN, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE}
    | {getattr(errno, "EREMOTEIO", errno.EBUSY)}  # Linux only; what s3fs makes of a 500
)
_PASSING_CODES = frozenset(
    {
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
        "RequestTimeout",
        "RequestLimitExceeded",
        "InternalError",
        "ServiceUnavailable",
        "OperationAborted",
        "ConditionalRequestConflict",
    }
)
# SDKs name their timeouts and lost connections alike, but share no base class that could be caught here.
_PASSING_NAMES = re.compile(
    r"Timeout|ConnectionClosed|EndpointConnection|ServerDisconnected|ClientPayload|IncompleteRead"
)

_NO_CREDENTIALS = re.compile(
    r"NoCredentials|PartialCredentials|CredentialRetrieval|ProfileNotFound|GoogleAuth|TokenRetrieval"
)
_CREDENTIALS_HINT = (
    "give credentials in the provider's usual environment (for s3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, "
    "AWS_ENDPOINT_URL_S3) or in a profile file (RESHARD_PROFILES)"
)

_SECRET_OPTION = re.compile(r"secret|key|token|passw|credential|sas|auth|username", re.IGNORECASE)
_SECRET_ENVIRONMENT = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_CONNECTION_STRING",
    "AZURE_STORAGE_SAS_TOKEN",
    "AZURE_CLIENT_SECRET",
    "HF_TOKEN",
)
_SECRET_PATTERNS = (
    (re.compile(r"(://)[^/@\s]+@"), r"\1***@"),
    (
        re.compile(
            r"((?:signature|credential|security-token|sig|token|key|secret|password)=)[^&\s'\"]+", re.IGNORECASE
        ),
        r"\1***",
    ),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}\b"), "***"),
    (re.compile(r"(Bearer\s+)\S+", re.IGNORECASE), r"\1***"),
)


def secrets_in(options: Mapping[str, object]) -> tuple[str, ...]:
    """The values among a driver's options, at any depth, that must never be shown."""
    found: list[str] = []
    for name, value in options.items():
        if isinstance(value, Mapping):
            found.extend(secrets_in(value))
        elif isinstance(value, str) and _SECRET_OPTION.search(name):
            found.append(value)
    return tuple(found)


def redact(text: str, secrets: tuple[str, ...] = ()) -> str:
    """``text`` without the given secrets, those of the environment, and what looks like one."""
    known = (*secrets, *(os.environ.get(name, "") for name in _SECRET_ENVIRONMENT))
    for secret in sorted(known, key=len, reverse=True):
        if len(secret) >= 4:  # shorter ones would blank out ordinary words
            text = text.replace(secret, "***")
    for pattern, replacement in _SECRET_PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from: drivers wrap the SDK's error, which alone holds the status."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def status_of(error: BaseException) -> tuple[int | None, str | None]:
    """HTTP status and the store's own error code, where an SDK error tells them."""
    response = getattr(error, "response", None)
    if isinstance(response, Mapping):  # botocore
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return (status if isinstance(status, int) else None), response.get("Error", {}).get("Code")
    for name in ("status", "status_code", "code"):  # aiohttp, azure, gcsfs
        value = getattr(error, name, None)
        if isinstance(value, int):
            return value, None
    return None, None


def already_exists(error: BaseException) -> bool:
    """True if a create-once write failed because something has the name (drivers disagree on how to say so)."""
    for cause in causes(error):
        if isinstance(cause, FileExistsError):
            return True
        status, code = status_of(cause)
        if status == 412 or code in ("PreconditionFailed", "BlobAlreadyExists"):
            return True
    return False


def passes_by_itself(error: BaseException) -> bool:
    """Throttling, timeouts, lost connections and 5xx answers: the same request may succeed in a moment."""
    for cause in causes(error):
        status, code = status_of(cause)
        if status in _PASSING_STATUS or code in _PASSING_CODES:
            return True
        if isinstance(cause, (FileNotFoundError, FileExistsError, PermissionError)) or status is not None:
            return False
        if isinstance(cause, (TimeoutError, ConnectionError)) or _PASSING_NAMES.search(type(cause).__name__):
            return True
        if isinstance(cause, OSError) and cause.errno in _PASSING_ERRNO:
            return True
    return False


@dataclass(frozen=True, slots=True)
class Retry:
    """How often a request that failed in passing is repeated: exponential waits with full jitter.

    The jitter keeps a gang of workers that were throttled together from coming back together.
    """

    attempts: int = 4
    first_wait_seconds: float = 0.25
    longest_wait_seconds: float = 4.0
    sleep: Callable[[float], None] = time.sleep

    def call(self, request: Callable[[], T]) -> T:
        """The request's answer; its last error once the attempts are used up, any lasting error at once."""
        for attempt in range(1, self.attempts + 1):
            try:
                return request()
            except Exception as error:
                if attempt == self.attempts or not passes_by_itself(error):
                    raise
                wait = min(self.longest_wait_seconds, self.first_wait_seconds * 2 ** (attempt - 1))
                self.sleep(random.uniform(0, wait))
        raise AssertionError("unreachable: the last attempt returns or raises")


def storage_error(
    error: BaseException, what: str, *, file: str, writing: bool, secrets: tuple[str, ...] = ()
) -> ReshardError:
    """The error of the tree for a driver's exception; ``what`` reads after "while"."""
    if isinstance(error, ReshardError):
        return error
    names = " ".join(type(cause).__name__ for cause in causes(error))
    detail = redact(str(error) or type(error).__name__, secrets)
    status, code = next(((s, c) for s, c in map(status_of, causes(error)) if s is not None), (None, None))
    if _NO_CREDENTIALS.search(names):
        return StorageDenied(f"no usable credentials while {what}: {detail}", file=file, hint=_CREDENTIALS_HINT)
    if isinstance(error, PermissionError) or status in (401, 403):
        return StorageDenied(f"the store refused access while {what}: {detail}", file=file, hint=_CREDENTIALS_HINT)
    if isinstance(error, FileNotFoundError) or status == 404:
        if writing:
            return TargetError(
                f"nothing to write into while {what}: {detail}", file=file, hint="does the bucket exist?"
            )
        return SourceNotFound(f"not found while {what}", file=file)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return TargetFull(f"no space left while {what}: {detail}", file=file)
    if isinstance(error, NotImplementedError) and writing:
        return TargetReadOnly(f"this kind of store can't be written ({what})", file=file)
    if isinstance(error, ImportError):
        return EnvironmentUnfit(f"a driver is missing while {what}: {detail}", file=file)
    kind = code or type(error).__name__
    return StorageFailed(f"failed while {what}: {kind}: {detail}", file=file)
