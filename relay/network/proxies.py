"""Which proxy a request takes: HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY, read in one place for every client.

The variables mean what they mean to curl, and NO_PROXY may hold networks as well. A value that cannot be used is refused
under its variable's name, and never shown: it may hold a password.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from urllib.parse import SplitResult, urlsplit

from relay.errors import UnreachableError, UsageError
from relay.support.persistence import seconds_asked

_KIND = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://", re.ASCII)
_HOST = re.compile(r"[0-9A-Za-z_.-]{1,253}", re.ASCII)
_EXEMPTION = re.compile(
    r"\[(?P<bracketed>[^\[\]]+)\](?P<prefix>/[0-9]+)?(:(?P<bracketed_port>[0-9]{1,5}))?"
    r"|(?P<plain>[^:\[\]]+)(:(?P<port>[0-9]{1,5}))?"
    r"|(?P<ipv6>[^\[\]]+)",
    re.ASCII,
)
_VARIABLES = ("http_proxy", "https_proxy", "all_proxy")
_OF_PROXIES = {407, 502, 503, 504}
_DEFAULT_PORT = {"http": 80, "https": 443}


class ProxyError(UnreachableError):
    """A proxy on the way fails, or does not let us through."""


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy, and the variable that names it."""

    url: str = field(repr=False)
    """With its credentials, where it has any."""
    variable: str

    def __str__(self) -> str:
        return f"the proxy {urlsplit(self.url).netloc.rpartition('@')[2]} (of {self.variable})"

    @property
    def host(self) -> str:
        return urlsplit(self.url).hostname or ""

    @property
    def port(self) -> int:
        return urlsplit(self.url).port or _DEFAULT_PORT["http"]

    @contextmanager
    def on_the_way_to(self, target: str) -> Iterator[None]:
        """An error of aiohttp's that is the proxy's own is raised as `ProxyError`; others pass as they are."""
        import aiohttp

        try:
            yield
        except aiohttp.ClientHttpProxyError as error:
            asked = error.headers.get("Retry-After") if error.headers else None
            raise self.answered(error.status, target, seconds_asked(asked)) from error
        # Through a proxy we look no other name up, and connect to nothing else.
        except (aiohttp.ClientProxyConnectionError, aiohttp.ClientConnectorDNSError) as error:
            failed = error.os_error
            # A look-up has words of its own; those of a loop name the address a second time.
            has_words = isinstance(failed, socket.gaierror) or not failed.errno
            reason = (failed.strerror if has_words else os.strerror(failed.errno or 0)) or str(failed)
            raise ProxyError(f"{self} cannot be reached: {reason}", hint=self._hint(target)) from error
        except aiohttp.ConnectionTimeoutError as error:
            raise ProxyError(f"{self} does not answer in time", hint=self._hint(target)) from error

    def answered(self, status: int, target: str, retry_after: float | None = None) -> ProxyError:
        """The proxy answered in place of `target`."""
        if status == 407:
            hint = f"Put them into {self.variable}: http://USER:PASSWORD@HOST:PORT"
            return ProxyError(f"{self} wants credentials, or other ones", hint=hint)
        message = f"{self} answers with status {status} in place of {target}"
        return ProxyError(message, hint=self._hint(target), retry_after=retry_after)

    def _hint(self, target: str) -> str:
        return f"Where {target} is reached without a proxy, name its host in NO_PROXY"


def proxy_of(url: str, environment: Mapping[str, str] = os.environ) -> Proxy | None:
    """The proxy through which `url` (http or https) is asked; None where it is asked without one.

    A mistake in a variable that is meant for other URLs is told as well; a kind of proxy only where it would be used.

    Raises:
        UsageError: a variable cannot be used.
    """
    parts = urlsplit(url)
    given = [named for name in _VARIABLES if (named := _first([name], environment))]
    if not given or _is_exempt(parts, environment):
        return None
    known = {variable: _url_of(variable, text) for variable, text in given if _kind(text) == "http"}
    named = _first([f"{parts.scheme}_proxy", "all_proxy"], environment)
    if named is None:
        return None
    variable, text = named
    if variable not in known:
        raise UsageError(
            f"{variable} names a proxy of the kind {_kind(text)[:20]}://, which is not supported",
            hint="Expected an HTTP proxy: http://HOST:PORT",
        )
    return Proxy(known[variable], variable)


def through(proxy: Proxy | None, target: str) -> AbstractContextManager[None]:
    """As `Proxy.on_the_way_to`; without a proxy every error passes."""
    return proxy.on_the_way_to(target) if proxy else nullcontext()


def check_answer(proxy: Proxy | None, url: str, status: int, target: str, retry_after: float | None) -> None:
    """Raise `ProxyError` for an answer that a proxy gives in place of `target`.

    Outside of a tunnel nothing tells whether a proxy speaks for itself or hands on what it was told: both are its word.
    """
    if proxy is not None and url.startswith("http:") and status in _OF_PROXIES:
        raise proxy.answered(status, target, retry_after)


# --- the variables


def _first(names: Iterable[str], environment: Mapping[str, str]) -> tuple[str, str] | None:
    """The first of these variables that is set, and its value: lower case counts before upper case, as for curl.

    An empty one is set, and means "no proxy".
    """
    for name in names:
        for variable in (name, name.upper()):
            if variable in environment:
                value = environment[variable].strip()
                return (variable, value) if value else None
    return None


def _kind(text: str) -> str:
    found = _KIND.match(text)
    return found[1].lower() if found else "http"


def _url_of(variable: str, text: str) -> str:
    """The HTTP proxy that a variable names. Raises `UsageError`."""
    url = text if _KIND.match(text) else f"http://{text}"
    if not _is_usable(url):
        hint = "Expected http://HOST:PORT or http://USER:PASSWORD@HOST:PORT"
        raise UsageError(f"{variable} is not the URL of a proxy", hint=hint)
    return f"http://{urlsplit(url).netloc}"


def _is_usable(url: str) -> bool:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return False
    host = parts.hostname or ""
    is_place = _HOST.fullmatch(host) if "[" not in parts.netloc else _address(host)
    is_bare = parts.path in {"", "/"} and not parts.query and not parts.fragment
    return bool(url.isprintable() and is_place and port != 0 and is_bare and not parts.netloc.endswith(":"))


# --- where no proxy is used


def _is_exempt(target: SplitResult, environment: Mapping[str, str]) -> bool:
    """Raises `UsageError`."""
    named = _first(("no_proxy",), environment)
    if named is None:
        return False
    variable, text = named
    host = _bare(target.hostname or "")
    port = target.port or _DEFAULT_PORT.get(target.scheme)
    # Every entry is read, so that a mistake is found whatever is asked first.
    matches = [_matches(entry, variable, host, port) for entry in re.split(r"[\s,]+", text) if entry]
    return any(matches)


def _matches(entry: str, variable: str, host: str, port: int | None) -> bool:
    try:
        name, wanted = _parse_exemption(entry)
        return _names(name, host) and wanted in {None, port}
    except ValueError as error:
        raise UsageError(
            f"{variable} has an entry that cannot be read: {entry[:80]!r}",
            hint="Expected a host, a domain, an address or a network (10.0.0.0/8), also with :PORT",
        ) from error


def _parse_exemption(entry: str) -> tuple[str, int | None]:
    """What an entry names, without brackets, and its port. Raises `ValueError`."""
    found = _EXEMPTION.fullmatch(entry)
    if found is None:
        raise ValueError("neither host nor address")
    name = (found["bracketed"] or "") + (found["prefix"] or "") or found["plain"] or found["ipv6"]
    port = int(found["port"] or found["bracketed_port"] or 0) or None
    if port is not None and port > 0xFFFF:
        raise ValueError("no port")
    return name, port


def _names(name: str, host: str) -> bool:
    """Whether `name` is the host, a domain above it, or a network around it. Raises `ValueError`."""
    if "/" in name or ":" in name or _address(name):
        network, address = ip_network(name, strict=False), _address(host)
        return address is not None and (address in network or _mapped(address) in network)
    domain = _bare(name).removeprefix("*.").removeprefix(".")
    return host == domain or host.endswith(f".{domain}") or fnmatchcase(host, domain)


def _bare(host: str) -> str:
    return host.lower().removesuffix(".")


def _address(text: str) -> IPv4Address | IPv6Address | None:
    """An address, seen through the IPv6 form of an IPv4 one; None where `text` is none."""
    try:
        found = ip_address(text.removeprefix("[").removesuffix("]"))
    except ValueError:
        return None
    return (found.ipv4_mapped or found) if isinstance(found, IPv6Address) else found


def _mapped(address: IPv4Address | IPv6Address) -> IPv6Address:
    """The IPv6 form, for networks that are written so (`::ffff:10.0.0.0/104`)."""
    return address if isinstance(address, IPv6Address) else IPv6Address(0xFFFF_0000_0000 | int(address))
