"""Machines that begin from templates: that they do, and that nothing of one is another's.

NAGAYA_TEMPLATE_STARTS says how many begin in a row (6), NAGAYA_TEMPLATE_AT_ONCE how many at a time (3).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nagaya.kernels.cache import cache_directory, find_kernel
from tests.conftest import remove_all
from tests.e2e.command import Cli

STARTS = int(os.environ.get("NAGAYA_TEMPLATE_STARTS", "6"))
AT_ONCE = int(os.environ.get("NAGAYA_TEMPLATE_AT_ONCE", "3"))
BUILD_S, START_S = 600.0, 300.0
OWN = ("random", "at_random", "uuid", "boot_id", "mac", "hostname", "text", "stack", "heap", "sequence")
CLOCK_S = 5.0

pytestmark = pytest.mark.timeout(BUILD_S + START_S * (1 + STARTS // AT_ONCE))


@pytest.fixture(scope="module")
def cli(tmp_path_factory: pytest.TempPathFactory, busybox_root: str) -> Iterator[Cli]:
    """A store with busybox and an image of busybox and the probe; a cache with the kernels of this host's, and a template."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("needs /dev/kvm")
    if find_kernel() is None:
        pytest.skip("needs a guest kernel: nagaya kernel build")
    place = tmp_path_factory.mktemp("templates")
    (place / "cache" / "nagaya").mkdir(parents=True)
    (place / "cache" / "nagaya" / "kernels").symlink_to(cache_directory())
    tree = place / "tree"
    (tree / "bin").mkdir(parents=True)
    shutil.copy2("/bin/busybox", tree / "bin" / "busybox")
    (tree / "bin" / "sh").symlink_to("busybox")
    probe = str(Path(__file__).parent / "identity.c")
    subprocess.run(["gcc", "-O2", "-static-pie", "-o", str(tree / "bin" / "identity"), probe], check=True)
    subprocess.run(["tar", "-C", str(tree), "-cf", str(place / "tree.tar"), "bin"], check=True)
    namespace = f"nagayatest-templates-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", namespace], check=True)
    subprocess.run(["ip", "-n", namespace, "link", "set", "lo", "up"], check=True)
    env = {"XDG_CACHE_HOME": str(place / "cache"), "NAGAYA_TEMPLATES": "1", "NAGAYA_TYPE": "kvm"}
    made = Cli(str(place / "store"), env=env, prefix=("nsenter", f"--net=/run/netns/{namespace}"))
    made.ok("import", str(place / "tree.tar"), "probe:1")
    made.ok("template", "build", "-q", "probe:1", timeout_s=BUILD_S)
    yield made
    remove_all(made)
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


def test_nothing_of_one_machine_is_another_ones(cli: Cli) -> None:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = list(pool.map(lambda number: run_probe(cli, number), range(STARTS)))
    for name in OWN:
        values = [each[name] for each in found]
        assert all(values) and len(set(values)) == STARTS, (name, values)
    assert not cli.ok("ps", "-aq")


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
