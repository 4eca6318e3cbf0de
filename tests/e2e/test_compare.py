"""`nagaya compare`: measures here and now, and leaves nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nagaya.manager.comparing import MEASURES, SAMPLES
from tests.e2e.command import Cli


@pytest.mark.timeout(180)
def test_a_container_beside_the_bare_host(busybox_root: str, network_namespace: tuple[str, ...]) -> None:
    cli = Cli(busybox_root, prefix=network_namespace)
    out = cli.ok("compare", "--type", "container", "--starts", "2", "--json", "busybox", timeout_s=150)
    bare, container = json.loads(out)
    assert (bare["type"], container["type"]) == ("host", "container")
    assert container["missing"] == {}
    for measure in MEASURES:
        count = 2 if measure.key in ("start", "resident") else SAMPLES
        for samples in (container["samples"], container["host_beside"], container["times_the_host"], bare["samples"]):
            assert len(samples[measure.key]) == count, measure
            assert all(0 < value < 1e15 for value in samples[measure.key])
    # A container's start is more than a shell's, and less than ten seconds; its supervisor is more than a shell.
    assert all(times > 1 for times in container["times_the_host"]["start"])
    assert all(0.005 < seconds < 10 for seconds in container["samples"]["start"])
    assert all(times > 1 for times in container["times_the_host"]["resident"])
    assert cli.machine_ids() == []


def test_what_stands_in_the_way_is_said_at_once(cli: Cli, tmp_path: Path) -> None:
    for argv, message in (
        (("--type", "jail", "busybox"), "unknown machine type 'jail'"),
        (("--starts", "0", "busybox"), "--starts"),
        (("--png", f"{tmp_path}/none/x.png", "busybox"), "--png" if _can_plot() else "matplotlib"),
    ):
        ran = cli("compare", *argv)
        assert ran.code != 0
        assert message in ran.err
        assert ran.out == ""


def _can_plot() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True
