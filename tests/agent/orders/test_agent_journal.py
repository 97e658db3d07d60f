"""The agent's journal: what was accepted is there before anything acts, survives everything, and is forgotten in time."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import msgspec
import pytest
from harness.orders_kit import DEPLOYMENT, OTHER, Desk, desk_in

from agent.disk import REMOVED
from agent.orders.acceptance import Accepted, Known, Me, Refused, judge
from agent.orders.envelopes import order_digest, sign_report
from agent.orders.journal import KEPT_SECONDS, REFUSALS_MAX, OperationJournal, OperationRecord
from agent.orders.keys import load_report_signer
from agent.orders.orders import SKEW_SECONDS, Order, Report, Survey
from relay.errors import StoreError
from relay.trust.envelopes import unverified

NOW = 1_800_000_000.0
GONE = NOW + 3600 + 2 * SKEW_SECONDS + 1


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return desk_in(tmp_path)


def order(desk: Desk, name: str = "survey", **changes) -> Order:
    return desk.order(Survey(()), name, **{"not_before": NOW, "not_after": NOW + 3600, **changes})


def accept(journal: OperationJournal, desk: Desk, made: Order) -> OperationRecord:
    envelope = desk.sign(made)
    return journal.accept(made, order_digest(envelope), envelope)


def end(journal: OperationJournal, desk: Desk, entry: OperationRecord, state="done", *, durable: bool = False) -> None:
    report = Report(
        1, entry.operation, entry.deployment, "web1", desk.identity.fingerprint, entry.digest, 1, state, "because"
    )
    journal.finish(entry, report, sign_report(report, load_report_signer(desk.home)), durable=durable)


def judged(journal: OperationJournal, desk: Desk, made: Order, now: float = NOW):
    return judge(desk.sign(made), desk.pins, Me("web1", desk.identity.fingerprint), journal.memory(), now)


def test_what_was_accepted_is_known_to_the_next_process(desk: Desk) -> None:
    made = order(desk)
    accept(OperationJournal(desk.home), desk, made)

    journal = OperationJournal(desk.home)

    assert isinstance(judged(journal, desk, made), Known)
    assert [entry.operation for entry in journal.unfinished()] == [made.operation]
    assert unverified(journal.envelope(journal.operations[made.operation]), Order) == made
    other = judged(journal, desk, msgspec.structs.replace(made, not_after=NOW + 1))
    assert isinstance(other, Refused)
    assert other.code == "altered"


def test_the_order_is_synced_with_its_folders_before_accept_returns(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = os.fsync

    def note(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    entry = accept(OperationJournal(desk.home), desk, order(desk))

    written, named, listed = synced[-3:]
    assert written.startswith(os.path.join(entry.folder, "order"))
    assert (named, listed) == (entry.folder, os.path.dirname(entry.folder))


def test_an_order_that_a_crash_tore_was_never_accepted(desk: Desk) -> None:
    made = order(desk)
    entry = accept(OperationJournal(desk.home), desk, made)
    path = Path(entry.folder, "order")
    path.write_bytes(path.read_bytes()[:-20])

    journal = OperationJournal(desk.home)
    assert journal.operations == {}
    journal.sweep()

    assert not os.path.exists(entry.folder)
    assert isinstance(judged(journal, desk, made), Accepted)
    accept(journal, desk, made)


def test_a_disk_that_fails_leaves_nothing_that_could_be_obeyed(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    journal = OperationJournal(desk.home)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(StoreError) as caught:
            accept(journal, desk, order(desk))

    assert caught.value.full
    assert OperationJournal(desk.home).operations == journal.operations == {}
    accept(journal, desk, order(desk))


@pytest.mark.parametrize("durable", [True, False])
def test_a_final_report_is_the_same_bytes_after_a_restart(desk: Desk, *, durable: bool) -> None:
    journal = OperationJournal(desk.home)
    entry = accept(journal, desk, order(desk))
    end(journal, desk, entry, durable=durable)

    again = OperationJournal(desk.home).operations[entry.operation]

    assert (again.report, again.envelope) == (entry.report, entry.envelope)
    assert OperationJournal(desk.home).unfinished() == []


def test_a_report_that_a_crash_tore_does_not_count(desk: Desk) -> None:
    journal = OperationJournal(desk.home)
    entry = accept(journal, desk, order(desk))
    end(journal, desk, entry)
    Path(entry.folder, "report").write_bytes(b"")

    assert [entry.operation for entry in OperationJournal(desk.home).unfinished()] == [entry.operation]


def test_acknowledged_is_remembered_and_told_once(desk: Desk) -> None:
    journal = OperationJournal(desk.home)
    entry = accept(journal, desk, order(desk))
    journal.acknowledge([entry.operation])
    assert not entry.acknowledged, "it is not over"
    end(journal, desk, entry)

    journal.acknowledge([entry.operation, "unknown"])
    assert entry.acknowledged
    assert OperationJournal(desk.home).unacknowledged() == []


@pytest.mark.parametrize(
    ("ended", "acknowledged", "now", "forgotten"),
    [
        (True, True, GONE, True),
        (True, True, GONE - 2, False),
        (True, False, GONE, False),
        (True, False, NOW + 3600 + KEPT_SECONDS + 1, True),
        (False, False, NOW + 3600 + KEPT_SECONDS + 1, False),
    ],
)
def test_only_what_is_over_known_and_too_old_is_forgotten(
    desk: Desk, *, ended: bool, acknowledged: bool, now: float, forgotten: bool
) -> None:
    journal = OperationJournal(desk.home)
    entry = accept(journal, desk, order(desk))
    if ended:
        end(journal, desk, entry)
    if acknowledged:
        journal.acknowledge([entry.operation])

    journal.forget(now)

    assert (entry.operation in journal.operations) is not forgotten
    assert os.path.exists(entry.folder) is not forgotten
    assert bool(OperationJournal(desk.home).operations) is not forgotten


def test_what_is_forgotten_is_not_obeyed_again_when_the_clock_goes_back(desk: Desk) -> None:
    made = order(desk)
    journal = OperationJournal(desk.home)
    end(journal, desk, accept(journal, desk, made))
    journal.acknowledge([made.operation])
    journal.forget(GONE)
    assert journal.operations == {}

    for each in (journal, OperationJournal(desk.home)):
        found = judged(each, desk, made, NOW + 10)
        assert isinstance(found, Refused)
        assert found.code == "expired"


def test_fences_outlive_the_orders_that_raised_them(desk: Desk) -> None:
    journal = OperationJournal(desk.home)
    made = order(desk, fence=7)
    end(journal, desk, accept(journal, desk, made))
    journal.acknowledge([made.operation])
    journal.forget(GONE)

    again = OperationJournal(desk.home)

    assert again.fences["test", ""].fence == 7
    assert (
        judged(again, desk, order(desk, "old", fence=6, not_before=GONE, not_after=GONE + 60), GONE).code
        == "fenced_off"
    )


def test_a_fence_is_open_until_its_own_deployment_ends(desk: Desk) -> None:
    journal = OperationJournal(desk.home)
    accept(journal, desk, order(desk, fence=7))
    assert OperationJournal(desk.home).fences["test", ""].open

    journal.close("test", OTHER)
    assert OperationJournal(desk.home).fences["test", ""].open
    journal.close("test", DEPLOYMENT)
    assert not OperationJournal(desk.home).fences["test", ""].open
    accept(journal, desk, order(desk, "late", fence=7))
    assert not OperationJournal(desk.home).fences["test", ""].open, (
        "what follows at the same fence does not open it again"
    )
    accept(journal, desk, order(desk, "next", fence=8))
    assert OperationJournal(desk.home).fences["test", ""].open


def test_an_order_that_is_not_kept_raises_the_fence_durably(desk: Desk) -> None:
    OperationJournal(desk.home).lead(order(desk, fence=9))

    assert OperationJournal(desk.home).fences["test", ""].fence == 9


def test_a_damaged_memory_of_fences_is_not_taken_for_none(desk: Desk) -> None:
    OperationJournal(desk.home).lead(order(desk, fence=9))
    Path(desk.home, "journal.json").write_bytes(b"{")

    with pytest.raises(StoreError, match=r"journal\.json"):
        OperationJournal(desk.home)


def test_refusals_are_bounded_escaped_and_noted_once(desk: Desk) -> None:
    journal = OperationJournal(desk.home)

    for number in range(3 * REFUSALS_MAX):
        digest = f"{number:064}"
        assert journal.refuse("forged", "bad\x1b[31m\n", operation="x\ny", digest=digest, relay="r", now=NOW)
        assert not journal.refuse("forged", "again", operation="x", digest=digest, relay="r", now=NOW)

    lines = Path(desk.home, "refusals.jsonl").read_bytes().splitlines()
    assert REFUSALS_MAX <= len(lines) <= 2 * REFUSALS_MAX + 1
    kept = OperationJournal(desk.home).refusals()
    assert len(kept) == REFUSALS_MAX
    assert kept[-1].digest == f"{3 * REFUSALS_MAX - 1:064}"
    assert (kept[-1].text + kept[-1].operation).isprintable()


def test_a_torn_line_of_refusals_costs_that_line(desk: Desk) -> None:
    journal = OperationJournal(desk.home)
    journal.refuse("forged", "bad", operation="x", digest="0" * 64, relay="r", now=NOW)
    with Path(desk.home, "refusals.jsonl").open("ab") as file:
        file.write(b'{"at": 1, "co')

    assert [refusal.digest for refusal in OperationJournal(desk.home).refusals()] == ["0" * 64]


def test_a_removal_that_a_crash_interrupted_leaves_no_operation(desk: Desk) -> None:
    journal = OperationJournal(desk.home)
    entry = accept(journal, desk, order(desk))
    aside = os.path.join(os.path.dirname(entry.folder), f"{REMOVED}{os.path.basename(entry.folder)}")
    shutil.move(entry.folder, aside)

    again = OperationJournal(desk.home)
    assert again.operations == {}
    again.sweep()
    assert not os.path.exists(aside)
