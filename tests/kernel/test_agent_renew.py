"""The agent's `renew`: a virtual machine's files and links, changed while it runs. In namespaces of the test's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from nagaya.engines.vm.agent import agent_path
from nagaya.protocol.setup import renewal_payload
from tests.conftest import require_root


def renew(payload: bytes, *prefix: str) -> subprocess.CompletedProcess[bytes]:
    argv = [*prefix, agent_path(), "--applet", "renew"]
    return subprocess.run(argv, input=payload, capture_output=True, timeout=30, check=False)


def test_a_file_is_written_in_place_unless_it_says_something_else(tmp_path: Path) -> None:
    told, own, longer, gone = (tmp_path / name for name in ("told", "own", "longer", "gone"))
    told.write_bytes(b"old\n")
    own.write_bytes(b"my own\n")
    longer.write_bytes(b"old\n# mine\n")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    inode = told.stat().st_ino
    new = b"x" * 300_000
    done = renew(renewal_payload((), tuple((str(path), b"old\n", new) for path in (told, own, longer, gone, pipe))))
    assert (done.returncode, done.stderr) == (0, b"")
    assert told.read_bytes() == new and told.stat().st_ino == inode
    assert own.read_bytes() == b"my own\n" and longer.read_bytes() == b"old\n# mine\n" and not gone.exists()
    assert renew(renewal_payload((), ((str(told), new, b""),))).returncode == 0
    assert told.read_bytes() == b""
    assert renew(renewal_payload((), ((str(told), b"", b"again"),))).returncode == 0
    assert told.read_bytes() == b"again"


def test_nothing_is_said_to_begin_with() -> None:
    """How the host asks whether an agent has this at all: an older one has 127 for an answer."""
    assert renew(b"").returncode == 0


def test_what_is_no_field_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_bytes(b"old")
    whole = renewal_payload((), ((str(place), b"old", b"new"),))
    one = whole[: 8 + len(str(place)) + 1 + 3]
    other = renewal_payload((), ((str(place) + "2", b"old", b"new"),))
    for payload in (whole[:-1], one, one + other, whole[:5], b"\xff" * 64, one + one + b"\1\2"):
        done = renew(payload)
        assert done.returncode == 2 and b"malformed" in done.stderr, payload
    assert place.read_bytes() == b"old"


LINKS = """
import json, subprocess, sys
from nagaya.protocol.setup import GuestNetwork, renewal_payload
def ip(*words): return json.loads(subprocess.run(["ip", "-j", *words], capture_output=True, check=True).stdout or "[]")
def renew(*links):
    done = subprocess.run([sys.argv[1], "--applet", "renew"], input=renewal_payload(links, ()), capture_output=True, check=False)
    return done.returncode, done.stderr.decode()
def defaults(): return [(one["gateway"], one["dev"]) for family in ("-4", "-6") for one in ip(family, "route") if one["dst"] == "default"]
for name, mac in (("eth0", "02:00:00:00:00:01"), ("eth1", "02:00:00:00:00:02")):
    subprocess.run(["ip", "link", "add", name, "address", mac, "type", "veth", "peer", "name", name + "p"], check=True)
    subprocess.run(["ip", "link", "set", name + "p", "up"], check=True)
first = GuestNetwork("02:00:00:00:00:01", "10.1.0.5", 24, "10.1.0.1", 1400, "eth0", "fd01::5", 64, "fd01::1")
second = GuestNetwork("02:00:00:00:00:02", "10.2.0.5", 24, "", 1500, "eth1", "fd02::5", 64, "")
assert renew(first, second) == (0, ""), renew(first, second)
assert defaults() == [("10.1.0.1", "eth0"), ("fd01::1", "eth0")], defaults()
assert renew(first, second) == (0, "")                      # as told already
off = GuestNetwork("02:00:00:00:00:01", "", 0, "", 0, "eth0")
subprocess.run(["ip", "route", "add", "10.9.0.0/24", "via", "10.2.0.77"], check=True)
assert renew(off, second._replace(gateway="10.2.0.1", gateway6="fd02::1")) == (0, "")
assert defaults() == [("10.2.0.1", "eth1"), ("fd02::1", "eth1")], defaults()
assert any(one["dst"] == "10.9.0.0/24" for one in ip("route")), "what is the way out has not been down for it"
assert "UP" not in ip("link", "show", "eth0")[0]["flags"]
other = GuestNetwork("02:00:00:00:00:77", "10.3.0.5", 16, "", 1300, "eth0", "fd03::5", 64, "")
assert renew(other) == (0, "")
link = ip("address", "show", "eth0")[0]
assert link["address"] == "02:00:00:00:00:77" and link["mtu"] == 1300 and "UP" in link["flags"]
found = {(one["local"], one["prefixlen"]) for one in link["addr_info"] if one["scope"] == "global"}
assert found == {("10.3.0.5", 16), ("fd03::5", 64)}, found
status, said = renew(other._replace(name="eth7"))
assert status == 1 and "no link eth7 any more" in said, said
"""


def test_links_go_down_and_to_other_networks() -> None:
    require_root()
    argv = ["unshare", "--net", sys.executable, "-c", LINKS, agent_path()]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
