"""A vCPU's timer budget: what a guest asks for, and what it gets."""

from __future__ import annotations

from itertools import pairwise

from nagaya.engines.kvm.ticks import BURST, PER_SECOND, Ticks

KHZ = 1_000_000
SECOND = KHZ * 1000
GAP = SECOND // PER_SECOND


def run(ticks: Ticks, *, step: int, count: int, start: int = 0) -> list[int]:
    """A guest that sets its timer anew each time that it fires; when it fires."""
    now, fired = start, []
    for _ in range(count):
        now = ticks.grant(now + step, now)
        fired.append(now)
    return fired


def test_a_guest_that_wakes_now_and_then_is_on_time() -> None:
    ticks = Ticks(KHZ)
    fired = run(ticks, step=2 * GAP, count=50)
    assert fired == [2 * GAP * (number + 1) for number in range(50)] and not ticks.postponed


def test_a_periodic_tick_gets_its_burst_and_then_its_share() -> None:
    ticks = Ticks(KHZ)
    fired = run(ticks, step=SECOND // 100, count=200)
    assert fired[:BURST] == [SECOND // 100 * (number + 1) for number in range(BURST)]
    late = [second - first for first, second in pairwise(fired[60:])]
    assert all(abs(distance - GAP) <= 1 for distance in late)
    assert ticks.postponed > 100


def test_rest_fills_the_budget_again() -> None:
    ticks = Ticks(KHZ)
    end = run(ticks, step=SECOND // 100, count=100)[-1]
    later = end + BURST * GAP
    assert run(ticks, step=SECOND // 100, count=3, start=later)[0] == later + SECOND // 100


def test_a_timer_that_is_replaced_before_it_fires_costs_nothing() -> None:
    ticks = Ticks(KHZ)
    for number in range(1000):
        assert ticks.grant(10 * GAP, number) == 10 * GAP
    assert not ticks.postponed


def test_disarming_is_granted_always() -> None:
    ticks = Ticks(KHZ)
    run(ticks, step=SECOND // 1000, count=100)
    assert ticks.grant(0, 5 * SECOND) == 0
