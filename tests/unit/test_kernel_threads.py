"""Waking one thread out of a system call, and taking pages out of a file."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import threading
import time

import pytest

from nagaya.kernel.files import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE, fallocate
from nagaya.kernel.libc import libc
from nagaya.kernel.threads import INTERRUPT, interrupt_thread, make_thread_interruptible

PATIENCE_S = 5.0


class Sleeper(threading.Thread):
    """In poll(2), which no signal handler restarts, for 5 s or until it is woken."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.result = (0, 0)
        self.ready = threading.Event()

    def run(self) -> None:
        make_thread_interruptible()
        self.ready.set()
        self.result = (libc.poll(None, ctypes.c_ulong(0), ctypes.c_int(5000)), ctypes.get_errno())

    def state(self) -> str:
        with open(f"/proc/self/task/{self.native_id}/stat") as stat:
            return stat.read().rpartition(") ")[2][0]


def test_only_the_named_thread_wakes() -> None:
    sleepers = [Sleeper(), Sleeper()]
    for sleeper in sleepers:
        sleeper.start()
        assert sleeper.ready.wait(PATIENCE_S)
        end = time.monotonic() + PATIENCE_S
        while sleeper.state() != "S" and time.monotonic() < end:
            time.sleep(0.001)
    time.sleep(0.02)  # from the event into the call
    for awake, sleeper in enumerate(sleepers):
        assert [other.is_alive() for other in sleepers] == [False] * awake + [True] * (2 - awake)
        assert sleeper.native_id is not None
        interrupt_thread(sleeper.native_id)
        sleeper.join(PATIENCE_S)
        assert sleeper.result == (-1, errno.EINTR)


def test_thread_that_has_ended_is_no_error() -> None:
    thread = threading.Thread(target=make_thread_interruptible)
    thread.start()
    thread.join()
    assert thread.native_id is not None
    interrupt_thread(thread.native_id)


def test_a_blocked_signal_is_let_through() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {INTERRUPT})
    try:
        make_thread_interruptible()
        assert INTERRUPT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
        interrupt_thread(threading.get_native_id())  # handled: it does not end the process
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_fallocate_takes_pages_out_and_keeps_the_size() -> None:
    fd = os.memfd_create("test")
    try:
        os.write(fd, b"\x01" * 0x4000)
        fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0x1000, 0x2000)
        assert os.pread(fd, 0x4000, 0) == b"\x01" * 0x1000 + bytes(0x2000) + b"\x01" * 0x1000
        assert os.fstat(fd).st_blocks * 512 == 0x2000
        with pytest.raises(OSError, match="fallocate") as caught:
            fallocate(fd, FALLOC_FL_ZERO_RANGE, 0, 0x1000)
        assert caught.value.errno == errno.EOPNOTSUPP  # a memfd has no such thing
        with pytest.raises(OSError, match="fallocate") as caught:
            fallocate(fd, 0, -1, 1)
        assert caught.value.errno == errno.EINVAL
    finally:
        os.close(fd)
