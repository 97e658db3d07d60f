from __future__ import annotations

import os
import re
import zlib
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from relay.config import TokenRecord
from relay.errors import UsageError
from relay.server.http.tokens import (
    SCOPES,
    ForbiddenError,
    MisplacedTokenError,
    TokenSet,
    UnauthenticatedError,
    append_token,
    authenticate,
    make_token,
    parse_tokens,
)

NOW = datetime(2026, 5, 1, 12, 0, 0, tzinfo=UTC)


class Request:
    """The two things of a request that are looked at."""

    def __init__(self, *authorization: str, path: str = "/v1/health") -> None:
        self.headers = CIMultiDict([("Authorization", text) for text in authorization])
        self.raw_path = path


def with_checksum(text: str) -> str:
    return f"{text}_{zlib.crc32(text.encode()):08x}"


def test_a_token_has_the_told_shape_and_only_its_hash_is_kept() -> None:
    text, record = make_token(["read"], NOW)
    assert re.fullmatch(r"wst_[0-9a-f]{8}_[A-Za-z0-9_-]{43}_[0-9a-f]{8}", text)
    assert text == with_checksum(text[:-9])
    secret = text[13:56]
    assert secret not in repr(record)
    assert record.id == text[4:12]
    assert record.expires - record.created == timedelta(days=90)


def test_a_token_that_is_bound_to_an_agent_says_so_in_relay_yaml_and_to_who_checks_it(tmp_path) -> None:
    text, record = make_token(["agent"], NOW, agent="web7")
    append_token(str(tmp_path / "relay.yaml"), record)
    written = yaml.safe_load((tmp_path / "relay.yaml").read_text())["tokens"]
    assert written[0]["agent"] == "web7"
    assert parse_tokens(written).check(text, NOW).agent == "web7"
    free, unbound = make_token(["agent"], NOW)
    assert "agent" not in msgspec.to_builtins(unbound)
    assert TokenSet([unbound]).check(free, NOW).agent == ""


@pytest.mark.parametrize(
    ("scopes", "agent"), [(["read"], "web7"), (["agent"], "web 7"), (["agent"], "-x"), (["order"], "w")]
)
def test_only_an_agents_token_is_bound_and_only_to_a_name_that_an_agent_can_have(scopes: list[str], agent: str) -> None:
    with pytest.raises(UsageError):
        make_token(scopes, NOW, agent=agent)


def test_two_tokens_are_never_alike() -> None:
    assert len({make_token(["read"], NOW)[0] for _ in range(50)}) == 50


@pytest.mark.parametrize(
    ("scopes", "may"),
    [
        (["read"], {"read"}),
        (["write"], {"read", "write"}),
        (["agent"], {"read", "agent"}),
        (["order"], {"order"}),
        (["agent", "order"], {"read", "agent", "order"}),
    ],
)
def test_write_and_agent_imply_read_and_nothing_else_is_implied(scopes: list[str], may: set[str]) -> None:
    text, record = make_token(scopes, NOW)
    identity = TokenSet([record]).check(text, NOW)
    assert identity.id == record.id
    for scope in SCOPES:
        if scope in may:
            identity.require(scope)
        else:
            with pytest.raises(ForbiddenError) as refused:
                identity.require(scope)
            assert refused.value.status == 403


@pytest.mark.parametrize(
    ("scopes", "days"), [([], 90), (["admin"], 90), (["read", "x"], 90), (["read"], 91), (["read"], 0)]
)
def test_a_token_without_a_known_scope_or_with_a_long_life_is_not_made(scopes: list[str], days: int) -> None:
    with pytest.raises(UsageError):
        make_token(scopes, NOW, days)


def refusals(tokens: TokenSet, text: str, now: datetime = NOW) -> tuple[type[BaseException], str]:
    with pytest.raises(UnauthenticatedError) as refused:
        tokens.check(text, now)
    assert refused.value.status == 401
    return type(refused.value), str(refused.value)


def test_unknown_altered_and_expired_tokens_are_refused_in_one_and_the_same_way() -> None:
    text, record = make_token(["read"], NOW)
    tokens = TokenSet([record])
    other_secret = with_checksum(text[:13] + ("A" if text[13] != "A" else "B") + text[14:56])
    other_id = with_checksum("wst_" + ("0" if text[4] != "0" else "1") + text[5:56])
    wrong_crc = text[:-1] + ("0" if text[-1] != "0" else "1")
    told = {refusals(tokens, bad) for bad in (other_secret, other_id, wrong_crc, "", "wst_", text + "\n", text.upper())}
    told.add(refusals(tokens, text, record.expires))
    told.add(refusals(tokens, text, record.expires + timedelta(seconds=1)))
    assert len(told) == 1
    assert tokens.check(text, record.expires - timedelta(seconds=1))


def test_a_revoked_token_is_refused() -> None:
    text, record = make_token(["read"], NOW)
    _, other = make_token(["read"], NOW)
    assert TokenSet([record, other]).check(text, NOW)
    refusals(TokenSet([other]), text)


@given(st.text())
def test_no_text_but_the_token_is_let_in(text: str) -> None:
    _, record = make_token(["read"], NOW)
    refusals(TokenSet([record]), text)


def test_a_bearer_is_known_and_a_request_without_credential_has_no_identity() -> None:
    text, record = make_token(["read"], NOW, name="ci")
    tokens = TokenSet([record])
    identity = authenticate(Request(f"Bearer {text}"), tokens, NOW)
    assert identity is not None
    assert identity.name == "ci"
    assert authenticate(Request(f"bearer {text}"), tokens, NOW) == identity
    assert authenticate(Request(), tokens, NOW) is None


@pytest.mark.parametrize("header", ["Basic dTpw", "Bearer", "Bearer x", "", "Digest a=b"])
def test_any_other_credential_is_refused(header: str) -> None:
    _, record = make_token(["read"], NOW)
    with pytest.raises(UnauthenticatedError):
        authenticate(Request(header), TokenSet([record]), NOW)


@pytest.mark.parametrize("where", ["/v1/health?token={}", "/v1/{}", "/x?a=1&access_token=1", "/x?access_token={}"])
def test_a_token_in_the_url_is_refused_even_beside_a_good_header(where: str) -> None:
    text, record = make_token(["read"], NOW)
    with pytest.raises(MisplacedTokenError) as refused:
        authenticate(Request(f"Bearer {text}", path=where.format(text)), TokenSet([record]), NOW)
    assert refused.value.status == 400
    assert text not in str(refused.value)


def test_a_percent_encoded_token_in_the_url_is_refused() -> None:
    text, record = make_token(["read"], NOW)
    with pytest.raises(MisplacedTokenError):
        authenticate(Request(path="/x?t=%77st%5F" + text[4:]), TokenSet([record]), NOW)


def test_two_authorization_headers_are_refused() -> None:
    text, record = make_token(["read"], NOW)
    with pytest.raises(MisplacedTokenError):
        authenticate(Request(f"Bearer {text}", f"Bearer {text}"), TokenSet([record]), NOW)


# --- relay.yaml

FILES = {
    "absent": None,
    "empty": "",
    "comments only": "# nothing yet\n",
    "without tokens": "site: fra  # Frankfurt\nlisten: 0.0.0.0:9400\n",
    "no newline at the end": "site: fra",
    "null tokens": "tokens:\nsite: fra\n",
    "empty list": "tokens: []\nsite: fra\n",
    "flow style": "{site: fra}\n",
}


@pytest.mark.parametrize("text", FILES.values(), ids=FILES.keys())
def test_an_appended_token_is_there_and_every_other_key_stays(tmp_path, text: str | None) -> None:
    path = tmp_path / "relay.yaml"
    before = {}
    if text is not None:
        path.write_text(text)
        before = yaml.safe_load(text) or {}
    first_text, first = make_token(["write"], NOW, name='the "build": server\u2028#1')
    second_text, second = make_token(["read", "agent"], NOW)
    append_token(str(path), first)
    append_token(str(path), second)
    document = yaml.safe_load(path.read_text())
    tokens = parse_tokens(document.pop("tokens"))
    before.pop("tokens", None)
    assert document == before
    assert len(tokens) == 2
    assert tokens.check(first_text, NOW).name == first.name
    assert tokens.check(second_text, NOW).scopes == {"read", "agent"}
    assert first_text[13:56] not in path.read_text()


def test_comments_and_what_follows_the_list_stay_where_they_were(tmp_path) -> None:
    path = tmp_path / "relay.yaml"
    path.write_text("# top\ntokens:  # ours\n")
    append_token(str(path), make_token(["read"], NOW, name="one")[1])
    text = path.read_text() + "# about the site\nsite: fra\n"
    path.write_text(text)
    append_token(str(path), make_token(["read"], NOW, name="two")[1])
    after = path.read_text()
    assert after.startswith(text[: text.index("# about the site")])
    assert after.endswith("# about the site\nsite: fra\n")
    assert [entry["name"] for entry in yaml.safe_load(after)["tokens"]] == ["one", "two"]


@given(st.sampled_from(["00000000", "12345678", "1234e567", "0x123456"[2:].zfill(8)]), st.integers(0, 9))
def test_an_id_or_hash_of_digits_only_comes_back_as_text(id: str, digit: int) -> None:
    import tempfile

    record = TokenRecord(id, ("read",), str(digit) * 64, NOW, NOW + timedelta(days=1))
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "relay.yaml")
        append_token(path, record)
        with open(path, encoding="utf-8") as file:
            document = yaml.safe_load(file)
    assert document["tokens"][0]["id"] == id
    assert len(parse_tokens(document["tokens"])) == 1


@pytest.mark.parametrize(
    "text", ["- a\n", "tokens: 3\n", "a: [\n", "a: 1\n---\nb: 2\n", "a: !!python/object:os.X {}\n"]
)
def test_a_file_that_is_no_mapping_with_a_list_is_refused_and_untouched(tmp_path, text: str) -> None:
    path = tmp_path / "relay.yaml"
    path.write_text(text)
    with pytest.raises(UsageError):
        append_token(str(path), make_token(["read"], NOW)[1])
    assert path.read_text() == text
    assert os.listdir(tmp_path) == ["relay.yaml"]


def test_the_file_keeps_its_mode_and_a_new_one_is_for_its_owner_alone(tmp_path) -> None:
    old, new = tmp_path / "old.yaml", tmp_path / "new.yaml"
    old.write_text("site: fra\n")
    old.chmod(0o640)
    for path in (old, new):
        append_token(str(path), make_token(["read"], NOW)[1])
    assert old.stat().st_mode & 0o777 == 0o640
    assert new.stat().st_mode & 0o777 == 0o600


def test_a_write_that_fails_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "relay.yaml"
    path.write_text("site: fra\n")
    called = []

    def fails(handle: int) -> None:
        called.append(handle)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(UsageError, match="No space left"):
        append_token(str(path), make_token(["read"], NOW)[1])
    assert called
    assert path.read_text() == "site: fra\n"
    assert os.listdir(tmp_path) == ["relay.yaml"]


@pytest.mark.parametrize(
    "change",
    [
        {"scopes": []},
        {"scopes": ["root"]},
        {"sha256": "x"},
        {"id": "12"},
        {"expires": "2026-05-01T00:00:00"},
        {"extra": 1},
    ],
)
def test_a_record_that_we_would_not_have_written_is_refused(change: dict[str, object]) -> None:
    entry = {
        "id": "0a0b0c0d",
        "scopes": ["read"],
        "sha256": "0" * 64,
        "created": "2026-05-01T00:00:00Z",
        "expires": "2026-06-01T00:00:00Z",
    }
    assert len(parse_tokens([entry])) == 1
    with pytest.raises(UsageError):
        parse_tokens([entry | change])
    with pytest.raises(UsageError):
        parse_tokens([entry, entry])
