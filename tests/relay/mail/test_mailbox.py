"""Mail keeps what it acknowledged, shows it in order, and never more than it may keep. Without HTTP."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.errors import ConflictError, StoreError
from relay.mail import mailbox as mails
from relay.mail.letter_database import DAMAGED, FILE, RETIRE_COUNT, LetterDatabase
from relay.mail.letters import LETTER_CHARGE, RETRY_SECONDS, Letter, MailLimits
from relay.mail.mailbox import KEPT_SECONDS, Mail
from relay.protocol import messages

D = "01ARZ3NDEKTSV4RRFFQ69G5FAV"
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


class Watched(LetterDatabase):
    """The database, which can be slow or fail, and counts its commits."""

    def __init__(self, folder: str | None, limits: MailLimits) -> None:
        super().__init__(folder, limits)
        self.commits = 0
        self.gate = threading.Event()
        self.gate.set()
        self.failure: Exception | None = None

    def take(self, requests, arrived):
        self.gate.wait(60)
        if self.failure:
            # As SQLite's own errors do, it comes when all was written and nothing committed.
            with self._transaction():
                taken = [self._take_one(letters, arrived, self.used.copy()) for letters in requests]
                if any(taken):
                    raise self.failure
        self.commits += 1
        return super().take(requests, arrived)


@pytest.fixture(autouse=True)
def _watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mails, "LetterDatabase", Watched)


async def opened(
    folder: Path | None, limits: MailLimits | None = None, clock: Callable[[], float] | None = None
) -> Mail:
    mail = Mail(str(folder) if folder else None, limits, clock or Clock())
    await mail.load()
    return mail


def kept_letters(mail: Mail) -> int:
    return mail._database.used["letters", ""]


async def reopened(mail: Mail, folder: Path, **more) -> Mail:
    await mail.close()
    return await opened(folder, **more)


@pytest.fixture
async def mail(tmp_path: Path) -> AsyncIterator[Mail]:
    mail = await opened(tmp_path)
    yield mail
    await mail.close()


@asynccontextmanager
async def held(mail: Mail) -> AsyncIterator[None]:
    """While the context lasts, nothing is committed."""
    mail._database.gate.clear()
    try:
        yield
    finally:
        mail._database.gate.set()


# --- durable, and in few writes


async def test_a_letter_is_committed_before_its_sender_is_answered(tmp_path: Path) -> None:
    mail = await opened(tmp_path)
    async with held(mail):
        posting = asyncio.create_task(mail.post([order()]))
        await asyncio.sleep(0.05)
        assert not posting.done()
        assert await mail.read(WEB1, None) == []
    assert await posting == messages.TakenAnswer(taken=1, known=0)
    assert data(await mail.read(WEB1, None)) == [b"order"]
    await mail.close()


POSTS = """
import asyncio, os, sys
from relay.mail.letters import Letter
from relay.mail.mailbox import Mail

async def main():
    mail = Mail(sys.argv[1])
    await mail.load()
    for n in range(5):
        await mail.post([Letter("order", "web1", "web1", f"D/{n}", 0, b"order")])
        os.write(1, b"posted")
    await mail.close()

asyncio.run(main())
"""


@pytest.mark.processes
def test_a_letter_is_synced_before_its_sender_is_answered(tmp_path: Path) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    trace = tmp_path / "trace"
    traced = ["strace", "-f", "-y", "-e", "trace=fsync,fdatasync,write", "-o", str(trace), sys.executable, "-c", POSTS]
    subprocess.run([*traced, str(tmp_path / "mail")], check=True, capture_output=True, timeout=60)
    before_each = trace.read_text().split('"posted"')
    assert len(before_each) == 6
    assert all(re.search(r"sync\(\d+<[^>]*letters\.db-wal>\)", calls) for calls in before_each[:5])


async def test_posts_that_wait_are_committed_together(mail: Mail) -> None:
    async with held(mail):
        first = asyncio.create_task(mail.post([order("0")]))
        await asyncio.sleep(0.01)
        others = [asyncio.create_task(mail.post([order(str(n))])) for n in range(1, 200)]
        await asyncio.sleep(0.01)
    await asyncio.gather(first, *others)
    assert mail._database.commits == 2
    assert [n.number for n in await mail.read(WEB1, None)] == list(range(1, 201))


async def test_one_transaction_does_not_grow_without_bound(mail: Mail, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mails, "COMMIT_BYTES", 10_000)
    await asyncio.gather(*(mail.post([order(str(n), b"x" * 4000)]) for n in range(9)))
    assert mail._database.commits == 3


async def test_everything_is_there_after_a_restart_under_the_same_epoch_and_numbers(tmp_path: Path) -> None:
    mail = await opened(tmp_path)
    await mail.post([order("1", b"a"), order("2", b"b", agent="web2"), report(), piece()])
    await mail.post([order("3", b"c")])
    boxes = (WEB1, ("order", "web2"), ("report", D), ("log", D))
    before = [await mail.read(box, None) for box in boxes]
    again = await reopened(mail, tmp_path)
    assert again.epoch == mail.epoch
    assert [await again.read(box, None) for box in boxes] == before
    assert [] not in before
    assert data(await again.read(WEB1, cursor(again, 1))) == [b"c"]
    await again.post([order("4", b"d")])
    assert [n.number for n in await again.read(WEB1, None)] == [1, 5, 6]
    await again.close()


async def test_without_a_folder_mail_lives_in_memory() -> None:
    mail = await opened(None)
    assert (await mail.post([order("1", b"a"), order("2", b"b")])).taken == 2
    assert data(await mail.read(WEB1, cursor(mail, 1))) == [b"b"]
    await mail.close()


async def test_a_poster_that_goes_away_loses_nothing_of_the_others(mail: Mail) -> None:
    async with held(mail):
        gone, stays = (asyncio.create_task(mail.post([order(name)])) for name in "ab")
        await asyncio.sleep(0.01)
        gone.cancel()
        await asyncio.sleep(0.01)
    assert (await stays).taken == 1
    assert (await mail.post([order("c")])).taken == 1


@pytest.mark.parametrize(
    "failure", [StoreError("the disk is full", full=True), RuntimeError("a bug")], ids=["disk", "bug"]
)
async def test_a_commit_that_failed_is_told_to_all_who_waited_and_takes_nothing(mail: Mail, failure: Exception) -> None:
    await mail.post([order("kept")])
    mail._database.failure = failure
    found = await asyncio.gather(*(mail.post([order(n)]) for n in "ab"), return_exceptions=True)
    assert found == [failure, failure]
    assert (kept_letters(mail), data(await mail.read(WEB1, None))) == (1, [b"order"])
    mail._database.failure = None
    assert (await mail.post([order("a")])).taken == 1
    assert len(await mail.read(WEB1, None)) == 2


# --- the same again, and something else under the same name


async def test_the_same_letter_again_is_known_and_stays_one(mail: Mail) -> None:
    assert await mail.post([order()]) == messages.TakenAnswer(1, 0)
    assert await mail.post([order(), order("2")]) == messages.TakenAnswer(1, 1)
    assert await mail.post([order("3"), order("3")]) == messages.TakenAnswer(1, 1)
    assert len(await mail.read(WEB1, None)) == 3


async def test_the_same_letter_twice_at_the_same_time_is_one(mail: Mail) -> None:
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
async def test_other_bytes_under_the_same_name_are_refused_with_all_that_came_with_them(
    tmp_path: Path, held, other, restarted
) -> None:
    mail = await opened(tmp_path)
    await mail.post([held])
    if restarted:
        mail = await reopened(mail, tmp_path)
    with pytest.raises(ConflictError):
        await mail.post([order("new"), other, report(9)])
    assert kept_letters(mail) == 1
    assert await mail.post([order("new"), report(9)]) == messages.TakenAnswer(2, 0)
    await mail.close()


async def test_a_request_that_contradicts_itself_is_refused(mail: Mail) -> None:
    with pytest.raises(ConflictError):
        await mail.post([order("1"), order("1", b"other")])
    assert (kept_letters(mail), mail.kept_bytes) == (0, 0)


async def test_output_that_is_cut_elsewhere_and_other_agents_reports_do_not_contradict(mail: Mail) -> None:
    await mail.post([piece(0, b"ab"), report(1, b"x", agent="web1")])
    assert await mail.post([piece(0, b"abcd"), report(1, b"y", agent="web2")]) == messages.TakenAnswer(2, 0)


async def test_a_refused_request_does_not_harm_those_beside_it(mail: Mail) -> None:
    await mail.post([order("1")])
    good, bad = await asyncio.gather(mail.post([order("2")]), mail.post([order("1", b"other")]), return_exceptions=True)
    assert good == messages.TakenAnswer(1, 0)
    assert isinstance(bad, ConflictError)


# --- cursors and epochs


async def test_a_reader_sees_what_is_after_its_cursor_and_only_its_box(mail: Mail) -> None:
    await mail.post([order("1", b"a"), order("x", b"other", agent="web2"), order("2", b"b")])
    assert [n.number for n in await mail.read(WEB1, None)] == [1, 3]
    assert data(await mail.read(WEB1, cursor(mail, 1))) == [b"b"]
    assert data(await mail.read(WEB1, cursor(mail, 2))) == [b"b"]
    assert await mail.read(WEB1, cursor(mail, 3)) == []
    assert await mail.read(("order", "nobody"), None) == []


async def test_a_cursor_of_another_epoch_or_of_the_future_counts_as_none(mail: Mail) -> None:
    await mail.post([order("1", b"a")])
    assert data(await mail.read(WEB1, messages.Cursor("other", 1))) == [b"a"]
    assert data(await mail.read(WEB1, cursor(mail, 500))) == [b"a"]


async def test_mail_that_was_emptied_has_another_epoch(tmp_path: Path) -> None:
    mail = await opened(tmp_path / "mail")
    await mail.post([order("1", b"a")])
    await mail.close()
    shutil.rmtree(tmp_path / "mail")
    again = await opened(tmp_path / "mail")
    assert again.epoch != mail.epoch
    await again.post([order("2", b"b")])
    assert data(await again.read(WEB1, cursor(mail, 1))) == [b"b"]
    await again.close()


async def test_an_answer_is_bounded_in_letters_and_in_bytes_and_the_rest_comes_after(tmp_path: Path) -> None:
    mail = await opened(tmp_path, MailLimits(bytes_per_agent=1 << 30))
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
    assert len(await mail.read(("report", D), cursor(mail, mail._database.last() - 1))) == 1, (
        "a single letter is always shown"
    )
    await mail.close()


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
async def test_over_a_bound_new_letters_are_refused_and_old_ones_stay(tmp_path: Path, limits, letter) -> None:
    mail = await opened(tmp_path, limits)
    taken, refused = await posted_until_full(mail, letter)
    assert refused.full
    assert refused.retry_after == RETRY_SECONDS
    assert taken == (20 if letter(0).kind == "order" else 17)
    assert kept_letters(mail) == taken
    assert await mail.post([letter(0)]) == messages.TakenAnswer(0, 1), "known letters need no room"
    await mail.close()


async def test_output_leaves_room_for_reports_and_both_leave_room_for_orders(tmp_path: Path) -> None:
    mail = await opened(tmp_path, MailLimits(letters=80))
    taken = {}
    for kind, letter in (("log", piece), ("report", report), ("order", lambda n: order(str(n)))):
        taken[kind], _ = await posted_until_full(mail, letter)
    assert taken == {"log": 60, "report": 10, "order": 10}
    await mail.close()


async def test_a_request_is_measured_as_a_whole(tmp_path: Path) -> None:
    mail = await opened(tmp_path, MailLimits(letters=10))
    with pytest.raises(StoreError):
        await mail.post([order(str(n)) for n in range(11)])
    assert (kept_letters(mail), mail.kept_bytes) == (0, 0)
    assert (await mail.post([order(str(n)) for n in range(10)])).taken == 10
    await mail.close()


async def test_one_full_agent_does_not_keep_others_from_their_orders(tmp_path: Path) -> None:
    mail = await opened(tmp_path, MailLimits(bytes_per_agent=2000))
    with pytest.raises(StoreError):
        await mail.post([order(str(n), bytes(1000)) for n in range(5)])
    assert (await mail.post([order("1", agent="web2")])).taken == 1
    await mail.close()


# --- how long


async def tended(mail: Mail, clock: Clock) -> None:
    if mail._tender is not None:
        await mail._tender
    clock.now += mails.TEND_SECONDS
    await mail.read(WEB1, None)
    await mail._tender


async def test_letters_are_kept_for_a_day_and_no_longer(tmp_path: Path) -> None:
    clock = Clock()
    mail = await opened(tmp_path, clock=clock)
    await mail.post([order("old", b"old"), report()])
    clock.now += KEPT_SECONDS / 2
    await mail.post([order("new", b"new")])
    clock.now += KEPT_SECONDS / 2 - 2 * mails.TEND_SECONDS
    await tended(mail, clock)
    assert data(await mail.read(WEB1, None)) == [b"old", b"new"]
    await tended(mail, clock)
    assert data(await mail.read(WEB1, None)) == [b"new"]
    assert await mail.read(("report", D), None) == []
    assert kept_letters(mail) == 1
    assert (await mail.post([order("old", b"other")])).taken == 1, "its name is free again"
    await mail.close()


async def test_room_comes_back_with_retention_in_the_file_too(tmp_path: Path) -> None:
    clock = Clock()
    count = RETIRE_COUNT + 1
    mail = await opened(tmp_path, MailLimits(letters=count), clock)
    await mail.post([order(str(n), bytes(4000)) for n in range(count)])
    with pytest.raises(StoreError):
        await mail.post([order("one more")])
    clock.now += KEPT_SECONDS
    await tended(mail, clock)
    assert (kept_letters(mail), mail.kept_bytes, +mail._database.used) == (0, 0, {})
    assert (await mail.post([order("one more")])).taken == 1
    await mail.close()
    assert os.path.getsize(tmp_path / FILE) < count * 4000 / 4


async def test_numbers_go_on_after_everything_was_retired_and_the_relay_started_again(tmp_path: Path) -> None:
    clock = Clock()
    mail = await opened(tmp_path, clock=clock)
    await mail.post([order(str(n)) for n in range(5)])
    clock.now += KEPT_SECONDS
    again = await reopened(mail, tmp_path, clock=clock)
    assert kept_letters(again) == 0
    await again.post([order("next", b"next")])
    assert [n.number for n in await again.read(WEB1, cursor(again, 5))] == [6]
    await again.close()


async def test_a_clock_that_was_ahead_does_not_keep_mail_for_ever(tmp_path: Path) -> None:
    clock = Clock()
    clock.now += 1e9
    mail = await opened(tmp_path, clock=clock)
    await mail.post([order()])
    clock.now -= 1e9
    again = await reopened(mail, tmp_path, clock=clock)
    clock.now += KEPT_SECONDS
    await tended(again, clock)
    assert kept_letters(again) == 0
    await again.close()


# --- damage


def flip(path: Path, what: bytes) -> None:
    """Another byte where `what` lies in the file."""
    raw = path.read_bytes()
    assert raw.count(what) == 1, "not where the test believes it"
    path.write_bytes(raw.replace(what, what[:-1] + b"?"))


async def test_a_letter_that_the_disk_changed_is_let_go_and_the_rest_is_there_under_a_new_epoch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mail = await opened(tmp_path)
    await mail.post([order("1", b"a letter of its own")])
    await mail.post([order("2", b"b")])
    epoch = mail.epoch
    await mail.close()
    flip(tmp_path / FILE, b"a letter of its own")
    again = await opened(tmp_path)
    assert again.epoch == epoch
    assert data(await again.read(WEB1, None)) == [b"b"]
    assert again.epoch != epoch
    assert kept_letters(again) == 1
    assert "damaged" in caplog.text
    third = await reopened(again, tmp_path)
    assert third.epoch == again.epoch, "it is told once"
    assert (await third.post([order("1", b"a letter of its own")])).taken == 1
    assert [n.number for n in await third.read(WEB1, None)] == [2, 3], "its number is not given again"
    await third.close()


DAMAGES = {
    "not a database": lambda raw: b"rubbish" * 1000,
    "its head": lambda raw: b"\0" * 200 + raw[200:],
    "its schema": lambda raw: raw[:100] + b"\xff" * 3900 + raw[4000:],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
async def test_a_file_that_is_damaged_at_the_start_is_put_aside_and_mail_begins_anew(
    tmp_path: Path, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    mail = await opened(tmp_path)
    await mail.post([order("1", b"a")])
    old = cursor(mail, 1)
    await mail.close()
    raw = damage((tmp_path / FILE).read_bytes())
    (tmp_path / FILE).write_bytes(raw)
    again = await opened(tmp_path)
    assert again.epoch != old.epoch
    assert (kept_letters(again), await again.read(WEB1, old)) == (0, [])
    assert "damaged" in caplog.text
    assert (tmp_path / DAMAGED / FILE).read_bytes() == raw
    assert (await again.post([order("1", b"a")])).taken == 1
    third = await reopened(again, tmp_path)
    assert (third.epoch, kept_letters(third)) == (again.epoch, 1), "it is told once"
    await third.close()


@pytest.mark.parametrize("by", ["read", "post"])
async def test_damage_that_shows_while_the_relay_runs_is_an_error_once_and_mail_begins_anew(
    mail: Mail, tmp_path: Path, by: str
) -> None:
    await mail.post([order("1", b"a")])
    epoch = mail.epoch
    (tmp_path / "rubbish").write_bytes(b"rubbish" * 1000)
    for name in ("_writer", "_reader"):
        getattr(mail._database, name).close()
        setattr(mail._database, name, sqlite3.connect(tmp_path / "rubbish", check_same_thread=False))
    (tmp_path / FILE).write_bytes(b"rubbish" * 1000)
    with pytest.raises(StoreError, match="damaged"):
        await (mail.read(WEB1, None) if by == "read" else mail.post([order("2")]))
    assert mail.epoch != epoch
    assert await mail.read(WEB1, None) == []
    assert (await mail.post([order("1", b"a")])).taken == 1


async def test_a_file_of_a_newer_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    await (await opened(tmp_path)).close()
    newer = sqlite3.connect(tmp_path / FILE)
    newer.execute("UPDATE relay SET format = 2")
    newer.commit()
    newer.close()
    mail = Mail(str(tmp_path))
    with pytest.raises(StoreError, match="format 2"):
        await mail.load()
    await mail.close()
    assert not (tmp_path / DAMAGED).exists()


# --- news


async def test_news_ring_for_the_box_that_got_some_and_for_no_other(mail: Mail) -> None:
    mine, others = mail.news.of(WEB1), mail.news.of(("order", "web2"))
    assert mail.news.of(WEB1) is mine
    await mail.post([order()])
    assert (mine.is_set(), others.is_set()) == (True, False)
    assert not mail.news.of(WEB1).is_set()


async def test_letters_that_are_known_are_no_news(mail: Mail) -> None:
    await mail.post([order()])
    news = mail.news.of(WEB1)
    await mail.post([order()])
    assert not news.is_set()


async def test_boxes_that_nobody_waits_for_are_forgotten(mail: Mail) -> None:
    for n in range(100):
        mail.news.of(("order", f"w{n}"))
    assert len(mail.news._events) == 0


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


@pytest.mark.long
@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(_LETTERS, st.sampled_from(["restart", "fail"])), max_size=12))
def test_whatever_happens_all_that_was_acknowledged_is_shown_once_and_in_order(history):
    async def play(folder: Path) -> None:
        mail = await opened(folder)
        held: dict[bytes, bytes] = {}
        for step in history:
            if step == "restart":
                mail = await reopened(mail, folder)
            elif step == "fail":
                mail._database.failure = StoreError("once")
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
                    assert mail._database.failure
                    assert new
                else:
                    assert not contradicts
                    held |= fresh
                mail._database.failure = None
            shown = [n for box in (WEB1, ("report", D), ("log", D)) for n in await mail.read(box, None)]
            assert {n.letter.key: n.letter.check for n in shown} == held
            assert len(shown) == len(held) == kept_letters(mail) == len({n.number for n in shown})

        await mail.close()

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(play(Path(folder)))
