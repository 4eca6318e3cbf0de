"""Messages between a client and a supervisor: what cannot be said, and what a hostile other side might say."""

from __future__ import annotations

import pytest

from nagaya.errors import Conflict, RemoteError, UsageError
from nagaya.protocol import control
from nagaya.protocol.frame import MAX_PAYLOAD, Decoder, Frame, encode


def only(data: bytes) -> Frame:
    (frame,) = Decoder().feed(data)
    return frame


def test_request_and_reply() -> None:
    frame = only(control.request("exec", argv=["sh", "\udcff"]))
    assert frame.type == control.REQUEST
    assert control.parse_json(frame) == {"op": "exec", "argv": ["sh", "\udcff"]}
    assert control.parse_json(only(control.reply(pid=3))) == {"pid": 3}


def test_a_request_that_fits_no_frame_is_the_caller_s_mistake() -> None:
    with pytest.raises(UsageError, match="too long"):
        control.request("exec", argv=["x" * MAX_PAYLOAD])


def test_errors_cross_whole() -> None:
    sent = Conflict("it runs", hint="stop it", state="running", required="exited")
    got = control.parse_error(only(control.error(sent)))
    assert type(got) is Conflict
    assert got.__dict__ == sent.__dict__


@pytest.mark.parametrize("payload", [b"", b"[]", b"3", b"\xff", b"{", b'{"a":1}x', b'{"a":' * 100_000])
def test_what_is_no_object_is_refused(payload: bytes) -> None:
    with pytest.raises(RemoteError):
        control.parse_json(Frame(control.REPLY, 0, payload))


@pytest.mark.parametrize("payload", [b"{}", b'{"message":3}', b'{"kind":"conflict"}'])
def test_a_malformed_error_is_still_an_error(payload: bytes) -> None:
    assert isinstance(control.parse_error(Frame(control.ERROR, 0, payload)), RemoteError)


def test_sizes_and_numbers() -> None:
    assert control.parse_u32(Frame(control.EXITED, 0, b"\x03\0\0\0why")) == 3
    assert control.parse_size(Frame(control.RESIZE, 0, b"\x18\0\x50\0")) == (24, 80)
    for short in (b"", b"\0\0\0"):
        with pytest.raises(RemoteError):
            control.parse_u32(Frame(control.CREDIT, 0, short))
        with pytest.raises(RemoteError):
            control.parse_size(Frame(control.RESIZE, 0, short))


def test_decoder_holds_no_more_than_a_frame() -> None:
    decoder = Decoder(max_payload=10)
    assert decoder.feed(encode(5, 1, b"0123456789")[:-1]) == []
    assert decoder.pending == 21
    assert decoder.feed(b"9") == [Frame(5, 1, b"0123456789")]
    assert decoder.pending == 0
    with pytest.raises(RemoteError):
        decoder.feed(encode(5, 1, b"0123456789a")[:12])
    with pytest.raises(ValueError, match="longer"):
        encode(5, 1, bytes(MAX_PAYLOAD + 1))
