"""`python -m benches [NAME…] [--rounds N]`: all of them, or the named ones. Status 1 when a promise is not kept."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from benches import disks, emulated, kvm, machine, migration, network, run, snapshots, start, supervisor, virtio, vmm
from benches import exec as exec_

BENCHES = {
    "run": (run.main, 30), "exec": (exec_.main, 30), "supervisor": (supervisor.main, 1), "vmm": (vmm.main, 20),
    "virtio": (virtio.main, 20), "emulated": (emulated.main, 10), "kvm": (kvm.main, 20),
    "disks": (disks.main, 20), "machine": (machine.main, 15), "start": (start.main, 30),
    "snapshots": (snapshots.main, 20), "network": (network.main, 20), "migration": (migration.main, 10),
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benches", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of: {', '.join(BENCHES)}, unpack (default: all)")
    parser.add_argument("--rounds", type=int, default=0)
    arguments = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["NAGAYA_TYPE"] = "container"  # where a benchmark names no type
    names = arguments.names or [*BENCHES, "unpack"]
    kept = True
    for name in names:
        if name == "unpack":
            done = subprocess.run([sys.executable, os.path.join(os.path.dirname(__file__), "unpack.py")], check=False)
            kept = kept and done.returncode == 0
            continue
        if name not in BENCHES:
            parser.error(f"there is no benchmark '{name}'")
        call, rounds = BENCHES[name]
        kept = call(arguments.rounds or rounds) and kept
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
