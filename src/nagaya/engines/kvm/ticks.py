"""Fewer timer interrupts for a guest whose kernel is emulated: one costs 2.5 ms there, and Linux takes 100 a second.

A quarter of a boot would go to them, and a quarter of every program that computes. Each vCPU has a budget instead (a
leaky bucket, as ATM's generic cell rate algorithm has it: ITU-T I.371): a guest that sleeps and wakes now and then has its timers on
time; one that asks for them all the time gets `PER_SECOND`.
"""

from __future__ import annotations

MSR_TSC = 0x10
MSR_TSC_DEADLINE = 0x6E0
PER_SECOND = 20
BURST = 16


class Ticks:
    """The budget of one vCPU, in units of its TSC."""

    def __init__(self, tsc_khz: int) -> None:
        self._gap = tsc_khz * 1000 // PER_SECOND
        self._deadline = 0  # what is set; 0 = none
        self._spent = 0  # when all that was granted would have been, at the steady rate
        self._before = 0  # as it was before the deadline that is set
        self.postponed = 0

    def grant(self, wanted: int, now: int) -> int:
        """The deadline to set for the one that the guest wants; 0, which disarms the timer, stays 0."""
        if self._deadline > now:  # it has not fired: it is replaced, and cost nothing
            self._spent = self._before
        self._before = self._spent
        if not wanted:
            self._deadline = 0
            return 0
        self._spent = max(self._spent, now)
        granted = max(wanted, self._spent - BURST * self._gap)
        self._spent = max(self._spent, granted - BURST * self._gap) + self._gap
        self._deadline = granted
        self.postponed += granted > wanted
        return granted
