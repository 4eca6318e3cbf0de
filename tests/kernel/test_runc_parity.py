"""runc as the yardstick: one probe in a container of ours and in one of runc's, configured as Docker and podman do it."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from nagaya.engines.container.mounts import MASKED
from nagaya.engines.container.policy import DEFAULT_CAPABILITIES
from tests.kernel import container_machine as machine

PROBE = """
echo '== status'; cat /proc/self/status
echo '== namespaces'; for n in /proc/self/ns/*; do ls -l $n; done
echo '== mounts'; cat /proc/self/mountinfo
echo '== devices'; cd /dev; for n in * ; do stat -c '%n %F %t:%T %a %u:%g' $n; done
echo '== refused'
mount -t tmpfs none /tmp 2>/dev/null || echo mount
(echo x > /proc/sys/kernel/core_pattern) 2>/dev/null || echo core_pattern
(echo x > /sys/kernel/x) 2>/dev/null || echo sysfs
mknod /tmp/kmsg c 1 11 && (cat /tmp/kmsg) 2>/dev/null || echo kmsg
chroot / true || echo chroot
echo '== end'
"""


class Seen(NamedTuple):
    """What the probe saw."""

    status: dict[str, str]
    own_namespaces: set[str]  # kinds that are not the host's
    mounts: dict[str, tuple[str, frozenset[str]]]  # place: file system, mount flags
    devices: set[str]
    refused: list[str]


def parse(text: str) -> Seen:
    parts: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("== "):
            parts[line[3:]] = here = []
        else:
            here.append(line)
    assert "end" in parts, text
    mounts = {}
    for line in parts["mounts"]:
        left, right = line.split(" - ")
        mounts[left.split()[4]] = (right.split()[0], frozenset(left.split()[5].split(",")))
    namespaces = dict(line.split("/proc/self/ns/")[1].split(" -> ") for line in parts["namespaces"])
    return Seen(
        status=dict(line.split(":\t", 1) for line in parts["status"] if ":\t" in line),
        own_namespaces={kind for kind, name in namespaces.items() if name != os.readlink(f"/proc/self/ns/{kind}")},
        mounts=mounts,
        devices=set(parts["devices"]),
        refused=parts["refused"],
    )


def runc_config(rootfs: str) -> dict[str, Any]:
    """What `runc spec` writes, with the capabilities, masks and filter of Docker and podman."""
    subprocess.run(["runc", "spec", "-b", os.path.dirname(rootfs)], check=True, timeout=20, capture_output=True)
    config: dict[str, Any] = json.loads(Path(os.path.dirname(rootfs), "config.json").read_text())
    names = [f"CAP_{name}" for name in DEFAULT_CAPABILITIES]
    config["process"] |= {
        "terminal": False,
        "args": ["sh", "-c", PROBE],
        "env": [machine.PATH],
        "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), names),
        "rlimits": [],
        "noNewPrivileges": True,
    }
    config["root"] = {"path": rootfs, "readonly": False}
    config["linux"]["namespaces"].append({"type": "cgroup"})
    config["linux"]["maskedPaths"] = list(MASKED)
    config["linux"]["seccomp"] = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["keyctl"], "action": "SCMP_ACT_ERRNO"}],
    }
    return config


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Seen, Seen]:
    """(ours, runc's)"""
    machine.require_facilities()
    if shutil.which("runc") is None:
        pytest.skip("runc is not installed")
    base = tmp_path_factory.mktemp("parity")
    layer = machine.make_layer(str(base / "rootfs"))
    with machine.boot(machine.make_request(machine.make_spec(), str(base / "machine"), (layer,))) as container:
        ours = container.shell(PROBE)
    (base / "config.json").write_text(json.dumps(runc_config(layer)))
    name = f"nagaya-parity-{secrets.token_hex(6)}"
    command = ["runc", "--root", str(base / "state"), "run", "--bundle", str(base), name]
    theirs = subprocess.run(command, capture_output=True, text=True, timeout=30)
    subprocess.run(["runc", "--root", str(base / "state"), "delete", "-f", name], capture_output=True, timeout=30)
    if theirs.returncode != 0 and "== end" not in theirs.stdout:
        pytest.skip(f"runc cannot run a container here: {theirs.stderr.strip()[-200:]}")
    return parse(ours.stdout), parse(theirs.stdout)


def test_namespaces(both: tuple[Seen, Seen]) -> None:
    ours, theirs = both
    assert ours.own_namespaces == theirs.own_namespaces
    assert {"mnt", "pid", "net", "ipc", "uts", "cgroup"} <= ours.own_namespaces


@pytest.mark.parametrize(
    "field", ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp", "Uid", "Gid"]
)
def test_privileges(both: tuple[Seen, Seen], field: str) -> None:
    ours, theirs = both
    assert ours.status[field].split() == theirs.status[field].split()


def test_the_same_places_are_mounted(both: tuple[Seen, Seen]) -> None:
    ours, theirs = both
    different = set(ours.mounts) ^ set(theirs.mounts)
    # runc mounts named version 1 hierarchies as well; the order of joined controllers' names may differ.
    assert {place for place in different if not place.startswith("/sys/fs/cgroup/")} == set()
    for place in set(ours.mounts) & set(theirs.mounts) - {"/"}:
        assert ours.mounts[place][0] == theirs.mounts[place][0], place


def test_protected_places_have_at_least_runcs_flags(both: tuple[Seen, Seen]) -> None:
    ours, theirs = both
    compared = 0
    for place, (_, flags) in theirs.mounts.items():
        if place in ours.mounts and place != "/":
            wanted = flags & {"ro", "nosuid", "nodev", "noexec"}
            assert wanted <= ours.mounts[place][1], f"{place}: {sorted(ours.mounts[place][1])}"
            compared += 1
    assert compared >= 10


def test_masked_and_read_only_places(both: tuple[Seen, Seen]) -> None:
    ours, theirs = both
    below = [
        {place for place in seen.mounts if place.startswith(("/proc/", "/sys/firmware", "/sys/devices"))}
        for seen in both
    ]
    assert below[0] == below[1]
    assert ours.refused == theirs.refused == ["mount", "core_pattern", "sysfs", "kmsg"]


def test_device_nodes(both: tuple[Seen, Seen]) -> None:
    nodes = [{line for line in seen.devices if "character special" in line} for seen in both]
    assert nodes[0] == nodes[1]
    names = [{line.split()[0] for line in seen.devices} for seen in both]
    assert names[0] == names[1]
