"""Threads and a condition without `threading`."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType

import pytest

from nagaya.kernel.light_threads import Condition, Thread

PATIENCE_S = 5.0


def test_join_waits_for_the_end() -> None:
    done: list[int] = []

    def work(number: int) -> None:
        time.sleep(0.05)
        done.append(number)

    threads = [Thread(work, number) for number in range(3)]
    for thread in threads:
        thread.join()
        thread.join()  # once more is no harm
    assert sorted(done) == [0, 1, 2]


def test_thread_that_raises_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    said = threading.Event()
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: said.set())

    def fail() -> None:
        raise ValueError("on purpose")

    Thread(fail).join()
    assert said.wait(PATIENCE_S)


def test_thread_knows_itself() -> None:
    seen: list[bool] = []
    started = threading.Event()

    def look() -> None:
        started.wait(PATIENCE_S)
        seen.append(thread.is_current)

    thread = Thread(look)
    assert thread.is_alive() and not thread.is_current
    started.set()
    thread.join()
    assert seen == [True]
    assert not thread.is_alive() and not thread.is_current


def test_all_who_wait_hear_of_a_change() -> None:
    condition = Condition()
    ready, heard = [False], []

    def wait(number: int) -> None:
        with condition:
            assert condition.wait_for(lambda: ready[0], PATIENCE_S)
            heard.append(number)

    threads = [Thread(wait, number) for number in range(4)]
    for _ in range(2):  # a call for nothing leaves them waiting
        with condition:
            condition.notify_all()
        time.sleep(0.02)
        assert heard == []
    with condition:
        ready[0] = True
        condition.notify_all()
    for thread in threads:
        thread.join()
    assert sorted(heard) == [0, 1, 2, 3]


def test_wait_ends_with_its_time() -> None:
    condition = Condition()
    began = time.monotonic()
    with condition:
        assert not condition.wait_for(lambda: False, 0.05)
    assert 0.05 <= time.monotonic() - began < PATIENCE_S
    with condition:  # and has left nothing behind
        assert condition.wait_for(lambda: True, 0)
        condition.notify_all()


def test_signal_handler_may_tell_of_a_change_whatever_its_thread_does() -> None:
    condition = Condition()
    changed: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        with condition:
            changed.append(number)
            condition.notify_all()

    before = signal.signal(signal.SIGUSR1, handle)
    try:
        with condition:
            os.kill(os.getpid(), signal.SIGUSR1)  # while it is held
            assert condition.wait_for(lambda: len(changed) == 1, PATIENCE_S)
        timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1))
        timer.start()
        with condition:  # and while it is waited for
            assert condition.wait_for(lambda: len(changed) == 2, PATIENCE_S)
        timer.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
