"""How fast a source goes, and when another one is worth asking."""

from __future__ import annotations

from math import inf

from relay.transfer.pace import ENCODER_SECONDS, GAIN, WINDOW_SECONDS, WORTH_SECONDS, Outlook, Pace, is_slow, is_sooner


def pace_of(*samples: tuple[float, int]) -> Pace:
    """One that was asked at 0, and had so many bytes in all at these moments."""
    pace = Pace(0.0)
    for now, total in samples:
        pace.bytes = total
        pace.mark(now)
    return pace


def test_a_source_is_not_judged_before_its_time() -> None:
    assert pace_of((1.0, 10)).rate(WINDOW_SECONDS - 0.1) is None
    assert pace_of((1.0, 10)).rate(WINDOW_SECONDS, ENCODER_SECONDS) is None


def test_what_counts_is_what_came_of_late() -> None:
    """It began fast, and drips now."""
    pace = pace_of((1.0, 0), (2.0, 0), (3.0, 800_000), (7.0, 800_000), (10.0, 800_030))

    assert pace.rate(10.0, 3.0) == 10.0
    assert pace.rate(10.0, 8.0) == 800_030 / 8


def test_marks_do_not_gather() -> None:
    pace = pace_of(*((n / 2, n) for n in range(10_000)))

    assert len(pace._marks) < 4 * ENCODER_SECONDS
    assert pace.rate(5000.0) == (9999 - 9994) / (5000.0 - 4997.0)


def test_a_source_that_begins_anew_is_judged_anew() -> None:
    pace = pace_of((1.0, 500), (9.0, 500))
    pace.begin(9.0)

    assert pace.rate(9.0 + WINDOW_SECONDS / 2) is None
    pace.bytes = 800
    assert pace.rate(9.0 + WINDOW_SECONDS) == 300 / WINDOW_SECONDS


def test_silence_takes_for_ever() -> None:
    assert Outlook(1, 0.0).seconds == inf
    assert is_slow(Outlook(1, 0.0))


def test_what_is_done_soon_is_left_alone_however_fast_another_one_is() -> None:
    nearly_done = Outlook(1000 * (WORTH_SECONDS - 1), 1000)

    assert not is_slow(nearly_done)
    assert not is_sooner(Outlook(nearly_done.payload, inf), nearly_done)


def test_a_change_has_to_pay() -> None:
    used = Outlook(1_000_000, 1200)

    assert is_sooner(Outlook(1_000_000, 1200 * GAIN * 1.01), used)
    assert not is_sooner(Outlook(1_000_000, 1200 * GAIN * 0.99), used)
    assert not is_sooner(Outlook(1_000_000, 0.0), Outlook(1_000_000, 0.0))
