"""Side by side: a Debian image from an OCI layout to a directory that a container can start from.

ours    nagaya.images: copy into the store, hash, gunzip, unpack, check the diff id, syncfs
theirs  skopeo copy oci:… oci:… && umoci unpack   (hash, copy, gunzip, unpack; they sync nothing)

Both in a process of their own, in turns, each into a new directory. Nothing is removed until the end: ext4 does not
give out inodes of the last seconds' deletions again, and searching past them would slow down whoever comes next.
Usage: benches/unpack.py [--rounds N] [--json] [--layout DIR] [--scratch DIR]; needs skopeo, umoci, and mmdebstrap
unless --layout names a layout with one image.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

SOURCE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "src")
OURS = "import sys; from nagaya.images.store import ImageStore; ImageStore(sys.argv[1]).pull(sys.argv[2])"


def make_layout(scratch: str) -> str:
    """A layout with one Debian image, made from the machine's own apt sources."""
    tar = f"{scratch}/debian.tar"
    subprocess.run(["mmdebstrap", "--quiet", "--variant=minbase", "bookworm", tar], check=True)
    sys.path.insert(0, SOURCE)
    from nagaya.images.store import ImageStore

    store = ImageStore(f"{scratch}/making")
    store.import_rootfs(tar, "debian:bench")
    store.save(("debian:bench",), f"{scratch}/layout", format="oci")
    return f"{scratch}/layout"


def find_tag(layout: str) -> str:
    with open(f"{layout}/index.json", "rb") as stream:
        entry = json.load(stream)["manifests"][0]
    return str(entry.get("annotations", {}).get("org.opencontainers.image.ref.name", ""))


def measure(argv: list[list[str]]) -> float:
    started = time.perf_counter()
    for command in argv:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": SOURCE})
    return time.perf_counter() - started


def run(layout: str, scratch: str, rounds: int) -> dict[str, list[float]]:
    tag = find_tag(layout)
    source = f"oci:{layout}:{tag}" if tag else f"oci:{layout}"
    times: dict[str, list[float]] = {"nagaya": [], "skopeo+umoci": []}
    for number in range(rounds + 1):
        os.sync()
        ours = measure([[sys.executable, "-c", OURS, f"{scratch}/ours-{number}", source]])
        os.sync()
        copy = f"{scratch}/copy-{number}"
        theirs = measure(
            [
                ["skopeo", "copy", "--quiet", source, f"oci:{copy}:bench"],
                ["umoci", "unpack", "--image", f"{copy}:bench", f"{scratch}/bundle-{number}"],
            ]
        )
        if number:  # the first round warms the page cache
            times["nagaya"].append(ours)
            times["skopeo+umoci"].append(theirs)
    return times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--layout", default="")
    parser.add_argument("--scratch", default=tempfile.gettempdir())
    arguments = parser.parse_args()
    for tool in ("skopeo", "umoci") + (() if arguments.layout else ("mmdebstrap",)):
        if shutil.which(tool) is None:
            print(f"skipped: there is no {tool}")
            return 0
    scratch = tempfile.mkdtemp(prefix="nagaya-bench-unpack-", dir=arguments.scratch)
    try:
        times = run(arguments.layout or make_layout(scratch), scratch, arguments.rounds)
    finally:
        shutil.rmtree(scratch)
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratio = medians["nagaya"] / medians["skopeo+umoci"]
    if arguments.json:
        print(json.dumps({"unpack": {"seconds": times, "medians": medians, "ratio": ratio, "goal": 1.0}}))
        return 0
    for name, values in times.items():
        print(f"{name:14} median {medians[name]:6.2f} s   ({', '.join(f'{value:.2f}' for value in values)})")
    print(f"ratio {ratio:.2f} (goal: at most 1.00)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
