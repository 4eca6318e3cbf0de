"""Networks as data: addresses, names, firewall text. No privileges."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nagaya.kernel import netlink
from nagaya.net import addresses, attach, firewall, names
from nagaya.net.addresses import Subnet

ROUTES = """Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
eth0\t00000000\t0102000A\t0003\t0\t0\t0\t00000000\t0\t0\t0
br0\t0000570A\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0
br1\t0000580A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0
wide\t0000600A\t00000000\t0001\t0\t0\t0\t0000F0FF\t0\t0\t0
vpn\t0000000A\t00000000\t0001\t0\t0\t0\t000000FF\t0\t0\t0
"""


def test_subnets_keep_clear_of_the_host_s_routes() -> None:
    assert addresses.used_subnets(ROUTES) == {87, 88, *range(96, 112)}
    assert addresses.used_subnets("") == set()


def test_a_subnet_is_chosen_once(tmp_path: Path) -> None:
    first = addresses.load_subnet(str(tmp_path / "net"))
    assert first.second in addresses.FIRST_SUBNETS
    assert addresses.load_subnet(str(tmp_path / "net")) == first
    assert first.gateway == f"10.{first.second}.0.1"


def test_a_subnet_that_others_took_meanwhile_is_given_up_while_nobody_lives_there(tmp_path: Path) -> None:
    directory = str(tmp_path)
    assert not addresses.drop_taken_subnet(directory, ROUTES)  # there is none yet
    os.symlink("90", f"{directory}/subnet")
    assert not addresses.drop_taken_subnet(directory, ROUTES)  # nobody else has it
    os.unlink(f"{directory}/subnet")
    os.symlink("87", f"{directory}/subnet")
    machine = "abcdef12" + "0" * 24
    addresses.claim(directory, Subnet(87), machine)
    assert not addresses.drop_taken_subnet(directory, ROUTES)  # a machine has an address in it
    addresses.release(directory, machine)
    assert addresses.drop_taken_subnet(directory, ROUTES)
    assert not os.path.lexists(f"{directory}/subnet")


def test_leases_are_exclusive_stable_and_given_back(tmp_path: Path) -> None:
    directory, subnet = str(tmp_path), Subnet(87)
    os.symlink("87", f"{directory}/subnet")
    # The same first digits: every one of them begins its search at the same place.
    ids = ["abcdef12" + f"{number:024x}" for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        claimed = list(pool.map(lambda machine_id: addresses.claim(directory, subnet, machine_id), ids))
    assert len(set(claimed)) == 40
    assert subnet.gateway not in claimed
    assert [addresses.claim(directory, subnet, machine_id) for machine_id in ids] == claimed
    assert addresses.holders(directory) == set(ids)
    for machine_id in ids[::2]:
        addresses.release(directory, machine_id)
        addresses.release(directory, machine_id)
    assert addresses.holders(directory) == set(ids[1::2])


@given(st.text("0123456789abcdef", min_size=32, max_size=32))
def test_every_machine_s_address_is_a_host_s(machine_id: str) -> None:
    number = 2 + addresses._start(machine_id)
    assert 2 <= number <= 65534


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
    text = names.hosts("inn", "10.87.0.5", (("db", "10.0.0.9"),))
    assert "10.87.0.5\tinn\n" in text
    assert "10.0.0.9\tdb\n" in text
    assert "127.0.1.1\tinn" in names.hosts("inn", "", ())


def test_a_store_of_its_own_has_a_bridge_of_its_own() -> None:
    assert attach.bridge_name(attach.DEFAULT_ROOT) == "nagaya0"
    other = attach.bridge_name("/somewhere/else")
    assert other != attach.bridge_name("/somewhere/other")
    assert len(other) <= 15  # IFNAMSIZ less one


def test_plans(tmp_path: Path) -> None:
    machine_id = "0123456789abcdef" * 2
    assert attach.plan_network("none", machine_id, str(tmp_path)).address == ""
    plan = attach.plan_network("bridge", machine_id, str(tmp_path))
    assert plan == attach.plan_network("bridge", machine_id, str(tmp_path))
    assert len(plan.host_link) <= 15
    assert int(plan.mac[:2], 16) & 3 == 2  # locally administered, not multicast
    attach.release(str(tmp_path), machine_id)
    assert addresses.holders(f"{tmp_path}/network/default") == set()


def test_the_firewall_names_only_its_own_table() -> None:
    text = firewall.ruleset("nagaya-1a2b", "10.87.0.0/16")
    assert text.count("table ") == 1
    assert text.startswith("table inet nagaya_1a2b {")
    assert 'ip saddr 10.87.0.0/16 oifname != "nagaya-1a2b" masquerade' in text


def test_netlink_attributes_are_padded() -> None:
    assert netlink.attribute(3, b"ab\0") == b"\x07\x00\x03\x00ab\x00\x00"
    assert netlink.attribute(3, b"abcd") == b"\x08\x00\x03\x00abcd"
    assert netlink.number(258) == b"\x02\x01\x00\x00"


def test_a_plain_user_gets_a_network_that_needs_no_bridge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    plan = attach.plan_network("bridge", "abcdef1234" + "0" * 22, str(tmp_path))
    assert (plan.kind, plan.mac, plan.bridge, plan.host_link) == ("user", "02:ab:cd:ef:12:34", "", "")
    assert (plan.address, plan.prefix, plan.gateway) == ("10.0.2.15", 24, "10.0.2.2")
    assert attach.plan_network("none", "0" * 32, str(tmp_path)).kind == "none"
    assert list(tmp_path.iterdir()) == []
