"""virtio-net on a tap device: the host's own TCP/IP answers a guest that leaves checksums and segmentation to others.

By our own card, and by the kernel's (vhost-net) where the host has it.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess

import pytest

from nagaya.kernel import namespaces, tun
from nagaya.virtio.net_link import HEADER_BYTES
from nagaya.virtio.vhost_net import VhostNet, make_tap_card, open_vhost_net
from tests.kernel.forked import in_child
from tests.virtio_rig import Rig

RECEIVE, TRANSMIT = 0, 1
GUEST_MAC, BROADCAST = bytes.fromhex("024e61676179"), b"\xff" * 6
GUEST_IP, HOST_IP = socket.inet_aton("10.9.8.2"), socket.inet_aton("10.9.8.1")
GUEST_PORT = 40000
SYN, ACK = 2, 16
NEEDS_CSUM, GSO_TCPV4 = 1, 1


def _require() -> None:
    if os.geteuid():
        pytest.skip("needs root")
    if not os.path.exists("/dev/net/tun"):
        pytest.skip("needs tun")


class Segment:
    """What arrived: the virtio header's word on it, and the TCP part."""

    def __init__(self, frame: bytes) -> None:
        self.flags, self.gso, _, self.gso_size, self.start, self.offset, self.buffers = struct.unpack(
            "<BBHHHHH", frame[:HEADER_BYTES]
        )
        self.ethernet = frame[HEADER_BYTES:]
        self.ip = self.ethernet[14:]
        self.tcp = self.ip[20:]
        self.sequence = struct.unpack(">I", self.tcp[4:8])[0]
        self.payload = self.tcp[(self.tcp[12] >> 4) * 4 :]


class Guest:
    """A card on a fresh tap device in a network namespace of this process's."""

    def __init__(self, *, vhost: bool = False) -> None:
        namespaces.unshare(namespaces.CLONE_NEWNET)
        fd = tun.open_tap("nagaya0")
        assert tun.interface_name(fd) == "nagaya0"
        for command in ("addr add 10.9.8.1/24 dev nagaya0", "link set nagaya0 up"):
            subprocess.run(["ip", *command.split()], check=True)
        self.net = make_tap_card("net0", fd, mac=GUEST_MAC, vhost=vhost)
        assert isinstance(self.net, VhostNet) is vhost
        self.rig = Rig(self.net).start()
        for _ in range(120):
            self.rig.add(RECEIVE, room=(1600,))

    def send(self, kind: int, packet: bytes, to: bytes = BROADCAST, header: bytes = bytes(HEADER_BYTES)) -> None:
        self.rig.add(TRANSMIT, header, to + GUEST_MAC + kind.to_bytes(2, "big") + packet)

    def frames(self, kind: int) -> list[bytes]:
        """At least one whole frame of this Ethernet type, with its virtio header; others (IPv6) are passed over."""
        found: list[bytes] = []
        while not found:
            parts = self.rig.taken_data(RECEIVE, count=1)
            parts += self.rig.taken_data(RECEIVE, count=struct.unpack("<H", parts[0][10:12])[0] - 1)
            frame = b"".join(parts)
            if frame[HEADER_BYTES + 12 : HEADER_BYTES + 14] == kind.to_bytes(2, "big"):
                found.append(frame)
        return found

    def tcp(self, host_mac: bytes, sequence: int, acknowledged: int, *, flags: int, port: int) -> None:
        """A segment whose checksum is only begun, as a driver with F_CSUM sends it."""
        options = b"\x02\x04" + (1460).to_bytes(2, "big") if flags & SYN else b""
        size = 20 + len(options)
        pseudo = GUEST_IP + HOST_IP + struct.pack(">BBH", 0, 6, size)
        head = struct.pack(
            ">HHIIBBHHH", GUEST_PORT, port, sequence, acknowledged, size // 4 << 4, flags, 65535, fold(pseudo), 0
        )
        ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + size, 0, 0, 64, 6, 0, GUEST_IP, HOST_IP)
        ip = ip[:10] + (0xFFFF ^ fold(ip)).to_bytes(2, "big") + ip[12:]
        header = struct.pack("<BBHHHHH", NEEDS_CSUM, 0, 0, 0, 34, 16, 0)
        self.send(0x0800, ip + head + options, host_mac, header)


def fold(data: bytes) -> int:
    """The Internet checksum (RFC 1071), not inverted."""
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def find_host(guest: Guest) -> bytes:
    """Ask by ARP; the host's hardware address."""
    question = struct.pack(">HHBBH6s4s6s4s", 1, 0x0800, 6, 4, 1, GUEST_MAC, GUEST_IP, bytes(6), HOST_IP)
    guest.send(0x0806, question)
    answer = guest.frames(0x0806)[0][HEADER_BYTES + 14 :]
    assert answer[6:8] == b"\0\2"
    assert answer[14:18] == HOST_IP
    return answer[8:14]


def _large_segment(vhost: bool) -> dict[str, int]:
    guest = Guest(vhost=vhost)
    host_mac = find_host(guest)
    with socket.create_server(("10.9.8.1", 0)) as server:
        server.settimeout(5)
        port = server.getsockname()[1]
        guest.tcp(host_mac, 1000, 0, flags=SYN, port=port)
        answer = Segment(guest.frames(0x0800)[0])
        guest.tcp(host_mac, 1001, answer.sequence + 1, flags=ACK, port=port)
        peer, _ = server.accept()
        data = os.urandom(14_000)
        peer.sendall(data)
        received, largest = b"", answer
        while len(received) < len(data):
            segment = Segment(guest.frames(0x0800)[0])
            received += segment.payload
            largest = max(largest, segment, key=lambda one: len(one.ethernet))
        assert received == data
        peer.close()
    counters = guest.net.counters()
    assert not guest.rig.faults
    result = {
        "flags": largest.flags, "gso": largest.gso, "gso_size": largest.gso_size, "bytes": len(largest.ethernet),
        "buffers": largest.buffers, "dropped": counters.get("sent_dropped", 0) + counters.get("received_dropped", 0),
    }  # fmt: skip
    guest.rig.close()
    return result


def _require_vhost() -> None:
    fd = open_vhost_net()
    if fd < 0:
        pytest.skip("no vhost-net on this host")
    os.close(fd)


@pytest.mark.parametrize("vhost", [False, True], ids=["ours", "vhost"])
def test_checksums_and_segmentation_are_left_to_each_other(vhost: bool) -> None:
    _require()
    if vhost:
        _require_vhost()
    largest = in_child(lambda: _large_segment(vhost))
    assert largest["flags"] & NEEDS_CSUM
    assert largest["gso"] == GSO_TCPV4
    assert largest["gso_size"] == 1460
    assert largest["bytes"] > 2 * 1460  # several segments in one; a slow host's TCP sends no more than two at once
    assert largest["buffers"] == (largest["bytes"] + HEADER_BYTES + 1599) // 1600
    assert largest["dropped"] == 0


def _reset_and_unplugged() -> list[int]:
    guest = Guest(vhost=True)
    find_host(guest)
    guest.rig.restart()  # the rings are empty, and the kernel begins at their start
    for _ in range(40):
        guest.rig.add(RECEIVE, room=(1600,))
    find_host(guest)
    assert guest.rig.device.is_raised()
    positions = [guest.rig.device.positions()[TRANSMIT]]
    guest.rig.loop.call(lambda: guest.net.plug(False))
    guest.send(0x0806, bytes(28))
    guest.rig.loop.call(lambda: guest.net.plug(True))
    find_host(guest)  # the one that waited has been sent too
    guest.rig.loop.call(lambda: guest.net.plug(False))
    positions.append(guest.rig.device.positions()[TRANSMIT])
    guest.rig.close()
    return positions


def test_the_kernels_card_is_reset_unplugged_and_plugged_in() -> None:
    _require()
    _require_vhost()
    first, last = in_child(_reset_and_unplugged)
    assert last == first + 2


def _bad_headers() -> int:
    guest = Guest()
    guest.send(0x0800, bytes(60), header=struct.pack("<BBHHHHH", NEEDS_CSUM, 99, 0, 0, 60000, 60000, 0))
    guest.rig.add(TRANSMIT, bytes(HEADER_BYTES), b"short")
    guest.rig.add(TRANSMIT, bytes(HEADER_BYTES), bytes(100_000))
    find_host(guest)
    subprocess.run(["ip", "link", "set", "nagaya0", "down"], check=True)
    guest.send(0x0800, bytes(60))
    dropped = guest.net.counters()["sent_dropped"]
    assert not guest.rig.faults
    guest.rig.close()
    return dropped


def test_what_the_kernel_refuses_is_dropped() -> None:
    _require()
    assert in_child(_bad_headers) == 4


def _removed() -> str:
    guest = Guest()
    subprocess.run(["ip", "link", "del", "nagaya0"], check=True)
    guest.rig.until(lambda: bool(guest.net.link_error))
    error = guest.net.link_error
    assert guest.net.read_config(6, 2) == b"\0\0"
    guest.rig.close()
    return error


def test_a_removed_tap_device_unplugs_the_cable() -> None:
    _require()
    assert "tap device" in in_child(_removed)


def test_refusals_name_the_call() -> None:
    _require()
    with pytest.raises(OSError, match="TUNSETIFF") as caught:
        tun.open_tap("lo")
    assert caught.value.filename == "lo"
    with pytest.raises(OSError, match="15 bytes"):
        tun.open_tap("x" * 16)
