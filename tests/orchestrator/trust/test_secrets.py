"""Secrets are read where they live, refused where they are not safe, and shown by nothing."""

from __future__ import annotations

import copy
import io
import json
import logging
import os
import pickle
import string
import traceback
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from agent.orders.envelopes import open_sealed, secret_context
from orchestrator.plan.plan import SecretSource
from orchestrator.trust.secrets import (
    SECRET_MAX,
    MachineSecret,
    SecretRefusedError,
    SecretStore,
    ServerSecret,
    read_secret,
    seal_for_machine,
    variable_of,
)
from relay.errors import NotFoundError, RefusedError, WaystationError

VALUE = "correct-horse-battery"


def secret_file(folder: Path, data: bytes = VALUE.encode(), mode: int = 0o600, name: str = "token") -> str:
    path = folder / name
    path.write_bytes(data)
    path.chmod(mode)
    return str(path)


def of_file(path: str) -> ServerSecret:
    return read_secret("token", SecretSource(file=path))


# --- reading


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"abcd", "abcd"),
        (b"abcd\n", "abcd"),
        (b"abcd\r\n", "abcd"),
        (b"abcd\n\n", "abcd\n"),
        (b" ab cd \n", " ab cd "),
        ("pässword\n".encode(), "pässword"),
        (b"-----BEGIN\nline\n-----END\n", "-----BEGIN\nline\n-----END"),
    ],
)
def test_one_line_feed_at_the_end_of_a_file_does_not_count(tmp_path: Path, data: bytes, expected: str) -> None:
    assert of_file(secret_file(tmp_path, data)).reveal() == expected


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o602, 0o620, 0o644, 0o666, 0o601])
def test_a_file_that_is_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    path = secret_file(tmp_path, mode=mode)
    with pytest.raises(SecretRefusedError, match=f"open to others.*{mode:04o}.*chmod 600") as caught:
        of_file(path)
    assert VALUE not in str(caught.value)


def test_the_largest_file_is_read_and_one_byte_more_is_refused(tmp_path: Path) -> None:
    assert of_file(secret_file(tmp_path, b"x" * SECRET_MAX + b"\r\n")).reveal() == "x" * SECRET_MAX
    with pytest.raises(SecretRefusedError, match="at most 64 KiB"):
        of_file(secret_file(tmp_path, b"x" * (SECRET_MAX + 1)))
    with pytest.raises(SecretRefusedError, match="at most 64 KiB"):
        of_file(secret_file(tmp_path, b"x" * (SECRET_MAX * 10)))


@pytest.mark.parametrize("data", [b"", b"\n", b"abc", b"abc\n"])
def test_scenario_33_what_is_too_short_to_be_masked_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(SecretRefusedError, match="fewer than 4"):
        of_file(secret_file(tmp_path, data))


def test_what_an_environment_cannot_hold_is_refused_without_telling_it(tmp_path: Path, monkeypatch) -> None:
    for data in (b"topsecret\xff", b"topsecret\0x"):
        with pytest.raises(SecretRefusedError) as caught:
            of_file(secret_file(tmp_path, data))
        assert "topsecret" not in "".join(traceback.format_exception(caught.value, chain=True))
    monkeypatch.setitem(os.environb, b"WS_TEST_SECRET", b"topsecret\xff")
    with pytest.raises(SecretRefusedError) as caught:
        read_secret("token", SecretSource(env="WS_TEST_SECRET"))
    assert "topsecret" not in "".join(traceback.format_exception(caught.value))


def test_a_fifo_a_folder_and_nothing_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo", 0o600)
    with pytest.raises(SecretRefusedError, match="not a regular file"):
        of_file(str(tmp_path / "fifo"))
    with pytest.raises(SecretRefusedError):
        of_file(str(tmp_path))
    with pytest.raises(NotFoundError, match="'token' is not there: no file"):
        of_file(str(tmp_path / "none"))


def test_a_link_to_a_private_file_is_followed_and_the_file_behind_it_judged(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(secret_file(tmp_path))
    assert of_file(str(link)).reveal() == VALUE
    os.chmod(tmp_path / "token", 0o644)
    with pytest.raises(SecretRefusedError, match="open to others"):
        of_file(str(link))


def test_a_secret_of_the_environment_is_read_when_it_is_used(monkeypatch) -> None:
    store = SecretStore({"hook": SecretSource(env="WS_TEST_SECRET")})
    with pytest.raises(NotFoundError, match="WS_TEST_SECRET is not set"):
        store.value("hook")
    monkeypatch.setenv("WS_TEST_SECRET", "first-value")
    assert store.value("hook").reveal() == "first-value"
    monkeypatch.setenv("WS_TEST_SECRET", "second-value")
    assert store.environment(["hook"]) == {"SECRET_HOOK": "second-value"}


# --- the store


def test_a_check_tells_everything_that_is_wrong(tmp_path: Path) -> None:
    store = SecretStore(
        {
            "good": SecretSource(file=secret_file(tmp_path, name="good")),
            "open": SecretSource(file=secret_file(tmp_path, name="open", mode=0o644)),
            "short": SecretSource(file=secret_file(tmp_path, b"ab", name="short")),
            "gone": SecretSource(file=str(tmp_path / "gone")),
        }
    )
    with pytest.raises(RefusedError) as caught:
        store.check()
    for name in ("open", "short", "gone"):
        assert f"'{name}'" in str(caught.value)
    assert "'good'" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "variable"), [("token", "SECRET_TOKEN"), ("lb-token.1", "SECRET_LB_TOKEN_1"), ("ß", "SECRET_SS")]
)
def test_a_script_finds_a_secret_under_its_own_name(name: str, variable: str) -> None:
    assert variable_of(name) == variable


@given(st.text(min_size=1))
def test_every_name_becomes_one_that_any_shell_takes(name: str) -> None:
    assert set(variable_of(name)) <= set(string.ascii_uppercase + string.digits + "_")


# --- what is never shown


def test_nothing_shows_the_value(tmp_path: Path) -> None:
    path = secret_file(tmp_path)
    store = SecretStore({"token": SecretSource(file=path)}, ["token"])
    for secret in (store.value("token"), store.machine_value("token")):
        stream = io.StringIO()
        handler = logging.StreamHandler(stream)
        logger = logging.getLogger("test_secrets")
        logger.addHandler(handler)
        logger.warning("%s %r %s", secret, secret, [secret])
        logger.removeHandler(handler)
        assert "token" in stream.getvalue()
        shown = [repr(secret), str(secret), f"{secret}", f"{[secret]} {store}", repr(vars(store)), stream.getvalue()]
        assert all(VALUE not in text for text in shown)
        assert not isinstance(secret, str)
        assert not hasattr(secret, "__dict__")


def test_nothing_serialises_or_copies_the_value(tmp_path: Path) -> None:
    secret = of_file(secret_file(tmp_path))
    for give_away in (
        json.dumps,
        msgspec.json.encode,
        msgspec.msgpack.encode,
        msgspec.to_builtins,
        pickle.dumps,
        copy.copy,
        copy.deepcopy,
    ):
        with pytest.raises(TypeError) as caught:
            give_away(secret)
        assert VALUE not in str(caught.value)


def test_secrets_of_the_same_value_are_not_equal(tmp_path: Path) -> None:
    path = secret_file(tmp_path)
    assert of_file(path) != of_file(path)


# --- machines


def test_a_secret_of_the_server_is_no_machines(tmp_path: Path) -> None:
    path = secret_file(tmp_path)
    store = SecretStore({"lb": SecretSource(file=path), "app": SecretSource(file=path)}, ["app"])
    assert isinstance(store.machine_value("app"), MachineSecret)
    assert not isinstance(store.value("app"), MachineSecret)
    with pytest.raises(SecretRefusedError, match="'lb' is not available to machines"):
        store.machine_value("lb")
    public = X25519PrivateKey.generate().public_key().public_bytes_raw().hex()
    with pytest.raises(SecretRefusedError, match="'lb' is not available to machines"):
        store.sealed(["app", "lb"], public, "op/1")
    with pytest.raises(TypeError, match="never leaves the server"):
        seal_for_machine(store.value("lb"), public, "op/1")  # type: ignore[arg-type]


def test_a_sealed_secret_is_opened_by_its_agent_for_its_operation_alone(tmp_path: Path) -> None:
    store = SecretStore({"app-key": SecretSource(file=secret_file(tmp_path))}, ["app-key"])
    agent, other = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    operation = "01ARZ3NDEKTSV4RRFFQ69G5FAV/1/web1/1-configure/1"
    sealed = store.sealed(["app-key"], agent.public_key().public_bytes_raw().hex(), operation)
    assert list(sealed) == ["SECRET_APP_KEY"]
    assert VALUE.encode() not in sealed["SECRET_APP_KEY"]
    context = secret_context(operation, "SECRET_APP_KEY")
    assert open_sealed(sealed["SECRET_APP_KEY"], agent, context) == VALUE.encode()
    for key, said in ((other, context), (agent, secret_context(operation[:-1] + "2", "SECRET_APP_KEY"))):
        with pytest.raises(WaystationError):
            open_sealed(sealed["SECRET_APP_KEY"], key, said)
