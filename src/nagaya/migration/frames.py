"""What goes over a migration's stream: bytes <-> frames, no I/O. docs/migration.md has the order.

Each direction begins with PREFACE. Then frames, little-endian:

    u8 type | u8[3] zero | u32 length of payload | u64 where | u32 CRC-32 of payload | u32 zero

The other side may be anybody's: every field is checked before anything is done with what follows it.
"""

from __future__ import annotations

import json
import zlib
from struct import Struct

from nagaya.errors import Conflict, NagayaError, RemoteError, UsageError, from_wire, to_wire
from nagaya.static import Any, NamedTuple

VERSION = 1
_PREFACE = b"nagaya-migrate "
PREFACE_BYTES = 20
HEADER = Struct("<B3sIQI4s")
DATA_BYTES = 1 << 20
"""The most that one frame brings of memory or a disk."""
PAGE_BYTES = 4096

# To the target.
OFFER, QUESTION, PAGES, ZEROS, BLOCKS, HOLE, ROUND, STATE, COMMIT, ABORT, STRANGE, BLOB, BLOB_END, ENGINE = range(1, 15)
# To the source; ROUND too.
WANT_IMAGE, WANT_ROOT, ACCEPT, REFUSE, READY, RUNNING, ANSWER, WANT = range(32, 40)

_JSON = frozenset((OFFER, QUESTION, STATE, ABORT, WANT_IMAGE, WANT_ROOT, ACCEPT, REFUSE, READY, RUNNING, ANSWER))
_DATA = frozenset((PAGES, BLOCKS, BLOB, ENGINE))
_LENGTHS = frozenset((ZEROS, HOLE, STRANGE))
_EMPTY = frozenset((ROUND, COMMIT, BLOB_END, WANT))
_MOST_JSON_BYTES = 16 << 20
LENGTH = Struct("<Q")


class Frame(NamedTuple):
    """`where` is an offset into memory, a disk, a blob or an engine's own stream, or the number of a round."""

    type: int
    where: int
    payload: bytes


def preface(version: int = VERSION) -> bytes:
    return (_PREFACE + b"%d" % version).ljust(PREFACE_BYTES - 1) + b"\n"


def check_preface(data: bytes) -> None:
    """Raises `RemoteError` for what is no migration, or another version's."""
    number = data[len(_PREFACE) :].strip()
    if len(data) != PREFACE_BYTES or not data.startswith(_PREFACE) or not number.isdigit():
        raise RemoteError(
            "the other side of the stream is no Nagaya that migrates machines",
            hint="one side is 'nagaya migrate send MACHINE --to ADDRESS', the other 'nagaya migrate receive ADDRESS'",
        )
    if int(number) != VERSION:
        raise RemoteError(
            f"the other side migrates by version {int(number)} of the protocol, and this one by version {VERSION}",
            hint="install the same version of Nagaya on both sides",
        )


def encode(type_: int, where: int = 0, payload: bytes | memoryview = b"") -> bytes:
    """A frame's header; the payload follows as it is."""
    return HEADER.pack(type_, bytes(3), len(payload), where, zlib.crc32(payload), bytes(4))


def encode_json(type_: int, value: object) -> tuple[bytes, bytes]:
    """Header and payload of a frame that holds JSON."""
    payload = json.dumps(value, separators=(",", ":")).encode()
    return encode(type_, 0, payload), payload


def parse_header(data: bytes) -> tuple[int, int, int, int]:
    """(type, length, where, sum). Raises `RemoteError` for a frame that cannot be."""
    type_, zero, length, where, sum_, more = HEADER.unpack(data)
    if zero != bytes(3) or more != bytes(4):
        raise _violation(f"a frame of type {type_} with a damaged header")
    if type_ in _JSON:
        fits = 0 < length <= _MOST_JSON_BYTES
    elif type_ in _DATA:
        fits = 0 < length <= DATA_BYTES
    elif type_ in _LENGTHS:
        fits = length == LENGTH.size
    elif type_ in _EMPTY:
        fits = length == 0
    else:
        raise _violation(f"a frame of the unknown type {type_}")
    if not fits:
        raise _violation(f"a frame of type {type_} with {length} bytes")
    return type_, length, where, sum_


def check_payload(type_: int, payload: bytes | bytearray, sum_: int) -> None:
    """Raises `RemoteError` when it is not what was sent."""
    if zlib.crc32(payload) != sum_:
        raise RemoteError(f"migration protocol: a frame of type {type_} was damaged on its way (its sum is wrong)")


def parse_json(frame: Frame) -> dict[str, Any]:
    """The object in a frame. Raises `RemoteError` when it is none."""
    try:
        data = json.loads(frame.payload)
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise _violation(f"a frame of type {frame.type} without a JSON object")
    return data


def parse_length(frame: Frame) -> int:
    """Of ZEROS, HOLE and STRANGE: how many bytes from `where` on."""
    number: int = LENGTH.unpack(frame.payload)[0]
    return number


def check_place(frame: Frame, size_bytes: int, total_bytes: int, *, unit: int) -> None:
    """Raises `RemoteError` unless so many bytes at `where` are inside, and whole units."""
    if frame.where % unit or size_bytes % unit or not 0 < size_bytes <= total_bytes - frame.where:
        raise _violation(f"{size_bytes} bytes at {frame.where:#x} of {total_bytes:#x}")


def refusal(problem: NagayaError) -> dict[str, object]:
    return to_wire(problem)


def parse_refusal(frame: Frame) -> NagayaError:
    """What REFUSE and ABORT say. The text is the other side's: one line, and not endless."""
    problem = from_wire(parse_json(frame))
    if isinstance(problem, UsageError):  # of what is in the machine's record, and not of this command line
        problem = Conflict(problem.message, hint=problem.hint)
    problem.message, problem.hint = _printable(problem.message), _printable(problem.hint)
    problem.args = (problem.message,)
    return problem


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text[:1000])


def unexpected(frame: Frame) -> RemoteError:
    return _violation(f"a frame of type {frame.type} where none may be")


def _violation(what: str) -> RemoteError:
    return RemoteError(f"migration protocol: the other side sent {what}")
