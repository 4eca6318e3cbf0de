"""Machines that begin from templates: that they do, and that nothing of one is another's.

NAGAYA_TEMPLATE_STARTS says how many begin in a row (6), NAGAYA_TEMPLATE_AT_ONCE how many at a time (3). With -s the test says what
is there on the host before and after. 1,000, 20 at a time, take two to four minutes of two cores.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nagaya.engines.vm.shares import why_not
from tests.conftest import remove_all
from tests.e2e.command import Cli
from tests.e2e.kvm_place import await_builds, make_place, pack_program
from tests.e2e.leftovers import cgroups
from tests.e2e.test_lifecycle import wait_for

STARTS = int(os.environ.get("NAGAYA_TEMPLATE_STARTS", "6"))
AT_ONCE = int(os.environ.get("NAGAYA_TEMPLATE_AT_ONCE", "3"))
BUILD_S, START_S = 600.0, 300.0
OWN = {
    "random": 128,
    "at_random": 128,
    "uuid": 122,
    "boot_id": 122,
    "mac": 40,
    "hostname": 48,
    "text": 28,
    "stack": 31,
    "heap": 18,
    "sequence": 32,
}
"""What is each machine's, and how many bits of it are chosen at random at least (of `heap` Linux, arch_randomize_brk: 1 GiB of pages)."""
UNLIKELY = 1e-6
CLOCK_S = 5.0
LEAK_BYTES = 16 << 10  # of each start: what the host's memory may be off by for other reasons

pytestmark = pytest.mark.timeout(BUILD_S + START_S * (1 + STARTS // AT_ONCE))


@pytest.fixture(scope="module")
def cli(tmp_path_factory: pytest.TempPathFactory, busybox_root: str) -> Iterator[Cli]:
    """A store with busybox and an image of busybox and the probe; a cache with the kernels of this host's, and a template."""
    place = make_place(tmp_path_factory, "templates")
    pack_program(place, "identity.c", "identity")
    namespace = f"nagayatest-templates-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", namespace], check=True)
    subprocess.run(["ip", "-n", namespace, "link", "set", "lo", "up"], check=True)
    env = {"XDG_CACHE_HOME": str(place / "cache"), "NAGAYA_TEMPLATES": "1", "NAGAYA_TYPE": "kvm"}
    made = Cli(str(place / "store"), env=env, prefix=("nsenter", f"--net=/run/netns/{namespace}"))
    made.ok("import", str(place / "tree.tar"), "probe:1")
    made.ok("template", "build", "-q", "probe:1", timeout_s=BUILD_S)
    yield made
    remove_all(made)
    await_builds(made, BUILD_S)
    subprocess.run(["ip", "netns", "delete", namespace], check=True)


def run_probe(cli: Cli, number: int) -> dict[str, str]:
    began = time.time()
    out = cli.ok(
        "run",
        "--rm",
        "--cap-add",
        "NET_ADMIN",
        "--name",
        f"own-{number}",
        "probe:1",
        "/bin/identity",
        timeout_s=START_S,
    )
    found = dict(line.split(" ", 1) for line in out.splitlines())
    assert began - CLOCK_S <= int(found["time"]) <= time.time() + CLOCK_S
    return found


def most_alike(bits: int) -> int:
    """How many of STARTS random numbers of that many bits may be another's; more are less likely than `UNLIKELY`."""
    mean = STARTS * (STARTS - 1) / 2 / 2**bits
    term, tail, most = math.exp(-mean), -math.expm1(-mean), 0  # Poisson's: of no pair, of more than `most` pairs
    while tail > UNLIKELY:
        most += 1
        term *= mean / most
        tail -= term
    return most


def count_host(cli: Cli) -> dict[str, int]:
    """What there is of all that a machine needs, whoever has it."""
    with open("/proc/meminfo") as file:
        kib = {line.split(":")[0]: int(line.split()[1]) for line in file}
    with open("/proc/sys/fs/file-nr") as file:
        files = int(file.read().split()[0])
    taken = ("MemFree", "Buffers", "Cached", "SReclaimable")
    return {
        "processes": sum(name.isdigit() for name in os.listdir("/proc")),
        "mounts": len(Path("/proc/self/mountinfo").read_text().splitlines()),
        "links": len(subprocess.check_output([*cli.prefix, "ip", "-o", "link"]).splitlines()),
        "control groups": len(cgroups()),
        "open files": files,
        "memory bytes": (kib["MemTotal"] - sum(kib[name] for name in taken) + kib["Shmem"]) << 10,
    }


def test_nothing_of_one_machine_is_another_ones(cli: Cli) -> None:
    run_probe(cli, 0)  # the first makes the network's bridge
    before = count_host(cli)
    began = time.monotonic()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = list(pool.map(lambda number: run_probe(cli, number), range(STARTS)))
    took_s = time.monotonic() - began
    assert not cli.ok("ps", "-aq")
    time.sleep(0.5)  # of what has just ended the kernel frees the rest
    after = count_host(cli)
    print(f"\n{STARTS} starts, {AT_ONCE} at a time: {took_s:.1f} s")
    print("\n".join(f"{name}: {before[name]} before, {after[name]} after" for name in before))
    for name, bits in OWN.items():
        values = [each[name] for each in found]
        alike = STARTS - len(set(values))
        print(f"{name}: {alike} alike")
        assert all(values) and alike <= most_alike(bits), (name, values)
    assert after["links"] <= before["links"]
    if os.environ.get("CI"):  # nobody else is there
        assert after["open files"] - before["open files"] < 100
        assert after["memory bytes"] - before["memory bytes"] < STARTS * LEAK_BYTES + (64 << 20)


def test_inspect_says_how_it_started(cli: Cli) -> None:
    name = cli.ok("run", "-d", "--name", "how", "probe:1", "/bin/busybox", "sleep", "600", timeout_s=START_S).strip()
    assert json.loads(cli.ok("inspect", name))[0]["state"]["origin"] == "template"
    assert cli.ok("exec", "how", "/bin/busybox", "cat", "/etc/hostname", timeout_s=START_S).strip() == name[:12]
    cli.ok("exec", "how", "/bin/sh", "-c", "echo kept >/file && /bin/busybox sync", timeout_s=START_S)
    cli.ok("stop", "how", timeout_s=START_S)
    # Now with a disk of its own: from the template that is for all images.
    cli.ok("start", "how", timeout_s=START_S)
    assert json.loads(cli.ok("inspect", "how"))[0]["state"]["origin"] == "template"
    assert cli.ok("exec", "how", "/bin/busybox", "cat", "/file", timeout_s=START_S) == "kept\n"
    cli.ok("rm", "-f", "how", timeout_s=START_S)


def await_template(cli: Cli, *flags: str, **what: object) -> None:
    """Have one built for machines that are started so, which the first of them does: or the next, if another one is being
    built at that moment.
    """

    def is_there() -> bool:
        if any(what.items() <= one.items() for one in json.loads(cli.ok("template", "ls", "--json"))):
            return True
        cli.ok("run", "--rm", *flags, "probe:1", "/bin/busybox", "true", timeout_s=START_S)
        return False

    wait_for(is_there, BUILD_S)


def start_some(cli: Cli, *flags: str) -> list[str]:
    """Machines that began from a template, by their names, at the same time."""

    def start(number: int) -> str:
        name = f"some-{number}"
        cli.ok(
            "run",
            "-d",
            "--cap-add",
            "NET_ADMIN",
            "--name",
            name,
            *flags,
            "probe:1",
            "/bin/busybox",
            "sleep",
            "600",
            timeout_s=START_S,
        )
        assert cli.json("inspect", name)[0]["state"]["origin"] == "template"
        return name

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(start, range(AT_ONCE)))


def assert_own(cli: Cli, names: list[str]) -> None:
    """Nothing of one machine is another's."""
    told = [cli.ok("exec", name, "/bin/identity", timeout_s=START_S) for name in names]
    found = [dict(line.split(" ", 1) for line in one.splitlines()) for one in told]
    for what in OWN:
        values = [each[what] for each in found]
        assert all(values) and len(set(values)) == len(names), (what, values)


def test_machines_with_several_cards(cli: Cli) -> None:
    """Each card is on its own network, with the address that the host gave it."""
    cli.ok("network", "create", "second")
    flags = ("--network", "bridge", "--network", "second")
    await_template(cli, *flags, network="tap tap")
    names = start_some(cli, *flags)
    try:
        assert_own(cli, names)
        seen: set[str] = set()
        for name in names:
            links = cli.json("inspect", name)[0]["links"]
            for number, link in enumerate(links):
                told = cli.ok("exec", name, "/bin/busybox", "ip", "addr", "show", f"eth{number}", timeout_s=START_S)
                assert link["mac"] in told and link["address"] in told, (told, link)
                seen |= {link["mac"], link["address"]}
                others = {other: cli.json("inspect", other)[0]["links"][number]["address"] for other in names}
                for other, address in others.items():
                    if other != name:
                        cli.ok(
                            "exec",
                            name,
                            "/bin/busybox",
                            "ping",
                            "-c",
                            "1",
                            "-W",
                            "10",
                            "-I",
                            f"eth{number}",
                            address,
                            timeout_s=START_S,
                        )
        assert len(seen) == 4 * len(names)
    finally:
        cli.ok("rm", "-f", *names, timeout_s=START_S)
        cli.ok("network", "rm", "second")


def test_machines_with_directories_of_the_host(cli: Cli, tmp_path: Path) -> None:
    """A daemon of the host's serves them, which has to be shown the memory."""
    if why_not():
        pytest.skip(f"needs virtiofsd: {why_not()}")
    (tmp_path / "file").write_text("from the host\n")
    flags = ("-v", f"{tmp_path}:/shared")
    await_template(cli, *flags, volumes=True)
    names = start_some(cli, *flags)
    try:
        for name in names:
            shell = f"/bin/busybox cat /shared/file; echo {name} > /shared/{name}; /bin/busybox cat /etc/hostname"
            told = cli.ok("exec", name, "/bin/sh", "-c", shell, timeout_s=START_S)
            assert told.startswith("from the host\n")
            assert (tmp_path / name).read_text() == f"{name}\n"
        assert_own(cli, names)
    finally:
        cli.ok("rm", "-f", *names, timeout_s=START_S)


def test_a_damaged_template_is_not_used(cli: Cli) -> None:
    for one in json.loads(cli.ok("template", "ls", "--json")):
        with open(f"{one['path']}/state", "r+b") as file:
            file.seek(200)
            file.write(b"\xff")
    assert json.loads(cli.ok("template", "ls", "--json")) == []
    off = Cli(cli.root, env={**cli.env, "NAGAYA_TEMPLATES": "0"}, prefix=cli.prefix)
    name = off.ok("create", "--name", "cold", "probe:1", "/bin/busybox", "true").strip()
    off.ok("rm", name)
    assert cli.ok("template", "prune") == ""
    left = os.listdir(Path(cli.env["XDG_CACHE_HOME"]) / "nagaya" / "templates")
    assert [entry for entry in left if entry != "lock"] == []
