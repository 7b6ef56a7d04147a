"""Faults of drivers: which are tried again, what becomes of the others, and that secrets never get through."""

from __future__ import annotations

import errno
from typing import Any

import pytest

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
from reshard_service.storage.faults import Retry, already_exists, passes_by_itself, redact, secrets_in, storage_error

pytestmark = pytest.mark.faults


class SdkError(Exception):
    """Shaped like botocore's ClientError."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(f"An error occurred ({code})")
        self.response: dict[str, Any] = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}


class HttpError(Exception):
    """Shaped like aiohttp's ClientResponseError."""

    def __init__(self, status: int) -> None:
        super().__init__("refused")
        self.status = status


class ReadTimeoutError(Exception):
    """Named like the SDKs name theirs."""


class NoCredentialsError(Exception):
    """Named like botocore's."""


def wrapped(outer: Exception, cause: Exception) -> Exception:
    outer.__cause__ = cause
    return outer


PASSING = [
    SdkError(503, "SlowDown"),
    SdkError(500, "InternalError"),
    SdkError(409, "ConditionalRequestConflict"),
    HttpError(429),
    TimeoutError(),
    ConnectionResetError(),
    ReadTimeoutError(),
    OSError(errno.EBUSY, "Please reduce your request rate"),
    wrapped(RuntimeError("driver"), HttpError(502)),
]
LASTING = [
    SdkError(403, "AccessDenied"),
    SdkError(412, "PreconditionFailed"),
    HttpError(404),
    FileNotFoundError("x"),
    PermissionError("x"),
    OSError(errno.ENOSPC, "full"),
    ValueError("bug"),
    wrapped(PermissionError("x"), TimeoutError()),
]


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_throttling_timeouts_and_5xx_pass_by_themselves(error: Exception) -> None:
    assert passes_by_itself(error)


@pytest.mark.parametrize("error", LASTING, ids=repr)
def test_refusals_and_bugs_do_not(error: Exception) -> None:
    assert not passes_by_itself(error)


def test_a_passing_fault_is_retried_with_growing_jittered_waits() -> None:
    waits: list[float] = []
    answers: list[Exception | str] = [TimeoutError(), HttpError(503), TimeoutError(), "done"]

    def request() -> str:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert Retry(attempts=4, first_wait_seconds=1, longest_wait_seconds=3, sleep=waits.append).call(request) == "done"
    assert len(waits) == 3
    assert all(0 <= wait <= most for wait, most in zip(waits, (1, 2, 3), strict=True))


@pytest.mark.parametrize(("error", "calls"), [(TimeoutError(), 3), (PermissionError(), 1)])
def test_retries_end_and_lasting_faults_have_none(error: Exception, calls: int) -> None:
    seen = []

    def request() -> None:
        seen.append(1)
        raise error

    with pytest.raises(type(error)):
        Retry(attempts=3, sleep=lambda _: None).call(request)
    assert len(seen) == calls


@pytest.mark.parametrize(
    ("error", "writing", "expected"),
    [
        (FileNotFoundError("x"), False, SourceNotFound),
        (FileNotFoundError("x"), True, TargetError),
        (PermissionError("x"), False, StorageDenied),
        (HttpError(401), False, StorageDenied),
        (NoCredentialsError("Unable to locate credentials"), True, StorageDenied),
        (OSError(errno.ENOSPC, "x"), True, TargetFull),
        (NotImplementedError(), True, TargetReadOnly),
        (ImportError("x"), False, EnvironmentUnfit),
        (SdkError(503, "SlowDown"), False, StorageFailed),
        (ValueError("x"), False, StorageFailed),
    ],
    ids=repr,
)
def test_every_fault_has_an_error_of_the_tree(error: Exception, writing: bool, expected: type[ReshardError]) -> None:
    made = storage_error(error, "looking", file="f", writing=writing)
    assert type(made) is expected
    assert "looking" in str(made)


def test_only_what_may_pass_is_called_retryable() -> None:
    assert StorageFailed.retryable
    assert not StorageDenied.retryable


@pytest.mark.parametrize(
    "error",
    [
        FileExistsError(),
        SdkError(412, "PreconditionFailed"),
        wrapped(OSError(errno.EINVAL, "x"), SdkError(412, "PreconditionFailed")),
        HttpError(412),
    ],
    ids=repr,
)
def test_every_spelling_of_already_exists_is_understood(error: Exception) -> None:
    assert already_exists(error)
    assert not already_exists(OSError(errno.EINVAL, "something else"))


def test_secrets_are_taken_out_of_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "from-the-environment")
    secrets = secrets_in(
        {"secret": "option-secret", "client_kwargs": {"aws_session_token": "deep-token"}, "anon": False}
    )
    text = (
        "option-secret deep-token from-the-environment AKIAABCDEFGHIJKLMNOP Bearer abc.def "
        "https://u:p4ss@host/x?X-Amz-Signature=0123&X-Amz-Credential=ck&sig=azure"
    )
    shown = redact(text, secrets)
    hidden = ("option-secret", "deep-token", "from-the-env", "AKIA", "abc.def", "p4ss", "0123", "ck&", "azure")
    assert not [part for part in hidden if part in shown], shown
    assert "@host/x" in shown
