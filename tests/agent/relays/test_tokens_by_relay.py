"""Which token goes to which relay."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.config import AgentConfig
from agent.relays.tokens import Tokens, relay_key
from agent.trees.installed import AgentState
from relay.errors import UsageError

A, B = "https://relay.a.example:7443", "https://relay.b.example:7443"


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    for name in ("default", "one", "two", "three"):
        (tmp_path / name).write_text(f"{name}\n")
    return {name: str(tmp_path / name) for name in ("default", "one", "two", "three")}


@pytest.mark.parametrize(
    ("key", "url", "fits"),
    [
        ("relay.a.example", A, True),
        ("Relay.A.Example", A, True),
        ("relay.a.example:7443", A, True),
        ("https://relay.a.example:7443", A, True),
        ("https://relay.a.example:7443/", A, True),
        ("relay.a.example:443", A, False),
        ("http://relay.a.example:7443", A, False),
        ("a.example", A, False),
        ("relay.a.example", "http://relay.a.example:80", True),
        ("https://relay.a.example", "https://relay.a.example:443", True),
        ("relay.a.example:443", "https://relay.a.example:443", True),
        ("[2001:db8::1]", "https://[2001:db8::1]:7443", True),
        ("[2001:db8::1]:7443", "https://[2001:db8::1]:7443", True),
        ("10.0.0.7", "http://10.0.0.7:7400", True),
    ],
)
def test_a_token_goes_to_the_relay_that_is_named_and_the_default_to_all_others(
    files: dict[str, str], key: str, url: str, fits: bool
) -> None:
    tokens = Tokens(files["default"], {key: files["one"]})
    assert tokens.of(url)() == ("one" if fits else "default")
    assert tokens.of(B)() == "default"


def test_the_most_exact_name_counts(files: dict[str, str]) -> None:
    tokens = Tokens(
        None,
        {
            "relay.a.example": files["one"],
            "relay.a.example:7443": files["two"],
            "https://relay.a.example:7443": files["three"],
        },
    )
    assert tokens.of(A)() == "three"
    assert tokens.of("http://relay.a.example:7443")() == "two"
    assert tokens.of("http://relay.a.example:80")() == "one"
    assert tokens.of(B)() is None


@pytest.mark.parametrize(
    "key", ["", "disk:/mnt/x", "s3://bucket", "https://u:p@relay.example", "a b", "relay.example:x", "host/path", "*.b"]
)
def test_a_name_that_is_no_relays_is_refused_with_the_file(tmp_path: Path, key: str) -> None:
    with pytest.raises(UsageError):
        relay_key(key)
    for line in (f"tokens: {{'{key}': /t}}", f"plain_http: ['{key}']"):
        (tmp_path / "agent.yaml").write_text(line)
        with pytest.raises(UsageError, match=r"agent\.yaml"):
            AgentState(str(tmp_path)).config()


def test_a_token_file_of_one_relay_that_cannot_be_read_is_named(tmp_path: Path, files: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="nowhere"):
        Tokens(files["default"], {"relay.a.example": str(tmp_path / "nowhere")})


def test_the_default_configuration_names_none() -> None:
    assert (AgentConfig().tokens, AgentConfig().plain_http) == ({}, ())
