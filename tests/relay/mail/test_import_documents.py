"""Mail that a relay before SQLite kept is there after the first start of this one, and is taken over once."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from xxhash import xxh3_64_digest

from relay.errors import StoreError
from relay.mail.import_documents import import_documents
from relay.mail.letters import Letter
from relay.mail.mailbox import Mail
from relay.protocol import messages
from relay.stores.memory import MemoryDocuments

EPOCH = "e" * 32
WEB1 = ("order", "web1")
NOW = 1e9


def order(name: str) -> Letter:
    return Letter("order", "web1", "web1", f"D/{name}", 0, name.encode())


async def write(documents: MemoryDocuments, *numbers: int) -> str:
    """A document as f8f3ed2 wrote it: named by its highest number."""
    body = msgspec.msgpack.encode([NOW, [[number, order(str(number))] for number in numbers]])
    name = f"state/mail/letters/{numbers[-1]:016d}"
    await documents.write(name, xxh3_64_digest(body) + body)
    return name


@pytest.fixture
async def documents() -> MemoryDocuments:
    documents = MemoryDocuments()
    await documents.write("state/mail/state", msgspec.json.encode({"epoch": EPOCH, "number": 3}))
    await write(documents, 4, 6)
    await write(documents, 7)
    return documents


@pytest.fixture
async def mail(tmp_path: Path) -> AsyncIterator[Mail]:
    mail = Mail(str(tmp_path), clock=lambda: NOW)
    await mail.load()
    yield mail
    await mail.close()


async def numbers(mail: Mail, after: int = 0) -> list[int]:
    return [found.number for found in await mail.read(WEB1, messages.Cursor(mail.epoch, after))]


async def test_letters_keep_their_numbers_and_readers_their_place(documents: MemoryDocuments, mail: Mail) -> None:
    await import_documents(documents, mail)
    assert mail.epoch == EPOCH
    assert await numbers(mail) == [4, 6, 7]
    assert await numbers(mail, 4) == [6, 7]
    assert (await mail.post([order("6"), order("new")])) == messages.TakenAnswer(taken=1, known=1)
    assert await numbers(mail, 7) == [8]
    assert await documents.list("state/mail") == []


async def test_a_second_start_changes_nothing(documents: MemoryDocuments, mail: Mail) -> None:
    await import_documents(documents, mail)
    await mail.post([order("new")])
    await import_documents(documents, mail)
    assert (mail.epoch, await numbers(mail)) == (EPOCH, [4, 6, 7, 8])


async def test_a_start_that_was_cut_off_is_gone_on_with(documents: MemoryDocuments, mail: Mail, monkeypatch) -> None:
    async def fails(name: str) -> None:
        raise StoreError(f"cannot remove {name}")

    with monkeypatch.context() as patched:
        patched.setattr(documents, "remove", fails)
        with pytest.raises(StoreError, match="cannot remove"):
            await import_documents(documents, mail)
    await import_documents(documents, mail)
    assert (mail.epoch, await numbers(mail)) == (EPOCH, [4, 6, 7])


async def test_numbers_that_were_given_are_not_given_again(documents: MemoryDocuments, mail: Mail) -> None:
    for name in await documents.list("state/mail/letters"):
        await documents.remove(name)
    await import_documents(documents, mail)
    assert mail.epoch == EPOCH
    await mail.post([order("new")])
    assert await numbers(mail) == [4]


@pytest.mark.parametrize(
    "raw", [b"", b"rubbish", xxh3_64_digest(b"\xc1") + b"\xc1"], ids=["empty", "rubbish", "no content"]
)
async def test_a_damaged_document_is_put_aside_and_changes_the_epoch(
    documents: MemoryDocuments, mail: Mail, raw: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    await documents.write("state/mail/letters/0000000000000009", raw)
    await import_documents(documents, mail)
    assert mail.epoch != EPOCH
    assert await numbers(mail) == [4, 6, 7]
    assert "damaged" in caplog.text
    assert await documents.read("state/mail/damaged/0000000000000009") == raw
    await mail.post([order("new")])
    assert await numbers(mail, 7) == [10], "it is not known which letters the damaged one held"


@pytest.mark.parametrize("raw", [None, b"", b"{", b'{"epoch": 1, "number": 1}', b"\xff"])
async def test_without_a_state_the_epoch_is_a_new_one(
    documents: MemoryDocuments, mail: Mail, raw: bytes | None
) -> None:
    await documents.remove("state/mail/state")
    if raw is not None:
        await documents.write("state/mail/state", raw)
    await import_documents(documents, mail)
    assert mail.epoch != EPOCH
    assert await numbers(mail) == [4, 6, 7]


async def test_a_relay_that_never_had_such_mail_is_left_alone(mail: Mail) -> None:
    epoch = mail.epoch
    await import_documents(MemoryDocuments(), mail)
    assert mail.epoch == epoch
