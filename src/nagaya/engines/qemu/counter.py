"""How fast the host's time stamp counter runs: an emulated x86 CPU shows it to its guest as its own."""

from __future__ import annotations

import os

_CPUINFO = "/proc/cpuinfo"
_FIRST_BYTES = 8192  # one CPU is enough, and on a large host the whole file takes long to make
_FEATURES = frozenset(("constant_tsc", "nonstop_tsc"))


def parse_khz(cpuinfo: str) -> int:
    """The counter's frequency by the first CPU of a /proc/cpuinfo, or 0 where it does not run at a constant one.

    "cpu MHz" is how fast the CPU happens to be. A kernel that knows the counter's frequency computes its delay loop from
    it (arch/x86/kernel/tsc.c, `lpj_fine`), and prints that as bogomips: half of it is the frequency in MHz, to 5 kHz.
    """
    fields = {}
    for line in cpuinfo.split("\n\n")[0].splitlines():
        name, _, value = line.partition(":")
        fields[name.strip()] = value.strip()
    if not set(fields.get("flags", "").split()) >= _FEATURES:
        return 0
    try:
        khz = round(float(fields["bogomips"]) * 500)
    except (KeyError, ValueError, OverflowError):
        return 0
    return khz if 100_000 <= khz <= 20_000_000 else 0


def find_khz() -> int:
    """This host's; 0 where it is unknown, or the host's CPU is another than x86."""
    if os.uname().machine != "x86_64":
        return 0
    try:
        with open(_CPUINFO, encoding="ascii", errors="replace") as file:
            return parse_khz(file.read(_FIRST_BYTES))
    except OSError:
        return 0
