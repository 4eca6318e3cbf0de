"""Published ports as data: what is tried first, how they are shown, and what user-mode networks are told of them."""

from __future__ import annotations

import os
import socket

import pytest

from nagaya.cli.views import ports_text
from nagaya.engines.qemu.arguments import Card, _network
from nagaya.engines.vm.passt import plan_passt
from nagaya.errors import Conflict
from nagaya.kernel import inet
from nagaya.model.spec import PortMapping
from nagaya.model.state import EXITED, RUNNING, MachineState
from nagaya.net import firewall, holders, ports
from nagaya.net.plan import USER_ADDRESS, USER_GATEWAY, LinkPlan, NetworkPlan

LINK = LinkPlan(driver="user", address=USER_ADDRESS, prefix=24, gateway=USER_GATEWAY)


def test_what_the_host_chose_before_is_tried_first() -> None:
    wanted = (PortMapping("", 8080, 80), PortMapping("", 0, 80), PortMapping("", 0, 81))
    recorded = (PortMapping("", 8080, 80), PortMapping("", 40001, 80), PortMapping("", 40002, 81))
    assert [first for _, first in ports.settle(wanted, recorded)] == [8080, 40001, 40002]
    assert [first for _, first in ports.settle(wanted, ())] == [8080, 0, 0]
    assert [first for _, first in ports.settle(wanted, recorded[1:])] == [8080, 0, 0]  # another machine's, by its looks


def test_a_chosen_port_is_kept_if_it_is_free_and_another_one_taken_if_not() -> None:
    wanted = (PortMapping("127.0.0.1", 0, 80),)
    (first,) = ports.hold(wanted)
    ports.release([first])
    (again,) = ports.hold(wanted, (first.mapping,))
    assert again.mapping == first.mapping
    (other,) = ports.hold(wanted, (first.mapping,))
    assert other.mapping.host_port not in (0, first.mapping.host_port)
    ports.release([again, other])


def test_loopback_is_both_of_them_with_one_port() -> None:
    (held,) = ports.hold((PortMapping("", 0, 80),))
    assert {inet.local_port(fd) for fd in held.sockets} == {held.mapping.host_port}
    ports.release([held])


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_a_port_in_use_names_its_holder_and_leaves_nothing_held(protocol: str) -> None:
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    with socket.socket(type=kind) as taken:
        taken.bind(("127.0.0.1", 0))
        if protocol == "tcp":
            taken.listen()
        number = taken.getsockname()[1]
        before = set(os.listdir("/proc/self/fd"))
        with pytest.raises(Conflict) as refused:
            ports.hold((PortMapping("", 0, 1, protocol), PortMapping("", number, 80, protocol)))
        assert set(os.listdir("/proc/self/fd")) == before
        assert f"127.0.0.1:{number}/{protocol} is in use by" in refused.value.message
        assert f"(pid {os.getpid()})" in refused.value.message
        assert holders.find_holder(protocol, "0.0.0.0", number).endswith(f"(pid {os.getpid()})")
        assert holders.find_holder(protocol, "127.0.0.2", number) == ""


def test_each_machine_has_a_loopback_address_of_its_own() -> None:
    assert ports.private_address("0" * 32) == "127.1.0.1"
    assert ports.private_address("f" * 32) == "127.3.255.2"
    socket.inet_aton(ports.private_address(os.urandom(16).hex()))


def test_ports_as_ps_shows_them() -> None:
    published = (
        *(PortMapping("0.0.0.0", 8000 + n, 80 + n) for n in range(3)),
        PortMapping("", 53, 53, "udp"),
        PortMapping("::1", 9000, 80),
    )
    text = "0.0.0.0:8000-8002->80-82/tcp, 127.0.0.1:53->53/udp, [::1]:9000->80/tcp"
    assert ports_text(MachineState(phase=RUNNING, ports=published)) == text
    assert ports_text(MachineState(phase=EXITED, ports=published)) == ""


def test_passt_leads_ports_to_the_machine() -> None:
    plan = NetworkPlan(
        "links", (LINK,), forwards=(PortMapping("127.1.2.3", 4000, 80), PortMapping("127.1.2.3", 4001, 53, "udp"))
    )
    argv = plan_passt(LINK, plan, 3)
    assert argv[argv.index("--tcp-ports") + 1] == "127.1.2.3/4000:80"
    assert argv[argv.index("--udp-ports") + 1] == "127.1.2.3/4001:53"
    assert "--ipv4-only" in argv
    argv = plan_passt(LINK._replace(address6="fd00::15", gateway6="fd00::2"), NetworkPlan("links"), 3)
    assert [argv[at + 1] for at, word in enumerate(argv) if word.endswith("-ports")] == ["none", "none"]
    assert "--ipv4-only" not in argv and "fd00::15" in argv


def test_qemus_own_network_leads_them_too() -> None:
    card = Card("02:00:00:00:00:01", ports=(PortMapping("127.1.2.3", 4000, 80),))
    assert _network(card, 0)[1].endswith(",ipv6=off,hostfwd=tcp:127.1.2.3:4000-:80")
    assert _network(Card("02:00:00:00:00:01", stream=7), 0)[1] == "stream,id=net0,server=off,addr.type=fd,addr.str=7"


def test_the_firewall_leads_what_comes_from_outside() -> None:
    link = LinkPlan(bridge="b", host_link="h", address="10.64.0.2", address6="fd00::2")
    published = (
        PortMapping("", 8080, 80),  # loopback is not its business
        PortMapping("127.0.0.1", 8081, 80),
        PortMapping("0.0.0.0", 9000, 80),
        PortMapping("::", 9000, 80),
        PortMapping("192.0.2.1", 5353, 53, "udp"),
        PortMapping("2001:db8::1", 9001, 80),
    )
    plan = NetworkPlan("links", (link,), ports=published)
    assert firewall.port_elements(plan) == [
        ("inet", "anyports4", "tcp . 9000 : 10.64.0.2 . 80"),
        ("inet", "anyports6", "tcp . 9000 : fd00::2 . 80"),
        ("inet", "ports4", "udp . 192.0.2.1 . 5353 : 10.64.0.2 . 53"),
        ("inet", "ports6", "tcp . 2001:db8::1 . 9001 : fd00::2 . 80"),
    ]
    without6 = plan._replace(links=(link._replace(address6=""),))
    assert [element[1] for element in firewall.port_elements(without6)] == ["anyports4", "ports4"]
    assert firewall.port_elements(plan._replace(links=(LINK,))) == []  # passt does it
