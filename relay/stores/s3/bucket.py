"""One bucket, by boto3: objects are read whole or streamed, written under conditions, and listed. All of it blocks.

`run` puts a job onto one of a bounded number of threads, which is also how many requests are under way at most. botocore
repeats what fails before an answer's body comes; a body that breaks off is asked for again here.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar

from boto3.s3.transfer import TransferConfig
from botocore.exceptions import ClientError

from relay.audit.acts import NotQuarantined, Quarantined
from relay.audit.event import tell
from relay.errors import ChunkInvalid, StoreError
from relay.stores.s3.failures import BROKEN, is_absent, is_not_known, is_raced, is_taken, translated
from relay.stores.s3.settings import S3Settings
from relay.support.persistence import Persistence

if TYPE_CHECKING:
    from types_boto3_s3.client import S3Client

THREADS: Final = 16
"""Requests that are under way at once."""
PART_BYTES: Final = 16 << 20
"""Of a large file: a part of a multipart upload, and from where on there is one."""
_AGAIN: Final = Persistence(first_pause=0.1, failures=3, spread=0.5)
"""With an answer that breaks off, and with a write that met another one."""
_STREAM_BYTES: Final = 256 << 10

P = ParamSpec("P")
T = TypeVar("T")


class TakenError(Exception):
    """There is an object of this key already, or another one than was to be replaced."""


class ConditionsIgnoredError(Exception):
    """The server does not know conditional writes."""


class TooLargeError(StoreError):
    """There is an object of this key, with more bytes than were asked for."""


class _RacedError(Exception):
    """Another writer was at it: again."""


@dataclass(frozen=True, slots=True)
class Found:
    """An object, read whole. `etag` is opaque: a token to compare, never a hash. `age`: seconds, by the server's clock."""

    data: bytes
    etag: str
    age: float


class Bucket:
    """`client` is boto3's, and is used by all threads."""

    def __init__(self, settings: S3Settings, client: S3Client, *, threads: int = THREADS) -> None:
        self.settings = settings
        self._client = client
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="s3")
        self._named: dict[str, Any] = {"Bucket": settings.bucket}
        self.closed_to_writes = ""
        """Why nothing is written any more; empty while all is well."""

    async def run(self, job: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `job` returns, on one of the threads. Raises `StoreError` where the bucket was closed."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, partial(job, *args, **kwargs))
        except RuntimeError as error:
            raise StoreError(f"{self.settings.place} was closed") from error

    async def run_all(self, jobs: Iterable[Callable[[], T]]) -> list[T]:
        """All of them, side by side; every one has ended when this returns or raises the first failure."""
        results = await asyncio.gather(*(self.run(job) for job in jobs), return_exceptions=True)
        done: list[T] = []
        for result in results:
            if isinstance(result, BaseException):
                raise result
            done.append(result)
        return done

    def close(self) -> None:
        """Let what is under way end. Twice is once."""
        self.closed_to_writes = self.closed_to_writes or "it was closed"
        self._pool.shutdown(wait=True)
        self._client.close()

    # --- reading

    def get(self, key: str, most: int) -> Found | None:
        """The object of this key; None where there is none.

        Raises:
            TooLargeError: the object has more than `most` bytes.
            StoreError: the bucket failed.
        """
        with translated(self.settings, f"read {key}"):
            for attempt in _AGAIN.blocking_tries(lambda error: isinstance(error, BROKEN)):
                with attempt:
                    return self._get(key, most)
        raise AssertionError("unreachable")  # pragma: no cover - the last try returns or raises

    def _get(self, key: str, most: int) -> Found | None:
        try:
            answer = self._client.get_object(**self._named, Key=key)
        except ClientError as error:
            if is_absent(error):
                return None
            raise
        with closing(answer["Body"]) as body:
            data = b"".join(body.iter_chunks(_STREAM_BYTES)) if answer["ContentLength"] <= most else b""
        if answer["ContentLength"] > most:
            raise TooLargeError(f"{key} in {self.settings.place} has {answer['ContentLength']:,} bytes: too many")
        now = _told_time(answer["ResponseMetadata"]["HTTPHeaders"].get("date", ""))
        return Found(data, answer["ETag"], (now - answer["LastModified"]).total_seconds())

    def stream(self, key: str) -> Iterator[bytes] | None:
        """The same in pieces, as they come; None where there is none. Raises `StoreError`, also between two pieces."""
        with translated(self.settings, f"read {key}"):
            try:
                body = self._client.get_object(**self._named, Key=key)["Body"]
            except ClientError as error:
                if is_absent(error):
                    return None
                raise
        return self._pieces(key, body)

    def _pieces(self, key: str, body: Any) -> Iterator[bytes]:  # noqa: ANN401 - botocore's stream has no type of its own
        with translated(self.settings, f"read {key}"), closing(body):
            yield from body.iter_chunks(_STREAM_BYTES)

    def has(self, key: str) -> bool:
        """Whether there is an object of this key. Raises `StoreError`."""
        with translated(self.settings, f"look for {key}"):
            try:
                self._client.head_object(**self._named, Key=key)
            except ClientError as error:
                if is_absent(error):
                    return False
                raise
        return True

    def list(self, prefix: str) -> Iterator[str]:
        """All keys that begin so, in order. Raises `StoreError`, also between two of them."""
        with translated(self.settings, f"list {prefix}"):
            for page in self._client.get_paginator("list_objects_v2").paginate(**self._named, Prefix=prefix):
                for entry in page.get("Contents", ()):
                    yield entry["Key"]

    # --- writing

    def put(self, key: str, data: bytes, *, only_new: bool = False, replaces: str = "") -> str:
        """Write an object, whole or not at all; its ETag. Its SHA-256 goes with it, so that the server finds what was damaged
        on the way.

        Args:
            key: its key.
            data: its bytes.
            only_new: there must be none of this key.
            replaces: the ETag of the one that must be there.

        Raises:
            TakenError: the condition does not hold.
            ConditionsIgnoredError: the server says that it knows no conditions.
            StoreError: the bucket failed; it may be written all the same.
        """
        self._require_writable()
        more: dict[str, Any] = {"ChecksumSHA256": base64.b64encode(hashlib.sha256(data).digest()).decode()}
        if only_new:
            more["IfNoneMatch"] = "*"
        if replaces:
            more["IfMatch"] = replaces
        with translated(self.settings, f"write {key}"):
            for attempt in _AGAIN.blocking_tries(lambda error: isinstance(error, _RacedError)):
                with attempt:
                    return self._put(key, data, more)
        raise AssertionError("unreachable")  # pragma: no cover - the last try returns or raises

    def _put(self, key: str, data: bytes, more: dict[str, Any]) -> str:
        try:
            return self._client.put_object(**self._named, Key=key, Body=data, **more)["ETag"]
        except ClientError as error:
            if is_taken(error) or (is_absent(error) and "IfMatch" in more):
                raise TakenError(key) from error
            if is_not_known(error):
                raise ConditionsIgnoredError from error
            if is_raced(error):
                raise _RacedError from error
            raise

    def put_file(self, key: str, path: str) -> None:
        """Write the file `path` as an object, a large one in parts; what fails leaves no parts behind. Raises `StoreError`."""
        self._require_writable()
        config = TransferConfig(
            multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=4, use_threads=True
        )
        with translated(self.settings, f"write {key}"):
            self._client.upload_file(path, self.settings.bucket, key, Config=config)

    def _require_writable(self) -> None:
        if self.closed_to_writes:
            raise StoreError(f"{self.settings.place} is read-only here: {self.closed_to_writes}")

    def copy(self, key: str, to: str) -> None:
        """Copy an object inside the bucket. Raises `StoreError`; one that is not there is no error."""
        with translated(self.settings, f"copy {key}"):
            try:
                self._client.copy_object(**self._named, Key=to, CopySource={"Bucket": self.settings.bucket, "Key": key})
            except ClientError as error:
                if not is_absent(error):
                    raise

    def delete(self, key: str) -> None:
        """Gone on return; what is not there is no error. Raises `StoreError`."""
        with translated(self.settings, f"remove {key}"):
            self._client.delete_object(**self._named, Key=key)

    def set_aside(self, key: str, aside: str, damage: ChunkInvalid) -> None:
        """Keep a damaged object under another key, so that the next put finds nothing in its way. Where that cannot be done,
        it stays, and is found again.
        """
        try:
            self.copy(key, aside)
            self.delete(key)
        except StoreError as error:
            tell(NotQuarantined(key, str(error)))
            damage.add_note(str(error))
            return
        tell(Quarantined(key, aside))

    def abort_stale_uploads(self, prefix: str, seconds: float) -> None:
        """Throw away the parts of uploads that began longer ago than that and never ended. Raises `StoreError`."""
        now = datetime.now(UTC)
        with translated(self.settings, "clear away old uploads"):
            for page in self._client.get_paginator("list_multipart_uploads").paginate(**self._named, Prefix=prefix):
                for upload in page.get("Uploads", ()):
                    if (now - upload["Initiated"]).total_seconds() > seconds:
                        self._client.abort_multipart_upload(
                            **self._named, Key=upload["Key"], UploadId=upload["UploadId"]
                        )


def _told_time(text: str) -> datetime:
    """The server's clock; where it does not tell, ours."""
    try:
        return parsedate_to_datetime(text)
    except ValueError:
        return datetime.now(UTC)
