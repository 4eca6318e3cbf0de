"""Stores for one benchmark run: ours, and podman's with the same image, both in a directory that is removed again."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from benches.measure import NAGAYA

# podman raises these beyond what a root without CAP_SYS_RESOURCE may: the same limits as ours then.
ULIMITS = ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"]


class Stores(NamedTuple):
    directory: str
    nagaya: list[str]
    podman: list[str]  # empty when it is not installed
    rootfs: str  # the busybox image as a plain directory


@contextmanager
def open_stores() -> Iterator[Stores]:
    """Make them with the image "busybox"."""
    directory = tempfile.mkdtemp(prefix="nagaya-bench-", dir=os.environ.get("BENCH_DIR", "/var/tmp"))
    ours = [NAGAYA, "--root", f"{directory}/nagaya"]
    podman: list[str] = []
    try:
        quiet = {"check": True, "stdout": subprocess.DEVNULL}
        subprocess.run([*ours, "pull", "-q", "busybox"], **quiet)  # type: ignore[call-overload]
        subprocess.run(  # type: ignore[call-overload]
            [*ours, "save", "--format", "docker-archive", "-o", f"{directory}/image.tar", "busybox"], **quiet
        )
        rootfs = f"{directory}/rootfs"
        os.mkdir(rootfs)
        subprocess.run(
            [
                "sh",
                "-c",
                f"cd {rootfs} && mkdir bin dev proc sys tmp && cp /bin/busybox bin/ && ln bin/busybox bin/true",
            ],
            check=True,
        )
        if shutil.which("podman"):
            podman = [
                "podman", "--root", f"{directory}/podman", "--runroot", f"{directory}/podman-run",
                "--cgroup-manager=cgroupfs", "--events-backend=none", "--runtime", "runc", "--storage-driver", "overlay",
            ]  # fmt: skip
            load = [*podman, "load", "-q", "-i", f"{directory}/image.tar"]
            subprocess.run(load, check=True, capture_output=True)
        yield Stores(directory, ours, podman, rootfs)
    finally:
        left = subprocess.run([*ours, "ps", "-aq"], capture_output=True, text=True, check=False).stdout.split()
        if left:
            subprocess.run([*ours, "rm", "-f", *left], stdout=subprocess.DEVNULL, check=False)
        if podman:
            subprocess.run([*podman, "rm", "-f", "-a", "-t", "0"], capture_output=True, check=False)
            subprocess.run(["umount", f"{directory}/podman/overlay"], capture_output=True, check=False)
        shutil.rmtree(directory, ignore_errors=True)
