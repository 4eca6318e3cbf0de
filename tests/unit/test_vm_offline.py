"""The machine that is booted for one of the agent's functions, as whoever talks to it sees it."""

from __future__ import annotations

import os
from typing import Any

import pytest

from nagaya.engines.vm.offline import _Applet
from nagaya.errors import LaunchError
from nagaya.kernel import unix
from nagaya.protocol import agent
from nagaya.protocol.frame import encode


def test_what_a_machine_said_before_it_went_is_heard() -> None:
    """It is found gone by a write: why it could not be set up lies there unread."""
    nobody: Any = None
    applet = _Applet(nobody, nobody, ("stat", "/"), data_disk=False)
    ours, theirs = unix.socket_pair()
    os.set_blocking(ours, False)
    applet._link.setup(b"")
    os.write(theirs, encode(agent.HELLO, 0, (agent.VERSION).to_bytes(4, "little") + bytes(4)))
    applet._exchange(ours)
    os.write(theirs, encode(agent.SETUP_FAILED, 0, bytes(4) + b"its disk is damaged"))
    os.close(theirs)
    with pytest.raises(LaunchError, match="its disk is damaged"):
        applet._exchange(ours)
    os.close(ours)
