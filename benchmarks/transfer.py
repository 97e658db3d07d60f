"""How long a package takes over a line, by encoding: the real command sends it to a real relay, again and again.

A relay keeps what it gets, and a version never changes: sent twice, the second time says nothing. So the far end is a
relay process of its own for each transfer, whose store was put back to what it held before, and the sender is put back
to what it remembered of the line after the first package that it ever sent over it: the predecessor, or where there is
none, the package itself. What is measured is the work of `package replicate` from its first question until the relay,
which has verified every chunk, lists the package; Python's own start is not in it.

The line is one of the network laboratory where that can be built, TCP and all; else a proxy with the same rate and
latency, which has no slow start. Encodings take turns, so that a machine whose speed drifts is fair to all.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from benchmarks.line import LineReport
from benchmarks.lines import network
from benchmarks.lines.laboratory import Laboratory, star
from benchmarks.support.conclusion import Conclusion, Outcome, of_transfer
from benchmarks.support.programs import WAYSTATION, Served, add, free_ports, make_tokens, relay, run, waystation
from orchestrator.files.values import bytes_per_second, seconds
from relay.encoding.codecs import Coding
from relay.encoding.planner import Prefer
from relay.errors import UsageError
from relay.package.identity import PackageRef
from relay.protocol.messages import EncodedBytes
from relay.support.console import share, table
from relay.support.console import size as bytes_of

PLANNED = "planned"
"""Stands where an encoding would: what is sent without `--encoding`."""
ENCODINGS = ("raw", "zstd:3", "zstd:9", "zstd:19", "zstd-prefix", "hdiff")
WITHIN = 1.10
"""What is planned may take so many times the best of what can be forced …"""
DIFFER = 1.20
"""… wherever the slowest of those takes more than so many times the fastest."""
HOPELESS = 3.0
"""What would take more than so many times the best on the line alone is not tried."""
SIDE_BY_SIDE = 30.0
"""Seconds on the line from which on repeats run beside each other, each over a line and with relays of its own."""
PORT = 7400
_TCP = 1500 / 1448
"""Bytes of IP packets for each byte of payload."""

_RATE_MIN, _RATE_MAX = 1e3, 12.5e9
LINE_SECONDS = 10.0
"""For measuring the line to a relay."""

Tell = Callable[[str], None]


class Shape(msgspec.Struct, frozen=True):
    """A line: bytes of IP packets a second, and its round trip in seconds."""

    rate: float
    round_trip: float

    @property
    def line(self) -> network.Line:
        return network.Line(rate=self.rate, latency=self.round_trip / 2)

    def __str__(self) -> str:
        return f"{self.rate * 8 / 1e6:,.4g} Mbit/s, round trip {1000 * self.round_trip:.3g} ms"

    @classmethod
    def like(cls, report: LineReport) -> Shape:
        """A line over which TCP moves as much to the relay as over the one that was measured."""
        found = [cell.goodput.median for cell in report.cells if cell.direction == "up" and cell.goodput]
        return cls(min(max(found) * _TCP, _RATE_MAX), report.round_trip.median)


def parse_shape(text: str) -> Shape:
    """`10,50`: Mbit/s, and milliseconds of round trip; or with units, `800kbit,50ms`. Raises `UsageError`."""
    rate, _, trip = text.partition(",")
    with suppress(ValueError):
        is_named = rate.endswith("bit"), trip.endswith("s")
        shape = Shape(
            bytes_per_second(rate) if is_named[0] else float(rate) * 1e6 / 8,
            seconds(trip) if is_named[1] else float(trip) / 1000,
        )
        if _RATE_MIN <= shape.rate <= _RATE_MAX and 0 <= shape.round_trip <= 10:
            return shape
    raise UsageError(
        f"{text[:40]!r} is no line", hint="Expected Mbit/s and milliseconds of round trip: 10,50 or 10Mbit,50ms"
    )


def parse_encodings(text: str) -> tuple[str, ...]:
    """`all`, or encodings as `package replicate --encoding` takes them, with commas between. Raises `UsageError`."""
    if text == "all":
        return ENCODINGS
    names = tuple(dict.fromkeys(word.strip() for word in text.split(",")))
    for name in names:
        Coding.parse(name)
    return names


# --- results; pure


class Trial(msgspec.Struct, frozen=True):
    """One transfer. `wire_bytes`: in both directions, of HTTP in all."""

    seconds: float
    payload_bytes: int
    wire_bytes: int
    encodings: tuple[EncodedBytes, ...]


class Tried(msgspec.Struct, frozen=True):
    """One encoding over one line.

    Attributes:
        encoding: its name, or `PLANNED`.
        trials: in the order in which they were made; none where it was hopeless.
        at_least: seconds that its bytes would take on the line alone, where it was hopeless.
    """

    encoding: str
    trials: tuple[Trial, ...] = ()
    at_least: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(trial.seconds for trial in self.trials)

    @property
    def payload(self) -> int:
        """Bytes, the median."""
        return int(statistics.median(trial.payload_bytes for trial in self.trials))

    @property
    def used(self) -> str:
        """The encodings that were used, by their bytes."""
        names = [one.encoding for one in sorted(self.trials[0].encodings, key=lambda one: -one.payload_bytes)]
        return " + ".join(names) or "nothing"


Verdict = Literal["within", "alike", "BEYOND"]


class Case(msgspec.Struct, frozen=True):
    """One package over one line, in every encoding. `base`: the version that the relay held, or empty."""

    id: str
    version: str
    base: str
    nupkg_bytes: int
    shape: Shape
    rows: tuple[Tried, ...]

    @property
    def planned(self) -> Tried:
        return next(row for row in self.rows if row.encoding == PLANNED)

    @property
    def forced(self) -> list[Tried]:
        """All that were tried, the fastest first."""
        return sorted((row for row in self.rows if row.encoding != PLANNED and row.trials), key=lambda row: row.median)

    @property
    def best(self) -> Tried:
        """The fastest of them; what is planned, where none was worth trying."""
        return next(iter(self.forced), self.planned)

    @property
    def slowest(self) -> float:
        """Seconds of the slowest alternative, or that it would take at least."""
        forced = [row for row in self.rows if row.encoding != PLANNED]
        return max((row.median if row.trials else row.at_least or 0.0 for row in forced), default=0.0)

    @property
    def share(self) -> float:
        """What is planned takes so many times the best."""
        return self.planned.median / self.best.median

    @property
    def verdict(self) -> Verdict:
        if self.share <= WITHIN:
            return "within"
        return "BEYOND" if self.slowest > DIFFER * self.best.median else "alike"


def conclusion_of(case: Case, url: str = "https://relay.example:7443") -> Conclusion:
    """What follows for the relay at `url`, at the end of such a line."""
    tried = [
        Outcome(row.encoding if row.encoding != PLANNED else f"planned ({row.used})", row.median, row.payload)
        for row in (case.planned, *case.forced)
    ]
    return of_transfer(url, case.shape.rate / _TCP, tried[0], tried[1:])


def document_of(case: Case) -> dict[str, Any]:
    """One case for programs."""
    rows = [
        msgspec.to_builtins(row)
        | {"seconds": row.median if row.trials else None, "used": row.used if row.trials else None}
        for row in case.rows
    ]
    head: dict[str, Any] = msgspec.to_builtins(case)
    return head | {"rows": rows, "best": case.best.encoding, "share": case.share, "verdict": case.verdict}


def text_of(case: Case) -> str:
    """One case for people."""
    best = case.best.median
    rows = []
    for row in case.rows:
        if not row.trials:
            rows.append([row.encoding, "", "", "", f"> {row.at_least:.0f}", "not tried", "", ""])
            continue
        seconds = [trial.seconds for trial in row.trials]
        payload = row.payload
        spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
        times = f"{row.median / best:.2f}"
        rows.append(
            [
                row.encoding,
                row.used,
                f"{payload:,}",
                share(payload, case.nupkg_bytes, 2),
                f"{row.median:.2f}",
                spread,
                times,
                "",
            ]
        )
        if row.encoding == PLANNED:
            rows[-1][-1] = case.verdict
    headers = ["encoding", "used", "payload", "of the nupkg", "seconds", "", "of the best", ""]
    held = f"the relay holds {case.base}" if case.base else "the relay holds nothing of it"
    head = f"{case.id} {case.version}, {bytes_of(case.nupkg_bytes)}; {held}; {case.shape}"
    return f"{head}\n{table(headers, rows, right=frozenset({2, 3, 4, 6}))}"


# --- ends of lines


@dataclass(frozen=True, slots=True)
class Place:
    """Where a relay runs, and where its sender: words before their commands, and where the relay listens."""

    near: tuple[str, ...]
    far: tuple[str, ...]
    listen: str
    url: str
    """For the sender, over the line."""


@contextmanager
def places(shape: Shape, count: int = 1) -> Iterator[list[Place]]:
    """The far ends of `count` lines of their own from this machine."""
    with ExitStack() as stack:
        if Laboratory.why_not():
            yield [_behind_proxy(stack, shape) for _ in range(count)]
        else:
            lab = stack.enter_context(Laboratory(star(count, shape.line)))
            yield [_in(lab, "origin", f"site{number + 1}") for number in range(count)]


def how() -> str:
    """In words, what lines are made of here."""
    reason = Laboratory.why_not()
    return f"a shaped proxy, as {reason}" if reason else "network namespaces"


def _in(lab: Laboratory, near: str, far: str) -> Place:
    listen = f"{lab.address(far)}:{PORT}"
    return Place(tuple(lab.inside(near)), tuple(lab.inside(far)), listen, f"http://{listen}")


def _behind_proxy(stack: ExitStack, shape: Shape) -> Place:
    [port] = free_ports(1)
    proxy = stack.enter_context(network.ThreadedProxy("127.0.0.1", port, up=shape.line, down=shape.line))
    return Place((), (), f"127.0.0.1:{port}", f"http://127.0.0.1:{proxy.port}")


class Lane:
    """One line, a relay at its far end and a sender at the near one, which every transfer finds as the first did."""

    def __init__(
        self, folder: str, place: Place, origin: str, *, is_known: bool = True, prefer: Prefer = "bytes"
    ) -> None:
        """Work in `folder`, which is empty, with the keys and packages of the home `origin`.

        `is_known`: the sender remembers the line; else each transfer is the first over a new one. `prefer`: of encodings
        that are about as fast.
        """
        self.place = place
        self._prefer = prefer
        self._is_known = is_known
        self._folder = folder
        self._home = os.path.join(folder, "home")
        self._store = os.path.join(folder, "store")
        self._held = os.path.join(folder, "held")
        self._remembered = os.path.join(folder, "remembered")
        self._config = os.path.join(folder, "relay.yaml")
        copy(origin, self._home)
        shutil.rmtree(self._state, ignore_errors=True)
        tokens = make_tokens(self._config, {"sender": ("write",)})
        self._token = Path(tokens["sender"]).read_text(encoding="ascii")

    @property
    def _state(self) -> str:
        return os.path.join(self._home, "depot", "state")

    def warm(self, package: PackageRef) -> Trial:
        """Send the first package over this line: from it the sender learns, and `send` can find it held."""
        shutil.rmtree(self._store, ignore_errors=True)
        with self.relay():
            trial = self._replicate(package, PLANNED)
        os.rename(self._store, self._held)
        copy(self._state, self._remembered)
        return trial

    def send(self, package: PackageRef, encoding: str = PLANNED, *, is_held: bool) -> Trial:
        """One transfer. `is_held`: the relay holds what was sent first; else nothing."""
        self._put_back(is_held)
        with self.relay():
            return self._replicate(package, encoding)

    def expected(self, package: PackageRef, *, is_held: bool) -> Mapping[str, int]:
        """Bytes of payload by encoding, as the sender reckons (`zstd-prefix` and `hdiff` at their own levels)."""
        self._put_back(is_held)
        with self.relay():
            told = self._run(*_replicate_words(package, self.place.url), "--dry-run")
        return {row["encoding"]: row["payload_bytes"] for row in told["relays"][0]["explained"]["rows"]}

    def tree_seconds(self, package: PackageRef, times: int) -> list[float]:
        """How long a machine beside the relay takes from there to a verified, durable tree, after the last `send`."""
        found = []
        with self.relay():
            for number in range(times):
                home, root = (os.path.join(self._folder, f"{name}{number}") for name in ("agent", "root"))
                pins = os.path.join(self._home, "trust", "trust.json")
                url = f"http://{self.place.listen}"
                self._run("agent", "init", "--home", home, "--relay", url, "--trust", pins, is_far=True)
                words = ("--root", root, "--home", home, "--relay", url)
                done = self._run("agent", "pull", *_names(package), *words, is_far=True)
                found.append(float(done["seconds"]))
                shutil.rmtree(home)
                shutil.rmtree(root)
        return found

    def relay(self) -> AbstractContextManager[Served]:
        """Its relay, as long as the context lasts."""
        return relay(self._store, "--config", self._config, before=self.place.far, listen=self.place.listen)

    def _put_back(self, is_held: bool) -> None:  # noqa: FBT001 - a fact
        for path in (self._store, self._state):
            shutil.rmtree(path, ignore_errors=True)
        if self._is_known:
            copy(self._remembered, self._state)
        if is_held:
            copy(self._held, self._store)
        else:
            # That it was sent is remembered where the relay has it.
            shutil.rmtree(os.path.join(self._state, "sent"), ignore_errors=True)
        os.sync()

    def _replicate(self, package: PackageRef, encoding: str) -> Trial:
        words = ("--prefer", self._prefer) if encoding == PLANNED else ("--encoding", encoding)
        told = self._run(*_replicate_words(package, self.place.url), *words)
        return msgspec.convert(told["relays"][0], Trial)

    def _run(self, *words: str, is_far: bool = False) -> Any:  # noqa: ANN401 - a JSON document
        before = self.place.far if is_far else self.place.near
        return waystation(*words, home=self._home, before=before, token=self._token)[1]


def _names(package: PackageRef) -> tuple[str, str]:
    return str(package.id), str(package.version)


def _replicate_words(package: PackageRef, url: str) -> tuple[str, ...]:
    return ("package", "replicate", *_names(package), "--relay", url)


def copy(source: str, target: str) -> None:
    """A folder of a store or a home. Files of chunks never change, and are linked."""

    def put(here: str, there: str) -> None:
        if f"{os.sep}chunks{os.sep}" in here:
            os.link(here, there)
        else:
            shutil.copy2(here, there)

    shutil.copytree(source, target, copy_function=put)


def at_once(lanes: Sequence[Lane], send: Callable[[Lane], Trial]) -> list[Trial]:
    """One transfer over each lane, beside each other."""
    with ThreadPoolExecutor(len(lanes)) as pool:
        return list(pool.map(send, lanes))


# --- one case


def hopeless(expected: int, shape: Shape, best: float | None) -> float | None:
    """Seconds that `expected` bytes take on the line, where that alone is far beyond the best so far; else None."""
    at_least = expected / shape.rate
    return at_least if best is not None and at_least > HOPELESS * best else None


def measure(
    lanes: Sequence[Lane],
    package: PackageRef,
    shape: Shape,
    *,
    base: PackageRef | None,
    encodings: Sequence[str],
    repeat: int,
    nupkg_bytes: int,
    tell: Tell = lambda _: None,
) -> Case:
    """Send `package` in every one of `encodings`, and as it is planned, `repeat` times each.

    `base` is what the lanes were warmed with, where the relay is to hold it; else the relay is empty.
    """
    is_held = base is not None
    # Without a base there are no differences.
    encodings = [name for name in encodings if is_held or not Coding.parse(name).needs_bases]
    expected = lanes[0].expected(package, is_held=is_held)
    trials: dict[str, list[Trial]] = {name: [] for name in (PLANNED, *encodings)}
    at_least: dict[str, float] = {}

    def send(name: str, count: int) -> None:
        found = at_once(lanes[:count], lambda lane: lane.send(package, name, is_held=is_held))
        trials[name] += found
        tell(f"{name}: {', '.join(f'{one.seconds:.2f} s' for one in found)}")

    # The least bytes first: so the hopeless are known before they are waited for.
    for name in sorted(trials, key=lambda name: expected.get(_full(name), 0)):
        done = [statistics.median(one.seconds for one in of) for of in trials.values() if of]
        if name != PLANNED and (long := hopeless(expected.get(_full(name), 0), shape, min(done, default=None))):
            at_least[name] = long
            tell(f"{name}: not tried, {long:.0f} s on the line alone")
            continue
        slow = expected.get(_full(name), min(expected.values())) / shape.rate > SIDE_BY_SIDE
        send(name, min(len(lanes), repeat) if slow else 1)
    while more := [name for name, of in trials.items() if of and len(of) < repeat]:
        for name in more:
            send(name, 1)
    rows = tuple(Tried(name, tuple(of), at_least.get(name)) for name, of in trials.items())
    return Case(str(package.id), str(package.version), str(base.version) if base else "", nupkg_bytes, shape, rows)


def _full(name: str) -> str:
    """With its level, as plans name it."""
    return name if name == PLANNED else str(Coding.parse(name))


class Wanted(msgspec.Struct, frozen=True):
    """What `bench transfer` was asked for.

    Attributes:
        names: a file, or an id and a version of the depot.
        base: a file, or a version of the depot; None: the far end holds nothing.
    """

    names: tuple[str, ...]
    base: str | None
    depot: str | None
    encodings: tuple[str, ...]
    repeat: int
    prefer: Prefer = "bytes"


def bench_transfer(wanted: Wanted, shape: Shape, tell: Tell = lambda _: None) -> Case:
    """Everything of `bench transfer`, in a temporary folder.

    Raises:
        UsageError: names that cannot be, or a base of another package.
        RuntimeError: a command failed; with what it said.
    """
    if wanted.base is None and all(Coding.parse(name).needs_bases for name in wanted.encodings):
        raise UsageError(
            f"{', '.join(wanted.encodings)}: nothing to build on", hint="Give what the far end holds: --base"
        )
    with tempfile.TemporaryDirectory(prefix="waystation-transfer-") as folder:
        files = _files(wanted, folder)
        home, work = os.path.join(folder, "origin"), os.path.join(folder, "lane")
        added = add(home, *files)
        package, size = added[-1]
        base = added[0][0] if wanted.base is not None else None
        if base is not None and (base.id != package.id or base == package):
            raise UsageError(f"{base} is no other version of {package.id}")
        os.mkdir(work)
        with places(shape) as [place]:
            lane = Lane(work, place, home, prefer=wanted.prefer)
            first = lane.warm(base or package)
            tell(f"{base or package}, sent first: {first.seconds:.2f} s")
            return measure(
                *([lane], package, shape),
                base=base,
                encodings=wanted.encodings,
                repeat=wanted.repeat,
                nupkg_bytes=size,
                tell=tell,
            )


def _files(wanted: Wanted, folder: str) -> list[str]:
    """The nupkgs, the base first; those of the depot are fetched from there."""
    base = [wanted.base] if wanted.base else []
    match wanted.names:
        case (file,):
            names = [*base, file]
            if missing := [name for name in names if not os.path.isfile(name)]:
                raise UsageError(f"{missing[0]!r} is no file")
            return [os.path.abspath(name) for name in names]
        case (id, version):
            depot = ("--depot", wanted.depot) if wanted.depot else ()
            versions = [*base, version]
            targets = [os.path.join(folder, f"{number}.nupkg") for number in range(len(versions))]
            for each, target in zip(versions, targets, strict=True):
                run([WAYSTATION, "package", "fetch", id, each, "--output", target, *depot])
            return targets
    raise UsageError("name one FILE, or ID VERSION of the depot")
