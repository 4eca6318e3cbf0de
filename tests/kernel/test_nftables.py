"""Elements of sets by nfnetlink, beside what the nft program makes of the same words, in a network namespace of the test's own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

SCRIPT = """
import errno, json, subprocess
from nagaya.kernel import namespaces
from nagaya.kernel.nftables import NFPROTO_INET, Element, Nftables, count_rules
from nagaya.net import elements, firewall

namespaces.unshare(namespaces.CLONE_NEWNET)
root = "/nowhere"
table = firewall.table_name(root)

def listed():
    tables = json.loads(subprocess.run(["nft", "-j", "list", "ruleset"], capture_output=True, check=True).stdout)
    found = {}
    for thing in tables["nftables"]:
        for kind in ("set", "map"):
            if kind in thing:
                one = thing[kind]
                found[one["family"], one["name"]] = sorted(map(json.dumps, one.get("elem", ())))
    return found

wanted = [
    ("inet", "bridges", '"br-1"'), ("inet", "insides", '"br-1" . "br-1"'), ("inet", "closed", '"br-1"'),
    ("inet", "gateways4", '"br-1" . 10.64.0.1'), ("inet", "gateways6", '"br-1" . fd00::1'),
    ("inet", "trusted4", '"br-1" . 10.64.0.2'), ("inet", "trusted6", '"br-1" . fd00::2'),
    ("inet", "ports4", "tcp . 192.0.2.1 . 80 : 10.64.0.2 . 8080"), ("inet", "ports6", "udp . 2001:db8::1 . 53 : fd00::2 . 5353"),
    ("inet", "anyports4", "udp . 53 : 10.64.0.2 . 5353"), ("inet", "anyports6", "tcp . 80 : fd00::2 . 65535"),
    ("inet", "resolvers4", '"br-1" . 10.64.0.2 : 10.64.0.1 . 20000'), ("inet", "resolvers6", '"br-1" . fd00::2 : fd00::1 . 29999'),
    ("bridge", "ports", '"ngy0123456789f"'), ("bridge", "advised", '"ngy0"'), ("bridge", "macs", '"ngy0" . 02:00:00:00:00:ff'),
    ("bridge", "senders4", '"ngy0" . 02:00:00:00:00:ff . 10.64.0.2'),
    ("bridge", "senders6", '"ngy0" . 02:00:00:00:00:ff . fe80::ff:fe00:ff'),
    ("bridge", "owned6", '"ngy0" . 0xfe800000000000000000000000ff00ff'),
    ("bridge", "hardware6", '"ngy0" . 0x0200000000ff'), ("bridge", "claimers", '"ngy0" : 0x01234567'),
    ("bridge", "reserved6", "0x01234567 . 0xfe800000000000000000000000ff00ff"),
]
by_rules = {name for name, shape in elements.SETS.items() if shape.timeout_s}
assert {(family, name) for family, name, _ in wanted} == set(elements.SETS) - by_rules
firewall.rebuild(root, wanted)
by_nft = listed()
firewall.rebuild(root, [])
empty = listed()
with Nftables() as nft:
    assert not firewall.has_exactly(root, wanted, nft)
    for _ in range(2):                                    # twice: what is there already is fine
        assert firewall.change(root, nft, add=wanted)
        assert listed() == by_nft
    assert firewall.has_exactly(root, wanted, nft)
    assert not firewall.has_exactly(root, wanted[1:], nft)
    for _ in range(2):                                    # and so is what is not there any more
        assert firewall.change(root, nft, remove=wanted)
        assert listed() == empty
    # Out and in at once, to somewhere else; and all or nothing.
    port, moved = wanted[9], ("inet", "anyports4", "udp . 53 : 10.64.0.3 . 5353")
    assert firewall.change(root, nft, add=[port])
    assert not firewall.change(root, nft, add=[*wanted, moved])
    assert firewall.has_exactly(root, [port], nft)
    assert firewall.change(root, nft, add=[moved], remove=[port])
    assert firewall.has_exactly(root, [moved], nft)
    # More than fits into one message.
    many = [("inet", "anyports4", f"tcp . {number} : 10.64.0.2 . {number}") for number in range(1, 3000)]
    assert firewall.change(root, nft, add=many) and firewall.has_exactly(root, [moved, *many], nft)
    assert firewall.change(root, nft, remove=many) and firewall.has_exactly(root, [moved], nft)
    for family, name, _ in wanted:                        # a flushed set does not go unnoticed
        firewall.rebuild(root, wanted)
        assert firewall.is_whole(root, nft)
        kind = "map" if elements.SETS[family, name].data else "set"
        subprocess.run(["nft", "flush", kind, family, table, name], check=True)
        assert not firewall.is_whole(root, nft), name
        assert not firewall.change(root, nft, add=wanted), name
    firewall.remove(root)
    assert not firewall.is_whole(root, nft) and count_rules(NFPROTO_INET, table) is None
    try:
        nft.change(table, add=[Element(NFPROTO_INET, "bridges", b"x".ljust(16, bytes(1)))])
    except OSError as error:
        assert error.errno == errno.ENOENT
    else:
        raise AssertionError("there is no such table")
print(json.dumps(len(by_nft)))
"""


def test_elements_by_netlink_are_those_that_nft_makes() -> None:
    if os.geteuid():
        pytest.skip("needs root")
    if not shutil.which("nft"):
        pytest.skip("needs nft")
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == 26
