"""The arithmetic of a replication, for people and for scripts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from relay.support.console import printable, share, size, table

if TYPE_CHECKING:
    from orchestrator.replication.alternatives import Alternatives
    from relay.transfer.probe import Explained

_PREFERRED = {
    "bytes": "prefer: bytes (the fewest, where times are within 10 %)",
    "time": "prefer: time (what is there first)",
}


def document_of(explained: Explained, package_bytes: int, others: Alternatives) -> dict[str, Any]:
    """As JSON has it. Bytes, seconds, bytes per second."""
    return {
        "encoding": explained.encoding,
        "base": explained.base,
        "note": explained.note,
        "missing_chunks": explained.missing_chunks,
        "missing_bytes": explained.missing_bytes,
        "goodput": explained.goodput,
        "goodput_from": explained.goodput_from,
        "round_trip": explained.round_trip,
        "prefer": explained.prefer,
        "rows": [
            {
                "encoding": str(row.candidate.coding),
                "payload_bytes": row.candidate.payload_bytes,
                "exact": row.candidate.exact,
                "share": row.candidate.payload_bytes / max(package_bytes, 1),
                "line_seconds": row.line_seconds,
                "encode_seconds": row.candidate.encode_seconds,
                "decode_seconds": row.candidate.decode_seconds,
                "seconds": row.seconds,
                "chosen": row.chosen,
                "why_not": row.why_not,
            }
            for row in explained.rows
        ],
        "runs": [
            {
                "encoding": str(run.coding),
                "chunks": len(run.run.indexes),
                "bytes": run.run.size,
                "payload_bytes": run.choice.chosen.payload_bytes,
                "exact": run.choice.chosen.exact,
            }
            for run in explained.runs
        ],
        "alternatives": {
            "whole_file": others.whole_file,
            "per_machine": others.per_machine,
            "machines": others.machines,
            "rsync_like_estimate": others.rsync_like,
        },
    }


def text_of(relay: str, document: dict[str, Any], package_bytes: int) -> str:
    """The same as lines of text."""
    mbit = document["goodput"] * 8 / 1e6
    lines = [
        printable(f"{relay}: {mbit:,.1f} Mbit/s ({document['goodput_from']})")
        + (f", round trip {1000 * document['round_trip']:.0f} ms" if document["round_trip"] else ""),
    ]
    if not document["rows"]:
        return "\n".join([*lines, f"  {document['note']}"])
    if document["prefer"]:
        lines.append(f"  {_PREFERRED[document['prefer']]}")
    built = f", building on {document['base']}" if document["base"] else ""
    lines.append(f"  missing: {document['missing_chunks']} chunks, {size(document['missing_bytes'])}{built}")
    if document["note"]:
        lines.append(f"  {document['note']}")
    rows = [
        [
            f"{'*' if row['chosen'] else ' '} {row['encoding']}",
            f"{row['payload_bytes']:,}{'' if row['exact'] else ' est.'}",
            share(row["payload_bytes"], package_bytes, 2),
            f"{row['line_seconds']:.2f}",
            f"{row['encode_seconds']:.2f}",
            f"{row['decode_seconds']:.2f}",
            f"{row['seconds']:.2f}",
            _chosen(row["encoding"], document["runs"]) if row["chosen"] else row["why_not"],
        ]
        for row in document["rows"]
    ]
    headers = ["encoding", "bytes", "of the nupkg", "line s", "encode s", "decode s", "seconds", "why not"]
    shown = table(headers, rows, right=frozenset(range(1, 7)))
    lines += [f"  {line}" for line in shown.splitlines()]
    lines.append(f"  {_sent(document['runs'])}")
    lines += [f"  {line}" for line in _others(document["alternatives"], package_bytes)]
    return "\n".join(lines)


def _chosen(encoding: str, runs: list[dict[str, Any]]) -> str:
    number = sum(run["encoding"] == encoding for run in runs)
    return "chosen" if number == len(runs) else f"chosen for {number} of {len(runs)} runs"


def _sent(runs: list[dict[str, Any]]) -> str:
    """What crosses in all."""
    payload, exact = sum(run["payload_bytes"] for run in runs), all(run["exact"] for run in runs)
    return f"{len(runs)} run{'s' if len(runs) != 1 else ''}, {payload:,} bytes{'' if exact else ' est.'}"


def _others(others: dict[str, Any], package_bytes: int) -> list[str]:
    def told(name: str, count: int, remark: str = "") -> str:
        return f"{name:28} {count:>15,} bytes  {share(count, package_bytes)}{remark}"

    lines = [told("whole file", others["whole_file"])]
    if others["per_machine"] is not None:
        lines.append(told(f"each of {others['machines']} machines", others["per_machine"]))
    if others["rsync_like_estimate"] is None:
        lines.append("rsync-like                   not known: the depot has not both files")
    else:
        lines.append(told("rsync-like", others["rsync_like_estimate"], "  (an estimate)"))
    return lines
