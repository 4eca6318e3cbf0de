"""QEMU's guest agent (docs/interop/qemu-ga.rst of QEMU), where a machine's system has it running. What it says is a guest's
word: checked, limited in size, and waited for no longer than the timeouts say.
"""

from __future__ import annotations

import json
import os
import select
import time

from nagaya.engines.qemu.monitor import Monitor
from nagaya.errors import RemoteError
from nagaya.static import Any, NamedTuple

CHANNEL = "org.qemu.guest_agent.0"
CHARDEV = "guest"
ANSWERS_WITHIN_S = 5.0
FREEZES_WITHIN_S = 20.0  # its file systems write out what they hold back
MOST_BYTES = 1 << 20
MOST_CPUS = 4096
MOST_INTERFACES, MOST_ADDRESSES = 64, 64


class GuestLink(NamedTuple):
    """A network interface as the system has it. Addresses with their prefixes."""

    name: str
    mac: str
    addresses: tuple[str, ...]


class GuestAgent:
    """`fd` is our end of its channel, non-blocking, and becomes ours. There may be nobody at the other end."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._number = 0
        self._unread = b""

    def close(self) -> None:
        os.close(self._fd)

    def freeze(self) -> None:
        """All file systems: written out, and written to no more until `thaw`. Raises `RemoteError`; call `thaw` then too."""
        self._ask("guest-fsfreeze-freeze", FREEZES_WITHIN_S)

    def thaw(self) -> None:
        self._ask("guest-fsfreeze-thaw", ANSWERS_WITHIN_S)

    def set_time(self, time_ns: int) -> None:
        self._ask("guest-set-time", ANSWERS_WITHIN_S, {"time": time_ns})

    def use_cpus(self) -> int:
        """Have the system take all CPUs that it knows of into use: plugged in is not yet that. How many it has in use then."""
        idle = [each["logical-id"] for each in self._list_cpus() if not each["online"]]
        if idle:
            told = [{"logical-id": number, "online": True} for number in idle]
            self._ask("guest-set-vcpus", ANSWERS_WITHIN_S, {"vcpus": told})
        return sum(bool(each["online"]) for each in self._list_cpus())

    def _list_cpus(self) -> list[dict[str, int]]:
        answer = self._ask("guest-get-vcpus", ANSWERS_WITHIN_S)
        try:
            return [
                {"logical-id": int(each["logical-id"]), "online": int(each["online"])} for each in answer[:MOST_CPUS]
            ]
        except (KeyError, TypeError, ValueError):
            raise RemoteError("the guest agent does not answer in its protocol") from None

    def find_links(self) -> tuple[GuestLink, ...]:
        """Its network interfaces."""
        answer, found = self._ask("guest-network-get-interfaces", ANSWERS_WITHIN_S), []
        try:
            for each in answer[:MOST_INTERFACES]:
                addresses = each.get("ip-addresses", ())[:MOST_ADDRESSES]
                texts = tuple(f"{one['ip-address']:.64}/{int(one['prefix'])}" for one in addresses)
                found.append(GuestLink(f"{each['name']:.64}", f"{each.get('hardware-address', ''):.64}", texts))
        except (KeyError, TypeError, ValueError, AttributeError):
            raise RemoteError("the guest agent does not answer in its protocol") from None
        return tuple(found)

    def _ask(self, command: str, within_s: float, arguments: dict[str, object] | None = None) -> Any:
        """One command's result. What is left of earlier ones is skipped up to the mark that this one begins with."""
        deadline_s = time.monotonic() + within_s
        self._number += 1
        sync = {"execute": "guest-sync-delimited", "arguments": {"id": self._number}}
        self._write(b"\xff" + json.dumps(sync).encode() + b"\n", deadline_s)
        while self._read(deadline_s).get("return") != self._number:
            pass
        self._write(json.dumps({"execute": command, "arguments": arguments or {}}).encode() + b"\n", deadline_s)
        answer = self._read(deadline_s)
        if "error" in answer:
            error = answer["error"]
            text = str(error.get("desc", "") if isinstance(error, dict) else error)[:200]
            raise RemoteError(f"the guest agent refused {command}: {text if text.isprintable() else 'unprintable'}")
        return answer.get("return")

    def _write(self, data: bytes, deadline_s: float) -> None:
        while data:
            try:
                data = data[os.write(self._fd, data) :]
            except BlockingIOError:
                self._wait(select.POLLOUT, deadline_s)
            except OSError:
                raise RemoteError("the machine's QEMU has ended") from None

    def _read(self, deadline_s: float) -> dict[str, Any]:
        """The next line's object; {} for what is none."""
        while b"\n" not in self._unread:
            try:
                data = os.read(self._fd, 65536)
            except BlockingIOError:
                self._wait(select.POLLIN, deadline_s)
                continue
            except OSError:
                data = b""
            if not data or len(self._unread) > MOST_BYTES:
                self._unread = b""
                raise RemoteError("the guest agent does not answer in its protocol")
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        if time.monotonic() > deadline_s:  # one that talks without an end is no answer
            raise RemoteError("the guest agent does not answer")
        try:
            message = json.loads(line.rpartition(b"\xff")[2])
        except (ValueError, RecursionError):
            return {}
        return message if isinstance(message, dict) else {}

    def _wait(self, events: int, deadline_s: float) -> None:
        poll = select.poll()
        poll.register(self._fd, events)
        left_s = deadline_s - time.monotonic()
        if left_s <= 0 or not poll.poll(left_s * 1000):
            raise RemoteError("the guest agent does not answer")


def is_there(monitor: Monitor) -> bool:
    """Whether somebody in the machine has the channel open."""
    try:
        return any(each["label"] == CHARDEV and each["frontend-open"] for each in monitor.command("query-chardev"))
    except (KeyError, TypeError):
        raise RemoteError("QEMU did not say who listens in the machine") from None
