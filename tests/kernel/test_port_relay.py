"""The relay behind published ports, on the loopback of a network namespace of the test's own: bytes, ends, breaks, limits."""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import pytest

from nagaya.kernel import inet, namespaces, netlink
from nagaya.supervisor import proxy
from nagaya.supervisor.loop import Loop
from nagaya.supervisor.proxy_tcp import TcpRelay
from nagaya.supervisor.proxy_udp import UdpRelay
from tests.kernel.forked import in_child

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
T = TypeVar("T")
MACHINE = "127.0.0.2"
RESET = struct.pack("ii", 1, 0)


def on_loopback(test: Callable[[], T]) -> T:
    def run() -> T:
        namespaces.unshare(namespaces.CLONE_NEWNET)
        with netlink.Netlink() as link:
            link.set_up(netlink.index_of("lo"))
        return test()

    return in_child(run)


class Relay:
    """A proxy process for one TCP and one UDP port of a "machine" at 127.0.0.2."""

    def __init__(self, *, address: str = "127.0.0.1") -> None:
        self.server = socket.create_server((MACHINE, 0), backlog=200)
        self.server.settimeout(10)
        self.datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.datagrams.bind((MACHINE, 0))
        self.datagrams.settimeout(10)
        tcp, udp = inet.listen_tcp(address, 0), inet.bind_udp(address, 0)
        self.address, self.tcp, self.udp = address, inet.local_port(tcp), inet.local_port(udp)
        self.pid = proxy.start(
            (
                proxy.Relayed(tcp, "tcp", MACHINE, self.server.getsockname()[1]),
                proxy.Relayed(udp, "udp", MACHINE, self.datagrams.getsockname()[1]),
            )
        )
        os.close(tcp)
        os.close(udp)

    def connect(self) -> tuple[socket.socket, socket.socket]:
        """A client, and what the machine's program accepts for it."""
        client = socket.create_connection((self.address, self.tcp), timeout=10)
        machine, _ = self.server.accept()
        machine.settimeout(10)
        return client, machine

    def close(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def receive_all(source: socket.socket) -> bytes:
    parts = []
    while data := source.recv(1 << 16):
        parts.append(data)
    return b"".join(parts)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_bytes_go_both_ways_and_each_end_is_told_by_itself(address: str) -> None:
    def test() -> None:
        relay = Relay(address=address)
        client, machine = relay.connect()
        question, answer = random.randbytes(3 << 20), random.randbytes(5 << 20)
        sender = threading.Thread(target=lambda: (client.sendall(question), client.shutdown(socket.SHUT_WR)))
        sender.start()
        assert receive_all(machine) == question  # it ends, and the other direction is open still
        sender.join()
        sender = threading.Thread(target=lambda: (machine.sendall(answer), machine.close()))
        sender.start()
        assert receive_all(client) == answer
        sender.join()
        client.close()
        relay.close()

    on_loopback(test)


def test_a_reader_that_does_not_read_stops_the_writer() -> None:
    def test() -> None:
        relay = Relay()
        client, machine = relay.connect()
        client.setblocking(False)
        sent = 0
        while select.select([], [client], [], 0.5)[1]:
            sent += client.send(bytes(1 << 16))
        assert sent < 64 << 20  # the kernel's buffers, and a pipe
        client.setblocking(True)
        client.shutdown(socket.SHUT_WR)
        assert len(receive_all(machine)) == sent
        usage = _cpu_s(relay.pid)
        time.sleep(0.3)
        assert _cpu_s(relay.pid) - usage < 0.1  # nor does a half-closed connection keep it busy
        relay.close()

    on_loopback(test)


def _cpu_s(pid: int) -> float:
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("breaks", ["client", "machine"])
def test_what_breaks_off_on_one_side_breaks_off_on_the_other(breaks: str) -> None:
    def test() -> None:
        relay = Relay()
        client, machine = relay.connect()
        client.sendall(b"x")
        assert machine.recv(1) == b"x"
        one, other = (client, machine) if breaks == "client" else (machine, client)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        one.close()
        with pytest.raises(ConnectionResetError):
            other.recv(1)
        relay.close()

    on_loopback(test)


def test_an_answer_before_a_break_arrives() -> None:
    """Of a server that does not want all of a request: its client hears why, as it would without a relay."""

    def test() -> None:
        relay = Relay()
        for _ in range(40):
            client, machine = relay.connect()

            def send(client: socket.socket = client) -> None:
                with contextlib.suppress(OSError):
                    client.sendall(bytes(16 << 20))

            sender = threading.Thread(target=send)
            sender.start()
            machine.recv(1000)
            machine.sendall(b"too large")
            machine.close()  # with what it has not read: a RST
            assert client.recv(1000) == b"too large"
            sender.join()
            client.close()
        relay.close()

    on_loopback(test)


def test_a_break_while_the_other_side_is_full_does_not_keep_the_relay_busy() -> None:
    def test() -> None:
        relay = Relay()
        client, machine = relay.connect()
        client.setblocking(False)
        while select.select([], [client], [], 0.3)[1]:
            client.send(bytes(1 << 16))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        client.close()
        with pytest.raises(ConnectionResetError):
            receive_all(machine)
        usage = _cpu_s(relay.pid)
        time.sleep(0.3)
        assert _cpu_s(relay.pid) - usage < 0.1
        relay.close()

    on_loopback(test)


def test_nobody_at_the_machines_port_is_a_reset() -> None:
    def test() -> None:
        relay = Relay()
        relay.server.close()
        with pytest.raises(ConnectionResetError):
            socket.create_connection(("127.0.0.1", relay.tcp), timeout=10).recv(1)
        relay.close()

    on_loopback(test)


def test_many_connections_at_once_leave_nothing_behind() -> None:
    def test() -> None:
        relay = Relay()
        relay.connect()[0].close()
        before = len(os.listdir(f"/proc/{relay.pid}/fd"))
        pairs = [relay.connect() for _ in range(100)]
        for number, (client, machine) in enumerate(pairs):
            client.sendall(str(number).encode())
            assert machine.recv(10) == str(number).encode()
        for client, machine in pairs:
            client.close()
            assert machine.recv(1) == b""
            machine.close()
        deadline = time.monotonic() + 5
        while len(os.listdir(f"/proc/{relay.pid}/fd")) > before + 4:  # a few idle pipes
            assert time.monotonic() < deadline, os.listdir(f"/proc/{relay.pid}/fd")
            time.sleep(0.02)
        relay.close()

    on_loopback(test)


def test_the_process_has_no_rights_and_no_other_descriptors() -> None:
    def test() -> None:
        relay = Relay()
        client, machine = relay.connect()
        with open(f"/proc/{relay.pid}/status", encoding="ascii") as file:
            status = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
        assert status["Uid"].split() == ["65534"] * 4
        assert status["CapEff"].strip("0") == ""
        assert status["NoNewPrivs"] == "1"
        targets = sorted(os.readlink(f"/proc/{relay.pid}/fd/{fd}").split(":")[0] for fd in ("0", "1", "2"))
        assert len(os.listdir(f"/proc/{relay.pid}/fd")) <= 3 + 2 + 1 + 2 + 4, targets
        client.close()
        machine.close()
        relay.close()

    on_loopback(test)


def test_it_dies_with_the_process_that_made_it() -> None:
    def test() -> None:
        read, write = os.pipe()
        parent = os.fork()
        if parent == 0:
            os.write(write, b"%d" % Relay().pid)
            time.sleep(60)
        relay = os.pidfd_open(int(os.read(read, 16)))
        time.sleep(0.2)
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
        assert select.select([relay], [], [], 5)[0]

    on_loopback(test)


def test_no_more_connections_than_it_may_have_and_none_is_lost() -> None:
    def test() -> None:
        server = socket.create_server((MACHINE, 0))
        server.settimeout(5)
        loop, listener = Loop(), inet.listen_tcp("127.0.0.1", 0)
        relay = TcpRelay(loop, most=3)
        relay.add(listener, MACHINE, server.getsockname()[1])
        thread = threading.Thread(target=loop.run, daemon=True)
        thread.start()
        clients = [socket.create_connection(("127.0.0.1", inet.local_port(listener))) for _ in range(5)]
        machines = [server.accept()[0] for _ in range(3)]
        time.sleep(0.1)
        assert relay.connections == 3
        assert not select.select([server], [], [], 0.1)[0]
        for machine in machines:
            machine.close()
        for client in clients[:3]:
            assert client.recv(1) == b""
            client.close()
        assert [server.accept()[0] for _ in range(2)]
        loop.stop()

    on_loopback(test)


def test_datagrams_find_their_way_back_to_each_client() -> None:
    def test() -> None:
        relay = Relay()
        clients = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(20)]
        for number, client in enumerate(clients):
            client.connect(("127.0.0.1", relay.udp))
            client.settimeout(5)
            client.send(b"%d" % number)
        for _ in clients:
            data, sender = relay.datagrams.recvfrom(100)
            relay.datagrams.sendto(b"answer " + data, sender)
        for number, client in enumerate(clients):
            assert client.recv(100) == b"answer %d" % number
        big = random.randbytes(60_000)
        clients[0].send(big)
        data, sender = relay.datagrams.recvfrom(65535)
        assert data == big
        relay.datagrams.sendto(b"", sender)  # an empty one is one too
        assert clients[0].recv(1) == b""
        relay.close()

    on_loopback(test)


def test_an_answer_comes_from_the_address_that_was_asked() -> None:
    def test() -> None:
        relay = Relay(address="0.0.0.0")
        client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        client.settimeout(5)
        for address in ("127.0.0.5", "127.0.0.1"):
            client.sendto(b"x", (address, relay.udp))
            _, sender = relay.datagrams.recvfrom(10)
            relay.datagrams.sendto(b"y", sender)
            assert client.recvfrom(10) == (b"y", (address, relay.udp))
        relay.close()

    on_loopback(test)


def test_silent_clients_are_forgotten_and_of_too_many_the_most_silent() -> None:
    def test() -> None:
        machine = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        machine.bind((MACHINE, 0))
        loop, fd = Loop(), inet.bind_udp("127.0.0.1", 0)
        relay = UdpRelay(loop, most=3, silent_s=0.3)
        relay.add(fd, MACHINE, machine.getsockname()[1])
        threading.Thread(target=loop.run, daemon=True).start()
        clients = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(5)]
        for client in clients:
            client.sendto(b"x", ("127.0.0.1", inet.local_port(fd)))
            machine.recv(10)
        assert relay.clients == 3
        deadline = time.monotonic() + 5
        while relay.clients:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        loop.stop()

    on_loopback(test)


def test_refused_datagrams_do_not_hurt() -> None:
    def test() -> None:
        relay = Relay()
        relay.datagrams.close()
        client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        for _ in range(50):
            client.sendto(b"x", ("127.0.0.1", relay.udp))
        pair = relay.connect()  # it lives
        assert pair
        relay.close()

    on_loopback(test)


def test_a_datagram_behind_a_refused_one_arrives() -> None:
    """The kernel tells of the refusal in the place of sending the next one."""

    def test() -> None:
        loop = Loop()
        relay, fd = UdpRelay(loop), inet.bind_udp("127.0.0.1", 0)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
            free.bind((MACHINE, 0))
            port = free.getsockname()[1]
        relay.add(fd, MACHINE, port)
        client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        client.sendto(b"refused", ("127.0.0.1", inet.local_port(fd)))
        relay._from_clients(relay._ports[0])
        server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        server.bind((MACHINE, port))
        server.settimeout(2)
        client.sendto(b"sent", ("127.0.0.1", inet.local_port(fd)))
        relay._from_clients(relay._ports[0])  # before the refusal was looked at
        assert server.recv(100) == b"sent"
        relay.close()
        os.close(fd)

    on_loopback(test)
