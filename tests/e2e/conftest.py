"""What tests of networks stand on."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest

from tests.conftest import remove_all, require_program
from tests.e2e.command import Cli


@pytest.fixture
def net(nagaya_root: str, busybox_root: str, network_namespace: tuple[str, ...]) -> Iterator[Cli]:
    """The command in a network namespace, on a store of this test's own with the busybox image."""
    require_program("dnsmasq")
    os.mkdir(nagaya_root)
    subprocess.run(["cp", "-a", f"{busybox_root}/images", nagaya_root], check=True)
    made = Cli(nagaya_root, prefix=network_namespace)
    try:
        yield made
    finally:
        remove_all(made)
        made.ok("network", "prune", "-f")
        made.ok("prune", "-f")
