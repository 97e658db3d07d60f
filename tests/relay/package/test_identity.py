from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.errors import IdentityError
from relay.package.identity import ID_MAX, VERSION_MAX, NuGetVersion, PackageId, PackageRef, chunk_id, parse_digest

V = NuGetVersion.parse


def shuffled(versions: list[NuGetVersion]) -> list[NuGetVersion]:
    return random.Random(1).sample(versions, len(versions))


# --- ids

words = st.text("abcXYZ019_", min_size=1, max_size=8)
ids = st.builds(
    lambda first, rest: first + "".join(mark + word for mark, word in rest),
    words,
    st.lists(st.tuples(st.sampled_from(".-"), words), max_size=6),
)


@pytest.mark.parametrize("text", ["A", "_", "Newtonsoft.Json", "a-b.c_d", "7zip", "x" * ID_MAX])
def test_a_valid_id_keeps_its_spelling(text: str) -> None:
    assert str(PackageId.parse(text)) == text
    assert PackageId.parse(text).key == text.lower()


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "..",
        "a..b",
        ".a",
        "a.",
        "a-",
        "-a",
        "a.-b",
        "a b",
        "a/b",
        "a\\b",
        "a%2fb",
        "a\0b",
        "a\n",
        "é",
        "İ",
        "\u0661",
        "x" * (ID_MAX + 1),
        " a",
        "a+b",
        "a:b",
    ],
)
def test_an_invalid_id_is_refused(text: str) -> None:
    with pytest.raises(IdentityError):
        PackageId.parse(text)
    with pytest.raises(IdentityError):
        PackageId(text)


@given(ids)
def test_ids_are_equal_whatever_their_case(text: str) -> None:
    one, other = PackageId.parse(text.upper()), PackageId.parse(text.lower())
    assert one == other
    assert hash(one) == hash(other)
    assert one.key == other.key


def test_an_id_is_not_its_text_and_cannot_be_changed() -> None:
    assert PackageId("a") != "a"
    with pytest.raises(dataclasses.FrozenInstanceError):
        PackageId("a").text = "b"  # type: ignore[misc]


# --- versions

numbers = st.integers(0, 2**31 - 1) | st.integers(0, 3)
label_text = st.text("abAB01-", min_size=1, max_size=4)
labels = (label_text | st.integers(0, 2**33).map(str)).filter(
    lambda t: not (t.isdigit() and len(t) > 1 and t[0] == "0")
)
metadata = st.lists(label_text, max_size=2).map(".".join)


@st.composite
def version_texts(draw: st.DrawFn) -> str:
    parts = draw(st.lists(numbers, min_size=1, max_size=4))
    text = ".".join("0" * draw(st.integers(0, 2)) + str(part) for part in parts)
    if release := draw(st.lists(labels, max_size=3)):
        text += "-" + ".".join(release)
    if build := draw(metadata):
        text += "+" + build
    return text


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("1", "1.0.0"),
        ("1.0", "1.0.0"),
        ("1.0.0.0", "1.0.0"),
        ("1.2.3.4", "1.2.3.4"),
        ("01.002.0003", "1.2.3"),
        ("1.0.0.00", "1.0.0"),
        ("0", "0.0.0"),
        ("1.0-Beta", "1.0.0-Beta"),
        ("1.0.0-Beta.11+Build.07", "1.0.0-Beta.11"),
        ("1.0.0+01", "1.0.0"),
        ("1.0.0--", "1.0.0--"),
        ("1.0.0-0", "1.0.0-0"),
        ("1.0.0-0a", "1.0.0-0a"),
        ("1.0.0-a-b.-", "1.0.0-a-b.-"),
        ("1.0.0+a-b", "1.0.0"),
        ("2147483647.2147483647.2147483647.2147483647", "2147483647.2147483647.2147483647.2147483647"),
    ],
)
def test_a_valid_version_is_normalized_as_nuget_does(text: str, normalized: str) -> None:
    assert V(text).normalized == normalized
    assert str(V(text)) == normalized
    assert V(text).url == normalized.lower()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1beta",
        "1.2..",
        "1.2..3",
        ".1",
        "1.",
        "1.2.3.4.5",
        "1.4.7-",
        "1.4.7+",
        "1.0.0-01",
        "1.0.0-a.01",
        "1.0.0-a..b",
        "2147483648",
        "1.99999999999",
        " 1.0",
        "1.0 ",
        "1. 0",
        "1.0\n",
        "1.0.0-β",
        "\u0661.0",
        "1.0.0+a+b",
        "1.0.0-a_b",
        "v1.0",
        "1.0.0/../../x",
        "-1",
        "1,0",
        "1.0.0-.",
        "1.0.0-a.",
        "1" * (VERSION_MAX + 1),
        "1.0.0-" + "a" * VERSION_MAX,
        "1.0\0",
    ],
)
def test_an_invalid_version_is_refused(text: str) -> None:
    with pytest.raises(IdentityError):
        V(text)


def test_one_version_in_four_spellings_is_one_package() -> None:
    spellings = [V("1"), V("1.0"), V("1.0.0.0"), V("1.0.0+x")]
    assert len(set(spellings)) == 1
    assert len({version.url for version in spellings}) == 1
    assert len({PackageRef(PackageId("A"), version) for version in spellings}) == 1
    assert V("1.0.0-RC") == V("1.0.0-rc")
    assert V("1.0.0") != "1.0.0"


def test_order_follows_numbers_then_labels_then_stable() -> None:
    ascending = [
        "0.9.9.9",
        "1.0.0-0",
        "1.0.0-2",
        "1.0.0-10",
        "1.0.0-10.a",
        "1.0.0-3000000000",  # above int32: a word for NuGet, so after every number
        "1.0.0-alpha",
        "1.0.0-Alpha.1",
        "1.0.0-alpha.beta",
        "1.0.0-beta",
        "1.0.0",
        "1.0.0.1-a",
        "1.0.0.1",
        "1.0.1",
        "1.2.0",
        "1.10.0",
        "2.0",
    ]
    versions = [V(text) for text in ascending]
    assert sorted(shuffled(versions)) == versions
    assert all(a < b for a, b in itertools.pairwise(versions))


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("1.0", "1.0.0"),
        ("1.0-a", "1.0.0-a"),
        ("1.0-a.b", "1.0.0-a.b"),
        ("1.0+Sha", "1.0.0+Sha"),
        ("1.0-A+Sha", "1.0.0-A+Sha"),
    ],
)
def test_the_full_form_keeps_labels_and_metadata(text: str, full: str) -> None:
    assert V(text).full == full


@given(version_texts())
def test_a_version_survives_being_written_and_read(text: str) -> None:
    version = V(text)
    assert V(version.full) == version
    assert V(version.full).full == version.full
    assert V(version.normalized).normalized == version.normalized
    assert V(version.url).url == version.url
    assert V(version.url) == version


@given(version_texts(), version_texts())
def test_order_is_total_and_agrees_with_equality(left: str, right: str) -> None:
    a, b = V(left), V(right)
    assert [a < b, a == b, a > b].count(True) == 1
    assert (a <= b) == (a < b or a == b)
    assert (a == b) == (a.url == b.url)
    if a == b:
        assert hash(a) == hash(b)


@given(st.lists(version_texts(), max_size=6))
def test_order_does_not_depend_on_where_sorting_starts(texts: list[str]) -> None:
    versions = [V(text) for text in texts]
    assert sorted(versions) == sorted(shuffled(versions))


@given(st.text(max_size=20))
def test_any_text_is_a_version_or_refused(text: str) -> None:
    try:
        version = V(text)
    except IdentityError:
        return
    assert V(version.full) == version


def test_a_reference_reads_well_and_has_one_key() -> None:
    ref = PackageRef(PackageId("Shop.Web"), V("1.2-RC+5"))
    assert str(ref) == "Shop.Web 1.2.0-RC"
    assert ref.key == ("shop.web", "1.2.0-rc")
    assert ref == PackageRef(PackageId("shop.WEB"), V("1.2.0-rc"))


# --- digests


def test_a_digest_is_64_lower_case_hex_digits_and_nothing_else() -> None:
    hexes = chunk_id(b"")
    assert parse_digest(hexes) == parse_digest(f"sha256:{hexes}") == hexes
    for bad in (hexes.upper(), hexes[:-1], hexes + "0", hexes + "\n", f"sha1:{hexes}", "\u0660" * 64, ""):
        with pytest.raises(IdentityError):
            parse_digest(bad)
