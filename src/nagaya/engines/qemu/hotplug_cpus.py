"""CPUs that come to a PC and leave it while it runs: by ACPI, in the places that it was born with.

The present ones are always the first places, so that a machine of that many, started from saved memory, is the same machine.
A system sees a new CPU by itself; to take it into use many leave to whoever is at work there, or to QEMU's guest agent.
"""

from __future__ import annotations

import time

from nagaya.engines.qemu import guest_agent
from nagaya.engines.qemu.guest_agent import GuestAgent
from nagaya.engines.qemu.monitor import Monitor
from nagaya.errors import Conflict, RemoteError, Unsupported
from nagaya.protocol.qmp import QmpError
from nagaya.static import Any

LETS_GO_WITHIN_S = 10.0
SEES_WITHIN_S = 5.0
_LOOK_AGAIN_S = 0.1
_TOPOLOGY = ("socket-id", "die-id", "core-id", "thread-id")


def set_cpus(monitor: Monitor, wanted: int) -> None:
    """Plug CPUs in, or ask the system to let go of the last ones, until there are `wanted`.

    Raises `Conflict` when it does not let go, `Unsupported` when QEMU takes no more; there are as many as before then.
    """
    places = _places(monitor)
    before = sum("qom-path" in place for place in places)
    try:
        for number in range(before, wanted):
            _plug(monitor, places[number])
        for number in range(before - 1, wanted - 1, -1):
            _unplug(monitor, number, places[number])
    except (QmpError, Conflict) as error:
        _put_back(monitor, before)
        if isinstance(error, Conflict):
            raise
        raise Unsupported(
            f"the machine takes no other number of CPUs now: {error.message}", hint="stop it first"
        ) from None


def _put_back(monitor: Monitor, before: int) -> None:
    """As many as before, as far as that goes: what the system has not let go of is there in any case."""
    places = _places(monitor)
    try:
        for place in places[:before]:
            if "qom-path" not in place:
                _plug(monitor, place)
        for number in range(len(places) - 1, before - 1, -1):
            if "qom-path" in places[number]:
                _unplug(monitor, number, places[number])
    except (QmpError, Conflict):
        return  # `check_number` tells, where it matters


def _places(monitor: Monitor) -> list[dict[str, Any]]:
    """Of CPUs, the first one first. Those with a "qom-path" are taken."""
    told = monitor.command("query-hotpluggable-cpus")
    try:
        return sorted(told, key=lambda place: [place["props"].get(name, 0) for name in _TOPOLOGY])
    except (KeyError, TypeError, AttributeError):
        raise RemoteError("QEMU did not say which CPUs the machine has") from None


def _plug(monitor: Monitor, place: dict[str, Any]) -> None:
    props = {name: int(place["props"][name]) for name in _TOPOLOGY if name in place["props"]}
    monitor.command("device_add", driver=str(place["type"]), **props)


def _unplug(monitor: Monitor, number: int, place: dict[str, Any]) -> None:
    deadline_s = time.monotonic() + LETS_GO_WITHIN_S
    try:
        monitor.command("device_del", id=str(place["qom-path"]))
    except QmpError as error:
        if (
            "not supported device type" not in error.message
        ):  # QEMU's words as long as no system has asked for this by ACPI
            raise
        raise Conflict(
            "the machine's system knows nothing of CPUs that go, or is not up yet",
            hint="stop the machine first: it starts with the new number", state="in use",
        ) from None  # fmt: skip
    while "qom-path" in _places(monitor)[number]:
        if time.monotonic() > deadline_s:
            raise Conflict(
                f"the machine's system has not let go of a CPU within {LETS_GO_WITHIN_S:.0f} s",
                hint="stop the machine first: it starts with the new number",
                state="in use",
            )
        time.sleep(_LOOK_AGAIN_S)


def check_number(monitor: Monitor, expected: int) -> None:
    """Raise `Conflict` when there are not as many as the record says: a system may let go of one late."""
    found = sum("qom-path" in place for place in _places(monitor))
    if found != expected:
        raise Conflict(
            f"the machine has {found} CPUs at the moment, and {expected} on record: its system has let go of one late",
            hint=f"make them the same first: nagaya update --cpus {found}; or --no-memory",
            state="changing",
        )


def take_into_use(monitor: Monitor, agent: GuestAgent | None, wanted: int) -> tuple[str, ...]:
    """Have the guest agent do it; a sentence where that has to be done by hand."""
    by_hand = (
        "where its system does not use a new CPU by itself: echo 1 > /sys/devices/system/cpu/cpuN/online, inside",
    )
    if agent is None or not guest_agent.is_there(monitor):
        return by_hand
    deadline_s = time.monotonic() + SEES_WITHIN_S
    try:
        while (used := agent.use_cpus()) < wanted:
            if time.monotonic() > deadline_s:
                return (f"its system uses {used} of them so far", *by_hand)
            time.sleep(_LOOK_AGAIN_S)
    except RemoteError as error:
        return (f"the guest agent did not take them into use ({error.message})", *by_hand)
    return ()
