"""When a machine that moves has little enough left to stand for it, and when it never will."""

from __future__ import annotations

from nagaya.errors import Conflict
from nagaya.migration.departure import Pace, Steps, Terms

MIB = 1 << 20


def make(max_downtime_ms: int = 130) -> Pace:
    return Pace(Terms(max_downtime_ms), adopt_s=0.03, hint="or try when it is quiet")


def test_what_can_be_sent_in_the_time_that_is_left_is_little() -> None:
    pace = make()
    pace.measure(100 * MIB, 1.0)
    assert pace.is_little(10 * MIB - 1) and not pace.is_little(11 * MIB)
    assert not make(20).is_little(1)  # the target alone takes longer


def test_a_little_says_nothing_of_the_rate() -> None:
    pace = make()
    pace.measure(1000, 1.0)
    assert pace.rate == 1000  # there is nothing better yet
    pace.measure(50 * MIB, 1.0)
    pace.measure(1000, 1.0)
    assert pace.rate == 50 * MIB


def test_five_rounds_that_leave_as_much_are_enough() -> None:
    pace = make()
    assert [pace.does_not_converge(10 * MIB) for _ in range(6)] == [False] * 5 + [True]


def test_rounds_that_leave_less_each_time_go_on() -> None:
    pace = make()
    left = 1 << 40
    for pace.round in range(60):
        assert not pace.does_not_converge(left)
        left = left * 8 // 10
    pace.round = 60
    assert pace.does_not_converge(left)


def test_the_refusal_says_what_would_do() -> None:
    pace = make()
    pace.measure(10 * MIB, 1.0)
    pace.round, pace.left = 7, 20 * MIB
    refusal = pace.refuse()
    assert isinstance(refusal, Conflict)
    assert "after 7 rounds 20480 KiB" in refusal.message and "10 MiB/s" in refusal.message
    assert "stand for 2030 ms" in refusal.message
    assert "--max-downtime 304" in refusal.hint and refusal.hint.endswith("or try when it is quiet")


def test_steps_add_up() -> None:
    steps = Steps()
    steps.begin()
    for name in ("pause", "rest"):
        steps.end(name)
    assert set(steps.took_ms) == {"pause", "rest"} and steps.total_ms == round(sum(steps.took_ms.values()), 1)
