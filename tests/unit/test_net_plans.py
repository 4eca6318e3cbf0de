"""Networks as data: addresses, names, firewall text. No privileges."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nagaya.errors import Conflict, IntegrityError, NotFound, UsageError
from nagaya.kernel import netlink
from nagaya.kernel.nftables import NFPROTO_BRIDGE, NFPROTO_INET, Element
from nagaya.model.spec import Attachment, MachineSpec, Process
from nagaya.net import addresses, attach, dns, elements, firewall, names, networks, planning, subnets
from nagaya.net.networks import NetworkRecord
from nagaya.net.plan import LinkPlan, NetworkPlan
from nagaya.net.subnets import Subnet, parse_subnet
from nagaya.storage import records
from nagaya.storage.paths import Paths

IDS = ["abcdef12" + f"{number:024x}" for number in range(40)]  # each begins its search at the same place
SUBNET = parse_subnet("10.87.0.0/16")


def spec(machine_id: str = "0123456789abcdef" * 2, network: str = "bridge", *on: Attachment) -> MachineSpec:
    return MachineSpec(
        id=machine_id, name="m", type="container", image="i", image_id="sha256:0", platform="", process=Process(("true",)),
        hostname="m", created_ns=0, network=network, attachments=on,
    )  # fmt: skip


# -- subnets


@pytest.mark.parametrize("text", ["10.87.0.0/16", "fd00:1:2:3::/64", "192.0.2.4/30"])
def test_subnets(text: str) -> None:
    subnet = parse_subnet(text)
    assert subnet.text == text
    assert subnet.holds(subnet.address(3)) and not subnet.holds(subnet.address(subnet.size))


@pytest.mark.parametrize(
    "text", ["", "10.87.0.0", "10.87.0.1/16", "10.87.0.0/33", "10.87.0.0/0", "fd00::1/64", "fd00::/x", "a/8"]
)
def test_what_is_no_subnet(text: str) -> None:
    with pytest.raises(ValueError, match="not a"):
        parse_subnet(text)


def test_subnets_keep_clear_of_the_host_s_routes() -> None:
    taken = [parse_subnet(text) for text in ("10.87.0.0/16", "10.88.3.0/24", "10.88.0.0/13", "10.0.0.0/8", "fd00::/64")]
    chosen = subnets.choose(subnets.default_candidates(), taken)
    assert chosen is not None and chosen.text == "10.96.0.0/16"  # 10/8 takes nothing: the longer prefix wins
    assert subnets.choose([parse_subnet("10.90.0.0/16")], taken) is None
    assert subnets.random_subnet6().text.startswith("fd") and subnets.random_subnet6() != subnets.random_subnet6()


# -- leases


@pytest.mark.parametrize("subnet", [SUBNET, parse_subnet("fd00::/64")])
def test_leases_are_exclusive_stable_and_given_back(subnet: Subnet, tmp_path: Path) -> None:
    leases, gateway = str(tmp_path / "leases"), subnet.address(1)

    def claim(machine_id: str) -> str:
        return addresses.claim(leases, subnet, machine_id, gateway=gateway)

    with ThreadPoolExecutor(8) as pool:
        claimed = list(pool.map(claim, IDS))
    assert len(set(claimed)) == 40
    assert gateway not in claimed
    assert [claim(machine_id) for machine_id in IDS] == claimed
    assert addresses.holders(leases) == set(IDS)
    for machine_id, address in zip(IDS[:10], claimed, strict=False):
        addresses.release_addresses(leases, machine_id, (claimed[20], address, "10.0.0.1", ""))
        addresses.release_addresses(leases, machine_id, (address,))
    for machine_id in IDS[10:20]:
        addresses.release(leases, machine_id)
    assert addresses.holders(leases) == set(IDS[20:])


def test_a_small_network_is_filled_to_its_last_address(tmp_path: Path) -> None:
    leases, subnet = str(tmp_path), parse_subnet("192.0.2.8/29")
    found = {addresses.claim(leases, subnet, machine_id, gateway="192.0.2.9") for machine_id in IDS[:5]}
    assert found == {f"192.0.2.{number}" for number in range(10, 15)}
    with pytest.raises(Conflict, match="are taken"):
        addresses.claim(leases, subnet, IDS[5], gateway="192.0.2.9")


def test_a_wanted_address(tmp_path: Path) -> None:
    leases = str(tmp_path)

    def claim(machine_id: str, wanted: str) -> str:
        return addresses.claim(leases, SUBNET, machine_id, gateway="10.87.0.1", wanted=wanted)

    assert claim(IDS[0], "10.87.3.4") == claim(IDS[0], "10.87.3.4") == "10.87.3.4"
    with pytest.raises(Conflict, match="in use by machine abcdef12"):
        claim(IDS[1], "10.87.3.4")
    for wrong in ("10.87.0.1", "10.87.0.0", "10.87.255.255", "10.88.0.1", "fd00::1", "nonsense"):
        with pytest.raises(UsageError):
            claim(IDS[1], wrong)


@given(st.text("0123456789abcdef", min_size=32, max_size=32))
def test_every_machine_s_address_is_a_host_s(machine_id: str) -> None:
    assert 0 <= addresses._start(machine_id, 65533) < 65533


@pytest.mark.parametrize(
    ("host", "dns", "own", "expected"),
    [
        ("nameserver 10.0.0.1\nsearch a b\n", (), True, "search a b\nnameserver 10.0.0.1\n"),
        ("nameserver 127.0.0.53\n", (), True, "nameserver 1.1.1.1\nnameserver 8.8.8.8\n"),
        ("nameserver ::1\nnameserver 10.0.0.1\n", (), True, "nameserver 10.0.0.1\n"),
        ("nameserver 127.0.0.53\n", (), False, "nameserver 127.0.0.53\n"),
        ("nameserver 10.0.0.1\noptions ndots:2\n", ("9.9.9.9",), True, "options ndots:2\nnameserver 9.9.9.9\n"),
        ("# nameserver 10.0.0.1\n; x\nnonsense\n\n", ("9.9.9.9",), False, "nameserver 9.9.9.9\n"),
    ],
)
def test_resolv_conf(host: str, dns: tuple[str, ...], own: bool, expected: str) -> None:
    assert names.resolv_conf(host, dns, own_namespace=own) == expected


def test_hosts() -> None:
    text = names.hosts("inn", ("10.87.0.5", "fd00::5"), (("db", "10.0.0.9"),))
    assert "10.87.0.5\tinn\nfd00::5\tinn\n10.0.0.9\tdb\n" in text
    assert "127.0.1.1\tinn" in names.hosts("inn", (), ())


def test_domains_to_search_replace_the_host_s() -> None:
    text = names.resolv_conf("search a\nnameserver 1.2.3.4\n", (), own_namespace=True, search=("x", "y"))
    assert text == "search x y\nnameserver 1.2.3.4\n"
    assert names.has_nameserver(text) and not names.has_nameserver("# nameserver 1\nnameserver\n")


def test_a_store_of_its_own_has_a_bridge_of_its_own() -> None:
    assert networks.bridge_name(networks.DEFAULT_ROOT) == "nagaya0"
    other = networks.bridge_name("/somewhere/else")
    assert other != networks.bridge_name("/somewhere/other") != networks.bridge_name("/somewhere/other", "front")
    assert len(other) <= 15  # IFNAMSIZ less one
    assert networks.bridge_mac(other).startswith("0e:") and len(networks.bridge_mac(other)) == 17


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-a", "a" * 64, "ü", "a b"])
def test_what_is_no_network_s_name(name: str, tmp_path: Path) -> None:
    assert not networks.is_name(name)
    with pytest.raises(NotFound):
        networks.load(str(tmp_path), name)


def test_a_network_s_record_is_checked(tmp_path: Path) -> None:
    root = str(tmp_path)
    record = NetworkRecord("front", "0" * 32, "bridge", 1, "10.64.0.0/24", "10.64.0.1")
    networks.store(root, record)
    assert networks.load(root, "front") == record
    assert networks.names(root) == ["front", "nagaya0"]
    for change in (
        {"name": "back"}, {"driver": "ipvlan"}, {"subnet": "10.64.0.0"}, {"gateway": "10.65.0.1"}, {"subnet": "10.64.0.0/31"},
        {"mtu": -1}, {"parent": 'x"'},
    ):  # fmt: skip
        records.store(f"{root}/network/front/network.json", record._replace(**change))
        with pytest.raises(IntegrityError, match="'front' is damaged"):
            networks.load(root, "front")


def test_links_have_names_and_addresses_of_their_own() -> None:
    machine_id = IDS[0]
    links, macs = planning.host_links(machine_id), [planning.mac_address(machine_id, number) for number in range(16)]
    assert len(set(links)) == len(set(macs)) == 16
    assert max(map(len, links)) <= 15
    assert all(int(mac[:2], 16) & 3 == 2 for mac in macs)  # locally administered, not multicast


def test_one_way_out() -> None:
    links = [
        LinkPlan(gateway="10.0.0.1"),
        LinkPlan(gateway="10.1.0.1", gateway6="fd00::1"),
        LinkPlan(gateway6="fd01::1"),
    ]
    found = planning.without_second_gateways(links)
    assert [(link.gateway, link.gateway6) for link in found] == [("10.0.0.1", ""), ("", "fd00::1"), ("", "")]


def test_plans_without_links(tmp_path: Path) -> None:
    for mode in ("none", "host"):
        assert attach.plan_network(spec(network=mode), Paths(str(tmp_path), str(tmp_path))) == NetworkPlan(mode)
    assert planning.attachments(spec()) == (Attachment("nagaya0"),)
    assert list(tmp_path.iterdir()) == []


LINK = LinkPlan(
    network="front", bridge="nagaya-1a2b", host_link="ngy0", mac="02:00:00:00:00:01", address="10.64.0.2", prefix=24,
    address6="fd00::2", prefix6=64, names=("db", "0123"),
)  # fmt: skip


def test_the_firewall_names_only_its_own_tables() -> None:
    text = firewall.tables("/somewhere")
    name = networks.bridge_name("/somewhere").replace("-", "_")
    heads = [line.removesuffix(" {").split()[-1] for line in text.splitlines() if "table " in line]
    assert set(heads) == {name}
    assert text.count("{{") == text.count("}}") == 0
    assert firewall.rules_of(firewall._INET) == 28 and firewall.rules_of(firewall._BRIDGE) == 36


def test_elements_of_a_machine() -> None:
    found = firewall.machine_elements("/r", NetworkPlan("links", (LINK, LinkPlan("user")), allow_host=True))
    assert ("bridge", "senders4", '"ngy0" . 02:00:00:00:00:01 . 10.64.0.2') in found
    assert ("bridge", "senders6", '"ngy0" . 02:00:00:00:00:01 . fe80::ff:fe00:1') in found
    assert ("bridge", "owned6", '"ngy0" . 0xfd000000000000000000000000000002') in found
    assert ("inet", "trusted4", '"nagaya-1a2b" . 10.64.0.2') in found
    assert not any(name.startswith("trusted") for _, name, _ in firewall.link_elements(LINK, trusted=False))


def test_an_internal_network_s_elements_have_no_way_out() -> None:
    record = NetworkRecord("front", "0" * 32, "bridge", 1, "10.64.0.0/24", "10.64.0.1", "fd00::/64", "fd00::1")
    inside = [name for _, name, _ in firewall.network_elements("/r", record._replace(internal=True))]
    assert inside == ["bridges", "insides", "closed", "gateways4", "gateways6", "reserved6", "reserved6"]
    assert [name for _, name, _ in firewall.network_elements("/r", record)] == [
        "bridges", "insides", "gateways4", "gateways6", "reserved6", "reserved6"
    ]  # fmt: skip


def test_elements_become_commands_that_can_be_given_twice() -> None:
    text = elements.additions("t", [("inet", "a", "1"), ("inet", "a", "2"), ("bridge", "b", "x . y")])
    assert text == "add element inet t a { 1, 2 }\nadd element bridge t b { x . y }\n"


def test_elements_as_the_kernel_has_them() -> None:
    mac = ("bridge", "macs", '"ngy0" . 02:00:00:00:00:01')
    port = ("inet", "ports4", "udp . 192.0.2.1 . 53 : 10.64.0.2 . 5353")
    assert elements.encode([mac, port]) == [
        Element(NFPROTO_BRIDGE, "macs", b"ngy0" + bytes(12) + bytes.fromhex("0200 0000 0001 0000")),
        Element(
            NFPROTO_INET, "ports4", bytes.fromhex("11000000 c0000201 00350000"), bytes.fromhex("0a400002 14e90000")
        ),
    ]
    static = {key: shape for key, shape in elements.SETS.items() if not shape.timeout_s}
    assert {(family, name) for family, name, _ in elements.marks()} == set(static)
    lengths = {
        "ifname": 16, "ether_addr": 8, "ipv4_addr": 4, "ipv6_addr": 16, "inet_proto": 4, "inet_service": 4, elements.TARGET: 16,
        elements.HARDWARE: 8, "mark": 4,
    }  # fmt: skip
    for element, shape in zip(elements.encode(elements.marks()), static.values(), strict=True):
        assert len(element.key) == sum(lengths[field] for field in shape.key)
        assert len(element.data) == sum(lengths[field] for field in shape.data)


def test_dnsmasq_s_command_line() -> None:
    record = NetworkRecord("front", "0" * 32, "bridge", 1, "10.64.0.0/24", "10.64.0.1", "fd00::/64", "fd00::1")
    argv = dns.arguments(record, "br", 1400, resolvers=("9.9.9.9",))
    assert {"--interface=br", "--dhcp-range=10.64.0.0,static,255.255.255.0,1h", "--server=9.9.9.9"} <= set(argv)
    assert {"--host-record=host.nagaya.internal,10.64.0.1,fd00::1", "--dhcp-option=option:router,10.64.0.1"} <= set(
        argv
    )
    assert {"--dhcp-range=fd00::,static,64,1h", "--enable-ra", "--ra-param=br,mtu:1400,600,1800"} <= set(argv)
    further = dns.further_arguments(record, "br", ("192.0.2.53",))
    assert {f"--port={dns.port_of(('192.0.2.53',))}", "--server=192.0.2.53", "--no-resolv"} <= set(further)
    assert not any(word.startswith(("--dhcp", "--enable-ra")) for word in further)
    assert dns.port_of(()) == 0 and 20000 <= dns.port_of(("192.0.2.53",)) < 30000
    closed = dns.arguments(record._replace(internal=True), "br", 1400, resolvers=("9.9.9.9",))
    assert "--ra-param=br,mtu:1400,600,0" in closed
    for other in (record._replace(subnet6="fd00::/48"), record._replace(subnet6="", gateway6="")):
        assert "--enable-ra" not in dns.arguments(other, "br", 1400, resolvers=())
    assert "--enable-ra" not in dns.arguments(record, "br", 1279, resolvers=())
    assert "--no-resolv" in closed and "--dhcp-option=option:router" in closed  # none
    assert not any(word.startswith("--server=") for word in closed)
    assert not any(
        "dhcp-range" in word for word in dns.arguments(record._replace(subnet="", gateway=""), "br", 0, resolvers=())
    )


def test_names_on_the_network() -> None:
    assert planning.names_of(spec("0123456789abcdef" * 2), Attachment("x", aliases=("db", "m"))) == (
        "m",
        "0123456789ab",
        "db",
    )


def test_netlink_attributes_are_padded() -> None:
    assert netlink.attribute(3, b"ab\0") == b"\x07\x00\x03\x00ab\x00\x00"
    assert netlink.attribute(3, b"abcd") == b"\x08\x00\x03\x00abcd"
    assert netlink.number(258) == b"\x02\x01\x00\x00"


def test_a_plain_user_gets_a_network_that_needs_no_bridge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    (link,) = attach.plan_network(spec("abcdef1234" + "0" * 22), Paths(str(tmp_path), str(tmp_path))).links
    assert (link.driver, link.mac, link.bridge, link.host_link) == ("user", "02:ab:cd:ef:12:34", "", "")
    assert (link.address, link.prefix, link.gateway) == ("10.0.2.15", 24, "10.0.2.2")
    assert list(tmp_path.iterdir()) == []
