"""The devices' thread: who may call into it, what comes back, and how it ends."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from nagaya.virtio.loop import Loop

PATIENCE_S = 5.0


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop("test")
    made.start()
    yield made
    made.close()


@pytest.fixture
def kick() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


class Log:
    """What was called back, on which thread."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self.seen: list[str] = []
        self.threads: set[int] = set()

    def add(self, text: str) -> None:
        with self._condition:
            self.seen.append(text)
            self.threads.add(threading.get_ident())
            self._condition.notify_all()

    def wait_for(self, count: int) -> None:
        with self._condition:
            assert self._condition.wait_for(lambda: len(self.seen) >= count, PATIENCE_S), self.seen


def taking(fd: int, log: Log, text: str = "kicked") -> Callable[[], None]:
    def callback() -> None:
        os.eventfd_read(fd)
        log.add(text)

    return callback


def test_calls_run_on_the_loops_thread(loop: Loop) -> None:
    one, other = loop.call(threading.get_ident), loop.call(threading.get_ident)
    assert one == other != threading.get_ident()


def test_call_from_the_loops_thread_runs_at_once(loop: Loop) -> None:
    assert loop.call(lambda: loop.call(lambda: loop.call(threading.get_ident))) != threading.get_ident()


def test_calls_from_many_threads_run_one_at_a_time(loop: Loop) -> None:
    count, errors = 0, []

    def add() -> int:
        nonlocal count
        seen = count
        time.sleep(0)
        count = seen + 1
        return count

    def caller() -> None:
        results = [loop.call(add) for _ in range(200)]
        if results != sorted(set(results)):
            errors.append(results)

    threads = [threading.Thread(target=caller) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (count, errors) == (1200, [])


@pytest.mark.parametrize("error", [ValueError("refused"), OSError(5, "io"), KeyboardInterrupt(), SystemExit(3)])
def test_exceptions_are_the_callers(loop: Loop, error: BaseException) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        loop.call(fail)
    assert caught.value is error
    assert loop.call(lambda: "goes on") == "goes on"


def test_watched_descriptor_calls_back(loop: Loop, kick: int) -> None:
    log = Log()
    loop.watch(kick, taking(kick, log))
    for number in range(3):
        os.eventfd_write(kick, 1)
        log.wait_for(number + 1)
    assert log.threads == {loop.call(threading.get_ident)}
    assert len(log.seen) == 3  # and not for ever


def test_watching_again_replaces(loop: Loop, kick: int) -> None:
    log = Log()
    loop.watch(kick, taking(kick, log, "first"))
    loop.watch(kick, taking(kick, log, "second"))
    os.eventfd_write(kick, 1)
    log.wait_for(1)
    assert log.seen == ["second"]


def test_writable_is_asked_for_by_itself(loop: Loop) -> None:
    reader, writer = os.pipe()
    log = Log()

    def writable() -> None:
        loop.watch(writer, lambda: None, readable=False, writable=False)
        log.add("writable")

    loop.watch(writer, writable, readable=False, writable=True)
    log.wait_for(1)
    loop.call(lambda: None)
    assert log.seen == ["writable"]
    loop.unwatch(writer)
    os.close(reader)
    os.close(writer)


def test_unwatched_descriptor_does_not(loop: Loop, kick: int) -> None:
    log = Log()
    loop.watch(kick, taking(kick, log))
    loop.unwatch(kick)
    loop.unwatch(kick)
    os.eventfd_write(kick, 1)
    time.sleep(0.02)
    loop.call(lambda: None)
    assert log.seen == []
    loop.watch(kick, taking(kick, log))  # what is pending is seen
    log.wait_for(1)


def test_unwatch_in_a_callback_holds_for_the_same_round(loop: Loop) -> None:
    """Both are ready at once; whichever comes first takes the other away, which may even be closed then."""
    fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
    log = Log()

    def callback_of(mine: int, other: int) -> Callable[[], None]:
        def callback() -> None:
            os.eventfd_read(fds[mine])
            loop.unwatch(fds[other])
            log.add(str(mine))

        return callback

    def begin() -> None:  # on the loop's thread: nothing is polled before both are ready
        for mine, other in ((0, 1), (1, 0)):
            os.eventfd_write(fds[mine], 1)
            loop.watch(fds[mine], callback_of(mine, other))

    loop.call(begin)
    log.wait_for(1)
    time.sleep(0.02)
    loop.call(lambda: None)
    assert len(log.seen) == 1
    for fd in fds:
        loop.unwatch(fd)
        os.close(fd)


def test_unwatch_of_itself_in_a_callback(loop: Loop, kick: int) -> None:
    log = Log()

    def callback() -> None:
        loop.unwatch(kick)  # without taking the kick: it stays ready
        log.add("once")

    loop.watch(kick, callback)
    os.eventfd_write(kick, 1)
    log.wait_for(1)
    time.sleep(0.02)
    assert log.seen == ["once"]


def test_callback_that_fails_is_reported_and_not_asked_again(
    loop: Loop, kick: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = os.eventfd(0, os.EFD_NONBLOCK)
    reported, log = Log(), Log()
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: reported.add(str(error)))

    def fail() -> None:
        raise RuntimeError("a bug")

    loop.watch(kick, fail)
    loop.watch(other, taking(other, log))
    os.eventfd_write(kick, 1)
    reported.wait_for(1)
    os.eventfd_write(other, 1)
    log.wait_for(1)
    assert reported.seen == ["a bug"]
    loop.unwatch(other)
    os.close(other)


def test_without_a_thread_calls_run_where_they_are_made() -> None:
    made = Loop()
    assert made.call(threading.get_ident) == threading.get_ident()
    made.start()
    assert made.call(threading.get_ident) != threading.get_ident()
    made.close()
    assert made.call(threading.get_ident) == threading.get_ident()


def test_close_ends_the_thread_and_gives_everything_back() -> None:
    before = (len(os.listdir("/proc/self/fd")), threading.active_count())
    for started in (True, False):
        made = Loop()
        if started:
            made.start()
            made.call(lambda: None)
        made.close()
        made.close()
        made.unwatch(0)  # devices are closed after their loop
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before


def test_close_answers_the_calls_that_it_has_been_given() -> None:
    """Callers race with the end: each gets its result, from either thread, and none waits for ever."""
    for _ in range(20):
        made = Loop()
        made.start()
        results: list[int] = []
        threads = [
            threading.Thread(target=lambda: results.extend(made.call(lambda: 1) for _ in range(20)))  # noqa: B023
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        made.close()
        for thread in threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()
        assert len(results) == 60


def test_busy_descriptor_does_not_keep_calls_out(loop: Loop, kick: int) -> None:
    os.eventfd_write(kick, 1)
    loop.watch(kick, lambda: None)  # never taken: ready at each round
    begun = time.monotonic()
    for _ in range(20):
        loop.call(lambda: None)
    assert time.monotonic() - begun < 10  # for ever, otherwise
    loop.unwatch(kick)
