"""A relay that ends TLS itself, as a process on its usual loop, with an authority that only tests know."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trustme
from harness.packages import make_nupkg, noise
from harness.process import Done, run
from harness.proxy import forward_proxy
from harness.relays import RelayProcess

ID = "Acme.Web"


@dataclass(frozen=True)
class Secured:
    """An origin's home and a relay that speaks TLS; where the authority behind its certificate is, and another one."""

    home: Path
    relay: RelayProcess
    ca: Path
    other_ca: Path

    @property
    def plain_url(self) -> str:
        return self.relay.url.replace("https://", "http://")

    def replicate(self, version: str, url: str, *more: object) -> Done:
        return run(self.home, "package", "replicate", ID, version, "--relay", url, "--patience", "0.2", *more)

    def held(self) -> list[str]:
        done = run(self.home, "relay", "status", "--relay", self.relay.url, "--ca-file", self.ca, "--json")
        return [entry["version"] for entry in done.json["packages"]]


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("origin")
    assert run(folder, "trust", "init").code == 0
    files = {"lib/web.dll": noise("web", 1_000_000)}
    nupkgs = [make_nupkg(folder, files, version=version) for version in ("1.0.0", "2.0.0")]
    assert run(folder, "package", "add", *nupkgs).code == 0
    return folder


@pytest.fixture(scope="module")
def secured(origin: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("secured")
    authority, other = trustme.CA(), trustme.CA()
    issued = authority.issue_cert("127.0.0.1", "localhost")
    issued.private_key_pem.write_to_path(str(folder / "relay.key"))
    for number, pem in enumerate(issued.cert_chain_pems):
        pem.write_to_path(str(folder / "relay.crt"), append=number > 0)
    for made, name in ((authority, "ca.pem"), (other, "other.pem")):
        made.cert_pem.write_to_path(str(folder / name))
    config = folder / "relay.yaml"
    config.write_text(
        f"listen: 127.0.0.1:0\ntls:\n  certificate: {folder / 'relay.crt'}\n  key: {folder / 'relay.key'}\n"
    )
    with RelayProcess(folder / "relay", "--config", config) as relay:
        yield Secured(origin, relay, folder / "ca.pem", folder / "other.pem")


def agent(secured: Secured, tmp_path: Path, url: str, ca: Path | None) -> Path:
    """A machine's home whose agent.yaml names the relay and, where there is one, the authority."""
    home = tmp_path / "machine"
    done = run(home, "agent", "init", "--trust", secured.home / "trust/trust.json", "--relay", url)
    assert done.code == 0, done.err
    if ca is not None:
        with (home / "agent/agent.yaml").open("a") as file:
            file.write(f"ca_file: {ca}\n")
    return home


def pull(home: Path) -> Done:
    return run(home, "agent", "pull", ID, "1.0.0", "--root", home / "root")


def trees(home: Path) -> list[str]:
    return [path.name for path in home.glob("root/releases/*") if not path.name.startswith(".")]


def test_a_package_goes_over_tls_to_the_relay_and_to_the_machine(secured: Secured, tmp_path: Path) -> None:
    assert secured.relay.url.startswith("https://127.0.0.1:")
    sent = secured.replicate("1.0.0", secured.relay.url, "--ca-file", secured.ca)
    assert sent.code == 0, sent.err
    assert "1.0.0" in secured.held()
    home = agent(secured, tmp_path, secured.relay.url, secured.ca)
    pulled = pull(home)
    assert pulled.code == 0, pulled.err
    assert secured.relay.url in pulled.out
    assert len(trees(home)) == 1


@pytest.mark.parametrize("which", ["none", "other"])
def test_a_certificate_of_an_unknown_authority_is_told_and_nothing_moves(
    secured: Secured, tmp_path: Path, which: str
) -> None:
    ca = secured.other_ca if which == "other" else None
    sent = secured.replicate("2.0.0", secured.relay.url, *(("--ca-file", ca) if ca else ()))
    home = agent(secured, tmp_path, secured.relay.url, ca)
    pulled = pull(home)
    for done in (sent, pulled):
        assert done.code == 1
        assert (
            f"relay {secured.relay.url} shows a certificate that is not trusted: unable to get local issuer" in done.err
        )
        assert "Traceback" not in done.err
    assert "--ca-file" in sent.err
    assert "2.0.0" not in secured.held()
    assert trees(home) == []


def test_a_certificate_of_another_name_is_told(secured: Secured) -> None:
    """The relay's certificate says 127.0.0.1 and localhost; the whole of 127.0.0.0/8 leads to the same machine."""
    with socket.create_server(("127.0.0.2", 0)) as probe:
        port = probe.getsockname()[1]
    config = secured.ca.parent / "other.yaml"
    config.write_text(
        (secured.ca.parent / "relay.yaml").read_text().replace("listen: 127.0.0.1:0", f"listen: 127.0.0.2:{port}")
    )
    with RelayProcess(secured.ca.parent / "second", "--config", config) as relay:
        sent = secured.replicate("2.0.0", relay.url, "--ca-file", secured.ca)
        assert relay.stop().code == 0
    assert sent.code == 1
    assert f"relay https://127.0.0.2:{port} shows a certificate that is not trusted: IP address mismatch" in sent.err


def test_an_authority_that_cannot_be_read_is_told(secured: Secured, tmp_path: Path) -> None:
    gone = tmp_path / "gone.pem"
    for done in (
        secured.replicate("2.0.0", secured.relay.url, "--ca-file", gone),
        pull(agent(secured, tmp_path, secured.relay.url, gone)),
    ):
        assert done.code == 2
        assert f"'{gone}' cannot be used" in done.err
        assert "Traceback" not in done.err


async def test_a_proxy_tunnels_to_a_relay_that_speaks_tls(secured: Secured) -> None:
    words = ("relay", "status", "--relay", secured.relay.url, "--ca-file", secured.ca)
    async with forward_proxy() as proxy:
        done = await asyncio.to_thread(
            run, secured.home, *words, HTTPS_PROXY=proxy.url, https_proxy=proxy.url, no_proxy=""
        )
    assert done.code == 0, done.err
    assert set(proxy.asked) == {f"CONNECT 127.0.0.1:{secured.relay.port} HTTP/1.1"}


def test_plain_http_at_a_port_that_speaks_tls_says_what_is_wrong(secured: Secured, tmp_path: Path) -> None:
    status = run(secured.home, "relay", "status", "--relay", secured.plain_url)
    pulled = pull(agent(secured, tmp_path, secured.plain_url, None))
    for done in (status, pulled):
        assert done.code == 1
        assert f"relay {secured.plain_url} closed the connection without an answer" in done.err
    assert "its URL begins with https" in status.err
    assert trees(tmp_path / "machine") == []


def test_tls_at_a_port_that_speaks_plain_http_says_what_is_wrong(tmp_path: Path) -> None:
    with RelayProcess(tmp_path) as relay:
        url = relay.url.replace("http://", "https://")
        done = run(tmp_path, "relay", "status", "--relay", url)
    assert done.code == 1
    assert f"relay {url} cannot be reached: it does not answer in TLS" in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_tls_1_3_is_spoken_and_1_2_is_not(secured: Secured, version: ssl.TLSVersion) -> None:
    context = ssl.create_default_context(cafile=secured.ca)
    context.minimum_version = context.maximum_version = version
    with socket.create_connection(("127.0.0.1", secured.relay.port), timeout=10) as raw:
        if version == ssl.TLSVersion.TLSv1_2:
            with pytest.raises((ssl.SSLError, ConnectionError)):
                context.wrap_socket(raw, server_hostname="127.0.0.1")
            return
        with context.wrap_socket(raw, server_hostname="127.0.0.1") as line:
            assert line.version() == "TLSv1.3"
            line.sendall(b"GET /v1/health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert line.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_a_key_that_is_not_the_certificates_is_refused_at_start(tmp_path: Path) -> None:
    one, two = trustme.CA().issue_cert("127.0.0.1"), trustme.CA().issue_cert("127.0.0.1")
    one.cert_chain_pems[0].write_to_path(str(tmp_path / "relay.crt"))
    two.private_key_pem.write_to_path(str(tmp_path / "relay.key"))
    config = tmp_path / "relay.yaml"
    config.write_text(
        f"listen: 127.0.0.1:0\ntls: {{certificate: {tmp_path / 'relay.crt'}, key: {tmp_path / 'relay.key'}}}\n"
    )
    done = run(tmp_path, "relay", "serve", "--config", config)
    assert done.code == 2
    assert "cannot be used: the key is not the certificate's" in done.err
    assert done.out == ""
