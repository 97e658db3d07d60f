"""What botocore says, as the store contract says it. A failure that another try may mend has a `retry_after`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    ReadTimeoutError,
    ResponseStreamingError,
)
from urllib3.exceptions import HTTPError

from relay.errors import StoreError
from relay.stores.s3.settings import S3Settings

RETRY_SECONDS: Final = 5.0
"""After which asking again makes sense where the bucket is away or wants less."""

_ABSENT: Final = frozenset({"NoSuchKey", "404", "NotFound"})
_TAKEN: Final = frozenset({"PreconditionFailed", "412"})
_RACED: Final = frozenset({"ConditionalRequestConflict", "OperationAborted", "409"})
_UNKNOWN: Final = frozenset({"NotImplemented", "501"})
_CREDENTIALS: Final = frozenset(
    {"AccessDenied", "403", "Forbidden", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}
)
_FULL: Final = frozenset({"QuotaExceeded", "InsufficientStorage", "XMinioStorageFull", "507", "ServiceQuotaExceeded"})
_CLOCK: Final = "RequestTimeTooSkewed"
_MANY_REQUESTS, _SERVER_FAULT = 429, 500

BROKEN: Final = (IncompleteReadError, ReadTimeoutError, ResponseStreamingError, HTTPError)
"""An answer that broke off: what came of it is thrown away, and asking once more may help."""
_ROAD: Final = (ConnectionError, HTTPClientError, OSError, *BROKEN)
FAILED: Final = (BotoCoreError, ClientError, HTTPError, OSError)
"""All that asking a bucket can raise."""


def code_of(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def is_absent(error: ClientError) -> bool:
    """There is no such key. (That there is no such bucket is another code, where a body comes with it.)"""
    return code_of(error) in _ABSENT


def is_taken(error: ClientError) -> bool:
    """A condition did not hold: the key is there, or is another object now."""
    return code_of(error) in _TAKEN


def is_raced(error: ClientError) -> bool:
    """Another writer was at it at the same moment, so that nothing was written: again."""
    return code_of(error) in _RACED


def is_not_known(error: ClientError) -> bool:
    """This server does not know what was asked of it."""
    return code_of(error) in _UNKNOWN


@contextmanager
def translated(settings: S3Settings, what: str) -> Iterator[None]:
    """Raise a `StoreError` in place of what botocore raises; `what` was being tried."""
    try:
        yield
    except FAILED as error:
        raise store_error(error, settings, what) from error


def store_error(error: Exception, settings: S3Settings, what: str) -> StoreError:
    """See `translated`."""
    place = settings.place
    if isinstance(error, ClientError):
        return _refused(error, place, what)
    if isinstance(error, NoCredentialsError | PartialCredentialsError | CredentialRetrievalError | ProfileNotFound):
        return StoreError(
            f"cannot {what} in {place}: {error}",
            hint="name a file with credentials= in the location, or give them as the AWS tools take them",
        )
    if isinstance(error, _ROAD):
        return StoreError(f"cannot {what}: {place} cannot be reached ({_short(error)})", retry_after=RETRY_SECONDS)
    return StoreError(f"cannot {what} in {place}: {_short(error)}")


def _refused(error: ClientError, place: str, what: str) -> StoreError:
    code, status = code_of(error), _status(error.response)
    if code == "NoSuchBucket":
        return StoreError(f"cannot {what}: there is no {place}", hint="make it first, or name another")
    if code in _CREDENTIALS:
        return StoreError(
            f"cannot {what}: {place} refuses these credentials ({code})",
            hint="they need s3:GetObject, PutObject, DeleteObject, ListBucket and AbortMultipartUpload there",
        )
    if code == _CLOCK:
        return StoreError(f"cannot {what}: the clock of {place} and this machine's differ by minutes", hint="set it")
    if code in _FULL:
        return StoreError(f"no space left to {what} in {place} ({code})", full=True, retry_after=RETRY_SECONDS)
    passes = status == _MANY_REQUESTS or status >= _SERVER_FAULT or code in _RACED
    return StoreError(f"cannot {what} in {place}: {code or status}", retry_after=RETRY_SECONDS if passes else None)


def _status(response: Any) -> int:  # noqa: ANN401 - a dictionary of botocore's
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _short(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
