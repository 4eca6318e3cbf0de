"""What tests of machines that begin from templates stand on: a cache with this host's kernels alone, and images with a C program."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from nagaya.kernels.cache import cache_directory, find_kernel
from tests.e2e.command import Cli


def make_place(tmp_path_factory: pytest.TempPathFactory, name: str) -> Path:
    """A directory with `cache`, for XDG_CACHE_HOME. Skips where no machine of type kvm can run."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("needs /dev/kvm")
    if find_kernel() is None:
        pytest.skip("needs a guest kernel: nagaya kernel build")
    place = tmp_path_factory.mktemp(name)
    (place / "cache" / "nagaya").mkdir(parents=True)
    (place / "cache" / "nagaya" / "kernels").symlink_to(cache_directory())
    return place


def await_builds(cli: Cli, timeout_s: float) -> None:
    """A machine that found no template of its kind has had one begun, by a process that nobody waits for: until there is none."""
    cli.ok("template", "prune", timeout_s=timeout_s)


def pack_program(place: Path, source: str, name: str, *libraries: str) -> Path:
    """`tree.tar` in `place`: a root with busybox, its shell, and the program `name`, made of a source file beside the tests."""
    tree = place / "tree"
    (tree / "bin").mkdir(parents=True)
    shutil.copy2("/bin/busybox", tree / "bin" / "busybox")
    (tree / "bin" / "sh").symlink_to("busybox")
    path = str(Path(__file__).parent / source)
    subprocess.run(["gcc", "-O2", "-static-pie", "-o", str(tree / "bin" / name), path, *libraries], check=True)
    packed = place / "tree.tar"
    subprocess.run(["tar", "-C", str(tree), "-cf", str(packed), "bin"], check=True)
    return packed
