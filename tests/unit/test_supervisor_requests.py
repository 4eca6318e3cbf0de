"""What a failed request is called: supervisor/requests.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from nagaya.errors import Conflict
from nagaya.model.spec import Process
from nagaya.protocol import control
from nagaya.storage.records import to_data
from nagaya.supervisor import requests


class _Client:
    """Remembers what it is answered."""

    def __init__(self) -> None:
        self.answers: list[object] = []
        self.send = self.finish = self.fail = self.answers.append


class _Program:
    """One that has been asked for."""

    def __init__(self) -> None:
        self.clients: list[_Client] = []
        self.on_started: Any = None
        self.on_exited: Any = None

    def join(self, client: _Client, *, stdin: bool) -> None:
        self.clients.append(client)


def _exec(*, detach: bool) -> tuple[_Program, list[object]]:
    program, client = _Program(), _Client()
    programs = SimpleNamespace(spawn=lambda *about, **more: program, flush=lambda: None)
    machine: Any = SimpleNamespace(
        state=SimpleNamespace(phase="running"), spec=SimpleNamespace(name="m"), booted=SimpleNamespace(policy=None),
        programs=programs, engine=SimpleNamespace(rootfs_kind="directory"), record=lambda *about, **more: None,
    )  # fmt: skip
    request = {"op": "exec", "process": to_data(Process(("true",))), "detach": detach}
    requests.handle(machine, client, request)  # type: ignore[arg-type]
    return program, client.answers


@pytest.mark.parametrize("detach", [False, True])
def test_a_program_whose_machine_ends_before_it_begins(detach: bool) -> None:
    """Who asked for it is told: of a machine that is restarted nobody else would."""
    program, answers = _exec(detach=detach)
    program.on_exited(137)
    (answer,) = answers
    assert isinstance(answer, Conflict)


@pytest.mark.parametrize("detach", [False, True])
def test_a_program_that_has_begun(detach: bool) -> None:
    program, answers = _exec(detach=detach)
    program.on_started(7)
    program.on_exited(137)
    assert answers == [control.reply(pid=7)] + ([] if detach else [control.exited(137)])


@pytest.mark.parametrize("op", requests._REQUESTS)
def test_every_request_has_words_for_people(op: str) -> None:
    assert "_" not in requests.describe({"op": op})


def test_no_words_are_left_of_a_request_that_is_gone() -> None:
    assert set(requests._WORDS) <= set(requests._REQUESTS)


def test_words() -> None:
    assert requests.describe({"op": "plug_disk"}) == "attach the disk"
    assert requests.describe({"op": "resize_disk"}) == "resize the disk"
    assert requests.describe({"op": "pause"}) == "pause"
