"""virtio-fs: every vhost-user message, against a daemon that is a thread of the test; what a bad or dying one does."""

from __future__ import annotations

import mmap
import os
import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from nagaya.errors import GuestFault, RemoteError, Unsupported, UsageError
from nagaya.virtio import vhost_user
from nagaya.virtio.device import RING_EVENT_IDX, RING_INDIRECT_DESC, VERSION_1
from nagaya.virtio.fs import FileSystem
from nagaya.virtio.vhost_user import VhostUser
from tests.virtio_rig import Rig

TRANSPORT = VERSION_1 | RING_INDIRECT_DESC | RING_EVENT_IDX
ALL_PROTOCOL = vhost_user.PROTOCOL_F_MQ | vhost_user.PROTOCOL_F_REPLY_ACK | vhost_user.PROTOCOL_F_CONFIG
SETTERS = {
    vhost_user.SET_OWNER, vhost_user.SET_FEATURES, vhost_user.SET_PROTOCOL_FEATURES, vhost_user.SET_MEM_TABLE,
    vhost_user.SET_VRING_NUM, vhost_user.SET_VRING_BASE, vhost_user.SET_VRING_ADDR, vhost_user.SET_VRING_KICK,
    vhost_user.SET_VRING_CALL, vhost_user.SET_VRING_ENABLE,
}  # fmt: skip


class Daemon:
    """Answers as a daemon does, and keeps what it was sent: (request, payload, descriptors)."""

    def __init__(self, *, features: int = TRANSPORT, protocol: int = ALL_PROTOCOL, refuses: int = 0) -> None:
        self.features, self.protocol, self.refuses = features | vhost_user.F_PROTOCOL_FEATURES, protocol, refuses
        self.requests: list[tuple[int, bytes, list[int]]] = []
        self.agreed = 0
        ours, self.socket = socket.socketpair()
        self.front = VhostUser(ours.detach())
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while True:
            header, fds, _, _ = socket.recv_fds(self.socket, 12, 8)
            if not header:
                return
            request, flags, size = struct.unpack("<III", header)
            payload = self.socket.recv(size, socket.MSG_WAITALL) if size else b""
            self.requests.append((request, payload, fds))
            answer = self.answer(request, payload)
            if request in SETTERS:
                assert bool(flags & 8) == bool(self.agreed & vhost_user.PROTOCOL_F_REPLY_ACK)
                answer = struct.pack("<Q", request == self.refuses) if flags & 8 else None
            if request == vhost_user.SET_PROTOCOL_FEATURES:
                (self.agreed,) = struct.unpack("<Q", payload)
            if answer is not None:
                self.socket.sendall(struct.pack("<III", request, 1 | 4, len(answer)) + answer)

    def answer(self, request: int, payload: bytes) -> bytes | None:
        if request == vhost_user.GET_FEATURES:
            return struct.pack("<Q", self.features)
        if request == vhost_user.GET_PROTOCOL_FEATURES:
            return struct.pack("<Q", self.protocol | 1 << 40)
        if request == vhost_user.GET_QUEUE_NUM:
            return struct.pack("<Q", 4)
        if request == vhost_user.GET_CONFIG:
            return payload[:12] + b"from-the-daemon".ljust(36, b"\0") + struct.pack("<I", 9)
        if request == vhost_user.GET_VRING_BASE:
            return payload[:4] + struct.pack("<I", 7)
        return None

    def sent(self, request: int) -> list[tuple[bytes, list[int]]]:
        return [(payload, fds) for sent, payload, fds in self.requests if sent == request]

    def close(self) -> None:
        self.socket.shutdown(socket.SHUT_RDWR)
        self.thread.join()
        self.socket.close()
        for _, _, fds in self.requests:
            for fd in fds:
                os.close(fd)


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    made = Daemon()
    yield made
    made.front.close()
    made.close()


def start(daemon: Daemon) -> Rig:
    daemon.front.greet()
    return Rig(FileSystem("fs0", daemon.front, tag="work")).start()


def test_greeting(daemon: Daemon) -> None:
    daemon.front.greet()
    assert daemon.front.features == TRANSPORT
    assert daemon.front.most_queues == 4
    assert daemon.agreed == ALL_PROTOCOL
    assert [request for request, _, _ in daemon.requests][:2] == [vhost_user.SET_OWNER, vhost_user.GET_FEATURES]


def test_the_daemon_gets_memory_and_rings(daemon: Daemon) -> None:
    rig = start(daemon)
    memory = rig.memory
    ((features, _),) = daemon.sent(vhost_user.SET_FEATURES)
    assert struct.unpack("<Q", features)[0] == TRANSPORT | vhost_user.F_PROTOCOL_FEATURES
    ((table, fds),) = daemon.sent(vhost_user.SET_MEM_TABLE)
    region = memory.regions[0]
    assert struct.unpack("<IIQQQQ", table) == (1, 0, 0, memory.size_bytes, region.hva, 0)
    memory.write(0x5000, b"shared")
    with mmap.mmap(fds[0], memory.size_bytes) as mapped:
        assert mapped[0x5000:0x5006] == b"shared"
    for number, queue in enumerate(rig.queues):
        assert queue is not None
        address, _ = daemon.sent(vhost_user.SET_VRING_ADDR)[number]
        hva = [region.hva + gpa for gpa in (queue.descriptors, queue.used, queue.available)]
        assert struct.unpack("<IIQQQQ", address) == (number, 0, *hva, 0)
        assert daemon.sent(vhost_user.SET_VRING_NUM)[number][0] == struct.pack("<II", number, queue.size)
        assert daemon.sent(vhost_user.SET_VRING_BASE)[number][0] == struct.pack("<II", number, 0)
        assert daemon.sent(vhost_user.SET_VRING_ENABLE)[number][0] == struct.pack("<II", number, 1)
    rig.close()


def test_kicks_and_interrupts(daemon: Daemon) -> None:
    rig = start(daemon)
    kicks = [fds[0] for _, fds in daemon.sent(vhost_user.SET_VRING_KICK)]
    calls = [fds[0] for _, fds in daemon.sent(vhost_user.SET_VRING_CALL)]
    assert [os.eventfd_read(fd) for fd in kicks] == [1, 1]  # the driver may have been early
    rig.kick(1)
    assert os.eventfd_read(kicks[1]) == 1
    os.eventfd_write(calls[1], 1)
    rig.until(lambda: rig.interrupts == [0, 1])
    assert rig.device.counters() == {"kicks": 1, "interrupts": 1}
    rig.close()


def test_reset_takes_the_rings_back(daemon: Daemon) -> None:
    rig = start(daemon)
    rig.restart()
    assert [payload[:4] for payload, _ in daemon.sent(vhost_user.GET_VRING_BASE)] == [b"\0" * 4, b"\1\0\0\0"]
    assert len(daemon.sent(vhost_user.SET_MEM_TABLE)) == 2
    rig.kick(0)
    rig.close()


def test_a_dead_daemon_stops_its_device_only(daemon: Daemon) -> None:
    rig = start(daemon)
    daemon.socket.shutdown(socket.SHUT_RDWR)
    rig.until(lambda: bool(rig.faults))
    assert rig.faults == ["fs0: its daemon ended"]
    with pytest.raises(GuestFault, match="ended"):
        rig.kick(1)
    with pytest.raises(GuestFault, match="ended"):
        rig.restart()
    assert rig.call(lambda: 5) == 5
    rig.close()


def test_a_daemon_that_dies_while_it_is_asked(daemon: Daemon) -> None:
    rig = start(daemon)
    rig.call(lambda: (daemon.socket.shutdown(socket.SHUT_RDWR), rig.device.reset()))
    assert rig.device.ended
    rig.close()


def test_a_daemon_that_refuses_the_memory() -> None:
    daemon = Daemon(refuses=vhost_user.SET_MEM_TABLE)
    daemon.front.greet()
    rig = Rig(FileSystem("fs0", daemon.front, tag="work"))
    with pytest.raises(GuestFault, match="refused"):
        rig.start()
    rig.close()
    daemon.close()


def test_configuration(daemon: Daemon) -> None:
    daemon.front.greet()
    device = FileSystem("fs0", daemon.front, tag="work", request_queues=2)
    assert device.read_config(0, 64) == b"work".ljust(36, b"\0") + struct.pack("<I", 2)
    assert len(device.queue_sizes) == 3
    device.close()


def test_the_daemons_own_tag(daemon: Daemon) -> None:
    daemon.front.greet()
    device = FileSystem("fs0", daemon.front)
    assert device.read_config(0, 64) == b"from-the-daemon".ljust(36, b"\0") + struct.pack("<I", 1)
    device.close()


def test_a_daemon_without_the_newer_protocol() -> None:
    daemon = Daemon(protocol=0)
    rig = start(daemon)
    rig.restart()
    with pytest.raises(Unsupported, match="tag"):
        FileSystem("fs0", daemon.front)
    rig.close()
    daemon.close()


def test_what_the_user_can_get_wrong() -> None:
    daemon = Daemon(features=VERSION_1)
    daemon.front.greet()
    with pytest.raises(Unsupported, match="fs0"):
        FileSystem("fs0", daemon.front, tag="work")
    daemon.close()
    daemon = Daemon()
    daemon.front.greet()
    with pytest.raises(UsageError):
        FileSystem("fs0", daemon.front, tag="x" * 37)
    daemon.close()


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        struct.pack("<III", 1, 5, 8),
        struct.pack("<IIIQ", 2, 5, 8, 0),
        struct.pack("<IIIQ", 1, 1, 8, 0),
        struct.pack("<IIII", 1, 5, 4, 0),
        struct.pack("<III", 1, 5, 1 << 31),
    ],
)
def test_answers_that_are_none(answer: bytes) -> None:
    ours, theirs = socket.socketpair()
    front = VhostUser(ours.detach())
    theirs.sendall(answer)
    theirs.shutdown(socket.SHUT_WR)
    with pytest.raises(RemoteError):
        front.greet()
    front.close()
    theirs.close()
