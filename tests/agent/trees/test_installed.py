"""What an agent keeps between runs: damage costs a look-up, never a crash, and never a wrong answer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from harness.origins import trust_keys
from harness.packages import Cut, cut_package, noise
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.config import AgentConfig
from agent.trees.installed import AgentState
from relay.errors import StoreError, UsageError
from relay.package.identity import NuGetVersion, PackageId, PackageRef

CUT = cut_package({"a.dll": noise("a", 100)})
NEWER = cut_package({"a.dll": noise("b", 100)}, version="1.1.0")
OTHER = cut_package({"a.dll": noise("a", 100)}, id="Acme.Other")


def installed(state: AgentState, root: Path, cut: Cut, ulid: str) -> Path:
    path = root / "releases" / f"x-{ulid}"
    path.mkdir(parents=True)
    state.record(cut.manifest, ulid=ulid, root=str(root), path=str(path), label="x")
    return path


@pytest.fixture
def state(tmp_path: Path) -> AgentState:
    return AgentState(str(tmp_path / "home"))


def test_an_agent_that_was_never_used_knows_nothing(state: AgentState) -> None:
    assert state.trees() == []
    assert state.pins() is None
    assert state.config() == AgentConfig()
    assert not os.path.exists(state.home)


def test_what_was_recorded_is_found_by_root_and_manifest(state: AgentState, tmp_path: Path) -> None:
    path = installed(state, tmp_path / "r", CUT, "01")

    found = AgentState(state.home).installed(str(tmp_path / "r"), CUT.manifest.id)

    assert found is not None
    assert (found.path, found.package, found.version) == (str(path), "Acme.Web", "1.0.0")
    held = state.manifest(found)
    assert held is not None
    assert held.id == CUT.manifest.id
    assert state.installed(str(tmp_path / "elsewhere"), CUT.manifest.id) is None
    assert state.installed(str(tmp_path / "r"), NEWER.manifest.id) is None


def test_of_two_trees_of_one_manifest_the_newest_counts(state: AgentState, tmp_path: Path) -> None:
    installed(state, tmp_path / "r", CUT, "01")
    newer = installed(state, tmp_path / "r", CUT, "02")

    found = state.installed(str(tmp_path / "r"), CUT.manifest.id)

    assert found is not None
    assert found.path == str(newer)


def test_trees_of_the_same_package_are_searched_first(state: AgentState, tmp_path: Path) -> None:
    for number, cut in enumerate([CUT, NEWER, OTHER]):
        installed(state, tmp_path / "r", cut, f"0{number}")

    found = state.newest_of(PackageRef(PackageId.parse("ACME.WEB"), NuGetVersion.parse("2.0")))

    assert [(str(held.package.id), held.package.version.normalized) for _, held in found] == [
        ("Acme.Web", "1.1.0"),
        ("Acme.Web", "1.0.0"),
        ("Acme.Other", "1.0.0"),
    ]


def test_a_record_whose_tree_was_removed_does_not_count(state: AgentState, tmp_path: Path) -> None:
    installed(state, tmp_path / "r", CUT, "01").rmdir()

    assert state.trees() == []
    assert state.installed(str(tmp_path / "r"), CUT.manifest.id) is None


DAMAGE = [b"", b"{", b"null", b"[]", b"{}", b'{"ulid":1}', b"\xff\xfe", b"[" * 100_000, b"\0" * 100]


@pytest.mark.parametrize("damage", DAMAGE, ids=range(len(DAMAGE)))
def test_a_damaged_record_is_passed_over(state: AgentState, tmp_path: Path, damage: bytes) -> None:
    whole = installed(state, tmp_path / "r", CUT, "01")
    installed(state, tmp_path / "r", NEWER, "02")
    Path(state.home, "trees", "02.json").write_bytes(damage)

    assert [record.path for record in state.trees()] == [str(whole)]


@given(damage=st.binary(max_size=300), at=st.integers(0, 400))
@settings(max_examples=100, deadline=None)
def test_a_record_with_any_bytes_in_it_raises_nothing(
    tmp_path_factory: pytest.TempPathFactory, damage: bytes, at: int
) -> None:
    folder = tmp_path_factory.mktemp("state")
    state = AgentState(str(folder / "home"))
    installed(state, folder / "r", CUT, "01")
    record = Path(state.home, "trees", "01.json")
    whole = record.read_bytes()
    record.write_bytes(whole[:at] + damage + whole[at + len(damage) :])

    for found in state.trees():
        state.manifest(found)


def test_a_folder_in_place_of_a_record_is_passed_over(state: AgentState, tmp_path: Path) -> None:
    installed(state, tmp_path / "r", CUT, "01")
    Path(state.home, "trees", "02.json").mkdir()
    Path(state.home, "trees", "note.txt").write_text("not a record")

    assert len(state.trees()) == 1


@pytest.mark.parametrize("damage", [b"", b"{}", CUT.manifest.canonical[:-1], NEWER.manifest.canonical])
def test_a_manifest_that_is_not_the_one_named_counts_as_lost(state: AgentState, tmp_path: Path, damage: bytes) -> None:
    installed(state, tmp_path / "r", CUT, "01")
    Path(state.home, "manifests", CUT.manifest.id).write_bytes(damage)

    assert state.manifest(state.trees()[0]) is None


def test_a_record_cannot_lead_out_of_the_home(state: AgentState, tmp_path: Path) -> None:
    from msgspec.structs import replace

    installed(state, tmp_path / "r", CUT, "01")
    Path(tmp_path, "secret").write_bytes(CUT.manifest.canonical)

    assert state.manifest(replace(state.trees()[0], manifest="../../secret")) is None


def test_only_the_user_can_read_what_is_kept(state: AgentState, tmp_path: Path) -> None:
    installed(state, tmp_path / "r", CUT, "01")

    modes = {p.name: p.stat().st_mode & 0o777 for p in [Path(state.home), *Path(state.home).rglob("*")]}

    assert set(modes.values()) == {0o700, 0o600}


def test_a_disk_that_fails_is_told(state: AgentState, tmp_path: Path) -> None:
    Path(state.home).write_text("a file where the home should be")

    with pytest.raises(StoreError, match="home"):
        installed(state, tmp_path / "r", CUT, "01")


# --- configuration


def write(state: AgentState, name: str, text: str | bytes) -> None:
    os.makedirs(state.home, exist_ok=True)
    Path(state.home, name).write_bytes(text.encode() if isinstance(text, str) else text)


def test_the_whole_configuration_is_read(state: AgentState) -> None:
    write(
        state,
        "agent.yaml",
        "name: web7\nsite: fra\ndomain: example.net\nresolver: 127.0.0.1:53\nscheme: http\n"
        "relays: ['http://10.0.0.1:7400', 'disk:/mnt/dfs']\ntoken_file: /t\nca_file: /c\n"
        "srv_site: '{site}.{domain}'\nsrv_generic: '{domain}'\n",
    )

    assert state.config() == AgentConfig(
        name="web7", site="fra", domain="example.net", resolver="127.0.0.1:53", scheme="http",
        srv_site="{site}.{domain}", srv_generic="{domain}", relays=("http://10.0.0.1:7400", "disk:/mnt/dfs"),
        token_file="/t", ca_file="/c",
    )  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "sight: fra",
        "site: [fra]",
        "scheme: ftp",
        "resolver: nowhere:53",
        "relays: ['ftp://x']",
        "relays: ['https://user:secret@x']",
        "relays: 'https://x'",
        "site: 'a b'\ndomain: example.net",
        "srv_site: '{unknown}'\nsite: fra",
        "- site",
        "site: 'fra",
        "\0",
    ],
)
def test_a_wrong_value_is_told_with_the_file(state: AgentState, text: str) -> None:
    write(state, "agent.yaml", text)

    with pytest.raises(UsageError) as caught:
        state.config()

    assert os.path.join(state.home, "agent.yaml") in str(caught.value)
    assert "secret" not in str(caught.value)


def test_pins_are_read(state: AgentState, tmp_path: Path) -> None:
    keys = trust_keys(tmp_path / "trust")
    write(state, "trust.json", Path(keys.pins_file).read_bytes())

    assert state.pins() == keys.pins


def test_pins_that_are_replaced_are_believed_and_what_is_none_changes_nothing(
    state: AgentState, tmp_path: Path
) -> None:
    """A key that was taken out of trust.json is believed no longer, also by an agent that runs."""
    one, two = trust_keys(tmp_path / "one"), trust_keys(tmp_path / "two")
    write(state, "trust.json", Path(one.pins_file).read_bytes())
    pins = state.followed_pins()
    assert pins() == one.pins
    for damage in (b"", b"{", Path(two.pins_file).read_bytes()[:-9]):
        write(state, "trust.json", damage)
        assert pins() == one.pins
    os.unlink(os.path.join(state.home, "trust.json"))
    assert pins() == one.pins
    write(state, "trust.json", Path(two.pins_file).read_bytes())
    assert pins() == two.pins


@pytest.mark.parametrize("text", [b"", b"{}", b"[" * 10_000, b"\xff"])
def test_pins_that_are_none_are_never_taken_for_no_pins(state: AgentState, text: bytes) -> None:
    write(state, "trust.json", text)

    with pytest.raises(UsageError, match=r"trust\.json"):
        state.pins()


def test_pins_that_cannot_be_read_are_never_taken_for_no_pins(state: AgentState) -> None:
    os.makedirs(os.path.join(state.home, "trust.json"))

    with pytest.raises(UsageError, match=r"trust\.json"):
        state.pins()
