"""A small network laboratory: places with lines between them, real down to the packet. Linux, root.

Each place is a network namespace with one address. Each line is a pair of TUN devices, one in either namespace, and
`benchmarks.lines.forwarder` carries packets between them after the line's latency; a token bucket (tbf) in front of each
device gives the rate. Kernels of small machines often lack netem, the usual source of latency; TUN and tbf they have.
TCP, its windows, slow start and queues are the kernel's own. Segmentation offload is kept where the rate allows it, so
that 1 Gbit/s costs the forwarder some 2,000 reads a second and not 80,000.

Where no namespaces can be had, `benchmarks.lines.network.CountingProxy` shapes payload without root; callers choose.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import Path
from typing import Self

from benchmarks.lines.network import Line
from relay.protocol.credentials import PLAIN_HTTP

_PREFIX = "waystation"
_OURS = re.compile(rf"{_PREFIX}-(\d+)-\d+-[A-Za-z0-9-]+", re.ASCII)
_PLACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,30}", re.ASCII)
_NETWORK = ip_network("10.99.0.0/16")
_MTU = 1500
_BURST_SECONDS = 0.002
_QUEUE_SECONDS = 0.05
_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
_serials = itertools.count(1)

# include/uapi/linux/if_tun.h
_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
_TUN_F_CSUM, _TUN_F_TSO4 = 0x01, 0x02


class LaboratoryError(RuntimeError):
    """It cannot be built here, or a command in it failed."""


@dataclass(frozen=True, slots=True)
class Link:
    """A line between two places.

    Attributes:
        near: one place.
        far: the other.
        line: its rate in bytes of IP packets a second, and its latency in seconds, each way. Its window is not used:
            here TCP has its own.
    """

    near: str
    far: str
    line: Line

    def other(self, place: str) -> str:
        return self.far if place == self.near else self.near


# --- shapes


def star(sites: int, line: Line) -> tuple[Link, ...]:
    """`origin`, with a line of its own to each of `site1`, `site2`, …"""
    return tuple(Link("origin", f"site{n}", line) for n in range(1, sites + 1))


def chain(sites: int, line: Line) -> tuple[Link, ...]:
    """`origin` to `site1` to `site2` …"""
    return tree(sites, line, 1)


def tree(sites: int, line: Line, fan_out: int = 2) -> tuple[Link, ...]:
    """`origin` to `fan_out` sites, each of them to as many more, filled row by row."""
    names = ["origin", *(f"site{n}" for n in range(1, sites + 1))]
    return tuple(Link(names[(n - 1) // fan_out], names[n], line) for n in range(1, sites + 1))


def next_hops(links: Sequence[Link]) -> Mapping[str, Mapping[str, int]]:
    """For each place and each other one, the number of the link that leads there.

    Raises:
        ValueError: the links are no tree, or a name cannot be a place's.
    """
    places = sorted({place for link in links for place in (link.near, link.far)})
    for name in places:
        if not _PLACE.fullmatch(name):
            raise ValueError(f"{name!r} is no name of a place")
    if not links or len(places) != len(links) + 1:
        raise ValueError("the links are no tree")
    hops: dict[str, dict[str, int]] = {place: {} for place in places}
    for start in places:
        reached, fresh = {start}, [start]
        while fresh:
            here = fresh.pop()
            for number, link in enumerate(links):
                if here in (link.near, link.far) and (there := link.other(here)) not in reached:
                    reached.add(there)
                    fresh.append(there)
                    hops[start][there] = number if here == start else hops[start][here]
        if len(reached) != len(places):
            raise ValueError("the links are no tree")
    return hops


def tbf_words(rate: float) -> str:
    """The qdisc for `rate` bytes a second: a bucket of 2 ms and at least two packets, and a queue of 50 ms behind it.

    A larger bucket would let small transfers pass at no cost; a smaller queue would starve one TCP connection.
    """
    burst = max(2 * _MTU + 200, int(rate * _BURST_SECONDS))
    queue = max(16 * _MTU, int(rate * _QUEUE_SECONDS))
    return f"tbf rate {int(rate * 8)}bit burst {burst}b limit {burst + queue}b"


# --- the laboratory


class Laboratory:
    """Places and lines, as long as the context lasts. Programs that still run in it are ended with it.

    Attributes:
        links: its lines; they are a tree, and every place reaches every other through it.
        places: the names of its places.
    """

    def __init__(self, links: Line | Sequence[Link]) -> None:
        """Plan it: one `Line` stands for `chain(1, line)`. Raises `ValueError`: the links are no tree."""
        self.links = chain(1, links) if isinstance(links, Line) else tuple(links)
        self._hops = next_hops(self.links)
        self.places = tuple(self._hops)
        self._label = f"{_PREFIX}-{os.getpid()}-{next(_serials)}"
        self._stack = contextlib.ExitStack()

    @staticmethod
    def why_not() -> str:
        """Why none can be built here, empty if one can. It tries."""
        if sys.platform != "linux":
            return "network namespaces are Linux's"
        if missing := [name for name in ("ip", "tc", "sysctl") if shutil.which(name, path=_PATH) is None]:
            return f"{' and '.join(missing)} missing: install the packages iproute2 and procps"
        if os.geteuid() != 0:
            return "only root may make network namespaces"
        trial = f"{_PREFIX}-{os.getpid()}-0-trial"
        try:
            _command("ip", "netns", "add", trial)
            try:
                _command("tc", "-n", trial, "qdisc", "add", "dev", "lo", "root", *tbf_words(1e6).split())
                os.close(_open_tun()[0])
            finally:
                _command("ip", "netns", "del", trial)
        except (LaboratoryError, OSError) as error:
            return f"this system lacks namespaces, token buckets (tbf) or TUN devices: {error}"
        return ""

    def __enter__(self) -> Self:
        """Build it; what dead processes left behind is removed first.

        Raises:
            LaboratoryError: it cannot be built here.
        """
        if reason := self.why_not():
            raise LaboratoryError(reason)
        with contextlib.ExitStack() as stack:
            remove_leftovers()
            for place in self.places:
                _command("ip", "netns", "add", self.namespace(place))
                stack.callback(_remove, self.namespace(place))
            self._lay_lines(stack)
            for place in self.places:
                self._furnish(place)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def namespace(self, place: str) -> str:
        """Its name, for `ip -n` and `tc -n`."""
        return f"{self._label}-{place}"

    def address(self, place: str) -> str:
        """Its IPv4 address, which every place reaches, and no program outside."""
        index = self.places.index(place) + 1
        return str(_NETWORK[index])

    def inside(self, place: str) -> list[str]:
        """What stands before the words of a command to run it there."""
        # No program outside can listen there, so tokens may go over plain http.
        return [_program("ip"), "netns", "exec", self.namespace(place), "env", f"{PLAIN_HTTP}={_NETWORK}"]

    def passed(self, place: str, to: str) -> int:
        """Bytes of IP packets, with all headers, that have left `place` by the line that leads to `to`."""
        device = _device(self._hops[place][to])
        text = _command("tc", "-n", self.namespace(place), "-s", "-j", "qdisc", "show", "dev", device)
        (found,) = [one for one in json.loads(text) if one.get("root")]
        return int(found["bytes"])

    # --- building it

    def _lay_lines(self, stack: contextlib.ExitStack) -> None:
        """Make both ends of every line, move them into their places, and start what carries packets between them."""
        ways: list[str] = []
        with contextlib.ExitStack() as ours:  # The forwarder has its own copies of the descriptors.
            descriptors: list[int] = []
            for number, link in enumerate(self.links):
                ends = {}
                for place in (link.near, link.far):
                    ends[place], name = _open_tun()
                    ours.callback(os.close, ends[place])
                    _command("ip", *f"link set dev {name} name {_device(number)} netns {self.namespace(place)}".split())
                ways += [f"{link.line.latency}:{end}:{ends[link.other(place)]}" for place, end in ends.items()]
                descriptors += ends.values()
            words = [sys.executable, "-m", "benchmarks.lines.forwarder", *ways]
            process = subprocess.Popen(words, stdin=subprocess.PIPE, pass_fds=descriptors, cwd=_ROOT)
        # It ends with its standard input.
        stack.callback(process.communicate)

    def _furnish(self, place: str) -> None:
        """Its address, its routes, and the rates of what leaves it."""
        name, own, hops = self.namespace(place), self.address(place), self._hops[place]
        _command(*self.inside(place), _program("sysctl"), "-eqw", *_SYSCTLS)
        devices = sorted({_device(number) for number in hops.values()})
        words = ["link set lo up", f"addr add {own}/32 dev lo"]
        words += [f"link set {device} up mtu {_MTU} txqueuelen 10000" for device in devices]
        words += [f"route add {self.address(to)}/32 dev {_device(hops[to])} src {own}" for to in hops]
        _command("ip", "-n", name, "-batch", "-", text="\n".join(words))
        for number in sorted(set(hops.values())):
            rate = self.links[number].line.rate
            qdisc = "pfifo limit 10000" if rate is None else tbf_words(rate)
            _command("tc", "-n", name, *f"qdisc add dev {_device(number)} root {qdisc}".split())


_ROOT = str(Path(__file__).resolve().parents[2])
_SYSCTLS = (
    "net.ipv4.ip_forward=1",
    # Otherwise the kernel's own questions for routers are counted with the bytes of the line.
    "net.ipv6.conf.all.disable_ipv6=1",
    "net.ipv6.conf.default.disable_ipv6=1",
)


def _device(number: int) -> str:
    """A line's name, the same at both of its ends."""
    return f"line{number}"


def _open_tun() -> tuple[int, str]:
    """A new TUN device in this process's namespace: its descriptor, with which it goes, and its name.

    Packets keep their virtio_net_hdr, so that unfinished checksums and unsegmented TCP pass to the other end as they
    are. Raises `OSError`.
    """
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    try:
        request = struct.pack("16sH22x", b"wayst%d", _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR)
        made = fcntl.ioctl(tun, _TUNSETIFF, request)
        fcntl.ioctl(tun, _TUNSETOFFLOAD, _TUN_F_CSUM | _TUN_F_TSO4)
    except OSError:
        os.close(tun)
        raise
    return tun, made[:16].rstrip(b"\0").decode()


# --- leaving nothing behind


def leftovers(namespaces: Iterable[str], lives: Iterable[int]) -> list[str]:
    """Those of `namespaces` that a laboratory made whose process is not among the pids in `lives`."""
    living = set(lives)
    return [name for name in namespaces if (made := _OURS.fullmatch(name)) and int(made[1]) not in living]


def remove_leftovers() -> None:
    """Remove the laboratories of processes that died, and end what runs in them."""
    # `ip netns list` prints an id behind a name.
    names = [line.split()[0] for line in _command("ip", "netns", "list").splitlines() if line.strip()]
    lives = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
    for name in leftovers(names, lives):
        _remove(name)


def _remove(namespace: str) -> None:
    """A namespace lives on without its name while a program runs in it: those are killed first."""
    for _ in range(100):
        pids = _command("ip", "netns", "pids", namespace).split()
        if not pids:
            break
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.02)
    _command("ip", "netns", "del", namespace)


# --- commands


def _program(name: str) -> str:
    return shutil.which(name, path=_PATH) or name


def _command(name: str, *words: str, text: str = "") -> str:
    """Run a command that makes the laboratory. Raises `LaboratoryError`: it failed; with what it said."""
    done = subprocess.run([_program(name), *words], input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LaboratoryError(f"{name} {' '.join(words)} failed: {done.stderr.strip()}")
    return done.stdout
