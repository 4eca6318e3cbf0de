"""What a QEMU that has ended too early said last."""

from __future__ import annotations

import os

from nagaya.engines.vm.console import TextLog
from nagaya.errors import LaunchError


def launch_error(log: TextLog, message: str, ended: os.waitid_result | None) -> LaunchError:
    """`message` with the last line of QEMU's `log`, or its status where it said nothing."""
    log.drain()
    said = log.tail()
    status = ended.si_status if ended is not None else 0
    last = said.splitlines()[-1] if said else f"it ended with status {status}"
    return LaunchError(f"{message}: {last}", command="qemu", status=status, log_tail=said)
