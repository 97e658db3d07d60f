from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.errors import FrameError
from relay.package.ranges import RANGES_MAX, check, count, from_indexes, in_order, indexes

some = st.lists(st.integers(0, 60), max_size=40)
numbers = st.integers(-(2**70), 2**70)


@given(some)
def test_canonical_ranges_name_exactly_the_indexes(given_indexes):
    ranges = from_indexes(given_indexes)
    assert list(indexes(ranges)) == sorted(set(given_indexes))
    assert count(ranges) == len(set(given_indexes))


@given(some)
def test_canonical_ranges_ascend_are_not_empty_and_do_not_touch(given_indexes):
    ranges = from_indexes(given_indexes)
    assert all(start < stop for start, stop in ranges)
    assert all(before[1] < after[0] for before, after in pairwise(ranges))


@given(st.lists(st.integers(0, 60), max_size=40, unique=True))
def test_ranges_in_order_keep_the_order(given_indexes):
    assert list(indexes(in_order(given_indexes))) == given_indexes


@given(st.lists(st.integers(0, 60), max_size=40, unique=True))
def test_what_we_make_passes_the_check(given_indexes):
    assert check(in_order(given_indexes), 61) == in_order(given_indexes)
    assert check(from_indexes(given_indexes), 61) == from_indexes(given_indexes)


@given(st.lists(st.tuples(st.integers(-2, 12), st.integers(-2, 12)), max_size=6).map(tuple))
def test_the_check_lets_pass_exactly_what_names_places_within_the_limit_once(ranges):
    places = [place for start, stop in ranges for place in range(start, stop)]
    good = all(start < stop for start, stop in ranges) and len(places) == len(set(places))
    good = good and all(0 <= place < 10 for place in places)
    if good:
        assert check(ranges, 10) == ranges
    else:
        with pytest.raises(FrameError):
            check(ranges, 10)


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=5).map(tuple))
def test_absurd_numbers_are_refused_without_walking_them(ranges):
    with pytest.raises(FrameError):
        check((*ranges, (0, 2**64)), 2**20)


def test_more_pairs_than_agreed_are_refused():
    pairs = tuple((2 * i, 2 * i + 1) for i in range(RANGES_MAX + 1))
    assert check(pairs[:-1], 2**20) == pairs[:-1]
    with pytest.raises(FrameError, match="more than"):
        check(pairs, 2**20)


def test_nothing_lies_in_an_empty_manifest():
    assert check((), 0) == ()
    with pytest.raises(FrameError):
        check(((0, 1),), 0)
