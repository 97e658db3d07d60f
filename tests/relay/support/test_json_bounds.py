from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.support import json_bounds
from relay.support.json_bounds import JsonTooDeepError, check_depth

texts = st.text(alphabet='ab"\\[]{}é\n', max_size=6)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=20,
)


def depth_of(value):
    if isinstance(value, dict):
        value = list(value.values())
    return 1 + max(map(depth_of, value), default=0) if isinstance(value, list) else 0


def is_too_deep(text, limit):
    try:
        check_depth(text, limit)
    except JsonTooDeepError:
        return True
    return False


@given(values, st.booleans())
def test_depth_is_measured_exactly_whatever_stands_in_strings(value, ascii_only):
    text = json.dumps(value, ensure_ascii=ascii_only).encode()
    depth = depth_of(value)
    assert not is_too_deep(text, depth)
    assert not depth or is_too_deep(text, depth - 1)


@given(values, st.booleans(), st.integers(1, 7))
def test_where_the_text_is_cut_into_slices_changes_nothing(value, ascii_only, size):
    text = json.dumps(value, ensure_ascii=ascii_only).encode()
    depth = depth_of(value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_bounds, "_SLICE", size)
        assert not is_too_deep(text, depth)
        assert not depth or is_too_deep(text, depth - 1)


def test_the_first_slice_that_is_too_deep_is_the_last_one_looked_at(monkeypatch):
    slices = []
    add = json_bounds._Gauge.add
    monkeypatch.setattr(json_bounds._Gauge, "add", lambda gauge, piece: slices.append(piece) or add(gauge, piece))
    assert is_too_deep(b"[" * (8 << 20), 16)
    assert len(slices) == 1


@given(values, st.integers(0, 3))
def test_white_space_changes_nothing(value, indent):
    text = json.dumps(value, indent=indent).encode()
    assert not is_too_deep(text, depth_of(value))


@given(st.binary(max_size=60) | st.text(alphabet='[]{}"\\,:1 ', max_size=40).map(str.encode))
def test_what_passes_never_sends_a_parser_deep(text):
    if is_too_deep(text, 4):
        return
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return
    assert depth_of(value) <= 4


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'[{"a":'])
def test_open_brackets_without_end_are_refused(opening):
    with pytest.raises(JsonTooDeepError):
        check_depth(opening * 200_000, 16)


@pytest.mark.parametrize(
    "hostile",
    [
        b'"' * (4 << 20),
        b'"\\' * (2 << 20),
        b"\\" * (4 << 20),
        b'["' * (2 << 20),
        b"[]" * (2 << 20),
        b"][" * (2 << 20),
        b"[" * (2 << 20) + b"]" * (2 << 20),
        b'{"":"\\"' * (1 << 19),
        b'"' + b"\\" * ((4 << 20) + 1),
    ],
)
def test_hostile_text_of_megabytes_is_scanned_in_linear_time(hostile):
    """A quadratic scan of these would take hours, so that it ends at all is the proof; no clock is asked."""
    assert is_too_deep(hostile, 16) in {True, False}


def test_a_bracket_in_a_string_does_not_count():
    check_depth(b'["[[[[[[", {"]]}}": "\\"[[["}]', 2)
