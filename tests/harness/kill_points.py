"""A command that kills itself at a named point: right before or right after it writes to its journal, or sends or starts
something.

`kill_at` says how to start it (`harness/process.py`, as Python in place of the command). There, and only there, every
durable write of the journal and every dispatch is wrapped; the product knows nothing of it. A point is named by what is
done (`append turn_started 3/web1`), with `before` or `after`, so that the same point is found in another deployment. A
commit of several events is one point with several names: which events share a commit differs between deployments. What may
happen any number of times, like looks at a balancer, is a point the first time alone.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from agent.orders.operation_id import OperationId
    from orchestrator.journal.events import Event

PASSED, AT, COUNT = "KILL_POINTS_PASSED", "KILL_POINTS_AT", "KILL_POINTS_COUNT"
CODE = "from harness.kill_points import serve; serve()"
_BETWEEN: Final = "\t"

Point = tuple[str, ...]
"""All its names."""


def kill_at(passed: Path, *points: str, count: int = 0) -> dict[str, Any]:
    """How to start a process that kills itself at the first point that it comes to with one of these names, or at the point
    of this `count`, where it is not 0.

    All that it comes to are written into the file `passed`, in order, one a line.
    """
    return {"code": CODE, PASSED: str(passed), AT: json.dumps(points), COUNT: str(count)}


def passed_in(path: Path) -> list[Point]:
    """The points that a process came to; the last is the one at which it died, where it died at one."""
    return [tuple(line.split(_BETWEEN)) for line in path.read_text().splitlines()] if path.exists() else []


def serve() -> None:
    """In the process: wrap what there is to wrap, and be the command."""
    from relay.main import main

    points = _Points(Path(os.environ.pop(PASSED)), json.loads(os.environ.pop(AT)), int(os.environ.pop(COUNT)))
    _wrap_journal(points)
    _wrap_dispatches(points)
    main()


class _Points:
    def __init__(self, passed: Path, deadly: Iterable[str], count: int) -> None:
        self._deadly = frozenset(deadly)
        self._left = count
        self._lock = threading.Lock()
        self._seen: Counter[str] = Counter()
        self._file = os.open(passed, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def come_to(self, when: str, *what: str, again: bool = False) -> None:
        """Where it may come `again`, each time is a point of its own."""
        with self._lock:
            names = [self._named(f"{when} {each}") for each in what]
            if not again and names != [f"{when} {each}" for each in what]:
                return
            os.write(self._file, f"{_BETWEEN.join(names)}\n".encode())
            self._left -= 1
            if self._left == 0 or not self._deadly.isdisjoint(names):
                os.kill(os.getpid(), signal.SIGKILL)

    def _named(self, name: str) -> str:
        self._seen[name] += 1
        return name if self._seen[name] == 1 else f"{name} #{self._seen[name]}"

    def around(
        self, name: Callable[..., Iterable[str]], function: Callable[..., Any], *, again: bool = False
    ) -> Callable[..., Any]:
        """The function, with a point before and one after it."""

        @wraps(function)
        def wrapped(*given: Any, **more: Any) -> Any:
            what = tuple(name(*given, **more))
            self.come_to("before", *what, again=again)
            result = function(*given, **more)
            self.come_to("after", *what, again=again)
            return result

        return wrapped


def _wrap_journal(points: _Points) -> None:
    from orchestrator.journal.journal import Journal

    def event(given: Event) -> str:
        return f"append {_event(given)}"

    names: dict[str, Callable[..., Iterable[str]]] = {
        "append": lambda _self, _deployment, *given, **_more: map(event, given) if given else ["append"],
        "keep_order": lambda _self, _deployment, operation, _envelope: [f"keep_order {operation.partition('/')[2]}"],
        "begin": lambda *_given, **_more: ["begin"],
        "set_state": lambda _self, _deployment, state, _reason="", *given: [f"set_state {state}", *map(event, given)],
        "take_up": lambda _self, _deployment, _fence, _operator, *given, **_more: ["take_up", *map(event, given)],
        "take_decision": lambda *_given: ["take_decision"],
        "claim": lambda *_given: ["claim"],
    }
    for method, name in names.items():
        setattr(Journal, method, points.around(name, getattr(Journal, method), again=True))


def _event(event: Event) -> str:
    """Its kind and what it is about; nothing that another run would have otherwise."""
    from agent.orders.operation_id import OperationId

    operation = getattr(event, "operation", "")
    step, machine = getattr(event, "step", None), getattr(event, "machine", "")
    names = {"relay", "package", "name", "ask", "do", "rotation"}
    about = [str(getattr(event, name)) for name in sorted(names) if getattr(event, name, "")]
    where = f"{step}/{machine}" if step is not None else machine
    if operation:
        where = _operation(OperationId.parse(operation))
    return " ".join(word for word in (event.kind(), where, *about) if word)


def _operation(operation: OperationId) -> str:
    return f"{operation.step}/{operation.who}/{operation.action}/{operation.attempt}"


def _wrap_dispatches(points: _Points) -> None:
    from agent.orders.operation_id import OperationId
    from agent.runs import runs
    from orchestrator.fleet.relay_mail import Mailroom

    def letter_of(letter: Any) -> str:
        return _operation(OperationId.parse(letter.operation))

    def folder_of(folder: str, *_given: object) -> Point:
        parts = Path(folder).parts
        name = "/".join(parts[parts.index("runs") + 1 :])
        if "~probe~" in name:
            # There are as many as it takes.
            name = name.rpartition("~")[0]
        return (f"launch {name}",)

    post, post_one = Mailroom.post, Mailroom._post

    @wraps(post)
    def wrapped_post(room: Mailroom, relays: Iterable[str], letter: Any) -> Any:
        points.come_to("before", f"post {letter_of(letter)}")
        return post(room, relays, letter)

    @wraps(post_one)
    def wrapped_one(room: Mailroom, relay: str, letter: Any) -> Awaitable[str]:
        return _then_come_to(points, f"post {letter_of(letter)}", post_one(room, relay, letter))

    Mailroom.post = wrapped_post  # type: ignore[method-assign]
    Mailroom._post = wrapped_one  # type: ignore[method-assign,assignment]
    runs.launch = points.around(folder_of, runs.launch)


async def _then_come_to(points: _Points, what: str, posting: Awaitable[str]) -> str:
    """The first relay that has a letter makes it a dispatch."""
    refused = await posting
    if not refused:
        points.come_to("after", what)
    return refused
