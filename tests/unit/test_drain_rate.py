"""When a refused request may come back."""

from engine.core.drain_rate import DrainRate


def test_the_estimate_follows_the_rate_at_which_requests_end():
    now = 0.0
    rate = DrainRate(lambda: now)
    assert rate.wait_s(1000) == 1, "nothing is known yet"
    rate.note_begin()
    for _ in range(100):
        now += 0.5
        rate.note_end()
    assert abs(rate.wait_s(9) - 5) < 0.1
    assert rate.wait_s(0) == 1
    assert rate.wait_s(10_000) == 60
    now += 63 * 0.5  # nothing ends any more
    assert abs(rate.wait_s(9) - 10) < 0.2


def test_time_without_requests_does_not_count():
    now = 0.0
    rate = DrainRate(lambda: now)
    for _ in range(100):
        rate.note_begin()
        now += 0.5
        rate.note_end()
        rate.note_idle()
        now += 600
    assert abs(rate.wait_s(9) - 5) < 0.1
    rate.note_begin()
    now += 63 * 0.5  # nothing ends any more
    assert abs(rate.wait_s(9) - 10) < 0.2
