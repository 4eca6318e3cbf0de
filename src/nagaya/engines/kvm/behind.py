"""Saving behind a machine's back: a forked child has its memory as it was, copy-on-write, and writes that while it runs on.

The fork is the whole pause: it copies page tables, a few milliseconds for a few hundred megabytes. Whatever happens to the
child, the machine does not notice.
"""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable

from nagaya.engines.kvm import saved
from nagaya.engines.kvm.saved import Files, Saved
from nagaya.errors import Conflict, HostError, NagayaError, to_wire
from nagaya.kernel.light_threads import Thread
from nagaya.kernel.process import PR_SET_DUMPABLE, close_all_but, die_with, prctl
from nagaya.memory import GuestMemory
from nagaya.static import Any, NamedTuple, NoReturn

_NICE = 5


class Order(NamedTuple):
    """What is to be written. The descriptors are the caller's."""

    files: Files
    answer: int  # a socket: one JSON line when it has ended. Who wants no answer any more closes the other end
    notes: dict[str, Any]
    base: Saved | None = None  # write what is not the same there
    place: str = ""  # where that is, seen from the directory that is written


def start(order: Order, memory: GuestMemory, state: dict[str, Any], ended: Callable[[], None]) -> None:
    """Fork the child that writes `memory`, and what `state` has beside it; `ended` hears of its end, on a thread.

    Raises `OSError`.
    """
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        _run(order, memory, state, parent)

    def reap() -> None:
        os.waitpid(pid, 0)
        ended()

    Thread(reap)


def _run(order: Order, memory: GuestMemory, state: dict[str, Any], parent: int) -> NoReturn:
    """In the child, which has but one of its parent's threads; never returns."""
    import json

    message: dict[str, Any]
    try:
        die_with(parent)
        prctl(PR_SET_DUMPABLE, 1)  # whoever changed its ids may not look at its own page map otherwise
        memory.open_page_map()
        bases = order.base.fds if order.base is not None else ()
        # Above all not the virtual machine, which lives as long as anybody holds it.
        close_all_but((2, *memory.fds, order.answer, *order.files, *bases), first=0)
        os.nice(_NICE)
        saved.write(
            order.files, memory, {**state, "notes": order.notes}, base=order.base, place=order.place,
            look_up=lambda: _look_up(order.answer),
        )  # fmt: skip
        message = {"done": {}}
    except NagayaError as error:
        message = {"error": to_wire(error)}
    except OSError as error:
        message = {"error": to_wire(HostError.from_os(error, "cannot save the machine"))}
    except BaseException:
        sys.excepthook(*sys.exc_info())
        message = {"error": to_wire(HostError("the machine could not be saved: its writer broke"))}
    finally:
        try:
            os.write(order.answer, json.dumps(message).encode() + b"\n")
        finally:
            os._exit(0)


def _look_up(answer: int) -> None:
    poll = select.poll()
    poll.register(answer, 0)  # POLLHUP comes unasked
    if poll.poll(0):
        raise Conflict("nobody wants the machine saved any more", state="given up", required="wanted")
