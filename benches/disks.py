"""Disk images: a linked clone of 20 GB, and a conversion beside qemu-img by itself, both until the disk has it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable

from benches.measure import NAGAYA, Check, command, report, take_turns

DATA_MIB = 2048  # of less, a good part of the time is the start of two programs and not the conversion


def _fresh(call: Callable[[], float], path: str) -> Callable[[], float]:
    """Each time without the file that the last one made."""

    def run() -> float:
        if os.path.exists(path):
            os.unlink(path)
        os.sync()
        return call()

    return run


def main(rounds: int) -> bool:
    directory = tempfile.mkdtemp(prefix="nagaya-bench-", dir=os.environ.get("BENCH_DIR", "/var/tmp"))
    try:
        ours = [NAGAYA, "--root", f"{directory}/root", "disk"]
        subprocess.run([*ours, "create", "base", "20g"], check=True, stdout=subprocess.DEVNULL)
        disks = f"{directory}/root/disks"
        clones = take_turns(
            {
                "nagaya disk clone --linked": _fresh(
                    command([*ours, "clone", "--linked", "base", "clone"]), f"{disks}/clone.qcow2"
                ),
                "qemu-img create -b": _fresh(
                    command(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", f"{disks}/base.qcow2",
                             f"{directory}/bare.qcow2"]), f"{directory}/bare.qcow2",
                ),
            },
            rounds=rounds,
        )  # fmt: skip
        clone = next(sample.median for sample in clones if sample.name.startswith("nagaya"))
        kept = report("linked clone of a 20 GB disk", clones, [Check("milliseconds", clone, 100)])

        source = f"{directory}/source.raw"
        with open(source, "wb") as file:
            for _ in range(DATA_MIB // 4):
                file.write(os.urandom(4 << 20))
        bare = f"qemu-img convert -O qcow2 {source} {directory}/bare.qcow2 && sync {directory}/bare.qcow2"
        conversions = take_turns(
            {
                "nagaya disk convert": _fresh(command([*ours, "convert", "-q", source, "new"]), f"{disks}/new.qcow2"),
                "qemu-img convert, sync": _fresh(command(["sh", "-c", bare]), f"{directory}/bare.qcow2"),
            },
            rounds=max(5, rounds // 3),
        )
        by_name = {sample.name: sample.median for sample in conversions}
        ratio = by_name["nagaya disk convert"] / by_name["qemu-img convert, sync"]
        return report(
            f"convert {DATA_MIB} MiB to qcow2", conversions, [Check("of qemu-img's time", ratio, 1 / 0.95)]
        ) and kept  # fmt: skip
    finally:
        shutil.rmtree(directory)
