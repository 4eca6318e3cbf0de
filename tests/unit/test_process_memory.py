"""What processes have of the host's memory, alone and with others."""

from __future__ import annotations

import mmap
import os

from nagaya.kernel.process import read_sharing

SIZE = 8 << 20


def test_what_a_child_has_too_is_shared() -> None:
    with mmap.mmap(-1, SIZE, mmap.MAP_PRIVATE) as mine:
        mine.write(b"x" * SIZE)
        alone = read_sharing((os.getpid(),))
        go_on, told = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(told)
            os.read(go_on, 1)
            os._exit(0)
        try:
            both = read_sharing((os.getpid(),))
        finally:
            os.close(told)
            os.close(go_on)
            os.waitpid(pid, 0)
    assert alone["memory_private_bytes"] - both["memory_private_bytes"] >= SIZE
    assert both["memory_shared_bytes"] - alone["memory_shared_bytes"] >= SIZE
    assert alone["memory_pss_bytes"] - both["memory_pss_bytes"] >= SIZE // 3
    assert both["memory_private_bytes"] < both["memory_pss_bytes"] < alone["memory_pss_bytes"]


def test_nothing_of_one_that_is_gone() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    assert read_sharing((pid,)) == {}
