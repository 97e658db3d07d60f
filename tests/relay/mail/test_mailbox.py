"""Mail keeps what it acknowledged, shows it in order, and never more than it may keep. Without HTTP."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.errors import ConflictError, StoreError
from relay.mail import mailbox as mails
from relay.mail.mailbox import KEPT_SECONDS, LETTER_CHARGE, Letter, Mail, MailLimits
from relay.protocol import messages
from relay.stores.contract import Documents
from relay.stores.memory import MemoryDocuments
from relay.stores.open import open_store

D = "01ARZ3NDEKTSV4RRFFQ69G5FAV"
FOLDER = "state/mail/letters"
WEB1 = ("order", "web1")


def order(operation="1", data=b"order", agent="web1"):
    return Letter("order", agent, agent, f"{D}/{operation}", 0, data)


def report(number=1, data=b"report", operation="1", agent="web1"):
    return Letter("report", D, agent, f"{D}/{operation}", number, data)


def piece(offset=0, data=b"output", operation="1", agent="web1"):
    return Letter("log", D, agent, f"{D}/{operation}", offset, data)


def cursor(mail, number):
    return messages.Cursor(mail.epoch, number)


def data(found):
    return [numbered.letter.data for numbered in found]


class Clock:
    def __init__(self):
        self.now = 1e9

    def __call__(self):
        return self.now


class Watched(Documents):
    """Documents in memory that tell what is done, and can be slow or fail."""

    def __init__(self):
        self.inner = MemoryDocuments()
        self.gate = asyncio.Event()
        self.gate.set()
        self.merge_gate = asyncio.Event()
        self.merge_gate.set()
        self.failure = None
        self.keep_on_failure = False
        self.refuse_removal = False
        self.written = []
        self.removed = []
        self.reads = 0

    async def read(self, name):
        self.reads += 1
        return await self.inner.read(name)

    async def write(self, name, data):
        await self.gate.wait()
        if "." in name:
            await self.merge_gate.wait()
        if self.failure and name.startswith(FOLDER):
            if self.keep_on_failure:
                await self.inner.write(name, data)
            raise self.failure
        self.written.append(name)
        await self.inner.write(name, data)

    async def create(self, name, data):
        raise AssertionError("mail does not create")

    async def remove(self, name):
        self.removed.append(name)
        if self.refuse_removal:
            raise StoreError("read-only")
        await self.inner.remove(name)

    async def list(self, prefix):
        return await self.inner.list(prefix)

    @property
    def commits(self):
        return [name for name in self.written if name.startswith(FOLDER)]


async def opened(documents, limits=None, clock=None):
    mail = Mail(documents, limits, clock or Clock())
    await mail.load()
    return mail


async def reopened(mail, documents, **more):
    await mail.close()
    return await opened(documents, **more)


# --- durable, and in few writes


async def test_a_letter_is_in_the_store_before_its_sender_is_answered():
    documents = Watched()
    mail = await opened(documents)
    documents.gate.clear()
    posting = asyncio.create_task(mail.post([order()]))
    await asyncio.sleep(0.05)
    assert not posting.done()
    assert await mail.read(WEB1, None) == []
    documents.gate.set()
    assert await posting == messages.TakenAnswer(taken=1, known=0)
    assert len(documents.commits) == 1
    assert data(await mail.read(WEB1, None)) == [b"order"]


async def test_posts_that_wait_are_written_as_one_document():
    documents = Watched()
    mail = await opened(documents)
    documents.gate.clear()
    first = asyncio.create_task(mail.post([order("0")]))
    await asyncio.sleep(0.01)
    others = [asyncio.create_task(mail.post([order(str(n))])) for n in range(1, 200)]
    await asyncio.sleep(0.01)
    documents.gate.set()
    await asyncio.gather(first, *others)
    assert len(documents.commits) == 2
    assert [n.number for n in await mail.read(WEB1, None)] == list(range(1, 201))


async def test_one_document_does_not_grow_without_bound(monkeypatch):
    monkeypatch.setattr(mails, "COMMIT_BYTES", 10_000)
    documents = Watched()
    mail = await opened(documents)
    await asyncio.gather(*(mail.post([order(str(n), b"x" * 4000)]) for n in range(9)))
    assert len(documents.commits) == 3


@pytest.mark.parametrize("location", ["memory:", "disk"])
async def test_everything_is_there_after_a_restart_under_the_same_epoch_and_numbers(tmp_path, location):
    store = await open_store(location if ":" in location else f"disk:{tmp_path}/store")
    mail = await opened(store.documents)
    await mail.post([order("1", b"a"), order("2", b"b", agent="web2"), report(), piece()])
    await mail.post([order("3", b"c")])
    again = await reopened(mail, store.documents)
    assert again.epoch == mail.epoch
    for box in (WEB1, ("order", "web2"), ("report", D), ("log", D)):
        assert await again.read(box, None) == await mail.read(box, None) != []
    assert data(await again.read(WEB1, cursor(again, 1))) == [b"c"]
    await again.post([order("4", b"d")])
    assert [n.number for n in await again.read(WEB1, None)] == [1, 5, 6]
    await again.close()
    await store.close()


async def test_a_poster_that_goes_away_loses_nothing_of_the_others():
    documents = Watched()
    mail = await opened(documents)
    documents.gate.clear()
    gone, stays = (asyncio.create_task(mail.post([order(name)])) for name in "ab")
    await asyncio.sleep(0.01)
    gone.cancel()
    await asyncio.sleep(0.01)
    documents.gate.set()
    assert (await stays).taken == 1
    assert (await mail.post([order("c")])).taken == 1


async def test_a_write_that_failed_is_told_to_all_who_waited_and_takes_nothing():
    documents = Watched()
    mail = await opened(documents)
    await mail.post([order("kept")])
    documents.failure = StoreError("the disk is full", full=True)
    found = await asyncio.gather(*(mail.post([order(n)]) for n in "ab"), return_exceptions=True)
    assert [type(error) for error in found] == [StoreError, StoreError]
    assert (mail.kept_letters, data(await mail.read(WEB1, None))) == (1, [b"order"])
    documents.failure = None
    assert (await mail.post([order("a")])).taken == 1
    # A number that was perhaps written is never given again.
    assert [n.number for n in await mail.read(WEB1, None)] == [1, 4]


async def test_an_unexpected_error_of_the_store_reaches_the_poster_and_mail_goes_on():
    documents = Watched()
    mail = await opened(documents)
    documents.failure = RuntimeError("a bug")
    with pytest.raises(RuntimeError):
        await mail.post([order()])
    documents.failure = None
    assert (await mail.post([order()])).taken == 1


async def test_a_failed_write_leaves_no_document_behind():
    documents = Watched()
    mail = await opened(documents)
    documents.failure, documents.keep_on_failure = StoreError("fsync failed"), True
    with pytest.raises(StoreError):
        await mail.post([order("a")])
    assert len(documents.removed) == 1
    assert await documents.list(FOLDER) == []


async def test_a_failed_write_that_is_there_all_the_same_does_not_make_two_letters_of_one():
    documents = Watched()
    mail = await opened(documents)
    documents.failure, documents.keep_on_failure = StoreError("fsync failed"), True
    documents.refuse_removal = True
    with pytest.raises(StoreError, match="fsync failed"):
        await mail.post([order("a")])
    documents.failure, documents.refuse_removal = None, False
    await mail.post([order("a"), order("b")])
    again = await reopened(mail, documents)
    assert len(await documents.list(FOLDER)) == 2, "the ghost is not there: this test proves nothing"
    assert sorted(n.letter.operation[-1] for n in await again.read(WEB1, None)) == ["a", "b"]


# --- the same again, and something else under the same name


async def test_the_same_letter_again_is_known_and_stays_one():
    mail = await opened(Watched())
    assert await mail.post([order()]) == messages.TakenAnswer(1, 0)
    assert await mail.post([order(), order("2")]) == messages.TakenAnswer(1, 1)
    assert await mail.post([order("3"), order("3")]) == messages.TakenAnswer(1, 1)
    assert len(await mail.read(WEB1, None)) == 3


async def test_the_same_letter_twice_at_the_same_time_is_one():
    mail = await opened(Watched())
    answers = await asyncio.gather(*(mail.post([order()]) for _ in range(5)))
    assert sorted((a.taken, a.known) for a in answers) == [(0, 1)] * 4 + [(1, 0)]
    assert len(await mail.read(WEB1, None)) == 1


@pytest.mark.parametrize(
    ("held", "other"),
    [
        (order("1"), order("1", b"other")),
        (order("1"), order("1", agent="web2")),
        (report(2), report(2, b"other")),
        (piece(5), piece(5, b"OUTPUT")),
    ],
)
@pytest.mark.parametrize("restarted", [False, True])
async def test_other_bytes_under_the_same_name_are_refused_with_all_that_came_with_them(held, other, restarted):
    documents = Watched()
    mail = await opened(documents)
    await mail.post([held])
    if restarted:
        mail = await reopened(mail, documents)
    with pytest.raises(ConflictError):
        await mail.post([order("new"), other, report(9)])
    assert mail.kept_letters == 1
    assert await mail.post([order("new"), report(9)]) == messages.TakenAnswer(2, 0)


async def test_a_request_that_contradicts_itself_is_refused():
    mail = await opened(Watched())
    with pytest.raises(ConflictError):
        await mail.post([order("1"), order("1", b"other")])
    assert (mail.kept_letters, mail.kept_bytes) == (0, 0)


async def test_output_that_is_cut_elsewhere_and_other_agents_reports_do_not_contradict():
    mail = await opened(Watched())
    await mail.post([piece(0, b"ab"), report(1, b"x", agent="web1")])
    assert await mail.post([piece(0, b"abcd"), report(1, b"y", agent="web2")]) == messages.TakenAnswer(2, 0)


async def test_a_refused_request_does_not_harm_those_beside_it():
    documents = Watched()
    mail = await opened(documents)
    await mail.post([order("1")])
    good, bad = await asyncio.gather(mail.post([order("2")]), mail.post([order("1", b"other")]), return_exceptions=True)
    assert good == messages.TakenAnswer(1, 0)
    assert isinstance(bad, ConflictError)


# --- cursors and epochs


async def test_a_reader_sees_what_is_after_its_cursor_and_only_its_box():
    mail = await opened(Watched())
    await mail.post([order("1", b"a"), order("x", b"other", agent="web2"), order("2", b"b")])
    assert [n.number for n in await mail.read(WEB1, None)] == [1, 3]
    assert data(await mail.read(WEB1, cursor(mail, 1))) == [b"b"]
    assert data(await mail.read(WEB1, cursor(mail, 2))) == [b"b"]
    assert await mail.read(WEB1, cursor(mail, 3)) == []
    assert await mail.read(("order", "nobody"), None) == []


async def test_a_cursor_of_another_epoch_or_of_the_future_counts_as_none():
    mail = await opened(Watched())
    await mail.post([order("1", b"a")])
    assert data(await mail.read(WEB1, messages.Cursor("other", 1))) == [b"a"]
    assert data(await mail.read(WEB1, cursor(mail, 500))) == [b"a"]


async def test_mail_that_was_emptied_has_another_epoch():
    documents = Watched()
    mail = await opened(documents)
    await mail.post([order("1", b"a")])
    again = await reopened(mail, Watched())
    assert again.epoch != mail.epoch
    await again.post([order("2", b"b")])
    assert data(await again.read(WEB1, cursor(mail, 1))) == [b"b"]


async def test_an_answer_is_bounded_in_letters_and_in_bytes_and_the_rest_comes_after():
    mail = await opened(Watched(), MailLimits(bytes_per_agent=1 << 30))
    many = [order(str(n), b"s") for n in range(messages.LETTERS_MAX + 44)]
    await mail.post(many[: messages.LETTERS_MAX])
    await mail.post(many[messages.LETTERS_MAX :])
    first = await mail.read(WEB1, None)
    assert len(first) == messages.LETTERS_MAX
    assert len(await mail.read(WEB1, cursor(mail, first[-1].number))) == 44
    large = messages.LETTERS_BYTES_MAX // 4
    await mail.post([report(n, bytes(large)) for n in range(1, 6)])
    assert len(await mail.read(("report", D), None)) == 4
    await mail.post([report(1, bytes(2 * messages.LETTERS_BYTES_MAX), operation="huge")])
    assert len(await mail.read(("report", D), cursor(mail, mail._last - 1))) == 1, "a single letter is always shown"


# --- how much is kept


async def posted_until_full(mail, letter):
    """How many of `letter(0)`, `letter(1)`, … were taken, and the refusal of the next."""
    for n in range(1000):
        try:
            assert (await mail.post([letter(n)])).taken == 1
        except StoreError as error:
            return n, error
    raise AssertionError("it never was full")


@pytest.mark.parametrize(
    ("limits", "letter"),
    [
        (MailLimits(bytes_per_agent=20 * (LETTER_CHARGE + 100)), lambda n: order(str(n), bytes(100))),
        (MailLimits(bytes_per_deployment=20 * (LETTER_CHARGE + 100)), lambda n: report(n, bytes(100))),
        (MailLimits(bytes=20 * (LETTER_CHARGE + 100)), lambda n: order(str(n), bytes(100), agent=f"w{n}")),
        (MailLimits(letters=20), lambda n: order(str(n), bytes(100), agent=f"w{n}")),
    ],
    ids=["agent", "deployment", "bytes", "letters"],
)
async def test_over_a_bound_new_letters_are_refused_and_old_ones_stay(limits, letter):
    mail = await opened(Watched(), limits)
    taken, refused = await posted_until_full(mail, letter)
    assert refused.full
    assert refused.retry_after == mails.RETRY_SECONDS
    assert taken == (20 if letter(0).kind == "order" else 17)
    assert mail.kept_letters == taken
    assert await mail.post([letter(0)]) == messages.TakenAnswer(0, 1), "known letters need no room"


async def test_output_leaves_room_for_reports_and_both_leave_room_for_orders():
    mail = await opened(Watched(), MailLimits(letters=80))
    taken = {}
    for kind, letter in (("log", piece), ("report", report), ("order", lambda n: order(str(n)))):
        taken[kind], _ = await posted_until_full(mail, letter)
    assert taken == {"log": 60, "report": 10, "order": 10}


async def test_a_request_is_measured_as_a_whole():
    mail = await opened(Watched(), MailLimits(letters=10))
    with pytest.raises(StoreError):
        await mail.post([order(str(n)) for n in range(11)])
    assert (mail.kept_letters, mail.kept_bytes) == (0, 0)
    assert (await mail.post([order(str(n)) for n in range(10)])).taken == 10


async def test_one_full_agent_does_not_keep_others_from_their_orders():
    mail = await opened(Watched(), MailLimits(bytes_per_agent=2000))
    with pytest.raises(StoreError):
        await mail.post([order(str(n), bytes(1000)) for n in range(5)])
    assert (await mail.post([order("1", agent="web2")])).taken == 1


# --- how long


async def tended(mail, clock):
    clock.now += mails.TEND_SECONDS
    await mail.read(WEB1, None)
    await mail.close()


async def test_letters_are_kept_for_a_day_and_no_longer():
    documents, clock = Watched(), Clock()
    mail = await opened(documents, clock=clock)
    await mail.post([order("old", b"old"), report()])
    clock.now += KEPT_SECONDS / 2
    await mail.post([order("new", b"new")])
    clock.now += KEPT_SECONDS / 2 - 2 * mails.TEND_SECONDS
    await tended(mail, clock)
    assert data(await mail.read(WEB1, None)) == [b"old", b"new"]
    await tended(mail, clock)
    assert data(await mail.read(WEB1, None)) == [b"new"]
    assert await mail.read(("report", D), None) == []
    assert (mail.kept_letters, len(await documents.list(FOLDER))) == (1, 1)
    assert (await mail.post([order("old", b"other")])).taken == 1, "its name is free again"


async def test_room_comes_back_with_retention():
    documents, clock = Watched(), Clock()
    mail = await opened(documents, MailLimits(letters=1), clock)
    await mail.post([order("1")])
    clock.now += KEPT_SECONDS
    await tended(mail, clock)
    assert (await mail.post([order("2")])).taken == 1


async def test_numbers_go_on_after_everything_was_retired_and_the_relay_started_again():
    documents, clock = Watched(), Clock()
    mail = await opened(documents, clock=clock)
    await mail.post([order(str(n)) for n in range(5)])
    clock.now += KEPT_SECONDS
    await tended(mail, clock)
    assert await documents.list(FOLDER) == []
    again = await reopened(mail, documents, clock=clock)
    await again.post([order("next", b"next")])
    assert [n.number for n in await again.read(WEB1, cursor(mail, 5))] == [6]


async def test_what_is_over_is_gone_at_the_next_start_too():
    documents, clock = Watched(), Clock()
    mail = await opened(documents, clock=clock)
    await mail.post([order()])
    clock.now += KEPT_SECONDS
    again = await reopened(mail, documents, clock=clock)
    assert (again.kept_letters, await documents.list(FOLDER)) == (0, [])


async def test_a_clock_that_was_ahead_does_not_keep_mail_for_ever():
    documents, clock = Watched(), Clock()
    clock.now += 1e9
    mail = await opened(documents, clock=clock)
    await mail.post([order()])
    clock.now -= 1e9
    again = await reopened(mail, documents, clock=clock)
    clock.now += KEPT_SECONDS
    await tended(again, clock)
    assert again.kept_letters == 0


# --- many small documents become one


async def posted_one_by_one(mail, count):
    for n in range(count):
        await mail.post([order(str(n), b"%d" % n), report(n)])


async def test_many_small_documents_become_one_and_every_letter_stays_where_it_was():
    documents, clock = Watched(), Clock()
    mail = await opened(documents, clock=clock)
    await posted_one_by_one(mail, mails.MERGE_COUNT)
    await mail.close()
    assert len(await documents.list(FOLDER)) == 1
    before = {box: await mail.read(box, None) for box in (WEB1, ("report", D))}
    assert data(before[WEB1]) == [b"%d" % n for n in range(messages.LETTERS_MAX)]
    again = await reopened(mail, documents)
    assert {box: await again.read(box, None) for box in before} == before
    assert again.epoch == mail.epoch
    await posted_one_by_one(again, 3)
    assert again.kept_letters == 2 * mails.MERGE_COUNT


@pytest.mark.parametrize("gone", [0, 100])
async def test_a_merge_cut_off_before_all_old_documents_are_gone_makes_no_letter_twice(gone):
    documents = Watched()
    mail = await opened(documents)
    await posted_one_by_one(mail, mails.MERGE_COUNT - 1)
    before = {name: await documents.read(name) for name in await documents.list(FOLDER)}
    await mail.post([order("last")])
    await mail.close()
    merged = await documents.list(FOLDER)
    assert len(merged) == 1
    for name in sorted(before)[gone:]:
        await documents.inner.write(name, before[name])
    again = await opened(documents)
    assert again.kept_letters == mail.kept_letters
    assert [n.number for n in await again.read(WEB1, None)] == [n.number for n in await mail.read(WEB1, None)]


async def test_letters_can_be_read_while_their_documents_are_merged():
    documents = Watched()
    mail = await opened(documents)
    await posted_one_by_one(mail, mails.MERGE_COUNT)
    seen = 0
    while not mail._tender.done():
        mail._recent = mails._Recent()
        assert len(await mail.read(WEB1, None)) == mails.MERGE_COUNT
        seen += 1
        await asyncio.sleep(0)
    assert seen, "the merge was over before the first look"
    assert len(await documents.list(FOLDER)) == 1
    assert mail.epoch == (await opened(documents)).epoch


async def test_damage_that_shows_while_documents_are_merged_costs_nothing_else():
    documents = Watched()
    mail = await opened(documents)
    documents.merge_gate.clear()
    await posted_one_by_one(mail, mails.MERGE_COUNT)
    await asyncio.sleep(0.05)
    assert not mail._tender.done(), "the merge does not wait at its write"
    damaged = documents.commits[3]
    await documents.inner.write(damaged, b"rubbish")
    mail._recent = mails._Recent()
    assert len(await mail.read(WEB1, None)) == mails.MERGE_COUNT - 1
    documents.merge_gate.set()
    await mail.close()
    assert mail.kept_letters == 2 * mails.MERGE_COUNT - 2
    assert sum(len(document.entries) for document in mail._kept.values()) == mail.kept_letters
    assert len(await mail.read(WEB1, None)) == mails.MERGE_COUNT - 1
    assert (await mail.post([order("3", b"3")])).taken == 1


async def test_merged_letters_retire_together_and_leave_nothing():
    documents, clock = Watched(), Clock()
    mail = await opened(documents, clock=clock)
    await posted_one_by_one(mail, mails.MERGE_COUNT)
    await mail.close()
    clock.now += KEPT_SECONDS
    await tended(mail, clock)
    assert (mail.kept_letters, mail.kept_bytes, await documents.list(FOLDER)) == (0, 0, [])
    assert (mail._checks, mail._boxes, dict(mail._used)) == ({}, {}, {})


async def test_letters_older_than_the_cache_are_read_from_the_store(monkeypatch):
    monkeypatch.setattr(mails, "CACHE_BYTES", 3000)
    documents = Watched()
    mail = await opened(documents)
    for n in range(10):
        await mail.post([order(str(n), bytes([n]) * 1000)])
    reads = documents.reads
    assert data(await mail.read(WEB1, None)) == [bytes([n]) * 1000 for n in range(10)]
    assert documents.reads >= reads + 8
    assert mail._recent._size <= 3000


# --- damage


def flipped(raw):
    return raw[:-3] + bytes([raw[-3] ^ 1]) + raw[-2:]


@pytest.mark.parametrize(
    "damage",
    [flipped, lambda raw: raw[:-1], lambda raw: b"", lambda raw: raw + b"x", lambda raw: b"\x00" * len(raw)],
    ids=["flipped", "cut", "empty", "longer", "zeros"],
)
async def test_a_damaged_document_is_put_aside_and_the_rest_is_there_under_a_new_epoch(damage, caplog):
    documents = Watched()
    mail = await opened(documents)
    await mail.post([order("1", b"a")])
    await mail.post([order("2", b"b")])
    name = documents.commits[0]
    raw = damage(await documents.read(name))
    await documents.inner.write(name, raw)
    again = await reopened(mail, documents)
    assert data(await again.read(WEB1, cursor(mail, 1))) == [b"b"]
    assert again.epoch != mail.epoch
    assert "damaged" in caplog.text
    (aside,) = await documents.list("state/mail/damaged")
    assert await documents.read(aside) == raw
    third = await reopened(again, documents)
    assert third.epoch == again.epoch, "it is told once"
    assert (await third.post([order("1", b"a")])).taken == 1


async def test_a_document_whose_checksum_fits_and_whose_content_does_not_is_no_crash():
    documents = Watched()
    mail = await opened(documents)
    await mail.post([order()])
    for body in (b"", b"\xc1", msgspec.msgpack.encode([1, 2, 3]), b"\x91" * 100_000):
        await documents.inner.write(f"{FOLDER}/zzz", mails.xxh3_64_digest(body) + body)
        mail = await reopened(mail, documents)
        assert mail.kept_letters == 1


async def test_the_numbers_of_a_damaged_document_are_not_given_again():
    documents = Watched()
    mail = await opened(documents)
    await mail.post([order(str(n)) for n in range(7)])
    await documents.inner.write(documents.commits[0], b"rubbish")
    again = await reopened(mail, documents)
    await again.post([order("next")])
    assert [n.number for n in await again.read(WEB1, None)] == [8]


async def test_damage_that_shows_while_the_relay_runs_costs_that_document_only():
    documents = Watched()
    mail = await opened(documents)
    await mail.post([order("1", b"a")])
    await mail.post([order("2", b"b")])
    epoch = mail.epoch
    mail._recent = mails._Recent()
    await documents.inner.write(documents.commits[0], b"rubbish")
    assert data(await mail.read(WEB1, None)) == [b"b"]
    assert mail.epoch != epoch
    assert (mail.kept_letters, await documents.read("state/mail/damaged/" + "1".zfill(16))) == (1, b"rubbish")
    assert (await mail.post([order("1", b"a")])).taken == 1


async def test_a_store_that_cannot_be_read_now_is_the_readers_error_and_loses_nothing(monkeypatch):
    documents = Watched()
    mail = await opened(documents)
    await mail.post([order()])
    mail._recent = mails._Recent()
    read = documents.inner.read

    async def fails(name):
        raise StoreError("too many open files")

    monkeypatch.setattr(documents.inner, "read", fails)
    with pytest.raises(StoreError):
        await mail.read(WEB1, None)
    monkeypatch.setattr(documents.inner, "read", read)
    assert data(await mail.read(WEB1, None)) == [b"order"]


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b'{"epoch": 1, "number": 1}', b"\xff"])
async def test_a_damaged_state_is_a_new_epoch_and_no_crash(raw):
    documents = Watched()
    mail = await opened(documents)
    await mail.post([order("1", b"a")])
    await documents.inner.write("state/mail/state", raw)
    again = await reopened(mail, documents)
    assert again.epoch != mail.epoch
    assert data(await again.read(WEB1, None)) == [b"a"]
    assert (await reopened(again, documents)).epoch == again.epoch


# --- news


async def test_news_ring_for_the_box_that_got_some_and_for_no_other():
    mail = await opened(Watched())
    mine, others = mail.news(WEB1), mail.news(("order", "web2"))
    assert mail.news(WEB1) is mine
    await mail.post([order()])
    assert (mine.is_set(), others.is_set()) == (True, False)
    assert not mail.news(WEB1).is_set()


async def test_letters_that_are_known_are_no_news():
    mail = await opened(Watched())
    await mail.post([order()])
    news = mail.news(WEB1)
    await mail.post([order()])
    assert not news.is_set()


async def test_boxes_that_nobody_waits_for_are_forgotten():
    mail = await opened(Watched())
    for n in range(100):
        mail.news(("order", f"w{n}"))
    assert len(mail._news) == 0


# --- any history


_LETTERS = st.lists(
    st.builds(
        lambda kind, n, byte: {"order": order, "report": report, "log": piece}[kind](
            str(n) if kind == "order" else n, bytes([byte])
        ),
        st.sampled_from(["order", "report", "log"]),
        st.integers(0, 4),
        st.integers(0, 1),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(_LETTERS, st.sampled_from(["restart", "fail"])), max_size=12))
def test_whatever_happens_all_that_was_acknowledged_is_shown_once_and_in_order(history):
    async def play():
        documents = Watched()
        mail = await opened(documents)
        held: dict[bytes, bytes] = {}
        for step in history:
            if step == "restart":
                mail = await reopened(mail, documents)
            elif step == "fail":
                documents.failure = StoreError("once")
            else:
                fresh = {letter.key: letter.check for letter in step}
                contradicts = any((held | fresh)[one.key] != one.check for one in step) or any(
                    held.get(key, check) != check for key, check in fresh.items()
                )
                new = any(key not in held for key in fresh)
                try:
                    await mail.post(step)
                except ConflictError:
                    assert contradicts
                except StoreError:
                    assert documents.failure
                    assert new
                else:
                    assert not contradicts
                    held |= fresh
                documents.failure = None
            shown = [n for box in (WEB1, ("report", D), ("log", D)) for n in await mail.read(box, None)]
            assert {n.letter.key: n.letter.check for n in shown} == held
            assert len(shown) == len(held) == mail.kept_letters == len({n.number for n in shown})

    asyncio.run(play())
