"""Who calls, and what, in the words of the audit trail."""

from __future__ import annotations

from typing import Final
from urllib.parse import unquote

from aiohttp import web

from relay.audit.event import Caller
from relay.server.http.tokens import ForbiddenError, Identity

IDENTITY: Final = web.RequestKey("identity", Identity)
"""Of a request with a valid token."""
_DECODED_MOST: Final = 3


def caller_of(request: web.BaseRequest, refusal: BaseException | None = None) -> Caller:
    """The sender of `request`; its token is named where it is valid, also where it was not enough."""
    identity = request.get(IDENTITY)
    known = identity.id if identity is not None else refusal.id if isinstance(refusal, ForbiddenError) else ""
    return Caller(request.remote or "", known)


def path_of(request: web.BaseRequest) -> str:
    """What was asked for, without its query, and decoded: a token in disguise is to be seen, and masked."""
    path = request.raw_path
    for _ in range(_DECODED_MOST):
        path = unquote(path.partition("?")[0])
    return path.partition("?")[0]
