"""`run --rm --network none busybox true` against podman, runc, crun, and the floor in C."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

from benches.measure import Check, command, report, take_turns
from benches.stores import ULIMITS, Stores, open_stores


def _bundle(stores: Stores, runtime: str) -> list[str]:
    """An OCI bundle of the same files, without the limits that this host may not raise."""
    bundle = f"{stores.directory}/bundle-{runtime}"
    os.mkdir(bundle)
    subprocess.run(["runc", "spec"], cwd=bundle, check=True)
    with open(f"{bundle}/config.json", encoding="utf-8") as file:
        config = json.load(file)
    config["process"].update({"terminal": False, "args": ["/bin/true"], "rlimits": []})
    config["root"] = {"path": stores.rootfs, "readonly": True}
    with open(f"{bundle}/config.json", "w", encoding="utf-8") as file:
        json.dump(config, file)
    return [runtime, "--root", f"{stores.directory}/{runtime}", "run", "--bundle", bundle, f"bench-{runtime}"]


def _works(argv: list[str]) -> bool:
    return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode == 0


def main(rounds: int) -> bool:
    with open_stores() as stores:
        floor = f"{stores.directory}/floor"
        subprocess.run(["cc", "-O2", "-o", floor, os.path.join(os.path.dirname(__file__), "floor.c")], check=True)
        contestants = {}
        if stores.podman:
            podman = [*stores.podman, "run", "--rm", *ULIMITS, "--network", "none", "busybox", "true"]
            contestants["podman run --rm (runc)"] = command(podman)
        contestants["nagaya run --rm"] = command(
            [*stores.nagaya, "run", "--rm", "--network", "none", "busybox", "true"]
        )
        for runtime in ("runc", "crun"):
            if shutil.which(runtime) and _works(argv := _bundle(stores, runtime)):
                contestants[f"{runtime} run (bundle)"] = command(argv)
        contestants["unshare -mpuinC --fork"] = command(["unshare", "-mpuinC", "--fork", "/bin/true"])
        contestants["floor in C"] = command([floor, stores.rootfs, f"{stores.directory}/floor-work", "/bin/true"])
        contestants["bare interpreter"] = command([sys.executable, "-c", "pass"])
        samples = take_turns(contestants, rounds=rounds)
        by_name = {sample.name: sample.median for sample in samples}
        checks = []
        if stores.podman:
            ratio = by_name["nagaya run --rm"] / by_name["podman run --rm (runc)"]
            checks = [Check("run, of podman's time (aim 0.25)", ratio, 0.5)]
        return report("run --rm --network none busybox true", samples, checks)
