"""However a machine ends, what its programs have written is there at its next start: the walls make no difference."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from nagaya import Machine
from tests.conformance.types import PATIENCE_S

WRITE_ONCE = (
    "if [ -e /root/note ]; then cat /root/note; exit 5; fi; trap '' TERM; "
    "echo kept > /root/note; echo written; while :; do sleep 0.1; done"
)


@pytest.mark.parametrize(
    "end", [lambda machine: machine.kill(), lambda machine: machine.stop(timeout_s=0)], ids=["kill", "stop"]
)
def test_what_was_written_is_kept(start: Callable[..., Machine], end: Callable[[Machine], None]) -> None:
    machine = start("sh", "-c", WRITE_ONCE)
    deadline = time.monotonic() + PATIENCE_S
    while not list(machine.logs()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    end(machine)
    assert machine.wait() == 137
    machine.start()
    assert machine.wait() == 5
    assert [line.data for line in machine.logs()] == [b"written", b"kept"]
