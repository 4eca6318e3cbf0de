"""Whether this host has CRIU, which takes the programs of containers out of a kernel and into files."""

from __future__ import annotations

import os
import subprocess

from nagaya.manager.finding import LIMITED, OK, Finding

PROGRAM = "criu"
_WITHIN_S = 20.0
_SAVED = "a container's snapshot has its programs, too"
_FOLLOWS = "a container's snapshot has its disk and not its memory; machines of type kvm are saved whole"


def look_at_criu(path: str) -> Finding:
    """`path` is the program's; "" = there is none. It is asked itself, which takes rights that root alone has."""
    if not path:
        return Finding(PROGRAM, LIMITED, "not installed", "looking in PATH", _FOLLOWS)
    how = f"{PROGRAM} check"
    if os.geteuid():
        return Finding(PROGRAM, LIMITED, f"{path}; only root can ask it", how, _FOLLOWS)
    version = _run(path, "--version")[1].removeprefix("Version: ") or "of an unknown version"
    status, said = _run(path, "check")
    if status == 0:
        return Finding(PROGRAM, OK, f"{version} works on this kernel", how, _SAVED)
    found = f"{version} does not work on this kernel: {said or 'it fails'}"
    return Finding(PROGRAM, LIMITED, found, how, _FOLLOWS)


def _run(path: str, word: str) -> tuple[int, str]:
    """(its status, the last line of what it said)."""
    try:
        ran = subprocess.run(
            [path, word], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=_WITHIN_S,
            check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, str(error)
    lines = [line for line in ran.stdout.decode(errors="replace").splitlines() if line.strip()]
    wanted = lines[:1] if word == "--version" else lines[-1:]
    return ran.returncode, wanted[0].strip() if wanted else ""
