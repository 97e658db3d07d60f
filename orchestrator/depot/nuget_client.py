"""Client of a NuGet V3 feed: one nupkg into one file, for `waystation package add --feed URL ID VERSION`.

The feed is hostile until proved otherwise: where it may send us is `orchestrator.depot.feed_policy`, what it may send is
capped and counted here. Protocol: https://learn.microsoft.com/nuget/api/overview.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
import hashlib
import os
import re
import socket
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Literal, TypeVar

import aiohttp
import msgspec
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from orchestrator.depot.feed_policy import FeedCredentials, FeedGate, FeedPolicy, FeedPolicyError
from relay.errors import (
    IdentityError,
    NotFoundError,
    RefusedError,
    StoreError,
    UnreachableError,
    UntrustedError,
    UsageError,
)
from relay.network.addresses import connector
from relay.network.proxies import Proxy, check_answer, proxy_of, through
from relay.package.identity import NuGetVersion, PackageId
from relay.support.json_bounds import check_depth
from relay.support.persistence import is_passing, seconds_asked

_T = TypeVar("_T")

_PACKAGE_BASE = ("PackageBaseAddress/3.0.0",)
# The hives that show every package come first.
_REGISTRATIONS = tuple(
    f"RegistrationsBaseUrl{suffix}" for suffix in ("/3.6.0", "/Versioned", "/3.4.0", "/3.0.0-rc", "/3.0.0-beta", "")
)
_PAGES_MAX = 4  # Pages that claim to hold one version: honest feeds have one.
_OPTIONAL_FAILURES, _OPTIONAL_SECONDS = 1, 5.0  # That are borne, and waited where the feed asks for time.
_LOCAL_FILE_HEADER = b"PK\x03\x04"


class FeedDocumentError(UntrustedError):
    """The feed's answer is not what the protocol says it must be."""


class FeedIntegrityError(UntrustedError):
    """The nupkg is not the one that was promised: another hash, or no zip at all."""


class FeedTooSlowError(UnreachableError):
    """The feed sends below the minimum rate, or took longer than all in all allowed."""


@dataclass(frozen=True, slots=True)
class FeedDownload:
    """A nupkg that has arrived.

    Attributes:
        verified_by: `given`, by the SHA-512 that the caller gave; `feed`, by the one that the feed states;
            `transport`, by nothing but the connection.
        source_url: where it was asked for, without query.
    """

    verified_by: Literal["feed", "given", "transport"]
    source_url: str


async def download(
    feed_url: str,
    id: PackageId,
    version: NuGetVersion,
    destination: str,
    *,
    sha512: str | None = None,
    policy: FeedPolicy | None = None,
    credentials: FeedCredentials | None = None,
    resolver: AbstractResolver | None = None,
) -> FeedDownload:
    """Fetch one nupkg into the new file `destination`, which is removed again if anything is wrong.

    Args:
        feed_url: of the service index.
        id: the package.
        version: its version.
        destination: must not exist.
        sha512: hex or base64; then the feed's own word is not asked for.
        policy: where to go and how long to bear with the feed.
        credentials: sent to the feed's own origin, and to no other.
        resolver: looks names up, by default the system's; what it answers is judged by the policy.

    Raises:
        UsageError: the URL, the SHA-512, a listed host, or a proxy of the environment cannot be read.
        FeedPolicyError: the feed leads to where the policy does not go.
        NotFoundError: no feed there, or no such package on it.
        RefusedError: the feed wants (other) credentials, or `destination` exists.
        FeedDocumentError, FeedIntegrityError: the feed answers with something else than it must.
        UnreachableError: the road, the feed's own trouble, or a deadline, for longer than the policy bears.
        StoreError: the file cannot be written.
    """
    policy = policy or FeedPolicy()
    gate = FeedGate(feed_url, policy)
    given = None if sha512 is None else parse_sha512(sha512)
    try:
        guarded = _GuardedResolver(gate, resolver or aiohttp.ThreadedResolver())
        async with asyncio.timeout(policy.total_seconds), _session(policy, guarded) as session:
            feed = _Feed(gate, policy, credentials, guarded, session)
            return await _download(feed, id, version, destination, given)
    except TimeoutError as error:
        raise FeedTooSlowError(f"{gate.feed.host} took more than {policy.total_seconds:g} s in all") from error


def parse_sha512(text: str) -> bytes:
    """The 64 bytes of a SHA-512 in hex or base64.

    Raises:
        UsageError: neither.
    """
    if re.fullmatch(r"[0-9a-fA-F]{128}", text):
        return bytes.fromhex(text)
    with contextlib.suppress(ValueError):
        digest = base64.b64decode(text, validate=True)
        if len(digest) == 64:
            return digest
    raise UsageError(f"{text[:100]!r} is not a SHA-512", hint="expected 128 hex digits, or base64 as NuGet writes it")


# --- the steps


async def _download(
    feed: _Feed, id: PackageId, version: NuGetVersion, destination: str, given: bytes | None
) -> FeedDownload:
    resources = await _resources(feed)
    base = _find(resources, _PACKAGE_BASE)
    if base is None:
        raise FeedDocumentError(f"the feed {_shown(feed.gate.feed)} offers no {_PACKAGE_BASE[0]}")
    # Before the package is fetched, so that a feed which leads elsewhere costs no 4 GiB.
    expected = given or await _stated_sha512(feed, resources, id, version)
    url = base / id.key / version.url / f"{id.key}.{version.url}.nupkg"

    async def once() -> bytes:
        sink = _Sink(destination)
        try:
            has_end = await _fetch_nupkg(feed, url, sink, f"{id} {version}")
            found = await asyncio.to_thread(sink.finish)
            if expected is not None and found != expected:
                whose = "given" if given else "the feed states"
                raise _wrong(f"{id} {version} has another SHA-512 than {whose}", FeedIntegrityError, has_end=has_end)
            return found
        except BaseException:
            sink.discard()
            raise

    await feed.persist(once)
    return FeedDownload("given" if given else "feed" if expected else "transport", _shown(url))


async def _resources(feed: _Feed) -> list[_Resource]:
    try:
        index = await feed.json(feed.gate.feed, _ServiceIndex)
    except NotFoundError as error:
        hint = "a V3 feed's URL usually ends in /index.json"
        raise NotFoundError(f"there is no NuGet V3 feed at {_shown(feed.gate.feed)}", hint=hint) from error
    if index.version.split(".")[0] != "3":
        raise FeedDocumentError(f"{_shown(feed.gate.feed)} is a feed of version {index.version[:40]!r}, not 3")
    return index.resources


def _find(resources: Iterable[_Resource], types: tuple[str, ...]) -> URL | None:
    """The base URL of the first of `types` that is offered."""
    for wanted in types:
        for resource in resources:
            if wanted in resource.types:
                return _absolute(resource.id)
    return None


async def _stated_sha512(feed: _Feed, resources: list[_Resource], id: PackageId, version: NuGetVersion) -> bytes | None:
    """What the feed says the nupkg's SHA-512 is, or None where it says nothing.

    It stands in the registration's catalog entry or, on the public gallery, in the catalog leaf that this names. A feed
    whose registration is out of order still has packages.
    """
    base = _find(resources, _REGISTRATIONS)
    if base is None:
        return None
    try:
        entry = await _catalog_entry(feed, base / id.key / "index.json", version)
        if entry is None or entry.hash is not None or not entry.id.startswith(("http://", "https://")):
            return None if entry is None else entry.sha512()
        return (await feed.json(_absolute(entry.id), _Hashed, optional=True)).sha512()
    except (NotFoundError, UnreachableError):
        return None


async def _catalog_entry(feed: _Feed, index: URL, version: NuGetVersion) -> _Entry | None:
    registration = await feed.json(index, _Registration, optional=True)
    pages = [page for page in registration.items if page.may_hold(version)]
    for page in pages[:_PAGES_MAX]:
        leaves = page.items
        if leaves is None:
            leaves = (await feed.json(_absolute(page.id), _Page, optional=True)).items or []
        for leaf in leaves:
            if _parse_version(leaf.entry.version) == version:
                return leaf.entry
    return None


async def _fetch_nupkg(feed: _Feed, url: URL, sink: _Sink, name: str) -> bool:
    """Whether its end was announced."""
    try:
        async with feed.get(url, accept_encoding="identity") as response:
            announced = response.content_length
            if announced is not None and announced > feed.policy.nupkg_max:
                raise FeedIntegrityError(f"{name} is announced with {announced} bytes, too many")
            if response.headers.get("Content-Encoding", "identity").lower() != "identity":
                raise FeedDocumentError(f"the feed sends {name} in a content coding, which alters its bytes")
            async for piece in feed.body(response, feed.policy.nupkg_max):
                await asyncio.to_thread(sink.write, piece)
    except NotFoundError as error:
        raise NotFoundError(f"the feed {_shown(feed.gate.feed)} has no {name}") from error
    if not sink.head.startswith(_LOCAL_FILE_HEADER):
        kind = response.content_type
        raise FeedIntegrityError(f"what the feed sends as {name} is no zip ({kind})", hint=_login_hint(kind))
    return _has_end(response)


# --- requests


class _GuardedResolver(AbstractResolver):
    """Looks names up and lets the gate judge each answer; aiohttp then connects to these addresses, none other.


    `proxies` are hosts and ports that the environment names, not the feed.
    """

    def __init__(self, gate: FeedGate, inner: AbstractResolver) -> None:
        self._gate = gate
        self._inner = inner
        self.proxies: set[tuple[str, int]] = set()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        found = await self._inner.resolve(host, port, family)
        if (host, port) not in self.proxies:
            for each in found:
                self._gate.check_address(host, each["host"])
        return found

    async def close(self) -> None:
        await self._inner.close()


def _session(policy: FeedPolicy, resolver: _GuardedResolver) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        # No cache: a name is judged each time that it is used.
        connector=connector(resolver),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        timeout=aiohttp.ClientTimeout(total=None, connect=policy.connect_seconds),
        headers={"User-Agent": "waystation"},
    )


@dataclass(frozen=True, slots=True)
class _Feed:
    """Requests to one feed, every one of them through the gate."""

    gate: FeedGate
    policy: FeedPolicy
    credentials: FeedCredentials | None
    resolver: _GuardedResolver
    session: aiohttp.ClientSession

    @contextlib.asynccontextmanager
    async def get(self, url: URL, *, accept_encoding: str) -> AsyncIterator[aiohttp.ClientResponse]:
        """The answer 200 to a GET, after at most `policy.redirects` redirects. Raises as `download` does."""
        for _ in range(self.policy.redirects + 1):
            self.gate.check_url(url)
            proxy = proxy_of(str(url))
            response = await self._request(url, accept_encoding, proxy)
            try:
                if response.status not in {301, 302, 303, 307, 308}:
                    _check_status(response, proxy)
                    yield response
                    return
                url = _redirect(url, response)
            finally:
                response.close()
        raise FeedPolicyError(f"the feed redirects more than {self.policy.redirects} times, at last to {_shown(url)}")

    async def persist(self, what: Callable[[], Awaitable[_T]], *, optional: bool = False) -> _T:
        """What `what` returns, tried again where the road or the feed is in trouble."""
        persistence = self.policy.persistence
        if optional:
            asked = min(_OPTIONAL_SECONDS, persistence.longest_asked)
            persistence = replace(persistence, failures=_OPTIONAL_FAILURES, longest_asked=asked, patience=0.0)
        return await persistence.call(what, _may_pass)

    async def json(self, url: URL, type: type[_T], *, optional: bool = False) -> _T:
        """A JSON document, capped before it is parsed. Tried again; raises as `download` does."""
        return await self.persist(lambda: self._json(url, type), optional=optional)

    async def _json(self, url: URL, type: type[_T]) -> _T:
        data = bytearray()
        async with self.get(url, accept_encoding="gzip, identity;q=0.5") as response:
            async for piece in self.body(response, self.policy.json_max):
                data += piece
            coding = response.headers.get("Content-Encoding", "identity").lower()
            kind = response.content_type
        try:
            text = _inflate(bytes(data), coding, self.policy.json_max).removeprefix(b"\xef\xbb\xbf")
            check_depth(text, self.policy.json_depth)
            return msgspec.json.decode(text, type=type)
        except (ValueError, RecursionError, zlib.error) as error:
            message = f"{_shown(url)} is not the JSON that it must be ({kind}): {error}"
            raise _wrong(message, FeedDocumentError, has_end=_has_end(response), hint=_login_hint(kind)) from error

    async def body(self, response: aiohttp.ClientResponse, most: int) -> AsyncIterator[bytes]:
        """The body in pieces, counted, and not slower than the policy's minimum."""
        loop = asyncio.get_running_loop()
        total = credit = 0
        deadline = loop.time() + self.policy.window_seconds
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    piece = await response.content.readany()
            except TimeoutError as error:
                rate = self.policy.window_bytes / self.policy.window_seconds
                raise FeedTooSlowError(f"{response.url.host} sends less than {rate:.0f} bytes a second") from error
            except (aiohttp.ClientError, OSError) as error:
                raise UnreachableError(f"the body of {_shown(response.url)} was cut short: {error}") from error
            if not piece:
                return
            total += len(piece)
            credit += len(piece)
            if total > most:
                raise FeedDocumentError(f"{_shown(response.url)} is larger than {most} bytes")
            if credit >= self.policy.window_bytes:
                credit, deadline = 0, loop.time() + self.policy.window_seconds
            yield piece

    async def _request(self, url: URL, accept_encoding: str, proxy: Proxy | None) -> aiohttp.ClientResponse:
        headers = {"Accept-Encoding": accept_encoding}
        if self.credentials is not None and self.gate.is_own(url):
            headers["Authorization"] = self.credentials.header
        if proxy is not None:
            self.resolver.proxies.add((proxy.host, proxy.port))
        try:
            with through(proxy, f"the feed's host {url.host}"):
                async with asyncio.timeout(self.policy.connect_seconds + self.policy.answer_seconds):
                    return await self.session.get(
                        url, headers=headers, allow_redirects=False, proxy=proxy.url if proxy else None
                    )
        except TimeoutError as error:
            raise UnreachableError(f"{url.host} did not answer in time") from error
        except aiohttp.InvalidURL as error:
            raise FeedPolicyError(f"the feed names an unusable URL on {url.host}") from error
        except aiohttp.ClientConnectorCertificateError as error:
            verdict = getattr(error.certificate_error, "verify_message", "") or error.certificate_error
            raise UntrustedError(f"{url.host} shows a certificate that is not trusted: {verdict}") from error
        except (aiohttp.ClientError, OSError) as error:
            raise UnreachableError(f"cannot reach {url.host}: {error}") from error


def _may_pass(error: Exception) -> bool:
    """Whether another try may help: the road and the feed may recover, a full disk does not."""
    return isinstance(error, UnreachableError) and not isinstance(error, StoreError)


def _has_end(response: aiohttp.ClientResponse) -> bool:
    """Whether the answer said where its body ends; else a connection that is cut looks like the end."""
    return response.content_length is not None or "chunked" in response.headers.get("Transfer-Encoding", "").lower()


def _wrong(
    message: str, kind: type[UntrustedError], *, has_end: bool, hint: str = ""
) -> UntrustedError | UnreachableError:
    """What is wrong with a body; of one without an announced end it may be that it was cut short."""
    return kind(message, hint=hint) if has_end else UnreachableError(f"{message}; it may be cut short", hint=hint)


def _redirect(url: URL, response: aiohttp.ClientResponse) -> URL:
    try:
        return url.join(URL(response.headers["Location"]))
    except (KeyError, ValueError) as error:
        raise FeedDocumentError(f"{_shown(url)} redirects to nowhere") from error


def _check_status(response: aiohttp.ClientResponse, proxy: Proxy | None) -> None:
    status, shown = response.status, _shown(response.url)
    if status == 200:
        return
    if status in {404, 410}:
        raise NotFoundError(f"{shown} does not exist")
    asked = seconds_asked(response.headers.get("Retry-After"))
    check_answer(proxy, shown, status, shown, asked)
    if status in {401, 403, 407}:
        raise RefusedError(f"{shown} is not open to us (status {status})", hint="give credentials for this feed")
    if not is_passing(status):
        raise FeedDocumentError(f"{shown} answers with status {status}")
    hint = "the feed has trouble of its own; try again later"
    raise UnreachableError(f"{shown} answers with status {status}", hint=hint, retry_after=asked)


def _shown(url: URL) -> str:
    """For people and records: without the query, where signed URLs carry their secret."""
    return str(url.with_query(None).with_fragment(None).with_user(None))


def _login_hint(content_type: str) -> str:
    return "it looks like a web page, perhaps a login" if content_type == "text/html" else ""


def _inflate(data: bytes, coding: str, most: int) -> bytes:
    """Undo `Content-Encoding`, counting the output. Raises `ValueError` or `zlib.error`."""
    if coding == "identity":
        return data
    if coding not in {"gzip", "x-gzip"}:
        raise ValueError(f"unknown content coding {coding[:40]!r}")
    inflater = zlib.decompressobj(wbits=31)
    text = inflater.decompress(data, most + 1)
    if len(text) > most:
        raise ValueError(f"inflates to more than {most} bytes")
    if not inflater.eof or inflater.unused_data:
        raise ValueError("is not one whole gzip stream")
    return text


# --- the file


class _Sink:
    """A new file that hashes what is written to it. Its methods block."""

    def __init__(self, path: str) -> None:
        try:
            self._file = open(path, "xb")  # noqa: SIM115 - it outlives this method
        except OSError as error:
            raise RefusedError(f"cannot make the file {path}: {error.strerror}") from error
        self._path = path
        self._sha512 = hashlib.sha512()
        self.head = b""

    def write(self, piece: bytes) -> None:
        self.head = self.head or piece[:4]
        with _translated(self._path):
            self._file.write(piece)
        self._sha512.update(piece)

    def finish(self) -> bytes:
        """Close the file and return its SHA-512."""
        with _translated(self._path):
            self._file.close()
        return self._sha512.digest()

    def discard(self) -> None:
        os.unlink(self._path)
        with contextlib.suppress(OSError):  # What is still in the buffer may not fit on the disk.
            self._file.close()


@contextlib.contextmanager
def _translated(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
        raise StoreError(f"cannot write {path}: {error.strerror}", full=full) from error


# --- what a feed says; only the members that we use, the rest is passed over


class _Resource(msgspec.Struct, frozen=True):
    id: str = msgspec.field(name="@id")
    type: str | list[str] = msgspec.field(name="@type")

    @property
    def types(self) -> list[str]:
        return [self.type] if isinstance(self.type, str) else self.type


class _ServiceIndex(msgspec.Struct, frozen=True):
    version: Annotated[str, msgspec.Meta(pattern=r"\A[0-9]+\.[0-9]+\.[0-9]+(?:[-+][0-9A-Za-z.+-]+)?\Z")]
    resources: list[_Resource]


class _Hashed(msgspec.Struct, frozen=True):
    """A catalog leaf, or the part of it that a registration repeats."""

    hash: str | None = msgspec.field(name="packageHash", default=None)
    algorithm: str | None = msgspec.field(name="packageHashAlgorithm", default=None)

    def sha512(self) -> bytes | None:
        if not self.hash or (self.algorithm or "").upper() != "SHA512":
            return None
        try:
            return parse_sha512(self.hash)
        except UsageError as error:
            raise FeedDocumentError(f"the feed states {self.hash[:100]!r} as a SHA-512") from error


class _Entry(_Hashed, frozen=True, kw_only=True):
    version: str
    id: str = msgspec.field(name="@id", default="")


class _Leaf(msgspec.Struct, frozen=True):
    entry: _Entry = msgspec.field(name="catalogEntry")


class _Page(msgspec.Struct, frozen=True):
    id: str = msgspec.field(name="@id", default="")
    lower: str = ""
    upper: str = ""
    items: list[_Leaf] | None = None

    def may_hold(self, version: NuGetVersion) -> bool:
        """Bounds that cannot be read exclude nothing."""
        lower, upper = _parse_version(self.lower), _parse_version(self.upper)
        return (lower is None or lower <= version) and (upper is None or version <= upper)


class _Registration(msgspec.Struct, frozen=True):
    items: list[_Page]


def _absolute(text: str) -> URL:
    try:
        url = URL(text)
        _ = url.port
    except ValueError as error:
        raise FeedDocumentError(f"the feed names {text[:200]!r}, which is no URL") from error
    if not url.absolute or not url.host:
        raise FeedPolicyError(f"the feed names {text[:200]!r}, which is no http or https URL")
    return url


def _parse_version(text: str) -> NuGetVersion | None:
    try:
        return NuGetVersion.parse(text)
    except IdentityError:  # Old feeds list versions that no client can ask for.
        return None
