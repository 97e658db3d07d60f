"""The ledger of a deployment, for people: a few lines, or the whole table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from orchestrator.journal.ledger import ARROW, CrossedView, LedgerView, LineView, together
from relay.support.console import size, table


def brief(ledger: LedgerView) -> list[str]:
    """What crossed, in which encodings, and what that saved: at most four lines."""
    sent, pulled, others = ledger.sent, ledger.pulled, ledger.alternatives
    is_cascade = 0 < ledger.from_origin_bytes < sent.wire_bytes
    origin = f", {size(ledger.from_origin_bytes)} of it from the origin" if is_cascade else ""
    lines = [
        f"to relays: {size(sent.wire_bytes)}{origin}{_made_of(sent)}",
        f"to machines: {size(pulled.wire_bytes)}{_made_of(pulled)}; {size(ledger.from_disk_bytes)} from their own disks",
    ]
    saved = [
        _saved(ledger.saved.whole_file, others.whole_file, "the whole file to each relay"),
        _saved(ledger.saved.per_machine, others.per_machine, f"the whole file to each of {others.machines} machines"),
    ]
    if any(saved):
        lines.append(f"to relays that is {'; '.join(one for one in saved if one)}")
    if sent.fallbacks or pulled.fallbacks:
        lines.append(
            f"differences that failed and went plainly: {sent.fallbacks} to relays, {pulled.fallbacks} to machines"
        )
    return lines


def full(ledger: LedgerView) -> str:
    """Each line by encoding; machines that took from the same relays are one line. Empty where nothing moved."""
    rows = [row for line in _gathered(ledger.lines) for row in _rows(line)]
    heads = ["line", "as", "chunks", "content", "payload", "around it", "on the wire"]
    return table(heads, rows, right=frozenset(range(2, 7))) if rows else ""


def _made_of(crossed: CrossedView) -> str:
    if not crossed.encodings:
        return ""
    names = ", ".join(f"{one.encoding} {size(one.payload_bytes)}" for one in crossed.encodings)
    content = sum(one.stream_bytes for one in crossed.encodings)
    return f" ({names} for {size(content)} of content, {size(crossed.overhead_bytes)} around it)"


def _saved(saved: int, whole: int, what: str) -> str:
    """What was saved in percent; what was not, in bytes: against a small file the framing is the larger part."""
    if not whole:
        return ""
    if saved < 0:
        return f"{size(-saved)} more than {what} ({size(whole)}): so small a package costs more framing than it saves"
    return f"{100 * saved / whole:.1f} % less than {what} ({size(whole)})"


def _gathered(lines: Sequence[LineView]) -> Iterable[LineView]:
    """As they are; those from the same relays to machines as one, with how many they are."""
    by_source: dict[str, list[LineView]] = {}
    for line in lines:
        if line.to == "relay":
            yield line
        else:
            by_source.setdefault(line.line.rpartition(ARROW)[0], []).append(line)
    for source, same in by_source.items():
        yield together(same[0].line if len(same) == 1 else f"{source}{ARROW}{len(same)} machines", same)


def _rows(line: LineView) -> Iterable[list[str]]:
    """One for each encoding; what the line carried in all stands in the first."""
    whole = [f"{line.overhead_bytes:,}", f"{line.wire_bytes:,}"]
    if not line.encodings:
        yield [line.line, "", "", "", f"{line.payload_bytes:,}" if line.payload_bytes else "", *whole]
    for number, one in enumerate(line.encodings):
        cells = [one.encoding, f"{one.chunks:,}", f"{one.stream_bytes:,}", f"{one.payload_bytes:,}"]
        yield [line.line if not number else "", *cells, *(["", ""] if number else whole)]
