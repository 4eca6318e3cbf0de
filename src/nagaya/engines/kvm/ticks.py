"""Fewer timer interrupts for a guest whose kernel is emulated: one costs 2.5 ms there, and Linux takes 100 a second.

A quarter of a boot would go to them, and a quarter of every program that computes; and where the vCPU has a CPU only now
and then, all of it: with a fifth of one, a tick takes longer than the time to the next, and the guest does nothing else.
So each vCPU has a budget (a leaky bucket, as ATM's generic cell rate algorithm has it: ITU-T I.371), which is not filled
by the clock but by the time that it worked, and more quickly by the time that it rested; not by the time that it waited
for a CPU. A guest that sleeps and wakes has its timers on time; one that computes loses a fortieth of its time to them.
"""

from __future__ import annotations

import _thread
import os
import time

from nagaya.static import Callable

BUSY_NS = 100_000_000
"""Of work, for one interrupt."""
IDLE_NS = 25_000_000
"""Of rest. Until late in its boot, Linux has its tick on idle CPUs too: they take the host's CPUs from the one that works."""
BURST = 16
_MOST_STRETCH = 32.0
_LEAST_SAMPLE_NS = 1_000_000


class ThreadTimes:
    """Of the thread that calls: how long it has been on a CPU, and how long it has waited for one, in ns."""

    def __init__(self) -> None:
        self._fd = -1
        self._thread_id = 0

    def __call__(self) -> tuple[int, int]:
        try:
            if self._thread_id != _thread.get_native_id():
                self.close()
                self._thread_id = _thread.get_native_id()
                self._fd = os.open(f"/proc/self/task/{self._thread_id}/schedstat", os.O_RDONLY | os.O_CLOEXEC)
            busy, waited, _ = os.pread(self._fd, 128, 0).split()
            return int(busy), int(waited)
        except (OSError, ValueError):  # a kernel without CONFIG_SCHED_INFO, a /proc that is not there
            return time.thread_time_ns(), 0

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Ticks:
    """The budget of one vCPU. Deadlines are in units of its TSC."""

    def __init__(self, tsc_khz: int, times: Callable[[], tuple[int, int]]) -> None:
        """`times` says how long the vCPU has worked, and waited for a CPU, in ns."""
        self._khz = tsc_khz
        self._times = times
        self._credit = float(BURST)
        self._deadline = 0  # what is set; 0 = none
        self._last: tuple[int, int, int] | None = None
        self._stretch = 1.0  # of a time of work, by waiting for a CPU
        self.postponed = 0

    def begin_spent(self) -> None:
        """Grant nothing ahead: of a machine that goes on from a template, the first thing it does is its user's work."""
        self._credit = 1.0

    def grant(self, wanted: int, now: int) -> int:
        """The deadline to set for the one that the guest wants; 0, which disarms the timer, stays 0."""
        self._fill(now)
        if self._deadline > now:  # it has not fired: it is replaced, and cost nothing
            self._credit += 1
        if not wanted:
            self._deadline = 0
            return 0
        self._credit = max(self._credit - 1, -1.0)
        granted = wanted
        if self._credit < 0:
            granted = max(wanted, now + int(-self._credit * BUSY_NS * self._stretch) * self._khz // 1_000_000)
        self._deadline = granted
        self.postponed += granted > wanted
        return granted

    def _fill(self, now: int) -> None:
        busy, waited = self._times()
        if self._last is not None:
            passed = (now - self._last[0]) * 1_000_000 // self._khz
            worked, wait = busy - self._last[1], waited - self._last[2]
            rested = max(0, passed - worked - wait)
            self._credit = min(float(BURST), self._credit + worked / BUSY_NS + rested / IDLE_NS)
            if worked >= _LEAST_SAMPLE_NS:
                self._stretch = min(_MOST_STRETCH, (worked + wait) / worked)
        self._last = now, busy, waited
