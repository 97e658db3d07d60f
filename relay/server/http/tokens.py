"""Bearer tokens: how they look, how they are checked, how relay.yaml keeps them. Only a hash is ever kept.

A token is `wst_<id>_<secret>_<crc>`: 8 hex digits to look it up by, 32 random bytes as 43 base64url characters, and the
CRC-32 of all before it as 8 hex digits, so that a secret scanner can tell a token from noise without asking anybody.

This module imports neither aiohttp nor yaml at its top: the command line uses it.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import re
import secrets
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, ClassVar, Final, get_args
from urllib.parse import unquote_plus

import msgspec

from relay.config import Scope, TokenRecord
from relay.errors import RefusedError, UsageError
from relay.protocol import messages
from relay.support.durable import write_durably

if TYPE_CHECKING:
    from aiohttp import web

SCOPES: Final[tuple[Scope, ...]] = get_args(Scope)
TOKEN_DAYS_MAX: Final = 90

_IMPLIED: Final[dict[str, frozenset[Scope]]] = {"write": frozenset({"read"}), "agent": frozenset({"read"})}
_TOKEN = re.compile(r"(wst_([0-9a-f]{8})_([A-Za-z0-9_-]{43}))_([0-9a-f]{8})", re.ASCII)
_TOKEN_IN_URL = re.compile(r"wst_[0-9a-f]{8}_|(?:^|[?&])access_token=", re.ASCII)
_NO_HASH = "0" * 64


class TokenError(RefusedError):
    """A request whose token is no ticket to what it asks for. `status` is the HTTP status to answer with."""

    status: ClassVar[int]
    code: ClassVar[str]


class UnauthenticatedError(TokenError):
    """No token, or none that is valid. Why is not told: unknown, altered and expired look the same from outside."""

    status = 401
    code = "unauthenticated"

    def __init__(self) -> None:
        super().__init__("a valid token is needed", hint="Give one with --token-file or WAYSTATION_TOKEN")


class ForbiddenError(TokenError):
    """A valid token without the scope that the route asks for."""

    status = 403
    code = "forbidden"

    def __init__(self, id: str, scope: str) -> None:
        super().__init__(f"token {id} has not the scope {scope!r}")
        self.id = id
        self.scope = scope


class MisplacedTokenError(TokenError):
    """A token where none may stand: in the URL (it would be in every log on the way), or a second one."""

    status = 400
    code = "misplaced_token"


@dataclass(frozen=True)
class Identity:
    """A peer with a valid token. `scopes` holds the implied ones too. `agent`: the only one that it may be; empty: any."""

    id: str
    scopes: frozenset[str]
    name: str = ""
    agent: str = ""

    def require(self, scope: str) -> None:
        """Pass, or say no.

        Raises:
            ForbiddenError: the token has not this scope.
        """
        if scope not in self.scopes:
            raise ForbiddenError(self.id, scope)


def make_token(
    scopes: Iterable[str], now: datetime, days: int = 90, name: str = "", agent: str = ""
) -> tuple[str, TokenRecord]:
    """A new token's text, to be shown once, and what to keep of it. `now` needs a zone; `agent` binds it to that one.

    Raises:
        UsageError: no scope, one that does not exist, a life of not 1 to 90 days, or no name of an agent; or a token
            that is no agent's is bound to one.
    """
    wanted = set(scopes)
    chosen = tuple(scope for scope in SCOPES if scope in wanted)
    if not chosen or len(chosen) != len(wanted):
        raise UsageError("a token needs one or more scopes", hint=f"There are: {', '.join(SCOPES)}")
    if not 1 <= days <= TOKEN_DAYS_MAX:
        raise UsageError(f"a token lives 1 to {TOKEN_DAYS_MAX} days")
    if agent and not re.search(messages.AGENT_NAME, agent):
        raise UsageError(f"{agent!r} is no name for an agent", hint="Letters, digits, . _ -")
    if agent and "agent" not in chosen:
        raise UsageError("only a token with the scope agent can be bound to one")
    id, secret = secrets.token_hex(4), secrets.token_urlsafe(32)
    created = now.astimezone(UTC).replace(microsecond=0)
    record = TokenRecord(
        id, chosen, _hash(secret), created, created + timedelta(days=days), name, agent or msgspec.UNSET
    )
    return _with_checksum(f"wst_{id}_{secret}"), record


class TokenSet:
    """The tokens that a relay knows."""

    def __init__(self, records: Iterable[TokenRecord]) -> None:
        self._records = {record.id: record for record in records}

    def __len__(self) -> int:
        return len(self._records)

    @property
    def records(self) -> tuple[TokenRecord, ...]:
        return tuple(self._records.values())

    def get(self, id: str) -> TokenRecord | None:
        return self._records.get(id)

    def check(self, text: str, now: datetime) -> Identity:
        """Who bears this token. The same work is done for every well-formed token, known or not.

        Raises:
            UnauthenticatedError: malformed, altered, unknown or expired.
        """
        match = _TOKEN.fullmatch(text)
        if not match or _with_checksum(match[1]) != text:
            raise UnauthenticatedError
        record = self._records.get(match[2])
        same = hmac.compare_digest(_hash(match[3]), record.sha256 if record else _NO_HASH)
        if not (record and same and now < record.expires):
            raise UnauthenticatedError
        implied = (_IMPLIED.get(scope, frozenset()) for scope in record.scopes)
        return Identity(record.id, frozenset(record.scopes).union(*implied), record.name, record.agent or "")


def authenticate(request: web.BaseRequest, tokens: TokenSet, now: datetime | None = None) -> Identity | None:
    """Who sends this request; None when it bears no credential at all.

    Raises:
        MisplacedTokenError: a token in the URL, or more than one Authorization header.
        UnauthenticatedError: a credential that is not a valid bearer token.
    """
    if _TOKEN_IN_URL.search(unquote_plus(request.raw_path)):
        raise MisplacedTokenError("tokens are not taken from a URL", hint="Send it as Authorization: Bearer")
    headers = request.headers.getall("Authorization", [])
    if len(headers) > 1:
        raise MisplacedTokenError("more than one Authorization header")
    if not headers:
        return None
    kind, _, text = headers[0].partition(" ")
    if kind.lower() != "bearer":
        raise UnauthenticatedError
    return tokens.check(text.strip(), now or datetime.now(UTC))


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("ascii")).hexdigest()


def _with_checksum(text: str) -> str:
    return f"{text}_{zlib.crc32(text.encode('ascii')):08x}"


# --- relay.yaml


def parse_tokens(entries: object) -> TokenSet:
    """The tokens of a parsed relay.yaml's `tokens:` (None where there is none).

    Raises:
        UsageError: an entry that is no token record, or an id that stands twice.
    """
    try:
        records = msgspec.convert(entries or [], list[TokenRecord])
    except msgspec.ValidationError as error:
        raise UsageError(f"tokens: {error}") from error
    if len({record.id for record in records}) != len(records):
        raise UsageError("tokens: an id stands twice")
    return TokenSet(records)


def append_token(path: str, record: TokenRecord) -> None:
    """Add `record` under `tokens:` in the YAML file `path`, which is made where it is not there. Atomic and durable.

    The entry is put in as text, so comments and order stay. Where reading the result back does not give exactly the
    old content and the entry (a file in flow style, say), the whole is written anew, without its comments.

    Raises:
        UsageError: the file is not a YAML mapping, its `tokens:` is not a list, or it cannot be read or written.
    """
    import yaml

    try:
        old = _read(path)
        document, entry = _load(path, old), msgspec.json.decode(msgspec.json.encode(record))
        wanted = document | {"tokens": [*document.get("tokens", []), entry]}
        new = _appended(old, entry)
        with contextlib.suppress(yaml.YAMLError):
            if yaml.safe_load(new) == wanted:
                _write_durably(path, new)
                return
        _write_durably(path, yaml.safe_dump(wanted, sort_keys=False, allow_unicode=True))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        return ""


def _load(path: str, text: str) -> dict[str, Any]:
    import yaml

    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not YAML: {error}") from error
    document = {} if document is None else document
    if not isinstance(document, dict):
        raise UsageError(f"{path} is not a mapping of settings")
    if document.get("tokens") is None:
        document.pop("tokens", None)
    elif not isinstance(document["tokens"], list):
        raise UsageError(f"{path}: tokens is not a list")
    return document


def _appended(text: str, entry: dict[str, Any]) -> str:
    """`text` with `entry` as a further item of its `tokens:`, by the places that the YAML parser names."""
    import yaml

    root = yaml.compose(text, Loader=yaml.SafeLoader)
    found = [] if root is None else [value for key, value in root.value if key.value == "tokens"]
    if not found:
        return f"{_ended(text)}tokens:\n{_item(entry, 0)}"
    tokens, indent = found[0], 0
    end = tokens.end_mark.index
    if tokens.value:
        indent, end = tokens.start_mark.column, _end_of(tokens)
    after = text.find("\n", end) + 1 or len(text)
    return f"{_ended(text[:after])}{_item(entry, indent)}{text[after:]}"


def _end_of(node: Any) -> int:  # noqa: ANN401 - yaml's nodes
    """Where the text of `node` ends. A block node's own mark lies behind the comments that follow it: ask its last leaf."""
    while isinstance(node.value, list) and node.value and not node.flow_style:
        last = node.value[-1]
        node = last[1] if isinstance(last, tuple) else last
    return int(node.end_mark.index)


def _ended(text: str) -> str:
    return text if not text or text.endswith("\n") else text + "\n"


def _item(entry: dict[str, Any], indent: int) -> str:
    """One list item. Values are JSON, which is YAML too: hex digits in quotes stay text, even when all are decimal."""
    lines = [f"{key}: {msgspec.json.encode(value).decode()}" for key, value in entry.items()]
    pad = " " * indent
    return f"{pad}- " + f"\n{pad}  ".join(lines) + "\n"


def _write_durably(path: str, text: str) -> None:
    """A new file is for its owner alone. One that another user must be able to read has to stay readable for it."""
    write_durably(path, text.encode(), mode=0o600, must_keep_owner=True)
