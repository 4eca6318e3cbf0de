"""`nagaya doctor`, as it is installed, on this host as it is."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

from nagaya.manager.doctor import TYPES
from tests.e2e.command import Cli

TOPICS = {
    *TYPES, "guest kernel", "overlayfs", "reflinks", "user namespaces", "seccomp", "network", "forwarding", "tap devices", "ports", "agent",
    "passt", "tc", "dnsmasq", "foreign firewall", "bridge filter", "mmdebstrap", "mkfs.erofs", "mke2fs",
    "virtiofsd", "swtpm", "vhost", "networks in use", "criu",
}  # fmt: skip
MOST_S = 0.3


def links() -> str:
    return subprocess.run(["ip", "-o", "link"], check=True, capture_output=True, text=True).stdout


def test_it_tells_every_topic_and_leaves_nothing(tmp_path: Path) -> None:
    cli = Cli(str(tmp_path / "store"))
    before = links()
    ran = cli("doctor", "--json")
    found = json.loads(ran.out)
    assert {finding["topic"] for finding in found} == TOPICS
    for finding in found:
        assert set(finding) == {"topic", "status", "found", "how", "follows"}
        assert finding["status"] in ("ok", "limited", "missing") and finding["found"] and finding["how"], finding
        assert finding["follows"] or finding["status"] == "ok", finding
    runs = any(finding["topic"] in TYPES and finding["status"] != "missing" for finding in found)
    assert ran.code == (0 if runs else 1) and not ran.err
    assert links() == before and not (tmp_path / "store").exists()


def test_it_is_for_people_too(tmp_path: Path) -> None:
    text = Cli(str(tmp_path / "store"))("doctor").out
    lines = text.splitlines()
    assert {line.split(":")[0] for line in lines if not line.startswith(" ")} == TOPICS
    assert not any(line.endswith(".") for line in lines)


def test_it_says_what_a_host_lacks(tmp_path: Path) -> None:
    """Programs are looked for where the user's PATH says, so that an empty one is a host without them."""
    empty = tmp_path / "empty"
    empty.mkdir()
    cli = Cli(str(tmp_path / "store"), env={"PATH": str(empty), "NAGAYA_AGENT": str(empty / "agent")})
    found = {finding["topic"]: finding for finding in json.loads(cli("doctor", "--json").out)}
    assert found["agent"]["status"] == found["mmdebstrap"]["status"] == "missing"
    assert found["mmdebstrap"]["follows"].endswith("apt install mmdebstrap")
    if os.geteuid() == 0:
        assert found["container"]["status"] == "missing"


def test_it_is_quick(tmp_path: Path) -> None:
    """The best of five: this is about what it does, not about who else is on the machine."""
    cli = Cli(str(tmp_path / "store"))
    times = []
    for _ in range(5):
        began = time.monotonic()
        cli("doctor", "--json")
        times.append(time.monotonic() - began)
    assert min(times) < MOST_S, times
