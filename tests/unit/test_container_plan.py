"""What the container engine refuses or plans before anything of a machine exists."""

from __future__ import annotations

import os
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nagaya.engines.cgroups.devices import DeviceRule
from nagaya.engines.container import devices, engine, userns
from nagaya.engines.container.devices import DeviceNode
from nagaya.engines.container.engine import ContainerEngine
from nagaya.errors import IntegrityError, NotFound, Unsupported, UsageError
from nagaya.model.spec import Device, MachineSpec, Mount, Process, Security, Ulimit

SPEC = MachineSpec(
    id="00" * 16, name="m", type="container", image="i", image_id="sha256:0", platform="linux/amd64",
    process=Process(("true",)), hostname="m", created_ns=0,
)  # fmt: skip


@pytest.fixture
def as_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("NAGAYA_AGENT", "/bin/true")


def test_a_plain_user_is_told_to_become_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(Unsupported) as caught:
        ContainerEngine().check_host()
    assert "sudo" in caught.value.hint and "1000" in caught.value.finding


def test_a_missing_agent(as_root: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAGAYA_AGENT", "/nowhere/nagaya-agent")
    with pytest.raises(Unsupported, match="/nowhere/nagaya-agent") as caught:
        ContainerEngine().check_host()
    assert "make agent" in caught.value.hint


@pytest.mark.parametrize(
    ("release", "good"), [("5.10.0-28-amd64", False), ("5.12.0", True), ("6.1.0-18-amd64", True), ("7.0-rc1", True)]
)
def test_old_kernels(as_root: None, monkeypatch: pytest.MonkeyPatch, release: str, good: bool) -> None:
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "n", release, "v", "x86_64")))
    if good:
        ContainerEngine().check_host()
        return
    with pytest.raises(Unsupported, match=r"5\.12"):
        ContainerEngine().check_host()


def test_a_plain_machine_passes_without_warnings(as_root: None) -> None:
    assert ContainerEngine().check(SPEC) == []


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"security": Security(cap_add=("FLY",))}, UsageError),
        ({"hostname": "x" * 65}, UsageError),
        ({"security": Security(seccomp="/nowhere/profile.json")}, NotFound),
        ({"security": Security(seccomp="/etc/passwd")}, IntegrityError),
        ({"ulimits": (Ulimit("files", 1, 1),)}, UsageError),
        ({"devices": (Device("/dev/nothing-there", "/dev/x"),)}, NotFound),
        ({"devices": (Device("/etc/passwd", "/dev/x"),)}, UsageError),
        ({"devices": (Device("/dev/zero", "/dev/x", "rx"),)}, UsageError),
        ({"devices": (Device("/dev/zero", "/x"),)}, UsageError),
        ({"devices": (Device("/dev/zero", "/dev/../x"),)}, UsageError),
        ({"devices": (Device("/dev/zero", "/dev/null"),)}, UsageError),
        ({"devices": (Device("/dev/zero", "/dev/pts/0"),)}, UsageError),
        ({"mounts": (Mount("tmpfs", "", "/proc/sys"),)}, UsageError),
        ({"mounts": (Mount("tmpfs", "", "/x", options=("sync",)),)}, UsageError),
        ({"sysctls": (("kernel.core_pattern", "x"),)}, UsageError),
    ],
)
def test_what_could_not_be_booted(as_root: None, changes: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error):
        ContainerEngine().check(SPEC._replace(**changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "key",
    [
        "kernel.shmmax",
        "kernel.msgmax",
        "kernel.sem",
        "fs.mqueue.msg_max",
        "net.ipv4.ip_forward",
        "net.ipv4.conf.eth0/5.forwarding",
    ],
)
def test_sysctls_of_namespaces(key: str) -> None:
    engine._check_sysctl(key, host_network=False)


@pytest.mark.parametrize(
    "key",
    [
        "kernel.core_pattern", "kernel.modprobe", "kernel.panic", "vm.overcommit_memory", "fs.file-max", "", "net",
        "kernel.semantics", "kernel/core_pattern", "../kernel/core_pattern", "net./../kernel/core_pattern",
        "kernel.shm/../core_pattern", "net.ipv4/../../kernel/core_pattern", "net.ipv4.\0", "net.//.kernel.core_pattern",
        "net.", "net..x",
    ],
)  # fmt: skip
def test_sysctls_of_the_host(key: str) -> None:
    with pytest.raises(UsageError):
        engine._check_sysctl(key, host_network=False)


def test_the_hosts_network_keeps_its_sysctls() -> None:
    with pytest.raises(UsageError, match="belongs to the whole host"):
        engine._check_sysctl("net.ipv4.ip_forward", host_network=True)


# -- devices


def test_nodes_are_the_standard_ones_and_the_machines_own() -> None:
    nodes = devices.plan_nodes((Device("/dev/zero", "/dev/sub/zero", "r"), Device("/dev/null", "/dev/null")))
    names = [node.name for node in nodes]
    assert names == ["null", "zero", "full", "random", "urandom", "tty", "sub/zero"]
    assert nodes[0] == DeviceNode("null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    host = os.stat("/dev/zero")
    assert nodes[-1] == DeviceNode("sub/zero", host.st_mode, host.st_rdev, host.st_uid, host.st_gid)


def test_access_is_to_the_standard_devices_terminals_and_what_was_given() -> None:
    rules = devices.device_rules((Device("/dev/zero", "/dev/zero", "r"),))
    assert DeviceRule("c", 136, devices.ANY, "rwm") in rules
    assert rules[-1] == DeviceRule("c", 1, 5, "r")
    usable = {(rule.type, rule.major) for rule in rules if set(rule.access) & set("rw")}
    assert usable == {("c", 1), ("c", 5), ("c", 136)}  # no block device, and mknod alone opens nothing
    assert rules[0].v1() == "c *:* m" and rules[-1].v1() == "c 1:5 r" and rules[-1].bpf() == ("c", 1, 5, "r")


# -- user namespaces


def test_ids_come_from_nagayas_range() -> None:
    subids = "alice:100000:65536\nnagaya:500000:131072\n"
    bases = {userns.find_base(f"{number:08x}", subids) for number in range(10)}
    assert bases == {500000, 500000 + 65536}


@given(
    number=st.integers(0, 2**32 - 1),
    subids=st.sampled_from(["", "junk", "nagaya:x:y\n", "nagaya:1:10\n", "root:1:65536\n"]),
)
def test_or_from_one_that_nobody_hands_out(number: int, subids: str) -> None:
    base = userns.find_base(f"{number:08x}" + "0" * 24, subids)
    last = base + userns.IDS - 1
    assert base >= userns.DEFAULT_BASE and last < 2**31 and base % userns.IDS == 0
