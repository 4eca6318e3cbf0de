"""What the VMM's process tells a template's agent in the supervisor's place."""

from __future__ import annotations

import errno
import os
import socket
import time

import pytest

from nagaya.engines.kvm.child import FirstWord
from nagaya.protocol.agent import SETUP
from nagaya.protocol.frame import Decoder, Frame
from nagaya.protocol.setup import GuestSetup, setup_payload, with_time

PLANNED = setup_payload(GuestSetup("box", time_ns=5))


def test_it_has_the_time_when_it_is_said_and_closes_its_end() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        before = time.time_ns()
        FirstWord(os.dup(ours.fileno()), PLANNED).say()
        after = time.time_ns()
        ours.close()
        said = theirs.recv(1 << 16)
        assert theirs.recv(1) == b""
    frame = Decoder().feed(said)[0]
    assert frame == Frame(SETUP, 0, frame.payload)
    times = [int.from_bytes(frame.payload[8:16], "little")]
    assert frame.payload == with_time(PLANNED, times[0])
    assert before <= times[0] <= after


def test_socket_without_room_for_all_of_it_is_an_error() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the least there can be
        long = setup_payload(GuestSetup("box", files=(("/etc/hosts", bytes(60_000)),)))
        with pytest.raises(OSError) as caught:
            FirstWord(ours.fileno(), long).say()  # which closes it only when it is said
        assert caught.value.errno == errno.ENOBUFS
