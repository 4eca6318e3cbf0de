"""`exec M true` against podman's."""

from __future__ import annotations

import subprocess

from benches.measure import Check, command, report, take_turns
from benches.stores import ULIMITS, open_stores


def main(rounds: int) -> bool:
    with open_stores() as stores:
        options = ["--network", "none", "--name", "bench", "busybox", "sleep", "600"]
        subprocess.run([*stores.nagaya, "run", "-d", *options], check=True, stdout=subprocess.DEVNULL)
        contestants = {}
        if stores.podman:
            subprocess.run([*stores.podman, "run", "-d", *ULIMITS, *options], check=True, stdout=subprocess.DEVNULL)
            contestants["podman exec"] = command([*stores.podman, "exec", "bench", "true"])
        contestants["nagaya exec"] = command([*stores.nagaya, "exec", "bench", "true"])
        samples = take_turns(contestants, rounds=rounds)
        checks = [Check("exec, of podman's time", samples[1].median / samples[0].median, 0.5)] if stores.podman else []
        return report("exec M true", samples, checks)
