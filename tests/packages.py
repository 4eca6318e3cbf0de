"""What Debian's packages have in them, for tests of what this host has not installed."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests import own_network


def unpack_package(name: str, place: Path) -> Path:
    """A directory with the package's files. Skips where it cannot be had: `place` gets the package."""
    if not _leads_out():  # apt would ask for names for ten seconds
        pytest.skip(f"the package {name} comes by the network: {own_network.CHOICE}=host")
    got = subprocess.run(["apt-get", "download", "-q", name], cwd=place, capture_output=True, text=True)
    found = list(place.glob("*.deb"))
    if got.returncode or not found:
        pytest.skip(f"the package {name} cannot be had here (apt-get update?): {got.stderr.strip()[-200:]}")
    subprocess.run(["dpkg-deb", "-x", found[0], place / "files"], check=True)
    found[0].unlink()
    return place / "files"


def find_kernel_package(name: str) -> str:
    """The one that a package without files ("linux-image-amd64") stands for. Skips where apt knows none."""
    shown = subprocess.run(["apt-cache", "depends", name], capture_output=True, text=True)
    found = re.search(r"Depends: (linux-image-\S+)", shown.stdout)
    if found is None:
        pytest.skip(f"apt knows no {name}")
    return found[1]


def _leads_out() -> bool:
    """Whether this network namespace has a route."""
    return len(Path("/proc/net/route").read_text().splitlines()) > 1
