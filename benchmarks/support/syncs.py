"""What a turn costs in fsyncs and in requests: counted by strace in the processes of a real deployment.

Run: python -m benchmarks.support.syncs [--agents N] [--steps 6]   (needs strace)
The farm is that of `benchmarks.rollout`. Only what falls between the beginning and the end of the steps is counted, and
told per machine: so also what an agent does beside its turn, such as to poll again.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from agent.orders.operation_id import OperationId
from benchmarks.support.farm import Deployed, Farm, chosen, deploy, farm
from benchmarks.support.report import add_folder, parser
from orchestrator.journal import events

STRACE = ("strace", "-f", "-ttt", "-y", "-s", "200", "-e", "trace=fsync,fdatasync,read,recvfrom")
_SYNC = re.compile(r"(?:\d+ +)?([\d.]+) (?:fsync|fdatasync)\(\d+<([^>]*)>")
_REQUEST = re.compile(r'(?:\d+ +)?([\d.]+) (?:read|recvfrom)\(.*?"(GET|POST|PUT|DELETE) (/[^ ?]*)')
_WORDS = (
    (r".*/letters\.db-wal", "mail (letters.db-wal)"),
    (r".*/journal\.db(-wal)?", "journal (journal.db-wal)"),
    (r".*/orders/.*\.json\..*tmp", "the order's file"),
    (r".*/orders", "the order's folder"),
    (r".*/operations", "folder of operations"),
    (r".*/operations/[0-9a-f]+", "the operation's folder"),
    (r".*/operations/[0-9a-f]+/(order|report)\..*", r"the operation's \1"),
    (r".*/(run-1|runs/[^/]*)", "the run's folder"),
    (r".*/(run-1|runs/[^/]*)/exit\.json\..*", "the run's exit.json"),
    (r".*/(run-1|runs/[^/]*)/(begun|output)", r"the run's \2"),
    (r".*/runs", "folder of runs"),
)


def main() -> None:
    """Count and print."""
    command = parser("syncs", __doc__)
    command.add_argument("--agents", type=int, default=10)
    command.add_argument("--steps", type=chosen, default=chosen("6"), help="by number, as in benchmarks.rollout")
    add_folder(command)
    options = command.parse_args()
    for kind in options.steps:
        with (
            tempfile.TemporaryDirectory(prefix="waystation-bench-", dir=options.folder) as folder,
            farm(folder, options.agents, (kind,)) as made,
        ):
            logs = {name: os.path.join(folder, f"{name}.strace") for name in ("relay", "agents", "command")}
            with traced(made, logs):
                deployed = deploy(made, behind=(*STRACE, "-o", logs["command"]))
            print(f"\n{kind.name}, window {kind.window or 'all'}; per machine, mean of {options.agents}")
            tell(made, deployed, logs)


@contextmanager
def traced(made: Farm, logs: dict[str, str]) -> Iterator[None]:
    """Relay and agents are traced, with what they start."""
    with ExitStack() as stack:
        for name, pid in (("relay", made.relay.pid), ("agents", made.agents)):
            words = [*STRACE, "-o", logs[name], "-p", str(pid)]
            tracer = stack.enter_context(subprocess.Popen(words, stderr=subprocess.PIPE))
            stack.callback(tracer.terminate)
            while not os.path.exists(logs[name]):
                if tracer.poll() is not None:
                    sys.exit("strace may not look at processes here")
                time.sleep(0.05)
        yield


def tell(made: Farm, deployed: Deployed, logs: dict[str, str]) -> None:
    """Fsyncs by process and file, then requests that the relay read, then the journal's entries by kind."""
    entries = [
        entry
        for entry in deployed.entries
        if isinstance(entry.event, events.StepStarted | events.StepEnded) or _is_of_step(entry.event)
    ]
    first, last = entries[0].at, entries[-1].at
    machines = len(made.machines)
    for name, log in logs.items():
        syncs = Counter(_words(path) for path in _found(log, _SYNC, first, last))
        print(f"  {name}: {syncs.total() / machines:.1f} fsyncs")
        for words, count in syncs.most_common():
            print(f"    {count / machines:6.1f}  {words}")
    requests = Counter(_route(method_path) for method_path in _found(logs["relay"], _REQUEST, first, last))
    print(f"  requests to the relay: {requests.total() / machines:.1f}")
    for words, count in requests.most_common():
        print(f"    {count / machines:6.1f}  {words}")
    kinds = Counter(entry.event.kind() for entry in entries)
    moments = len({entry.at for entry in entries})
    print(f"  journal: {len(entries) / machines:.1f} entries in {moments / machines:.1f} commits")
    print(f"    {', '.join(f'{kind} {count / machines:.1f}' for kind, count in kinds.most_common())}")


def _is_of_step(event: events.Event) -> bool:
    operation = getattr(event, "operation", "")
    if operation:
        return OperationId.parse(operation).step > 0
    return bool(getattr(event, "step", 0)) or isinstance(event, events.BracketOpened | events.BracketClosed)


def _found(log: str, pattern: re.Pattern[str], first: float, last: float) -> Iterator[str]:
    with open(log, encoding="utf-8", errors="replace") as file:
        for line in file:
            match = pattern.match(line)
            if match and first <= float(match[1]) <= last:
                yield " ".join(match.groups()[1:])


def _words(path: str) -> str:
    for pattern, words in _WORDS:
        if match := re.fullmatch(pattern, path.removesuffix(" (deleted)")):
            return match.expand(words)
    return re.sub(r"[0-9a-f]{16,}|\d+", "*", os.path.join(*Path(path).parts[-2:]))


def _route(request: str) -> str:
    return re.sub(r"/(agents|deployments|reports|logs)/[^/]+", r"/\1/…", request)


if __name__ == "__main__":
    main()
