"""A real name server for tests: dnsmasq on a free port of 127.0.0.1, with the records given and no others."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import dns.exception
import dns.message
import dns.query
import pytest

DOMAIN = "example.test"
_START_SECONDS = 10.0
_ANSWER_SECONDS = 0.1
_PORT_TRIES = 5


class FixedNames:
    """Every name leads to these addresses, for a client that looks names up so (`relay.network.names.Names`)."""

    def __init__(self, *addresses: str) -> None:
        self._addresses = addresses

    async def addresses(self, host: str) -> Sequence[str]:
        return self._addresses


@dataclass(frozen=True)
class Srv:
    """One SRV record. An empty `target` is RFC 2782's ".": decidedly not available."""

    name: str
    target: str = ""
    port: int = 0
    priority: int = 0
    weight: int = 0

    def option(self) -> str:
        if not self.target:
            return f"--srv-host={self.name}"
        return f"--srv-host={self.name},{self.target},{self.port},{self.priority},{self.weight}"


class DnsServer:
    """A running dnsmasq. It answers "no such name" below `DOMAIN` and refuses every other question."""

    def __init__(self, program: str, port: int, folder: Path) -> None:
        self.port = port
        self._program = program
        self._log = folder / "log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def resolver(self) -> str:
        """As the configuration wants it."""
        return f"127.0.0.1:{self.port}"

    def serve(
        self, srv: Sequence[Srv] = (), hosts: Mapping[str, Sequence[str]] | None = None, options: Sequence[str] = ()
    ) -> bool:
        """From now on it has these records, and no others; whether it could be started."""
        self.stop()
        records = [*options, *(one.option() for one in srv)]
        records += [f"--host-record={name},{address}" for name, some in (hosts or {}).items() for address in some]
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                [self._program, *_options(self.port), *records],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )
        deadline = time.monotonic() + _START_SECONDS
        while self._process.poll() is None and time.monotonic() < deadline:
            if self.answers():
                return True
            time.sleep(0.02)
        self.stop()
        return False

    def log(self) -> str:
        return self._log.read_text()

    def was_asked(self, kind: str, name: str) -> bool:
        """Whether a question of this kind (`SRV`, `A`, …) really arrived here."""
        return self.times_asked(kind, name) > 0

    def times_asked(self, kind: str, name: str) -> int:
        return self.log().count(f"query[{kind}] {name} from")

    def answers(self) -> bool:
        """Whether anything comes back over UDP."""
        question = dns.message.make_query(DOMAIN, "A")
        try:
            dns.query.udp(question, "127.0.0.1", port=self.port, timeout=_ANSWER_SECONDS)
        except (dns.exception.DNSException, OSError):
            return False
        return True

    def stop(self) -> None:
        """Gone on return. Twice is once."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def dns_server(
    srv: Sequence[Srv] = (), hosts: Mapping[str, Sequence[str]] | None = None, options: Sequence[str] = ()
) -> Iterator[DnsServer]:
    """Start dnsmasq with SRV records, addresses by host name and further options; skip where there is no dnsmasq."""
    program = shutil.which("dnsmasq") or shutil.which("dnsmasq", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        pytest.skip("dnsmasq is not installed: look-ups against a real name server are NOT tested")
    with tempfile.TemporaryDirectory() as folder:
        # Somebody else may take the free port before dnsmasq does: then another is tried.
        for _ in range(_PORT_TRIES):
            server = DnsServer(program, _free_port(), Path(folder))
            if server.serve(srv, hosts, options):
                break
        else:
            raise RuntimeError(f"dnsmasq did not start: {server.log()[-500:]}")
        try:
            yield server
        finally:
            server.stop()


def _options(port: int) -> list[str]:
    return [
        "--no-daemon",  # stays in front, and never changes its user: needs no root
        "--conf-file=/dev/null",
        "--no-resolv",
        "--no-hosts",
        f"--port={port}",
        "--listen-address=127.0.0.1",
        "--bind-interfaces",
        f"--local=/{DOMAIN}/",
        "--log-queries",
        "--log-facility=-",
        "--pid-file=",
    ]


def _free_port() -> int:
    """Free for UDP and for TCP."""
    while True:
        with socket.socket(type=socket.SOCK_STREAM) as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
            tcp.bind(("127.0.0.1", 0))
            port: int = tcp.getsockname()[1]
            try:
                udp.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
