"""A machine's process as its supervisor asks it, played: late answers, and a pause that nobody waited for any more."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from nagaya.engines.kvm import vmm
from nagaya.engines.kvm.vmm import Vmm
from nagaya.engines.vm.bounds import Bounds
from nagaya.errors import RemoteError


class Played:
    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.vmm = Vmm(f"{directory}/log", stack, Bounds())
        self.child = stack.enter_context(socket.socket(fileno=os.dup(self.vmm.control_end)))
        stack.callback(self.vmm.close)

    def say(self, **message: object) -> None:
        self.child.sendall(json.dumps(message).encode() + b"\n")

    def heard(self) -> list[tuple[object, object]]:
        messages = [json.loads(line) for line in self.child.recv(65536).splitlines()]
        return [(message["do"], message["number"]) for message in messages]


@pytest.fixture
def played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Played]:
    monkeypatch.setattr(vmm, "ANSWER_WITHIN_S", 0.1)
    with ExitStack() as stack:
        yield Played(tmp_path, stack)


def test_a_late_answer_is_not_the_next_request_s(played: Played) -> None:
    with pytest.raises(RemoteError, match="did not answer"):
        played.vmm.ask("counters")
    played.say(to=1, done={"late": True})
    played.say(to=2, done={"late": False})
    assert played.vmm.ask("describe") == {"late": False}
    assert played.heard() == [("counters", 1), ("describe", 2)]


def test_a_pause_that_comes_too_late_is_taken_back(played: Played) -> None:
    with pytest.raises(RemoteError, match="did not answer"):
        played.vmm.pause()
    assert played.heard() == [("pause", 1), ("resume", 2)]
    played.say(to=1, done=None)
    played.say(to=2, done=None)
    played.say(to=3, done={"x": 1})
    assert played.vmm.ask("counters") == {"x": 1}


def test_one_that_has_ended_says_so(played: Played) -> None:
    played.say(ended="power-off", reason="it was switched off")
    with pytest.raises(RemoteError, match="just ended"):
        played.vmm.ask("pause")
