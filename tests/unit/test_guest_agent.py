"""QEMU's guest agent as a machine's system may play it: whatever it says, it is waited for no longer than was said."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from nagaya.engines.qemu import guest_agent
from nagaya.engines.qemu.guest_agent import GuestAgent, GuestLink
from nagaya.errors import RemoteError

LINKS = [
    {
        "name": "eth0",
        "hardware-address": "52:54:00:00:00:01",
        "ip-addresses": [{"ip-address": "10.0.2.15", "prefix": 24}],
    },
    {"name": "lo"},
]


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[GuestAgent, socket.socket]]:
    monkeypatch.setattr(guest_agent, "ANSWERS_WITHIN_S", 0.3)
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    agent = GuestAgent(ours.detach())
    yield agent, theirs
    agent.close()
    theirs.close()


def serve(theirs: socket.socket, answer: Callable[[str], bytes], early: bytes = b"") -> threading.Thread:
    """An agent that keeps to the protocol up to the answer itself."""

    def run() -> None:
        theirs.sendall(early)
        for line in theirs.makefile("rb"):
            command = json.loads(line.lstrip(b"\xff"))
            if command["execute"] == "guest-sync-delimited":
                theirs.sendall(b"\xff" + json.dumps({"return": command["arguments"]["id"]}).encode() + b"\n")
            else:
                with contextlib.suppress(BrokenPipeError):  # it was not heard to its end
                    theirs.sendall(answer(command["execute"]))
                return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def test_what_it_says_of_its_network(ends: tuple[GuestAgent, socket.socket]) -> None:
    agent, theirs = ends
    serve(theirs, lambda command: json.dumps({"return": LINKS}).encode() + b"\n", early=b'{"return": "late"}\nnoise\n')
    assert agent.find_links() == (
        GuestLink("eth0", "52:54:00:00:00:01", ("10.0.2.15/24",)), GuestLink("lo", "", ()),
    )  # fmt: skip


def test_it_takes_cpus_into_use(monkeypatch: pytest.MonkeyPatch, ends: tuple[GuestAgent, socket.socket]) -> None:
    cpus = [{"logical-id": number, "online": number < 2, "can-offline": number > 0} for number in range(4)]
    asked: list[object] = []

    def ask(self: GuestAgent, command: str, within_s: float, arguments: dict | None = None) -> object:
        asked.append((command, arguments))
        if command == "guest-set-vcpus":
            assert arguments is not None
            for told in arguments["vcpus"][:1]:  # as one that has trouble with the others
                cpus[told["logical-id"]]["online"] = told["online"]
            return 1
        return cpus

    monkeypatch.setattr(GuestAgent, "_ask", ask)
    agent, _ = ends
    assert agent.use_cpus() == 3
    wanted = [{"logical-id": number, "online": True} for number in (2, 3)]
    assert asked[1] == ("guest-set-vcpus", {"vcpus": wanted})
    cpus[:] = cpus[:2]
    del asked[:]
    assert agent.use_cpus() == 2 and [command for command, _ in asked] == ["guest-get-vcpus"] * 2
    cpus[:] = [{"logical-id": "x"}]
    with pytest.raises(RemoteError, match="protocol"):
        agent.use_cpus()


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b'{"return": 5}\n',
        b'{"return": [{"name": 1}, 2]}\n',
        b'{"error": {"desc": "no\\u001b[2J"}}\n',
        b'{"error": 7}\n',
        b"[" * 100_000 + b"\n",
        b"x" * (2 << 20),
    ],
)
def test_nonsense_is_an_error(ends: tuple[GuestAgent, socket.socket], answer: bytes) -> None:
    agent, theirs = ends
    serve(theirs, lambda command: answer)
    with pytest.raises(RemoteError) as caught:
        agent.find_links()
    assert caught.value.message.isprintable()


def test_silence_and_an_end_are_errors(ends: tuple[GuestAgent, socket.socket]) -> None:
    agent, theirs = ends
    with pytest.raises(RemoteError, match="does not answer"):
        agent.thaw()
    theirs.shutdown(socket.SHUT_RDWR)
    with pytest.raises(RemoteError):
        agent.thaw()
