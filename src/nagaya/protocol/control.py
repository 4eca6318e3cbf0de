"""Messages between a client (CLI, library) and a machine's supervisor, over its Unix socket.

A client sends REQUEST (JSON); the supervisor answers REPLY or ERROR (JSON). `attach` and `exec` turn the connection
into one program's streams, with the same frame types, credit and meaning as in the agent protocol; EXITED ends it.
The socket a launcher holds behaves as a connection whose request ("start") has already been made.
"""

from __future__ import annotations

import json
from struct import Struct

from nagaya.errors import NagayaError, RemoteError, UsageError, from_wire, to_wire
from nagaya.protocol.frame import MAX_PAYLOAD, Frame, encode

# The numbers of the agent protocol (docs/agent-protocol.md), which the streams share.
STDIN = 5
STDIN_CLOSE = 6
STDOUT = 7
STDERR = 8
CREDIT = 9
SIGNAL = 10
RESIZE = 11
EXITED = 12

REQUEST = 32
REPLY = 33
ERROR = 34
PROGRESS = 35  # to a launcher, before the reply

WINDOW = 256 << 10  # bytes of standard input that a client may have outstanding
CHUNK = 64 << 10

U32 = Struct("<I")
SIZE = Struct("<HH")


def request(op: str, **arguments: object) -> bytes:
    """A request as bytes. Raises `UsageError` when its arguments, a command's for example, do not fit one frame."""
    payload = json.dumps({"op": op, **arguments}).encode()
    if len(payload) > MAX_PAYLOAD:
        raise UsageError(
            f"the request is too long ({len(payload)} bytes, at most {MAX_PAYLOAD})",
            hint="pass long data through a file or standard input",
        )
    return encode(REQUEST, 0, payload)


def reply(**answer: object) -> bytes:
    return encode(REPLY, 0, json.dumps(answer).encode())


def progress(**state: object) -> bytes:
    return encode(PROGRESS, 0, json.dumps(state).encode())


def error(problem: NagayaError) -> bytes:
    return encode(ERROR, 0, json.dumps(to_wire(problem)).encode())


def exited(status: int, why: str = "") -> bytes:
    return encode(EXITED, 0, U32.pack(status) + why.encode())


def parse_json(frame: Frame) -> dict[str, object]:
    """The object in a REQUEST, REPLY, PROGRESS or ERROR frame. Raises `RemoteError` when it is none."""
    try:
        data = json.loads(frame.payload)
    except (ValueError, RecursionError):  # the latter: a million opening brackets
        data = None
    if not isinstance(data, dict):
        raise RemoteError(f"control protocol: frame {frame.type} holds no JSON object")
    return data


def parse_error(frame: Frame) -> NagayaError:
    return from_wire(parse_json(frame))


def parse_u32(frame: Frame) -> int:
    if len(frame.payload) < 4:
        raise RemoteError(f"control protocol: frame {frame.type} is too short")
    number: int = U32.unpack_from(frame.payload)[0]
    return number


def parse_size(frame: Frame) -> tuple[int, int]:
    """Rows and columns of a RESIZE."""
    if len(frame.payload) != SIZE.size:
        raise RemoteError("control protocol: RESIZE has the wrong length")
    rows, columns = SIZE.unpack(frame.payload)
    return rows, columns
