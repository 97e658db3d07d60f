"""Mail as relays before SQLite kept it: one document for each commit. It is taken over at the first start, and goes.

A document is XXH3-64 of the rest, then MessagePack `[arrived, [[number, letter], ...]]`. A damaged one is put aside with a
line in the log, and changes the epoch.
"""

from __future__ import annotations

import secrets
from typing import Final

import msgspec
from xxhash import xxh3_64_digest

from relay.audit.acts import MailLost
from relay.audit.event import tell
from relay.mail.letters import Numbered
from relay.mail.mailbox import Mail
from relay.stores.contract import Documents

_FOLDER: Final = "state/mail/letters"
_DAMAGED: Final = "state/mail/damaged"
_STATE: Final = "state/mail/state"
_DIGEST_BYTES: Final = 8


class _Content(msgspec.Struct, frozen=True, array_like=True):
    arrived: float
    letters: tuple[Numbered, ...]


class _State(msgspec.Struct, frozen=True):
    epoch: str
    number: int


async def import_documents(documents: Documents, mail: Mail) -> None:
    """Take over what is there. Cut off anywhere, the next start goes on.

    Raises:
        StoreError: the store or the mail cannot be read or written; nothing is removed that was not taken over.
    """
    names = await documents.list(_FOLDER)
    state = await documents.read(_STATE)
    if state is None and not names:
        return
    known = _parse_state(state) or _State(secrets.token_hex(16), 0)
    numbers = [known.number, *map(_number, names)]
    for name in names:
        raw = await documents.read(name) or b""
        try:
            content = _parse(raw)
        except (ValueError, RecursionError):
            tell(MailLost(f"{name} is damaged, and put aside under {_DAMAGED}"))
            await documents.write(f"{_DAMAGED}/{name.rpartition('/')[2]}", raw)
            known = _State(secrets.token_hex(16), known.number)
        else:
            await mail.adopt(content.letters, content.arrived)
            numbers += [numbered.number for numbered in content.letters[-1:]]
    await mail.go_on(known.epoch, max(numbers))
    for name in (*names, _STATE):
        await documents.remove(name)


def _parse(raw: bytes) -> _Content:
    """Raises `ValueError` and `RecursionError`: it is damaged."""
    if xxh3_64_digest(raw[_DIGEST_BYTES:]) != raw[:_DIGEST_BYTES]:
        raise ValueError("another digest")
    return msgspec.msgpack.decode(raw[_DIGEST_BYTES:], type=_Content)


def _parse_state(raw: bytes | None) -> _State | None:
    try:
        return msgspec.json.decode(raw or b"", type=_State)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _number(name: str) -> int:
    """The highest number in a document, by its name."""
    text = name.rpartition("/")[2].partition(".")[0]
    return int(text) if text.isascii() and text.isdigit() else 0
