"""Screen and keyboard of a whole machine, by its monitor. QEMU listens nowhere: viewers are handed to it."""

from __future__ import annotations

import os

from nagaya.engines.qemu.monitor import Monitor
from nagaya.errors import RemoteError, UsageError
from nagaya.protocol.qmp import QmpError

FORMATS = ("png", "ppm")
MOST_BYTES = 256 << 20
MOST_KEYS = 1024
HOLD_MS = 20
_DRAW_S = 30.0  # an emulated screen of many pixels takes its time to become a PNG
# What people call keys that QEMU calls otherwise (qapi/ui.json, QKeyCode).
_NAMES = {
    "enter": "ret", "return": "ret", "escape": "esc", "del": "delete", "ins": "insert", "space": "spc", "win": "meta_l",
    "super": "meta_l", "meta": "meta_l", "control": "ctrl", "pageup": "pgup", "pagedown": "pgdn", "altgr": "alt_r",
    "bksp": "backspace",
}  # fmt: skip
# A character on a US keyboard: its key, with shift for those of the second line.
_PLAIN = {" ": "spc", "\n": "ret", "\t": "tab", "-": "minus", "=": "equal", "[": "bracket_left", "]": "bracket_right",
          ";": "semicolon", "'": "apostrophe", "`": "grave_accent", "\\": "backslash", ",": "comma", ".": "dot",
          "/": "slash"}  # fmt: skip
_SHIFTED = dict(zip('!@#$%^&*()_+{}:"~|<>?', "1234567890-=[];'`\\,./", strict=True))


def take_picture(monitor: Monitor, format: str) -> bytes:
    """What the screen shows. Raises `QmpError`, `RemoteError` for what is no picture."""
    picture = os.memfd_create("screen", os.MFD_CLOEXEC)
    try:
        # QEMU looks among its descriptors for one that is opened as it would open the file: for writing alone.
        end = os.open(f"/proc/self/fd/{picture}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            group = monitor.command("add-fd", descriptor=end)["fdset-id"]
        finally:
            os.close(end)
        try:
            place = f"/dev/fdset/{int(group)}"
            monitor.command("screendump", timeout_s=_DRAW_S, filename=place, format=format)
        finally:
            monitor.command("remove-fd", fdset_id=int(group))
        size = os.fstat(picture).st_size
        if not 0 < size <= MOST_BYTES:
            raise RemoteError("QEMU gave no picture of the screen")
        data = os.pread(picture, size, 0)
    except (KeyError, TypeError, ValueError):
        raise RemoteError("QEMU gave no picture of the screen") from None
    finally:
        os.close(picture)
    if not data.startswith(b"\x89PNG" if format == "png" else b"P6"):
        raise RemoteError("QEMU gave no picture of the screen")
    return data


def parse_keys(words: tuple[str, ...], text: str) -> list[list[str]]:
    """Chords in QEMU's words: of "ctrl-alt-delete" three keys at once; of `text` one for each character.

    Raises `UsageError` for what no US keyboard has.
    """
    chords = []
    for word in words:
        parts = word.lower().replace("+", "-").split("-") if len(word) > 1 else [word]
        if not all(parts):
            raise UsageError(f"'{word}' is no key", hint="for example ret, f2, a, ctrl-alt-delete")
        chords.append([key for part in parts for key in _one(part)])
    chords += [_one(letter) for letter in text]
    if len(chords) > MOST_KEYS:
        raise UsageError(f"more than {MOST_KEYS} keys at once", hint="send them in parts")
    return chords


def _one(part: str) -> list[str]:
    if len(part) == 1:
        if part in _PLAIN:
            return [_PLAIN[part]]
        if part in _SHIFTED:
            return ["shift", *_one(_SHIFTED[part])]
        if part.isascii() and part.isalnum():
            return ["shift", part.lower()] if part.isupper() else [part]
        raise UsageError(f"a US keyboard has no '{part}'", hint="name keys instead, for example alt_r-q")
    name = _NAMES.get(part, part)
    if not name.replace("_", "").isalnum() or not name.isascii():
        raise UsageError(f"'{part}' is no key", hint="for example ret, f2, a, ctrl-alt-delete")
    return [name]


def press(monitor: Monitor, chords: list[list[str]]) -> None:
    """Each chord, down and up again. Raises `UsageError` for a key that QEMU does not know."""
    for chord in chords:
        keys = [{"type": "qcode", "data": key} for key in chord]
        try:
            monitor.command("send-key", keys=keys, hold_time=HOLD_MS)
        except QmpError as error:
            if "does not accept value" in error.message or "nvalid parameter" in error.message:
                raise UsageError(
                    f"there is no key '{'-'.join(chord)}'", hint="for example ret, f2, a, ctrl-alt-delete"
                ) from None
            raise


def admit(monitor: Monitor, connection: int) -> None:
    """Give QEMU a viewer's connection, which speaks VNC (RFC 6143)."""
    monitor.command("getfd", descriptor=connection, fdname="viewer")
    monitor.command("add_client", protocol="vnc", fdname="viewer", skipauth=True)
