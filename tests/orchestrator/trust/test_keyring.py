from __future__ import annotations

import os
import stat

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from orchestrator.trust import keyring
from orchestrator.trust.keyring import (
    init_trust,
    load_person_signer,
    load_pins,
    load_signer,
    make_person,
    people_in,
)
from relay.errors import LockedError, NotFoundError, RefusedError, SignatureError, UsageError
from relay.package.identity import manifest_id
from relay.support.private_files import write_new_file
from relay.trust.envelopes import PackageStatement, sign_package, verify_package
from relay.trust.keys import parse_pins

STATEMENT = PackageStatement(id="A", version="1.0.0", manifest=manifest_id(b""), nupkg_sha256="00" * 32)


@pytest.fixture
def folder(tmp_path):
    return str(tmp_path / "trust")


def read(folder, name):
    with open(os.path.join(folder, name), "rb") as file:
        return file.read()


def mode(*path):
    return stat.S_IMODE(os.stat(os.path.join(*path)).st_mode)


def test_the_keys_that_were_made_verify_what_they_sign(folder):
    pins = init_trust(folder)
    assert parse_pins(read(folder, "trust.json")) == pins
    assert verify_package(sign_package(STATEMENT, load_signer(folder, "package")), pins) == STATEMENT


def test_the_order_key_that_was_made_makes_no_packages(folder):
    pins = init_trust(folder)
    assert load_signer(folder, "order").public_key.keyid == pins.order[0].keyid
    with pytest.raises(SignatureError):
        verify_package(sign_package(STATEMENT, load_signer(folder, "order")), pins)


def test_private_keys_are_for_their_owner_only_whatever_the_umask(folder):
    before = os.umask(0)
    try:
        init_trust(folder)
    finally:
        os.umask(before)
    assert mode(folder) == 0o700
    assert mode(folder, "package.key") == mode(folder, "order.key") == 0o600


@pytest.mark.parametrize("present", ["package.key", "order.key", "trust.json"])
def test_what_exists_is_never_overwritten(folder, present):
    os.mkdir(folder, 0o700)
    path = os.path.join(folder, present)
    with open(path, "wb") as file:
        file.write(b"precious")
    with pytest.raises(RefusedError, match=present):
        init_trust(folder)
    assert read(folder, present) == b"precious"
    assert os.listdir(folder) == [present]


def test_a_key_that_appears_in_the_last_moment_is_not_overwritten(tmp_path):
    path = str(tmp_path / "package.key")
    write_new_file(path, b"precious", mode=0o600)
    with pytest.raises(RefusedError, match="never overwritten"):
        write_new_file(path, b"other", mode=0o600)
    assert read(tmp_path, "package.key") == b"precious"


def test_a_dangling_link_in_a_keys_place_is_not_followed(folder, tmp_path):
    os.mkdir(folder, 0o700)
    os.symlink(tmp_path / "elsewhere", os.path.join(folder, "order.key"))
    with pytest.raises(RefusedError, match=r"order\.key"):
        init_trust(folder)
    assert not os.path.exists(tmp_path / "elsewhere")


@pytest.mark.parametrize("broken_write", [2, 3])
def test_an_interrupted_init_is_explained_by_the_next(folder, monkeypatch, broken_write):
    writes = []

    class PowerCutError(BaseException):
        pass

    def cut(original):
        def write(*args, **options):
            writes.append(args[0])
            if len(writes) == broken_write:
                raise PowerCutError
            original(*args, **options)

        return write

    with monkeypatch.context() as patch:
        patch.setattr(keyring, "write_private_key", cut(keyring.write_private_key))
        patch.setattr(keyring, "write_new_file", cut(keyring.write_new_file))
        with pytest.raises(PowerCutError):
            init_trust(folder)
    assert len(writes) == broken_write
    first = read(folder, "package.key")
    with pytest.raises(RefusedError, match="interrupted"):
        init_trust(folder)
    assert read(folder, "package.key") == first


def test_a_folder_that_others_can_open_is_refused(folder):
    os.mkdir(folder)
    os.chmod(folder, 0o740)
    with pytest.raises(RefusedError, match="chmod 700"):
        init_trust(folder)
    assert os.listdir(folder) == []


@pytest.mark.parametrize("open_mode", [0o640, 0o604, 0o620, 0o602])
def test_a_key_file_that_others_can_open_is_not_used(folder, open_mode):
    init_trust(folder)
    os.chmod(os.path.join(folder, "order.key"), open_mode)
    with pytest.raises(RefusedError, match=f"open to others.*{open_mode:04o}"):
        load_signer(folder, "order")
    assert load_signer(folder, "package")


def test_a_missing_key_is_told_with_the_command_that_makes_it(folder):
    with pytest.raises(NotFoundError, match="trust init"):
        load_signer(folder, "package")


def test_a_key_of_another_kind_is_refused(folder):
    init_trust(folder)
    other = X25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with open(os.path.join(folder, "package.key"), "wb") as file:
        file.write(other)
    with pytest.raises(UsageError, match="Ed25519"):
        load_signer(folder, "package")


@pytest.mark.parametrize(
    "content", [b"", b"not a key", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"]
)
def test_a_broken_key_file_is_refused(folder, content):
    init_trust(folder)
    with open(os.path.join(folder, "package.key"), "wb") as file:
        file.write(content)
    with pytest.raises(UsageError, match="not a private key"):
        load_signer(folder, "package")


def test_a_pipe_in_a_keys_place_is_refused_without_waiting(folder):
    os.mkdir(folder, 0o700)
    os.mkfifo(os.path.join(folder, "order.key"), 0o600)
    with pytest.raises(RefusedError, match="regular file"):
        load_signer(folder, "order")


# --- people


def test_a_person_gets_a_key_of_their_own_and_a_name_in_trust_json(folder):
    before = init_trust(folder)
    key, path = make_person(folder, "anna")
    assert path == os.path.join(folder, "people", "anna.key")
    assert (mode(folder, "people"), mode(path), mode(folder, "trust.json")) == (0o700, 0o600, 0o644)
    pins = load_pins(folder)
    assert (pins.package, pins.order) == (before.package, (*before.order, key))
    assert (key.name, key.environments) == ("anna", None)
    assert load_person_signer(folder, "anna").public_key.keyid == key.keyid
    assert load_person_signer(folder, "").public_key.keyid == before.order[0].keyid


def test_trust_json_of_before_people_had_names_is_written_as_it_was(folder):
    init_trust(folder)
    assert b"name" not in read(folder, "trust.json")


def test_a_persons_key_can_be_kept_elsewhere_and_be_for_some_environments_only(folder, tmp_path):
    init_trust(folder)
    own = str(tmp_path / "annas")
    key, path = make_person(folder, "anna", own, ("staging", "test"))
    assert path == os.path.join(own, "anna.key")
    assert key.environments == ("staging", "test")
    assert (people_in(folder, "staging"), people_in(folder, "production")) == ({"anna"}, frozenset())
    assert load_person_signer(folder, "anna", own).public_key.keyid == key.keyid
    with pytest.raises(NotFoundError, match="--keys names the folder"):
        load_person_signer(folder, "anna")


def test_nobody_is_known_where_there_is_no_trust_json(folder):
    assert people_in(folder, "staging") == frozenset()


def test_a_name_is_given_once_and_no_key_is_overwritten(folder):
    init_trust(folder)
    make_person(folder, "anna")
    before, key = read(folder, "trust.json"), read(folder, "people/anna.key")
    with pytest.raises(RefusedError, match="has a key of anna already"):
        make_person(folder, "anna")
    write_new_file(os.path.join(folder, "people", "ben.key"), b"mine", mode=0o600)
    with pytest.raises(RefusedError, match="knows no ben; keys are never overwritten"):
        make_person(folder, "ben")
    assert (read(folder, "trust.json"), read(folder, "people/anna.key")) == (before, key)
    assert read(folder, "people/ben.key") == b"mine"


@pytest.mark.parametrize("name", ["", "Anna", "../anna", "a b", "anna\n", "1anna", "a" * 64, "team:shop", "anna@host"])
def test_what_cannot_be_a_persons_name_makes_no_key(folder, name):
    init_trust(folder)
    before = read(folder, "trust.json")
    with pytest.raises(UsageError, match="is no name of a person"):
        make_person(folder, name)
    assert read(folder, "trust.json") == before
    assert not os.path.exists(os.path.join(folder, "people"))


def test_two_who_name_people_at_once_lose_nobody(folder):
    init_trust(folder)
    with keyring._pins_held(folder), pytest.raises(LockedError):
        make_person(folder, "anna")
    make_person(folder, "anna")
    make_person(folder, "ben")
    assert people_in(folder, "any") == {"anna", "ben"}
    assert sorted(os.listdir(folder)) == ["order.key", "package.key", "people", "trust.json"]


def test_a_person_is_named_only_where_there_is_a_trust_json(tmp_path):
    with pytest.raises(NotFoundError):
        make_person(str(tmp_path / "none"), "anna")


def test_a_name_that_two_keys_have_or_that_nobody_can_have_is_refused(folder):
    init_trust(folder)
    make_person(folder, "anna")
    make_person(folder, "ben")
    text = read(folder, "trust.json")
    with pytest.raises(SignatureError, match="gives the name 'anna' to two keys"):
        parse_pins(text.replace(b'"ben"', b'"anna"'))
    for name in (b'"Ben"', b'""', b'"b n"'):
        with pytest.raises(UsageError, match="not valid"):
            parse_pins(text.replace(b'"ben"', name))
