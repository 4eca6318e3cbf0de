"""QMP without QEMU: what is understood, and what is refused."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nagaya.errors import RemoteError, from_wire, to_wire
from nagaya.protocol.qmp import KEPT, MAX_LINE, Answer, Event, Greeting, QmpError, QmpLink, Refusal

GREETING = (
    b'{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian 1:7.2"},'
    b' "capabilities": ["oob"]}}\r\n'
)


def greeted() -> QmpLink:
    link = QmpLink()
    assert link.receive(GREETING) == [Greeting("7.2.22", "Debian 1:7.2")]
    return link


def test_a_command_is_one_line_with_its_number() -> None:
    link = greeted()
    assert link.execute("qmp_capabilities") == 1
    assert link.execute("blockdev-del", node_name="data") == 2
    lines = link.outgoing().splitlines()
    assert json.loads(lines[0]) == {"execute": "qmp_capabilities", "id": 1}
    assert json.loads(lines[1]) == {"execute": "blockdev-del", "id": 2, "arguments": {"node-name": "data"}}
    link.sent(len(lines[0]) + 1)
    assert link.outgoing() == lines[1] + b"\n"


def test_answers_events_and_refusals_in_any_pieces() -> None:
    link = greeted()
    first, second = link.execute("query-status"), link.execute("nonsense")
    data = (
        b'{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "RESUME"}\r\n'
        b'{"return": {"status": "running"}, "id": 1}\r\n'
        b'{"id": 2, "error": {"class": "CommandNotFound", "desc": "The command nonsense\\u001b has not been found"}}\r\n'
    )
    found = [message for at in range(len(data)) for message in link.receive(data[at : at + 1])]
    assert found[0] == Event("RESUME", {})
    assert found[1] == Answer(first, {"status": "running"})
    refusal = found[2]
    assert isinstance(refusal, Refusal)
    assert (refusal.id, refusal.kind, refusal.text) == (
        second,
        "CommandNotFound",
        "The command nonsense? has not been found",
    )
    assert link.pending() == ""


def test_a_refusal_keeps_what_was_sent_and_received() -> None:
    link = greeted()
    link.execute("stop")
    (refusal,) = link.receive(b'{"id": 1, "error": {"class": "GenericError", "desc": "no"}}\n')
    assert isinstance(refusal, Refusal)
    error = refusal.error()
    assert error.message == "QEMU refused a command: no"
    assert json.loads(error.sent) == {"execute": "stop", "id": 1}
    assert json.loads(error.received)["error"]["desc"] == "no"
    crossed = from_wire(to_wire(error))
    assert isinstance(crossed, RemoteError) and crossed.message == error.message


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b"nonsense\n", "not JSON"),
        (b"[" * 100_000 + b"\n", "not JSON"),
        (b"[1]\n", "no object"),
        (b'{"return": {}}\n', "not asked"),
        (b'{"return": {}, "id": 7}\n', "not asked"),
        (b'{"return": {}, "id": true}\n', "not asked"),
        (b'{"return": {}, "id": [1]}\n', "not asked"),
        (b'{"error": {"desc": 5}, "id": 1}\n', "neither"),
        (b'{"event": 5}\n', "malformed event"),
        (b'{"event": "STOP", "data": []}\n', "malformed event"),
        (b"x" * (MAX_LINE + 1), "without end"),
    ],
)
def test_violations_are_refused_with_what_led_to_them(line: bytes, what: str) -> None:
    link = greeted()
    link.execute("query-status")
    with pytest.raises(QmpError, match=what) as caught:
        link.receive(line)
    assert "query-status" in caught.value.sent
    assert caught.value.received == line.rstrip(b"\n").decode()[:KEPT]


@pytest.mark.parametrize(
    "line", [b"{}\n", b'{"QMP": 1}\n', b'{"QMP": {"version": {"qemu": {}}}}\n', b'{"return": {}}\n']
)
def test_the_greeting_comes_first(line: bytes) -> None:
    with pytest.raises(QmpError, match="no greeting"):
        QmpLink().receive(line)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["id", "return", "error", "event", "data", "desc", "QMP"]), inner),
    max_leaves=8,
)  # fmt: skip


@given(st.lists(JSON, max_size=4), st.booleans())
def test_nothing_but_a_qmp_error_comes_of_hostile_lines(messages: list[object], after_greeting: bool) -> None:
    link = greeted() if after_greeting else QmpLink()
    link.execute("stop")
    for message in messages:
        try:
            link.receive(json.dumps(message).encode() + b"\n")
        except QmpError:
            return
