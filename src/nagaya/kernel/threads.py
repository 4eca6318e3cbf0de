"""Threads that answer at once: woken out of a system call by a signal whose handler does nothing, and on time."""

from __future__ import annotations

import ctypes
import os

from nagaya.kernel.libc import libc, syscall
from nagaya.kernel.process import prctl

# Not by Python's `signal`: it makes enumerations of all that there is, which takes 2 ms of a start of 10.
SYS_TGKILL = 234
SIG_UNBLOCK = 1
PR_SET_TIMERSLACK = 29
INTERRUPT: int = libc.__libc_current_sigrtmin() + 4
_SIGSET_BYTES = 128
_SIG_ERR = ctypes.c_void_p(-1).value

_prepared = False


def make_thread_interruptible() -> None:
    """Let `interrupt_thread` wake the calling thread. The handler is the process's, and is set once."""
    global _prepared
    if not _prepared:
        # A function of the C library that takes an int and does nothing else: Python's own handlers can be set on the
        # main thread alone, and run there.
        libc.signal.restype = ctypes.c_void_p
        if libc.signal(ctypes.c_int(INTERRUPT), ctypes.cast(libc.abs, ctypes.c_void_p)) == _SIG_ERR:
            raise OSError(ctypes.get_errno(), "signal: the handler cannot be set")
        _prepared = True
    signals = ctypes.create_string_buffer(_SIGSET_BYTES)
    libc.sigemptyset(signals)
    libc.sigaddset(signals, INTERRUPT)
    error = libc.pthread_sigmask(SIG_UNBLOCK, signals, None)
    if error:
        raise OSError(error, "pthread_sigmask: the signal cannot be let through")


def make_thread_punctual() -> None:
    """Have the calling thread's timed waits end on time. Linux lets them sleep up to 50 us longer (prctl(2), timer slack)."""
    prctl(PR_SET_TIMERSLACK, 1)


def interrupt_thread(thread_id: int) -> None:
    """Make the system call that a thread of this process is in return EINTR; one that has ended is no error.

    The handler restarts what can be restarted, as read(2): it is for KVM_RUN, poll(2) and others that never are.
    """
    try:
        syscall("tgkill", SYS_TGKILL, ctypes.c_int(os.getpid()), ctypes.c_int(thread_id), ctypes.c_int(INTERRUPT))
    except ProcessLookupError:
        pass
