"""The ledger tells every byte by line and encoding, and what that saved; entries of older journals still count."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from agent.orders.orders import AcquireFacts, TreePulled
from orchestrator.journal import events as ev
from orchestrator.journal.events import JournalEntry, LineBytes, decode
from orchestrator.journal.ledger import LedgerView, ledger
from orchestrator.plan.plan import AcquirePlan, Plan, PlannedPackage, PlannedRelay
from orchestrator.replication.ledger_text import brief, full
from relay.protocol.messages import EncodedBytes, summed

ULID = "01M83DSN7Z2DSFFFVQGSAHJFQ0"
HDIFF = EncodedBytes("hdiff", 20, 90_000, 700)
ZSTD = EncodedBytes("zstd", 2, 3_000, 1_000)


def entries(*events: ev.Event) -> list[JournalEntry]:
    return [JournalEntry(number, ULID, 1000.0 + number, event) for number, event in enumerate(events, 1)]


def replicated(relay: str = "fra", *lines: LineBytes, size: int = 5_000, fallbacks: int = 0) -> ev.Replicated:
    sent = sum(encoded.chunks for line in lines for encoded in line.encodings)
    crossed = sum(line.wire_bytes for line in lines) if sent else 0
    return ev.Replicated(relay, "Acme.Web", "1.4.2", size, crossed, 22, sent, 1.0, lines, fallbacks)


def acquired(machine: str, sources: dict[str, int], *encodings: EncodedBytes, **facts: int) -> ev.Acquired:
    tree = TreePulled(
        "Acme.Web",
        "1.4.2",
        f"/srv/{machine}",
        already=bool(facts.get("already")),
        tree_bytes=93_000,
        from_disk_bytes=facts.get("disk", 0),
        from_relays=sources,
        encodings=encodings,
        fallbacks=facts.get("fallbacks", 0),
        wire_bytes=facts.get("wire", 0),
    )
    return ev.Acquired(machine, AcquireFacts((tree,)))


CASCADE = entries(
    replicated("fra", LineBytes("origin → fra", 2_000, (HDIFF, ZSTD)), fallbacks=1),
    replicated("iad", LineBytes("fra → iad", 1_500, (HDIFF,)), LineBytes("origin → iad", 1_200, (ZSTD,))),
    acquired("web1", {"http://fra": 1_700}, HDIFF, ZSTD, wire=2_100, fallbacks=2),
    acquired("web2", {"http://fra": 1_000}, ZSTD, wire=1_300, disk=90_000),
    acquired("web3", {}, already=1),
)


def test_every_line_tells_its_bytes_by_encoding() -> None:
    lines = {line.line: line for line in ledger(CASCADE).lines}
    assert list(lines) == ["origin → fra", "fra → iad", "origin → iad", "http://fra → web1", "http://fra → web2"]
    assert [line.to for line in lines.values()] == ["relay"] * 3 + ["machine"] * 2
    first = lines["origin → fra"]
    assert (first.wire_bytes, first.payload_bytes, first.overhead_bytes) == (2_000, 1_700, 300)
    assert first.encodings == (HDIFF, ZSTD)
    assert lines["http://fra → web2"].encodings == (ZSTD,)


def test_all_lines_of_a_kind_add_up() -> None:
    counted = ledger(CASCADE)
    assert counted.sent.wire_bytes == 2_000 + 1_500 + 1_200
    assert counted.sent.payload_bytes == 2 * (700 + 1_000)
    assert counted.sent.overhead_bytes == counted.sent.wire_bytes - counted.sent.payload_bytes
    assert counted.sent.encodings == (
        EncodedBytes("hdiff", 40, 180_000, 1_400),
        EncodedBytes("zstd", 4, 6_000, 2_000),
    )
    assert (counted.sent.fallbacks, counted.pulled.fallbacks) == (1, 2)
    assert counted.pulled.wire_bytes == counted.wire_bytes == 3_400
    assert counted.from_origin_bytes == 2_000 + 1_200, "what fra passed on did not leave the origin"


def test_what_was_saved_counts_only_what_had_to_be_brought() -> None:
    counted = ledger(CASCADE)
    assert (counted.alternatives.whole_file, counted.saved.whole_file) == (10_000, 10_000 - 4_700)
    assert counted.alternatives.machines == 2, "web3 had it before: nobody would have sent it there"
    assert (counted.alternatives.per_machine, counted.saved.per_machine) == (10_000, 10_000 - 4_700)


def test_a_relay_that_had_it_is_nothing_saved_and_its_questions_are_told() -> None:
    counted = ledger(entries(replicated("fra", LineBytes("origin → fra", 600))))
    assert (counted.to_relays, counted.alternatives.whole_file) == ({"fra": 0}, 0)
    assert (counted.sent.wire_bytes, counted.sent.overhead_bytes) == (600, 600)
    assert counted.saved.whole_file == -600


def test_a_package_brought_in_two_tries_is_one_whole_file() -> None:
    line = LineBytes("origin → fra", 2_000, (ZSTD,))
    counted = ledger(entries(replicated("fra", line), replicated("fra", line)))
    assert (counted.sent.wire_bytes, counted.alternatives.whole_file) == (4_000, 5_000)
    assert [found.wire_bytes for found in counted.lines] == [4_000]


def test_a_tree_pulled_once_and_found_again_after_a_resume_counts_once() -> None:
    story = entries(
        replicated("fra"),
        acquired("web1", {"fra": 1_000}, ZSTD, wire=1_100),
        acquired("web1", {}, already=1),
    )
    assert ledger(story).alternatives.per_machine == 5_000
    assert ledger(story).already == 0


def test_entries_from_before_lines_were_told_still_count() -> None:
    old = (
        b'{"kind":"replicated","relay":"fra","package":"Acme.Web","version":"1.4.2","package_bytes":5000,'
        b'"wire_bytes":300,"chunks":9,"chunks_sent":3,"seconds":0.5}'
    )
    tree = (
        b'{"kind":"acquired","machine":"web1","facts":{"type":"acquire","trees":[{"package":"Acme.Web",'
        b'"version":"1.4.2","path":"/p","already":false,"tree_bytes":9,"from_relays":{"fra":250},"wire_bytes":320}]}}'
    )
    counted = ledger(entries(decode(old), decode(tree)))
    relay, machine = counted.lines
    assert (relay.line, relay.wire_bytes, relay.overhead_bytes) == ("origin → fra", 300, 0)
    assert (machine.line, machine.payload_bytes, machine.overhead_bytes) == ("fra → web1", 250, 70)
    assert (counted.saved.whole_file, counted.sent.encodings) == (4_700, ())


def test_what_a_new_entry_tells_outlives_the_journal() -> None:
    event = CASCADE[0].event
    assert decode(msgspec.json.encode(event)) == event


def test_the_names_of_relays_and_the_sizes_of_packages_are_the_plans() -> None:
    plan = Plan(
        format=1,
        project="shop",
        label="1.4.2",
        environment="production",
        packages={"web": PlannedPackage("acme.web", "1.4.2", nupkg_bytes=7_000)},
        scripts=None,
        relays=(PlannedRelay("fra", "http://fra", "fra"),),
        feeds={},
        machines=(),
        secrets={},
        machine_secrets=(),
        pre_acquire=(),
        acquire=AcquirePlan(),
        steps=(),
    )
    counted = ledger(entries(acquired("web1", {"http://fra/": 1_000}, ZSTD, wire=1_100)), plan)
    assert [line.line for line in counted.lines] == ["fra → web1"]
    assert counted.alternatives.per_machine == 7_000


# --- for people


def test_a_few_lines_tell_what_crossed_and_what_it_saved() -> None:
    lines = brief(ledger(CASCADE))
    assert len(lines) == 4
    assert "4.6 KiB, 3.1 KiB of it from the origin (hdiff 1.4 KiB, zstd 2.0 KiB" in lines[0]
    assert "87.9 KiB from their own disks" in lines[1]
    assert "53.0 % less than the whole file to each relay" in lines[2]
    assert "each of 2 machines" in lines[2]
    assert "1 to relays, 2 to machines" in lines[3]


def test_what_cost_more_than_the_file_is_told_as_it_is() -> None:
    line = LineBytes("origin → fra", 2_000, (ZSTD,))
    told = "\n".join(brief(ledger(entries(replicated("fra", line, size=1_000)))))
    assert "1000 B more than the whole file" in told
    assert "costs more framing than it saves" in told


def test_the_table_has_a_row_for_each_line_and_encoding_and_one_for_the_machines_of_a_relay() -> None:
    rows = [row.split() for row in full(ledger(CASCADE)).splitlines()]
    assert [row[:4] for row in rows[1:]] == [
        ["origin", "→", "fra", "hdiff"],
        ["zstd", "2", "3,000", "1,000"],
        ["fra", "→", "iad", "hdiff"],
        ["origin", "→", "iad", "zstd"],
        ["http://fra", "→", "2", "machines"],
        ["zstd", "4", "6,000", "2,000"],
    ]
    assert rows[1][-1] == "2,000"


def test_nothing_that_moved_is_no_table_and_no_saving() -> None:
    counted = ledger([])
    assert full(counted) == ""
    assert not any("less" in line or "more" in line for line in brief(counted))


# --- sums


_ENCODED = st.builds(
    EncodedBytes,
    st.sampled_from(["raw", "zstd", "zstd-prefix", "hdiff"]),
    *[st.integers(min_value=0, max_value=1 << 40)] * 3,
)
_LINE = st.builds(
    LineBytes,
    st.sampled_from(["origin → fra", "fra → iad", "origin → iad"]),
    st.integers(min_value=0, max_value=1 << 40),
    st.lists(_ENCODED, max_size=4).map(tuple),
)
_EVENT = st.builds(
    lambda relay, lines, fallbacks: replicated(relay, *lines, fallbacks=fallbacks),
    st.sampled_from(["fra", "iad"]),
    st.lists(_LINE, max_size=4),
    st.integers(min_value=0, max_value=9),
)


@given(st.lists(_EVENT, max_size=12))
def test_no_byte_is_lost_or_told_twice(story: list[ev.Replicated]) -> None:
    counted: LedgerView = ledger(entries(*story))
    lines = [line for event in story for line in event.lines]
    everything = [encoded for line in lines for encoded in line.encodings]
    assert counted.sent.encodings == summed(everything)
    assert counted.sent.payload_bytes == sum(encoded.payload_bytes for encoded in everything)
    assert counted.sent.wire_bytes == sum(line.wire_bytes for line in lines)
    assert counted.sent.wire_bytes == sum(line.wire_bytes for line in counted.lines)
