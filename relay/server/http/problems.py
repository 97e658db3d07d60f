"""What a relay answers when it cannot do what was asked: RFC 9457 problem documents with fixed texts.

Nothing of the request and nothing of an error's message goes into an answer: the title belongs to the code, and the
random id leads to the line in the log that says more.
"""

from __future__ import annotations

import math
import random
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError, LineTooLong
from aiohttp.typedefs import Handler

from relay.audit.acts import AnswerBroken, NothingThere, RequestFailed, RequestRefused
from relay.audit.event import tell
from relay.errors import (
    ChunkInvalid,
    ChunkMissing,
    ConflictError,
    LockedError,
    NotFoundError,
    RefusedError,
    SignatureError,
    StoreError,
    UnknownLeaseError,
    UnreachableError,
    UntrustedError,
    WaystationError,
)
from relay.server.http.callers import caller_of, path_of
from relay.server.http.counts import REFUSALS
from relay.server.http.tokens import TokenError

PROBLEM_TYPE: Final = "application/problem+json"
SERVER: Final = "waystation"
"""The Server header: no versions."""
RETRY_SECONDS: Final = 2.0
"""What a busy relay asks for when the error names no time itself."""
FULL_RETRY_SECONDS: Final = 60.0
"""What a relay without space asks for: somebody has to make room first."""

TITLES: Final[Mapping[str, str]] = {
    "bad_request": "The request is malformed",
    "bad_host": "The Host header is missing or malformed",
    "bad_json": "The body is not JSON, is nested too deep, or names a key twice",
    "bad_fields": "The JSON body does not have the expected fields",
    "bad_body": "The body breaks off or breaks its framing",
    "untrusted": "What was sent breaks its format",
    "refused": "A rule of this relay refuses the request",
    "misplaced_token": "A token belongs into one Authorization header and nowhere else",
    "unauthenticated": "A valid token is needed",
    "forbidden": "The token has not the scope for this",
    "other_agent": "The token is bound to another agent",
    "forged": "The presence is not signed by the key that it names, or is another agent's",
    "too_many_refusals": "This token was refused too often for this",
    "unknown_peer": "This relay does not fetch from there",
    "not_found": "There is nothing here under this name",
    "not_exact": "The identical nupkg is not here, and cannot be made here",
    "unknown_lease": "This lease is unknown or has ended",
    "method_not_allowed": "This method is not for this path",
    "too_slow": "The body came too slowly",
    "conflict": "The same name already stands for something else",
    "missing_chunks": "Chunks of this manifest are not here yet",
    "locked": "Somebody else holds the lock",
    "too_large": "The body is larger than this relay takes",
    "content_coding": "Bodies with a Content-Encoding are not taken",
    "media_type": "The body has another media type than this path takes",
    "expectation": "Only 100-continue can be expected",
    "misdirected": "This relay does not answer for this host name",
    "digest_mismatch": "The bytes do not match their digest or signature",
    "too_many_connections": "This peer has too many connections",
    "header_too_large": "The request line or a header is too long",
    "internal": "The relay failed; its log says more under this id",
    "store_failed": "The relay's store failed; its log says more under this id",
    "busy": "The relay cannot serve this now",
    "http_version": "Only HTTP/1.0 and HTTP/1.1 are spoken here",
    "store_full": "The relay has no space left",
}
"""The fixed text of every code."""

_BY_STATUS: Final[Mapping[int, str]] = {
    400: "bad_request",
    401: "unauthenticated",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "too_slow",
    409: "conflict",
    413: "too_large",
    415: "media_type",
    417: "expectation",
    503: "busy",
}

_BY_ERROR: Final[tuple[tuple[type[BaseException], int, str], ...]] = (
    (LineTooLong, 431, "header_too_large"),
    (web.RequestPayloadError, 400, "bad_body"),
    (HttpProcessingError, 400, "bad_request"),
    (SignatureError, 422, "digest_mismatch"),
    (ChunkInvalid, 422, "digest_mismatch"),
    (UntrustedError, 400, "untrusted"),
    (UnknownLeaseError, 404, "unknown_lease"),
    (NotFoundError, 404, "not_found"),
    (ChunkMissing, 404, "not_found"),
    (ConflictError, 409, "conflict"),
    (LockedError, 409, "locked"),
    (RefusedError, 400, "refused"),
    (StoreError, 500, "store_failed"),
    (BaseException, 500, "internal"),
)
"""The first that an error is counts: the nearer kind stands before the wider."""

_ENDS: Final = frozenset({400, 408, 421, 505})
_EVENTS: Final = {404: NothingThere, 500: RequestFailed}
"""By status; all others are refusals."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What stands behind an answer that is a problem, for the audit trail."""

    id: str
    code: str
    cause: BaseException | None


PROBLEM: Final = web.ResponseKey("problem", Problem)


class HttpRefusal(RefusedError):  # noqa: N818 - a refusal, in the word of its root
    """A request that is refused with a status and code of its own. The code must be one of `TITLES`."""

    def __init__(self, status: int, code: str, *, retry_after: float | None = None) -> None:
        super().__init__(TITLES[code])
        self.status = status
        self.code = code
        self.retry_after = retry_after


@dataclass(frozen=True)
class Verdict:
    """How an error is told to a peer. `retry_after` is in seconds, before jitter."""

    status: int
    code: str
    retry_after: float | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


def verdict_of(error: BaseException) -> Verdict:
    """The answer that an error deserves. Everything unknown is a 500."""
    match error:
        case HttpRefusal():
            return Verdict(error.status, error.code, error.retry_after)
        case TokenError():
            headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
            return Verdict(error.status, error.code, headers=headers)
        case web.HTTPException():
            allow = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
            default = "internal" if error.status >= 500 else "bad_request"
            return Verdict(error.status, _BY_STATUS.get(error.status, default), headers=allow)
        case StoreError() if error.full:
            return Verdict(507, "store_full", error.retry_after or FULL_RETRY_SECONDS)
        case UnreachableError() if not isinstance(error, ChunkMissing | StoreError):
            return Verdict(503, "busy", error.retry_after or RETRY_SECONDS)
    return next(Verdict(status, code) for kind, status, code in _BY_ERROR if isinstance(error, kind))


def problem(
    status: int,
    code: str,
    *,
    retry_after: float | None = None,
    extra: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
    cause: BaseException | None = None,
) -> web.Response:
    """A problem document. Its id stands in the event that `tell_problem` makes of it.

    Args:
        status: the HTTP status.
        code: a key of `TITLES`.
        retry_after: seconds; up to half as much again is added, so that refused peers do not come back as one.
        extra: further members, such as the ranges that are missing. Never put a request's own text here.
        headers: further headers.
        cause: what happened, for the log alone; with its traceback where it is a mistake of ours (`internal`).
    """
    id = secrets.token_hex(8)
    document = dict(extra or {}) | {
        "type": f"urn:waystation:problem:{code}",
        "title": TITLES[code],
        "status": status,
        "code": code,
        "id": id,
    }
    told = {"Server": SERVER, **(headers or {})}
    if retry_after is not None:
        # Spread, not secrecy: an ordinary random number will do.
        told["Retry-After"] = str(math.ceil(retry_after * random.uniform(1.0, 1.5)))  # noqa: S311
    response = web.Response(status=status, body=msgspec.json.encode(document), content_type=PROBLEM_TYPE, headers=told)
    response[PROBLEM] = Problem(id, code, cause if status == 500 else _without_frames(cause))
    return response


def problem_of(error: BaseException) -> web.Response:
    """The problem document for an error, by `verdict_of`."""
    verdict = verdict_of(error)
    return problem(verdict.status, verdict.code, retry_after=verdict.retry_after, headers=verdict.headers, cause=error)


@web.middleware
async def problem_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every error becomes a problem document. The connection ends with a request that was malformed, or whose body
    nobody read to its end: what follows on it cannot be trusted to be the next request.

    Once the answer has begun there is nothing left to say: the connection is cut, so that the peer sees it broken off.
    """
    try:
        response = await handler(request)
        if not isinstance(response, web.StreamResponse):
            raise TypeError("a handler returned no response")
    except Exception as error:
        response = _answer_to(request, error)
    tell_problem(request, response)
    if response.status in _ENDS or (response.status >= 400 and not request.content.is_eof()):
        response.force_close()
    return response


def _without_frames(error: BaseException | None) -> BaseException | None:
    """A peer may be slow to take its answer: what the frames behind it hold, such as a body, is not held for so long."""
    if error is not None:
        error.__traceback__ = error.__context__ = error.__cause__ = None
    return error


def tell_problem(request: web.BaseRequest, response: web.StreamResponse) -> None:
    """Tell who was refused what and why, where `response` is a problem; every problem goes through here once."""
    found = response.get(PROBLEM)
    if found is None:
        return
    REFUSALS.labels(found.code).inc()
    kind = _EVENTS.get(response.status, RequestRefused)
    by, path = caller_of(request, found.cause), path_of(request)
    event = kind(by, request.method, path, response.status, found.code, found.id, _why(found.cause))
    tell(event, found.cause if response.status == 500 else None)


def _why(cause: BaseException | None) -> str:
    if cause is None:
        return ""
    # The words of aiohttp's parser quote what was sent, and that may be a credential.
    is_quote = isinstance(cause, HttpProcessingError | web.RequestPayloadError)
    return type(cause).__name__ if is_quote else f"{type(cause).__name__}: {cause}"


def _answer_to(request: web.Request, error: Exception) -> web.StreamResponse:
    transport = request.transport
    if transport is None or transport.is_closing():
        raise ConnectionResetError("the peer has gone") from error
    if isinstance(error, web.HTTPException) and error.status < 400:
        raise error
    if request.writer.output_size:
        is_expected = isinstance(error, WaystationError | OSError)
        broken = AnswerBroken(caller_of(request), request.method, path_of(request), _why(error))
        tell(broken, None if is_expected else error)
        transport.abort()
        raise ConnectionResetError("the answer broke off") from error
    return problem_of(error)
