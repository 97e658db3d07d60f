"""What the rotation scripts share: how HAProxy is asked and told, and how its answers are read.

Python's standard library alone, so that the folder works wherever it is copied. HAProxy is spoken to by one of:

- its runtime API (https://docs.haproxy.org/2.6/management.html#9.3): `/run/haproxy/admin.sock` or `10.1.0.5:9999`.
  It knows no password: whoever reaches the socket may do everything.
- its statistics page with `stats admin`: `https://lb.example.net:8404/stats`, with a user and a password.

Both give the same CSV (management.html#9.1), so both are read alike.
"""

from __future__ import annotations

import base64
import csv
import http.client
import os
import re
import socket
import ssl
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol
from urllib.parse import urlencode, urlsplit

ANSWER_SECONDS = 10.0
"""For one question to HAProxy."""
PAUSE_SECONDS = 0.1
"""Between two looks while waiting."""
DONE, FAILED, USAGE = 0, 1, 2

State = Literal["ready", "drain", "maint"]

_NAME = re.compile(r"[A-Za-z0-9_.:-]+", re.ASCII)


class RotationError(Exception):
    """What is wrong and what to do, in one sentence; `code` is the exit code."""

    def __init__(self, sentence: str, code: int = FAILED) -> None:
        super().__init__(sentence)
        self.code = code


@dataclass(frozen=True)
class Server:
    """A line of HAProxy's statistics.

    Attributes:
        status: HAProxy's word: `UP`, `DOWN`, `DRAIN`, `MAINT`, `NOLB`, `no check`. What follows counts: `UP 1/3` is up
            until the next checks say otherwise, `MAINT (via web/web1)` is somebody else's maintenance.
        sessions: requests that it works on, or that wait for it.
        check: what its last health check said.
    """

    status: str
    sessions: int
    check: str

    @property
    def in_service(self) -> bool:
        """It is given requests."""
        return self.status.split(" ")[0] == "UP" or self.status == "no check"


class Road(Protocol):
    """A way to one HAProxy."""

    def statistics(self, backend: str) -> str:
        """The CSV that holds the lines of this backend's servers. Raises `RotationError` or `OSError`."""

    def order(self, backend: str, server: str, state: State) -> None:
        """Set the administrative state. Raises `RotationError` for what HAProxy refuses, or `OSError`."""


@dataclass(frozen=True)
class RuntimeApi:
    """One command, one connection; HAProxy ends it after the answer. Errors come as text, with nothing that marks them."""

    address: str

    def statistics(self, backend: str) -> str:
        answer = self._ask(f"show stat {backend} 4 -1")
        if not answer.startswith("# "):
            raise RotationError(
                f"HAProxy does not tell about backend {backend}, it says {_short(answer)}: check VAR_BACKEND"
            )
        return answer

    def order(self, backend: str, server: str, state: State) -> None:
        answer = self._ask(f"set server {backend}/{server} state {state}")
        if answer.strip():
            raise RotationError(
                f"HAProxy does not set {backend}/{server} to {state}, it says {_short(answer)}: "
                f"check the names, and that {self.address} has 'level admin'"
            )

    def _ask(self, command: str) -> str:
        with self._connect() as connection:
            connection.settimeout(ANSWER_SECONDS)
            connection.sendall(f"{command}\n".encode())
            return b"".join(iter(lambda: connection.recv(1 << 16), b"")).decode(errors="replace")

    def _connect(self) -> socket.socket:
        if not self.address.startswith("/"):
            host, _, port = self.address.rpartition(":")
            return socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(ANSWER_SECONDS)
            connection.connect(self.address)
        except BaseException:
            connection.close()
            raise
        return connection


@dataclass(frozen=True)
class StatsPage:
    """The page behind `stats enable` and `stats admin`; it answers an order by where it redirects to."""

    url: str
    user: str
    password: str
    ca_file: str

    def statistics(self, backend: str) -> str:  # noqa: ARG002 - the page gives all of them
        status, _, body = self._ask("GET", ";csv")
        if status != http.HTTPStatus.OK or not body.startswith("# "):
            raise RotationError(f"{self.url} answers {status} and no statistics: VAR_HAPROXY must name the 'stats uri'")
        return body

    def order(self, backend: str, server: str, state: State) -> None:
        form = urlencode({"b": backend, "s": server, "action": state})
        status, location, _ = self._ask("POST", "", form)
        if not location.endswith(";st=DONE"):
            told = location.rpartition("st=")[2] or str(status)
            raise RotationError(
                f"HAProxy does not set {backend}/{server} to {state}, it says {told}: "
                "check the names, and that the statistics page has 'stats admin' for this user"
            )

    def _ask(self, method: str, suffix: str, form: str | None = None) -> tuple[int, str, str]:
        # http.client and not urllib: no proxy of the environment may see the password, and redirects are answers.
        url = urlsplit(self.url)
        connection = self._connection(url.hostname or "", url.port, secure=url.scheme == "https")
        try:
            credentials = base64.b64encode(f"{self.user}:{self.password}".encode()).decode()
            headers = {"Authorization": f"Basic {credentials}", "Connection": "close"}
            if form is not None:
                headers["Content-Type"] = "application/x-www-form-urlencoded"
            connection.request(method, f"{url.path or '/'}{suffix}", body=form, headers=headers)
            answer = connection.getresponse()
            body = answer.read().decode(errors="replace")
        except http.client.HTTPException as error:
            raise RotationError(
                f"{self.url} does not speak HTTP as HAProxy does ({error!r}): check VAR_HAPROXY"
            ) from None
        finally:
            connection.close()
        if answer.status in {http.HTTPStatus.UNAUTHORIZED, http.HTTPStatus.FORBIDDEN}:
            raise RotationError(f"HAProxy refuses user {self.user} at {self.url}: check the secret lb_token")
        return answer.status, answer.getheader("Location", ""), body

    def _connection(self, host: str, port: int | None, *, secure: bool) -> http.client.HTTPConnection:
        if not secure:
            return http.client.HTTPConnection(host, port, timeout=ANSWER_SECONDS)
        context = ssl.create_default_context(cafile=self.ca_file or None)
        return http.client.HTTPSConnection(host, port, timeout=ANSWER_SECONDS, context=context)


@dataclass(frozen=True)
class Balancer:
    """One HAProxy, and one server of it."""

    name: str
    road: Road
    backend: str
    server: str

    def look(self) -> Server:
        """What HAProxy says of the server now. Raises `RotationError`."""
        text = self._told(lambda: self.road.statistics(self.backend))
        for row in csv.DictReader(text.removeprefix("# ").splitlines()):
            if row.get("pxname") == self.backend and row.get("svname") == self.server:
                return Server(
                    status=row["status"],
                    sessions=int(row["scur"] or 0) + int(row["qcur"] or 0),
                    check=row.get("check_desc") or row.get("check_status") or "no check",
                )
        raise RotationError(
            f"HAProxy at {self.name} knows no server {self.server} in backend {self.backend}: "
            "VAR_BACKEND is the backend's name there, and the machine is called as its server line calls it"
        )

    def order(self, state: State) -> None:
        """Tell HAProxy. Raises `RotationError`."""
        self._told(lambda: self.road.order(self.backend, self.server, state))

    def _told(self, ask: Callable[[], str | None]) -> str:
        try:
            return ask() or ""
        except OSError as error:
            reason = error.strerror or str(error) or type(error).__name__
            raise RotationError(
                f"HAProxy cannot be reached at {self.name} ({reason}): check VAR_HAPROXY, and that this user may use it"
            ) from None


@dataclass(frozen=True)
class Settings:
    """What the environment of a script says; see README.md for the names."""

    server: str
    balancers: tuple[Balancer, ...]
    out_state: State
    drain_seconds: float
    up_seconds: float
    outcome: str


def settings(environment: Mapping[str, str]) -> Settings:
    """Read the variables that a rotation script sees. Raises `RotationError`, with the exit code for usage."""
    server, backend = (_name(environment, key) for key in ("MACHINE", "VAR_BACKEND"))
    addresses = [text.strip() for text in environment.get("VAR_HAPROXY", "").split(",") if text.strip()]
    if not addresses:
        raise RotationError("VAR_HAPROXY is not set: set the variable haproxy in the environment file", USAGE)
    out_state = environment.get("VAR_HAPROXY_OUT", "drain")
    if out_state not in {"drain", "maint"}:
        raise RotationError(f"VAR_HAPROXY_OUT is {out_state!r}: expected drain or maint", USAGE)
    return Settings(
        server=server,
        balancers=tuple(Balancer(text, _road(text, environment), backend, server) for text in addresses),
        out_state="maint" if out_state == "maint" else "drain",
        drain_seconds=_seconds(environment, "VAR_DRAIN_SECONDS"),
        up_seconds=_seconds(environment, "VAR_UP_SECONDS"),
        outcome=environment.get("OUTCOME", ""),
    )


def _road(address: str, environment: Mapping[str, str]) -> Road:
    if address.startswith(("http://", "https://")):
        password = environment.get("SECRET_LB_TOKEN", "")
        if not password:
            raise RotationError(
                "SECRET_LB_TOKEN is not set: the statistics page wants a password, so the rotation needs "
                "'secrets: [lb_token]'",
                USAGE,
            )
        user = environment.get("VAR_HAPROXY_USER", "waystation")
        return StatsPage(address, user, password, environment.get("VAR_HAPROXY_CA_FILE", ""))
    if address.startswith("/") or re.fullmatch(r".+:[0-9]{1,5}", address):
        return RuntimeApi(address)
    raise RotationError(
        f"VAR_HAPROXY holds {address!r}: expected the absolute path of a socket, HOST:PORT, or the URL of the "
        "statistics page",
        USAGE,
    )


def _name(environment: Mapping[str, str], key: str) -> str:
    """A name for HAProxy's command line, where ';' and spaces would end it."""
    text = environment.get(key, "")
    if not _NAME.fullmatch(text):
        raise RotationError(f"{key} is {text!r}: expected a name of HAProxy, of letters, digits and _ . : -", USAGE)
    return text


def _seconds(environment: Mapping[str, str], key: str) -> float:
    text = environment.get(key, "60")
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]+)?", text):
        raise RotationError(f"{key} is {text!r}: expected seconds", USAGE)
    return float(text)


def wait(balancer: Balancer, seconds: float, is_there: Callable[[Server], bool]) -> tuple[Server, bool]:
    """Look until it is there or the time is over; returns what HAProxy said last, and whether it is there."""
    deadline = time.monotonic() + seconds
    while True:
        seen = balancer.look()
        if is_there(seen):
            return seen, True
        if time.monotonic() >= deadline:
            return seen, False
        time.sleep(PAUSE_SECONDS)


def run(script: Callable[[Settings], int], otherwise: int | None = None) -> int:
    """The exit code of `script`; what goes wrong is one sentence on standard error, and the code `otherwise`."""
    try:
        return script(settings(os.environ))
    except RotationError as error:
        print(error, file=sys.stderr)
        return error.code if otherwise is None else otherwise
    except Exception as error:  # Nothing may end with a code that means something else.
        print(f"This script failed, report it with what HAProxy answers: {error!r}", file=sys.stderr)
        return FAILED if otherwise is None else otherwise


def _short(answer: str) -> str:
    return repr(" ".join(answer.split())[:120])
