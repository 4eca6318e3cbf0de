"""A vCPU's timer budget: what a guest asks for, and what it gets."""

from __future__ import annotations

import os
import threading
import time
from itertools import pairwise

from nagaya.engines.kvm.ticks import BURST, BUSY_NS, IDLE_NS, ThreadTimes, Ticks

KHZ = 2_000_000  # two for each nanosecond
TICK_NS = 10_000_000


class Guest:
    """A guest that sets its timer anew each time that it fires, on a host that gives it `share` of a CPU."""

    def __init__(self, *, busy: float, share: float = 1.0) -> None:
        """`busy` is how much of the time that it has a CPU it works."""
        self.busy, self.share = busy, share
        self.ticks = Ticks(KHZ, lambda: (int(self.worked), int(self.waited)))
        self.now = 0
        self.worked = self.waited = 0.0

    def pass_time(self, ns: int) -> None:
        self.now += ns
        active = ns * self.busy
        self.worked += active * self.share
        self.waited += active * (1 - self.share)

    def run(self, *, step_ns: int, count: int) -> list[int]:
        """When its timer fires, in ns."""
        fired = []
        for _ in range(count):
            granted = self.ticks.grant((self.now + step_ns) * 2, self.now * 2) // 2
            assert granted >= self.now + step_ns
            self.pass_time(granted - self.now)
            fired.append(self.now)
        return fired


def test_a_guest_that_sleeps_and_wakes_is_on_time() -> None:
    guest = Guest(busy=0.2)
    fired = guest.run(step_ns=2 * IDLE_NS, count=500)
    assert fired == [2 * IDLE_NS * (number + 1) for number in range(500)] and not guest.ticks.postponed


def test_one_that_asks_for_more_than_rest_pays_for_gets_its_share() -> None:
    fired = Guest(busy=0.0).run(step_ns=IDLE_NS // 100, count=1000)
    assert fired[999] - fired[899] >= 99 * IDLE_NS


def test_a_guest_that_computes_gets_its_burst_and_then_its_share() -> None:
    guest = Guest(busy=1.0)
    fired = guest.run(step_ns=TICK_NS, count=200)
    assert fired[:BURST] == [TICK_NS * (number + 1) for number in range(BURST)]
    late = [second - first for first, second in pairwise(fired[60:])]
    assert all(abs(distance - BUSY_NS) <= 2 * TICK_NS for distance in late)
    assert guest.ticks.postponed > 100


def test_ticks_do_not_crowd_out_the_work_of_a_guest_that_waits_for_a_cpu() -> None:
    """Found on a busy host: spaced by the clock alone, they took all that the guest got, and it never came to its program."""
    guest = Guest(busy=1.0, share=0.1)
    guest.run(step_ns=TICK_NS, count=60)
    before, worked = len(guest.run(step_ns=TICK_NS, count=50)), guest.worked
    guest.run(step_ns=TICK_NS, count=50)
    assert (guest.worked - worked) / before >= 0.9 * BUSY_NS


def test_rest_fills_the_budget_again() -> None:
    guest = Guest(busy=1.0)
    guest.run(step_ns=TICK_NS, count=100)
    guest.busy = 0.0
    guest.pass_time(BURST * IDLE_NS + BUSY_NS)
    guest.busy = 1.0
    later = guest.now
    assert guest.run(step_ns=TICK_NS, count=3) == [later + TICK_NS * number for number in (1, 2, 3)]


def test_a_timer_that_is_replaced_before_it_fires_costs_nothing() -> None:
    guest = Guest(busy=1.0)
    for number in range(1000):
        assert guest.ticks.grant(10 * BUSY_NS, number) == 10 * BUSY_NS
    assert not guest.ticks.postponed


def test_disarming_is_granted_always() -> None:
    guest = Guest(busy=1.0)
    guest.run(step_ns=TICK_NS, count=100)
    assert guest.ticks.grant(0, 2 * guest.now) == 0


def test_a_threads_times() -> None:
    found = []

    def measure() -> None:
        times = ThreadTimes()
        before = times()
        end = time.thread_time() + 0.02
        while time.thread_time() < end:
            pass
        between = times()
        time.sleep(0.05)
        after = times()
        found.extend((before, between, after))
        held = len(os.listdir("/proc/self/fd"))
        times.close()
        assert len(os.listdir("/proc/self/fd")) == held - 1

    thread = threading.Thread(target=measure)
    thread.start()
    thread.join()
    before, between, after = found
    assert between[0] - before[0] > 0.015e9 and after[0] - between[0] < 0.02e9
    assert between[1] >= before[1]
