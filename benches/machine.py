"""Whole machines: what `nagaya start` adds to the same QEMU command run by hand, until the system has said a word.

The system is the one of 512 bytes that the tests have: firmware and QEMU are what takes the time, in both.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from benches.measure import NAGAYA, Check, report, take_turns

SOURCE = Path(__file__).parent.parent / "tests" / "kernel" / "boot_sector.S"
WORD = b"READY"
WITHIN_S = 60.0


def _make_disk(directory: str) -> str:
    path = f"{directory}/boot.raw"
    subprocess.run(["as", "--32", SOURCE, "-o", f"{directory}/boot.o"], check=True)
    link = ["ld", "-m", "elf_i386", "-Ttext", "0x7c00", "--oformat", "binary", "-o", path, f"{directory}/boot.o"]
    subprocess.run(link, check=True)
    os.truncate(path, 1 << 20)
    return path


def _read_command(machine: str, pid: int) -> list[str]:
    """QEMU's own words, with names in the place of the descriptors that it was born with."""
    words = [word.decode() for word in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") if word]
    command: list[str] = []
    for word in words:
        if word.startswith("socket,id="):
            word = word.split(",fd=")[0] + ",fd=FD"
        if word.startswith("{"):
            node = json.loads(word)
            node["file"]["filename"] = f"{machine}/disk0.qcow2"
            node["backing"]["file"]["filename"] = "BASE"
            word = json.dumps(node)
        if word.startswith("fd=") and ",set=" in word:
            command.pop()  # -add-fd
            continue
        command.append(word)
    return command


def _said(log: bytes) -> bytes:
    """A machine's log without what stands before each piece of its output: a serial line has pieces of a byte."""
    return b"".join(line.split(b" ", 3)[3] for line in log.splitlines() if line.count(b" ") >= 3)


def _run_by_hand(command: list[str], base: str) -> float:
    """Milliseconds until the word is on the serial line."""
    pairs = [socket.socketpair() for word in command if word.endswith(",fd=FD")]
    ends = iter(theirs for _, theirs in pairs)
    argv = [
        word.replace("fd=FD", f"fd={next(ends).fileno()}") if word.endswith(",fd=FD") else word.replace("BASE", base)
        for word in command
    ]
    console = next(
        ours
        for (ours, _), word in zip(pairs, [w for w in command if w.endswith("=FD")], strict=True)
        if "id=console" in word
    )
    began = time.perf_counter()
    with subprocess.Popen(argv, pass_fds=[theirs.fileno() for _, theirs in pairs], stderr=subprocess.DEVNULL) as qemu:
        console.settimeout(WITHIN_S)
        said = b""
        while WORD not in said:
            data = console.recv(4096)
            if not data:
                raise RuntimeError("QEMU ended by itself")
            said += data
        took = (time.perf_counter() - began) * 1e3
        qemu.kill()
    for pair in pairs:
        for end in pair:
            end.close()
    return took


def main(rounds: int) -> bool:
    directory = tempfile.mkdtemp(prefix="nagaya-bench-", dir=os.environ.get("BENCH_DIR", "/var/tmp"))
    ours = [NAGAYA, "--root", f"{directory}/root", "--run-dir", f"{directory}/run"]
    try:
        base = _make_disk(directory)
        subprocess.run(
            [*ours, "machine", "create", "m", "--disk", f"{base},clone", "--network", "none", "--type", "emulated"],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        shown = json.loads(subprocess.run([*ours, "inspect", "m"], check=True, capture_output=True).stdout)[0]
        place = str(shown.get("directory") or shown["Directory"])
        log = f"{place}/log"

        def run_ours() -> float:
            before = os.path.getsize(log) if os.path.exists(log) else 0
            began = time.perf_counter()
            with subprocess.Popen([*ours, "start", "m"], stdout=subprocess.DEVNULL) as start:
                while True:
                    if os.path.exists(log) and WORD in _said(Path(log).read_bytes()[before:]):
                        break
                    if time.perf_counter() - began > WITHIN_S:
                        raise RuntimeError("the machine did not say anything")
                    time.sleep(0.002)
                took = (time.perf_counter() - began) * 1e3
                start.wait()
            subprocess.run([*ours, "kill", "m"], check=True, stdout=subprocess.DEVNULL)
            return took

        subprocess.run([*ours, "start", "m"], check=True, stdout=subprocess.DEVNULL)
        shown = json.loads(subprocess.run([*ours, "inspect", "m"], check=True, capture_output=True).stdout)[0]
        command = _read_command(place, int(shown["state"]["pid"]))
        subprocess.run([*ours, "kill", "m"], check=True, stdout=subprocess.DEVNULL)
        samples = take_turns(
            {"nagaya start": run_ours, "QEMU by hand": lambda: _run_by_hand(command, base)}, rounds=rounds
        )
        by_name = {sample.name: sample.median for sample in samples}
        added = by_name["nagaya start"] - by_name["QEMU by hand"]
        return report(
            "a whole machine's start, to its system's first word", samples, [Check("milliseconds more", added, 150)]
        )
    finally:
        subprocess.run([*ours, "rm", "-f", "m"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
        shutil.rmtree(directory)
