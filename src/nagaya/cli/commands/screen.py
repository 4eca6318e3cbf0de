"""`nagaya screen`, `screenshot` and `sendkey`: the screen and the keyboard of a whole machine."""

from __future__ import annotations

import os
import shlex
import sys

from nagaya.cli.context import Context
from nagaya.cli.flags import MANY, Command, Flag, Parsed
from nagaya.errors import HostError, UsageError


def screen(context: Context, parsed: Parsed) -> int:
    """Say where a viewer finds it; with -q the socket alone."""
    path = context.host.machines.get(parsed.words[0]).front.find_screen()
    if parsed.switch("quiet"):
        print(path)
        return 0
    quoted = shlex.quote(path)
    print(f"The screen is at {path}, for VNC viewers of this user:")
    print(f"  vncviewer {quoted}")
    print(f"  remote-viewer vnc+unix://{quoted}")
    print("From another computer, by ssh and then a viewer on 127.0.0.1:5900 there:")
    print(f"  ssh -L 127.0.0.1:5900:{quoted} {os.uname().nodename}")
    return 0


def screenshot(context: Context, parsed: Parsed) -> int:
    """Write the picture; '-' is standard output."""
    name, path = parsed.words
    format_ = "ppm" if path.lower().endswith(".ppm") else "png"
    if path != "-" and not path.lower().endswith((".png", ".ppm")):
        raise UsageError(f"'{path}' is neither a .png nor a .ppm", hint="for example screen.png")
    picture = context.host.machines.get(name).front.take_picture(format=format_)
    if path == "-":
        sys.stdout.buffer.write(picture)
        return 0
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(picture)
        os.replace(temporary, path)
    except OSError as error:
        raise HostError.from_os(error, "cannot write the picture") from None
    return 0


def sendkey(context: Context, parsed: Parsed) -> int:
    """Press each, one after the other; then type --text."""
    name, *keys = parsed.words
    text = parsed.text("text")
    if not keys and not text:
        raise UsageError("no key was named", hint=f"for example nagaya sendkey {name} ctrl-alt-delete")
    context.host.machines.get(name).front.press_keys(tuple(keys), text=text)
    return 0


SCREEN = Command(
    screen,
    usage="MACHINE",
    words=(1, 1),
    flags=(Flag("-q --quiet", "Print the socket's path only"),),
    about="Its screen is served as VNC on a Unix socket, for the user that started the machine. The serial console is"
    " 'nagaya attach'.",
    examples=(("nagaya screen web", ""), ("nagaya screen -q web", "the socket alone, for a script")),
)
SCREENSHOT = Command(
    screenshot,
    usage="MACHINE FILE",
    words=(2, 2),
    about="FILE ends in .png or .ppm, or is '-'.",
    examples=(("nagaya screenshot web screen.png", ""),),
)
SENDKEY = Command(
    sendkey,
    usage="MACHINE [KEY...]",
    words=(1, MANY),
    flags=(Flag("--text", "Type this, on a US keyboard, after the keys", value="TEXT"),),
    about="A KEY is a character or a name (ret, esc, tab, f1, up, delete …); with '-' several are pressed at once.",
    examples=(
        ("nagaya sendkey web ctrl-alt-delete", ""),
        ("nagaya sendkey web --text root ret", "type a name, and return"),
    ),
)
