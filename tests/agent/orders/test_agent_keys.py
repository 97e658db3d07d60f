from __future__ import annotations

import hashlib
import os
import re
import stat

import pytest

from agent.orders.keys import load_agent_identity, load_report_signer, load_sealing_key, make_agent_keys
from relay.errors import NotFoundError, RefusedError
from relay.trust.envelopes import sign_document, verify_document
from relay.trust.keys import public_key


@pytest.fixture
def folder(tmp_path):
    return str(tmp_path / "keys")


def test_an_agent_is_the_same_after_a_restart(folder):
    made = make_agent_keys(folder)
    assert load_agent_identity(folder) == made
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", made.fingerprint)


def test_the_fingerprint_covers_both_keys(folder):
    made = make_agent_keys(folder)
    both = f'{{"sealing":"{made.sealing_public}","signing":"{made.signing_public}"}}'
    assert made.fingerprint == f"sha256:{hashlib.sha256(both.encode()).hexdigest()}"


def test_two_agents_are_two(tmp_path):
    assert make_agent_keys(str(tmp_path / "a")).fingerprint != make_agent_keys(str(tmp_path / "b")).fingerprint


def test_a_report_is_verified_by_the_identitys_signing_key(folder):
    made = make_agent_keys(folder)
    envelope = sign_document(b"{}", "text/plain", load_report_signer(folder))
    assert verify_document(envelope, [public_key(made.signing_public)], "text/plain")[0] == b"{}"


def test_the_sealing_key_is_the_one_of_the_identity(folder):
    made = make_agent_keys(folder)
    assert load_sealing_key(folder).public_key().public_bytes_raw().hex() == made.sealing_public


def test_agent_keys_are_for_their_owner_only(folder):
    make_agent_keys(folder)
    modes = {name: stat.S_IMODE(os.stat(os.path.join(folder, name)).st_mode) for name in os.listdir(folder)}
    assert modes == {"signing.key": 0o600, "sealing.key": 0o600}
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700


def test_agent_keys_are_never_overwritten(folder):
    made = make_agent_keys(folder)
    with pytest.raises(RefusedError, match="never overwritten"):
        make_agent_keys(folder)
    assert load_agent_identity(folder) == made


def test_half_an_identity_is_explained(folder):
    make_agent_keys(folder)
    os.unlink(os.path.join(folder, "sealing.key"))
    with pytest.raises(RefusedError, match="interrupted"):
        make_agent_keys(folder)
    with pytest.raises(NotFoundError, match="agent init"):
        load_agent_identity(folder)


def test_agent_keys_that_others_can_read_are_not_used(folder):
    make_agent_keys(folder)
    os.chmod(os.path.join(folder, "sealing.key"), 0o644)
    with pytest.raises(RefusedError, match="open to others"):
        load_agent_identity(folder)
