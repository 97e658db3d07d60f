"""Open a bucket as a store: reach it, see that it is a store of ours or nothing yet, and what its server can do."""

from __future__ import annotations

import configparser
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError

from relay.errors import UsageError
from relay.stores.contract import FORMAT, LockName, check_format
from relay.stores.s3.blobs import STALE_SECONDS, S3Blobs
from relay.stores.s3.bucket import THREADS, Bucket, ConditionsIgnoredError, TakenError
from relay.stores.s3.chunks import S3Chunks
from relay.stores.s3.documents import S3Documents
from relay.stores.s3.failures import store_error
from relay.stores.s3.keys import Keys
from relay.stores.s3.locks import S3Locks
from relay.stores.s3.settings import S3Settings

if TYPE_CHECKING:
    from types_boto3_s3.client import S3Client

CONNECT_SECONDS: Final = 5.0
ANSWER_SECONDS: Final = 20.0
"""For the next bytes of an answer."""
_TRIES: Final = 4
_FORMAT_MAX: Final = 4096


@dataclass(frozen=True, slots=True)
class OpenedBucket:
    """The faces of a store in a bucket, and its locks. `closed` says why nothing is written any more; empty while all is
    well.
    """

    chunks: S3Chunks
    documents: S3Documents
    blobs: S3Blobs
    exclusive: Callable[[LockName], AbstractContextManager[None]]
    closed: Callable[[], str]


def open_bucket(settings: S3Settings, *, read_only: bool = False, threads: int = THREADS) -> OpenedBucket:
    """Blocking. `read_only`: nothing is written, also no format; a bucket that is away fails each read until it is there.

    Raises:
        UsageError: the bucket holds something else under this prefix, or the credentials' file cannot be used.
        StoreError: the bucket cannot be reached, is not there, or refuses.
    """
    bucket, keys = Bucket(settings, _client(settings, threads), threads=threads), Keys(settings.prefix)
    try:
        has_conditions = read_only or _prepare(bucket, keys)
    except BaseException:
        bucket.close()
        raise
    locks = S3Locks(bucket, keys, has_conditions=has_conditions)
    documents = S3Documents(bucket, keys, has_conditions=has_conditions)
    return OpenedBucket(
        S3Chunks(bucket, keys), documents, S3Blobs(bucket, keys), locks.exclusive, lambda: bucket.closed_to_writes
    )


def _prepare(bucket: Bucket, keys: Keys) -> bool:
    """See that this is our format, written now where nothing is; whether the server heeds conditions."""
    found = bucket.get(keys.format, _FORMAT_MAX)
    if found is None:
        _refuse_foreign(bucket, keys)
        try:
            bucket.put(keys.format, FORMAT, only_new=True)
        except TakenError:
            pass
        except ConditionsIgnoredError:
            bucket.put(keys.format, FORMAT)
    else:
        check_format(str(bucket.settings), found.data)
    bucket.abort_stale_uploads(keys.all, STALE_SECONDS)
    return _heeds_conditions(bucket, keys)


def _heeds_conditions(bucket: Bucket, keys: Keys) -> bool:
    """By a write that must not happen; where it does, it writes what is there."""
    try:
        bucket.put(keys.format, FORMAT, only_new=True)
    except TakenError:
        return True
    except ConditionsIgnoredError:
        return False
    return False


def _refuse_foreign(bucket: Bucket, keys: Keys) -> None:
    foreign = next(bucket.list(keys.all), None)
    if foreign is not None:
        raise UsageError(
            f"{bucket.settings} is neither empty nor a store: it holds {foreign[:120]!r}", hint="name another prefix"
        )


def _client(settings: S3Settings, threads: int) -> S3Client:
    config = Config(
        connect_timeout=CONNECT_SECONDS,
        read_timeout=ANSWER_SECONDS,
        max_pool_connections=threads + 4,  # parts of a large file have threads of their own
        retries={"mode": "standard", "max_attempts": _TRIES},
        # Ours are set where they serve; what newer clients add by themselves is refused by S3-compatible servers.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"addressing_style": "path" if settings.path_style else "auto"},
        tcp_keepalive=True,
    )
    more: dict[str, Any] = _credentials(settings) if settings.credentials else {}
    try:
        with _making:
            session = _session()
            region = settings.region or session.region_name or "us-east-1"
            endpoint = settings.endpoint or None
            return session.client("s3", region_name=region, endpoint_url=endpoint, config=config, **more)
    except (BotoCoreError, ValueError) as error:
        raise store_error(error, settings, "open a store") from error


_making: Final = threading.Lock()
"""A session makes one client at a time; clients may be used by many threads."""


@lru_cache(maxsize=1)
def _session() -> boto3.session.Session:
    """One for all buckets: each reads a description of S3 that takes a tenth of a second to parse."""
    return boto3.session.Session()


def _credentials(settings: S3Settings) -> dict[str, str]:
    """Of the section that is named, else of the first. No value of it is told in an error."""
    path = settings.credentials
    parser = configparser.ConfigParser(interpolation=None)
    try:
        with open(path, encoding="utf-8") as file:
            parser.read_file(file)
    except (OSError, UnicodeDecodeError, configparser.Error) as error:
        why = error.strerror if isinstance(error, OSError) else type(error).__name__
        raise UsageError(f"the credentials' file {path} cannot be read: {why}", hint=_HINT) from None
    section = settings.profile or next(iter(parser.sections()), "")
    if not parser.has_section(section):
        raise UsageError(f"the credentials' file {path} has no section {section or 'at all'!r}", hint=_HINT)
    found = {name: parser.get(section, name, fallback="") for name in _WANTED}
    if not (found["aws_access_key_id"] and found["aws_secret_access_key"]):
        raise UsageError(f"section {section!r} of {path} lacks a key", hint=_HINT)
    return {name: value for name, value in found.items() if value}


_WANTED: Final = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
_HINT: Final = "expected a section such as [default] with aws_access_key_id and aws_secret_access_key"
