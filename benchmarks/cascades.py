"""Cascades over thin lines: what leaves the origin, and when the last site has it.

Run: python -m benchmarks.cascades [--rate MBIT] [--round-trip MS] [--repeat N] [--only SHAPE]… [--json]

Sites hang on each other by lines of their own in the network laboratory: one site alone, a chain of four, and a tree of
eight (one root below the origin, two sites below each). Each has a relay process that may fetch from those above it (`peers:`). `package replicate
--environment` sends the AspNetCore runtime 10.0.13 to all of them, which hold nothing, then 10.0.14. No line was ever used
before the first send; by the second, every sender remembers its lines, as in real use.

What leaves the origin is counted on its line, in bytes of IP packets, with all that it says to sites further away. What is
promised: it is at most 1.05 times that for one site; and for the first send, the last site has it within 1.3 times the
time of one hop. The next version's time is told. At last a relay in the middle of a chain of four is killed when a quarter
of the package has left the origin: all others get it all the same.

The exit status is 1 where a promise did not hold.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec
import yaml

from benchmarks.lines.laboratory import Laboratory, Link, chain
from benchmarks.lines.network import Line
from benchmarks.support.programs import add, make_tokens, relay, waystation
from benchmarks.support.report import Check, add_json, documents, parser, show, tell
from benchmarks.support.workload import real_package
from benchmarks.transfer import PORT, Shape, copy
from relay.package.identity import PackageRef
from relay.support.console import table

FILES = (
    "microsoft.aspnetcore.app.runtime.linux-x64.10.0.13.nupkg",
    "microsoft.aspnetcore.app.runtime.linux-x64.10.0.14.nupkg",
)
EGRESS_SHARE = 1.05
"""The origin's uplink may carry so many times what it carries for one site."""
HOP_SHARE = 1.3
"""The last site may have a first send after so many times the time of one hop."""
KILLED_AT = 0.25
"""Share of the package that has left the origin when a relay is killed."""


class Send(msgspec.Struct, frozen=True):
    """One package to all sites of a shape.

    Attributes:
        egress: bytes of IP packets that left the origin.
        seconds: of each site, from the start until its relay lists the package; by name.
        sources: where each got the last of it; empty: from the origin.
        failed: relays that did not get it, and why.
        replans: in words.
    """

    egress: int
    seconds: Mapping[str, float]
    sources: Mapping[str, str]
    failed: Mapping[str, str]
    replans: tuple[str, ...] = ()

    @property
    def last(self) -> float:
        return max(self.seconds.values())


class Course(msgspec.Struct, frozen=True):
    """What one run over one shape measured: the first send, then the next version."""

    shape: str
    first: Send
    next: Send


# --- shapes


def rooted(sites: int, line: Line) -> tuple[Link, ...]:
    """`origin` to `site1`, two sites below that, and two below each of those."""
    return (Link("origin", "site1", line), *(Link(f"site{n // 2}", f"site{n}", line) for n in range(2, sites + 1)))


def shapes(line: Line) -> dict[str, tuple[Link, ...]]:
    """The first is the hop that the others are held to."""
    return {"one site": chain(1, line), "chain of 4": chain(4, line), "tree of 8": rooted(8, line)}


def above(links: Sequence[Link]) -> dict[str, str]:
    """For each site the place that it hangs on."""
    return {link.far: link.near for link in links}


def upstreams(above: Mapping[str, str], site: str) -> list[str]:
    """The site above this one, then the one above that: all that it may have to fetch from."""
    found = []
    while (site := above[site]) != "origin":
        found.append(site)
    return found


def judge(courses: Sequence[Course]) -> list[Check]:
    """Medians against those of one site. Pure; empty where one site alone was not measured."""
    alone = [one for one in courses if one.shape == "one site"]
    checks = []
    for shape in dict.fromkeys(one.shape for one in courses if alone and one.shape != "one site"):
        these = [one for one in courses if one.shape == shape]
        for name in ("first", "next"):
            most = statistics.median(getattr(one, name).egress for one in alone)
            seen = statistics.median(getattr(one, name).egress for one in these)
            checks.append(Check(f"{shape}, {name}: egress against one site", seen / most, EGRESS_SHARE))
        hop = statistics.median(one.first.last for one in alone)
        last = statistics.median(one.first.last for one in these)
        checks.append(Check(f"{shape}, first: last site against one hop", last / hop, HOP_SHARE))
    return checks


# --- the country


class Country:
    """Relays in their places, and an environment that names them, each with those above it to fetch from."""

    def __init__(self, lab: Laboratory, folder: str, origin: str) -> None:
        """Work in `folder`, which is empty, with a copy of the home `origin`."""
        self.pids: dict[str, int] = {}
        self._lab = lab
        self._folder = folder
        self._above = above(lab.links)
        self._home = os.path.join(folder, "home")
        copy(origin, self._home)
        self._environment = os.path.join(folder, "environment.yaml")
        relays = {site: self._furnish(site) for site in self._above}
        Path(self._environment).write_text(
            yaml.safe_dump({"environment": "cascade", "relays": relays}), encoding="ascii"
        )

    def _config(self, site: str) -> str:
        return os.path.join(self._folder, f"{site}.yaml")

    def _listen(self, site: str) -> str:
        return f"{self._lab.address(site)}:{PORT}"

    def _entry(self, site: str) -> dict[str, object]:
        return {"url": f"http://{self._listen(site)}", "token": {"file": f"{self._config(site)}.all.token"}}

    def _furnish(self, site: str) -> dict[str, object]:
        """Its relay's configuration; what the environment says of it."""
        ways = upstreams(self._above, site)
        peers = {"peers": [self._entry(one) for one in ways]} if ways else {}
        make_tokens(self._config(site), {"all": ("write",)}, **peers)
        return self._entry(site) | {"generic": True} | ({"from": ways[0]} if ways else {})

    @contextmanager
    def open(self) -> Iterator[None]:
        """All relays, as long as the context lasts."""
        with ExitStack() as stack:
            for site in self._above:
                store, config = os.path.join(self._folder, f"{site}.store"), self._config(site)
                serving = relay(store, "--config", config, before=self._lab.inside(site), listen=self._listen(site))
                self.pids[site] = stack.enter_context(serving).pid
            yield

    def egress(self) -> int:
        return self._lab.passed("origin", "site1")

    def send(self, package: PackageRef) -> Send:
        """To all of them, by the real command."""
        before = self.egress()
        words = ("package", "replicate", str(package.id), str(package.version), "--environment", self._environment)
        _, told = waystation(*words, home=self._home, before=self._lab.inside("origin"), codes=(0, 1))
        return Send(
            egress=self.egress() - before,
            seconds={one["name"]: one["seconds"] for one in told["relays"]},
            sources={one["name"]: one["source"] for one in told["relays"]},
            failed={one.get("name") or one["relay"]: one["error"] for one in told["failed"]},
            replans=tuple(str(one) for one in told.get("replans", ())),
        )


@contextmanager
def country(links: Sequence[Link], folder: str, origin: str) -> Iterator[Country]:
    """Fresh relays that hold nothing, and run."""
    os.mkdir(folder)
    with Laboratory(links) as lab:
        made = Country(lab, folder, origin)
        with made.open():
            yield made
    shutil.rmtree(folder)


def travel(shape: str, links: Sequence[Link], folder: str, origin: str, packages: Sequence[PackageRef]) -> Course:
    """One run over one shape."""
    sends = []
    with country(links, folder, origin) as made:
        for package in packages:
            send = made.send(package)
            if send.failed:
                raise RuntimeError(f"{shape}: {send.failed}")
            sends.append(send)
            tell(f"{shape}, {package}: {send.egress:,} bytes left the origin, last site after {send.last:.2f} s")
    return Course(shape, *sends)


def lose_one(links: Sequence[Link], folder: str, origin: str, package: PackageRef, size: int) -> Send:
    """A chain of four whose second relay is killed on the way."""
    with country(links, folder, origin) as made, ThreadPoolExecutor(1) as pool:
        sending = pool.submit(made.send, package)
        while made.egress() < KILLED_AT * size and not sending.done():
            time.sleep(0.1)
        if sending.done():
            raise RuntimeError("the package was there before a relay could be killed")
        os.kill(made.pids["site2"], signal.SIGKILL)
        tell(f"site2 was killed after {made.egress():,} bytes")
        return sending.result()


def text_of(courses: Sequence[Course], checks: Sequence[Check], loss: Send | None) -> str:
    """Everything for people."""
    rows = [
        [one.shape, name, f"{send.egress:,}", f"{min(send.seconds.values()):.2f}", f"{send.last:.2f}"]
        for one in courses
        for name, send in (("first", one.first), ("next", one.next))
    ]
    shown = table(["shape", "send", "left the origin", "first site", "last site"], rows, right=frozenset({2, 3, 4}))
    return "\n".join([shown, "", *map(str, checks), *(_text_of_loss(loss) if loss else [])])


def _text_of_loss(send: Send) -> list[str]:
    """What became of the others."""
    return [
        "chain of 4, site2 killed on the way:",
        *(f"  {site}: from {send.sources[site] or 'the origin'}, {send.seconds[site]:.2f} s" for site in send.seconds),
        *(f"  {site} failed: {why}" for site, why in send.failed.items()),
        *(f"  {one}" for one in send.replans),
        f"  {send.egress:,} bytes left the origin",
    ]


def measure(options: argparse.Namespace, folder: str) -> bool:
    """All of it, printed; whether every promise held."""
    paths = [path for name in FILES if (path := real_package(name))]
    if len(paths) != len(FILES):
        sys.exit("the packages of the shared data do not lie beside the project")
    home = os.path.join(folder, "origin")
    added = add(home, *paths)
    packages = [package for package, _ in added]
    line = Shape(options.rate * 1e6 / 8, options.round_trip / 1000).line
    courses = [
        travel(name, links, os.path.join(folder, "course"), home, packages)
        for _ in range(options.repeat)
        for name, links in shapes(line).items()
        if not options.only or name in options.only
    ]
    checks, loss = judge(courses), None
    if not options.only or "loss" in options.only:
        loss = lose_one(chain(4, line), os.path.join(folder, "loss"), home, packages[0], added[0][1])
        # The killed one is named as failed, and no other.
        survived = set(loss.seconds) == {"site1", "site3", "site4"} and len(loss.failed) == 1
        checks.append(Check("chain of 4, one killed: relays lost beside it", 0.0 if survived else 1.0, 0.0))
    document = {"format": 1, "courses": courses, "loss": loss, "checks": documents(checks)}
    show(text_of(courses, checks, loss), document, as_json=options.as_json)
    return all(one.held for one in checks)


def main() -> int:
    """Measure, print, and judge: the exit status."""
    command = parser("cascades", __doc__)
    command.add_argument("--rate", type=float, default=10.0, metavar="MBIT")
    command.add_argument("--round-trip", type=float, default=50.0, metavar="MS")
    command.add_argument("--repeat", type=int, default=3, metavar="N")
    command.add_argument(
        "--only", action="append", default=[], metavar="SHAPE", help="one site, chain of 4, tree of 8, loss"
    )
    add_json(command)
    options = command.parse_args()
    if reason := Laboratory.why_not():
        sys.exit(reason)
    with tempfile.TemporaryDirectory(prefix="waystation-cascades-") as folder:
        return 0 if measure(options, folder) else 1


if __name__ == "__main__":
    sys.exit(main())
