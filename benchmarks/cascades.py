"""Cascades over thin lines: what leaves the origin, and when the last site has it.

Run: python -m benchmarks.cascades [--rate MBIT] [--round-trip MS] [--repeat N] [--only SHAPE]… [--json]

Sites hang on each other by lines of their own in the network laboratory: one site alone, a chain of four, and a tree of
eight (one root below the origin, two sites below each). Each has a relay process that may fetch from those above it (`peers:`). `package replicate --environment` sends the AspNetCore runtime 10.0.13 to all of them, who hold nothing, then
10.0.14. No line was ever used before the first send; by the second, everybody remembers theirs, as in real use.

What leaves the origin is counted on its line, in bytes of IP packets, with all that it says to sites further away. What is
promised: it is at most 1.05 times that for one site; and for the first send, the last site has it within 1.3 times the
time of one hop. The next version's time is told. At last a relay in the middle of a chain of four is killed when a quarter
of the package has left the origin: all others get it all the same.

The exit status is 1 where a promise did not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import signal
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import msgspec
import yaml

from benchmarks.lines.laboratory import Laboratory, Link, chain
from benchmarks.lines.network import Line
from benchmarks.support.programs import WAYSTATION, run
from benchmarks.support.workload import real_package
from benchmarks.transfer import Shape, Tell, add, copy, run_json, serving
from relay.package.identity import PackageRef
from relay.support.console import print_json, table

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
_PORT = 7400


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


class Check(msgspec.Struct, frozen=True):
    """One promise: what was seen, and the most that it may be."""

    what: str
    seen: float
    most: float

    @property
    def held(self) -> bool:
        return self.seen <= self.most


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
    """Relay processes at all places but the origin, and the origin's home."""

    def __init__(self, lab: Laboratory, folder: str, origin: str) -> None:
        """Work in `folder`, which is empty, with the keys and packages of the home `origin`."""
        self._lab = lab
        self._folder = folder
        self._home = os.path.join(folder, "home")
        self._above = above(lab.links)
        self.pids: dict[str, int] = {}
        copy(origin, self._home)
        shutil.rmtree(os.path.join(self._home, "depot", "state"), ignore_errors=True)
        self._environment = os.path.join(folder, "country.yaml")
        relays = {site: self._configure(site) for site in self._above}
        with open(self._environment, "w", encoding="utf-8") as file:
            yaml.safe_dump({"environment": "country", "relays": relays}, file)

    def _url(self, site: str) -> str:
        return f"http://{self._lab.address(site)}:{_PORT}"

    def _token(self, site: str) -> str:
        return os.path.join(self._folder, f"{site}.token")

    def _configure(self, site: str) -> dict[str, object]:
        """Write what the relay there needs; what the environment says of it."""
        config = os.path.join(self._folder, f"{site}.yaml")
        made = run([WAYSTATION, "relay", "token", "write", "--config", config], home=self._home).output
        with open(os.open(self._token(site), os.O_WRONLY | os.O_CREAT, 0o600), "w", encoding="ascii") as file:
            file.write(made)
        entry: dict[str, object] = {"url": self._url(site), "token": {"file": self._token(site)}, "generic": True}
        if ways := upstreams(self._above, site):
            peers = [{"url": self._url(one), "token": {"file": self._token(one)}} for one in ways]
            with open(config, "a", encoding="utf-8") as file:
                yaml.safe_dump({"peers": peers}, file)
            entry["from"] = ways[0]
        return entry

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """All relays, as long as the context lasts."""
        async with AsyncExitStack() as stack:
            for site in self._above:
                store, config = (os.path.join(self._folder, f"{site}.{kind}") for kind in ("store", "yaml"))
                listen = f"{self._lab.address(site)}:{_PORT}"
                words = self._lab.inside(site)
                self.pids[site] = await stack.enter_async_context(serving(words, listen, store, config))
            yield

    async def egress(self) -> int:
        return (await self._lab.passed("origin", "site1")).bytes

    async def send(self, package: PackageRef) -> Send:
        """To all of them, by the real command."""
        before = await self.egress()
        words = ("package", "replicate", str(package.id), str(package.version), "--environment", self._environment)
        told = await run_json(
            [*self._lab.inside("origin"), WAYSTATION, *words, "--json"],
            os.environ | {"WAYSTATION_HOME": self._home},
            codes=(0, 1),
        )
        return Send(
            egress=await self.egress() - before,
            seconds={one["name"]: one["seconds"] for one in told["relays"]},
            sources={one["name"]: one["source"] for one in told["relays"]},
            failed={one.get("name") or one["relay"]: one["error"] for one in told["failed"]},
            replans=tuple(str(one) for one in told.get("replans", ())),
        )


async def travel(
    shape: str, links: Sequence[Link], folder: str, origin: str, packages: Sequence[PackageRef], tell: Tell
) -> Course:
    """One run over one shape, with fresh relays that hold nothing."""
    async with Laboratory(links) as lab:
        country = await asyncio.to_thread(Country, lab, folder, origin)
        async with country.open():
            sends = []
            for package in packages:
                send = await country.send(package)
                if send.failed:
                    raise RuntimeError(f"{shape}: {send.failed}")
                sends.append(send)
                tell(f"{shape}, {package}: {send.egress:,} bytes left the origin, last site after {send.last:.2f} s")
    return Course(shape, *sends)


async def lose_one(links: Sequence[Link], folder: str, origin: str, package: PackageRef, size: int, tell: Tell) -> Send:
    """A chain of four whose second relay is killed on the way."""
    async with Laboratory(links) as lab:
        country = await asyncio.to_thread(Country, lab, folder, origin)
        async with country.open():
            sending = asyncio.create_task(country.send(package))
            while await country.egress() < KILLED_AT * size and not sending.done():
                await asyncio.sleep(0.1)
            if sending.done():
                raise RuntimeError("the package was there before a relay could be killed")
            os.kill(country.pids["site2"], signal.SIGKILL)
            tell(f"site2 was killed after {await country.egress():,} bytes")
            return await sending


def text_of(courses: Sequence[Course], checks: Sequence[Check]) -> str:
    """Everything but the killed relay, for people."""
    rows = [
        [one.shape, name, f"{send.egress:,}", f"{min(send.seconds.values()):.2f}", f"{send.last:.2f}"]
        for one in courses
        for name, send in (("first", one.first), ("next", one.next))
    ]
    shown = table(["shape", "send", "left the origin", "first site", "last site"], rows, right=frozenset({2, 3, 4}))
    lines = [f"{'held  ' if one.held else 'BROKEN'}  {one.what}: {one.seen:.3f} of {one.most}" for one in checks]
    return "\n".join([shown, "", *lines])


def text_of_loss(send: Send) -> str:
    """What became of the others."""
    lines = ["chain of 4, site2 killed on the way:"]
    lines += [
        f"  {site}: from {send.sources[site] or 'the origin'}, {send.seconds[site]:.2f} s" for site in send.seconds
    ]
    lines += [f"  {site} failed: {why}" for site, why in send.failed.items()]
    lines += [f"  {one}" for one in send.replans]
    return "\n".join([*lines, f"  {send.egress:,} bytes left the origin"])


async def measure(options: argparse.Namespace, folder: str, tell: Tell) -> bool:
    """All of it, printed; whether every promise held."""
    paths = [path for name in FILES if (path := real_package(name))]
    if len(paths) != len(FILES):
        sys.exit("the packages of the shared data do not lie beside the project")
    home = os.path.join(folder, "origin")
    added = await asyncio.to_thread(add, home, *paths)
    packages = [package for package, _ in added]
    line = Shape(options.rate * 1e6 / 8, options.round_trip / 1000).line
    wanted = {name: links for name, links in shapes(line).items() if not options.only or name in options.only}
    courses = []
    for number in range(options.repeat):
        for name, links in wanted.items():
            work = _made(folder, f"{name}-{number}".replace(" ", "-"))
            courses.append(await travel(name, links, work, home, packages, tell))
            shutil.rmtree(work)
    checks = judge(courses)
    loss = None
    if not options.only or "loss" in options.only:
        loss = await lose_one(chain(4, line), _made(folder, "loss"), home, packages[0], added[0][1], tell)
        # The killed one is told as failed, and nobody else.
        survived = set(loss.seconds) == {"site1", "site3", "site4"} and len(loss.failed) == 1
        checks.append(Check("chain of 4, one killed: relays lost beside it", 0.0 if survived else 1.0, 0.0))
    if options.as_json:
        told = [msgspec.to_builtins(one) | {"held": one.held} for one in checks]
        print_json(
            {"format": 1, "courses": msgspec.to_builtins(courses), "loss": msgspec.to_builtins(loss), "checks": told}
        )
    else:
        print(text_of(courses, checks))
        if loss is not None:
            print(text_of_loss(loss))
    return all(one.held for one in checks)


def _made(*path: str) -> str:
    folder = os.path.join(*path)
    os.mkdir(folder)
    return folder


def main() -> int:
    """Measure, print, and judge: the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cascades", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rate", type=float, default=10.0, metavar="MBIT")
    parser.add_argument("--round-trip", type=float, default=50.0, metavar="MS")
    parser.add_argument("--repeat", type=int, default=3, metavar="N")
    parser.add_argument(
        "--only", action="append", default=[], metavar="SHAPE", help="one site, chain of 4, tree of 8, loss"
    )
    parser.add_argument("--json", action="store_true", dest="as_json")
    options = parser.parse_args()
    if reason := Laboratory.why_not():
        sys.exit(reason)
    with tempfile.TemporaryDirectory(prefix="waystation-cascades-") as folder:
        tell: Tell = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731 - as short as can be
        return 0 if asyncio.run(measure(options, folder, tell)) else 1


if __name__ == "__main__":
    sys.exit(main())
