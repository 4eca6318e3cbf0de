"""A TPM 2.0 for a whole machine: swtpm, whose state is a file in the machine's directory. It sees that, and QEMU."""

from __future__ import annotations

import os
from collections.abc import Callable

from nagaya.engines.qemu import rights
from nagaya.engines.qemu.inherited import Inherited
from nagaya.engines.qemu.pc_boards import PcBoard
from nagaya.engines.vm import child
from nagaya.engines.vm.parts import user_id
from nagaya.errors import Unsupported
from nagaya.kernel import unix

PROGRAM = "swtpm"


def require_tpm(board: PcBoard) -> None:
    """Raise `Unsupported` where there can be none."""
    if not board.tpm:
        raise Unsupported(f"QEMU has no TPM for {board.architecture} machines", hint="leave --tpm away")
    places = child.ENVIRONMENT["PATH"].split(":")
    if not any(os.access(f"{place}/{PROGRAM}", os.X_OK) for place in places):
        raise Unsupported(
            "a TPM is swtpm's work, and it is not installed", hint="as root: apt-get install swtpm",
            finding="it was looked for in PATH",
        )  # fmt: skip


def start_tpm(
    state: str, machine_id: str, log: int, inherited: Inherited, *, enter: Callable[[], None]
) -> tuple[int, int]:  # fmt: skip
    """(the number of QEMU's connection to it, its pid). It ends when QEMU does. Raises `OSError`."""
    ours, theirs = unix.socket_pair()
    number = inherited.add(ours)
    file = os.open(state, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        if not os.geteuid():
            os.fchown(file, user_id(machine_id), user_id(machine_id))
        os.set_blocking(theirs, True)
        os.set_blocking(ours, True)
        argv = [
            PROGRAM, "socket", "--tpm2", "--terminate", "--ctrl", f"type=unixio,clientfd={child.FIRST_FD}",
            "--tpmstate", f"backend-uri=file:///proc/self/fd/{child.FIRST_FD + 1}",
        ]  # fmt: skip
        return number, child.start(
            child.Launch(argv, (theirs, file), log, enter, rights.plan_rights(machine_id, host_network=False))
        )
    finally:
        os.close(theirs)
        os.close(file)
