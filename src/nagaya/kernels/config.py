"""Fragments of a kernel configuration: lines of `CONFIG_NAME=value`, with reasons behind `#`."""

from __future__ import annotations

import os
import re

from nagaya.errors import HostError, UsageError
from nagaya.static import NamedTuple

NO = "n"
_LINE = re.compile(r'(CONFIG_\w+)=("(?:[^"\\]|\\.)*"|[^\s"#]\S*)(?:\s+#.*)?')
_NOT_SET = re.compile(r"# (CONFIG_\w+) is not set")


class Lost(NamedTuple):
    """A line that did not survive: the source does not know the symbol, or something that it depends on is off."""

    name: str
    wanted: str
    found: str


def shipped_paths(architecture: str) -> tuple[str, str]:
    """The fragments that come with this package: what every CPU's guest kernel has, and what this one's has beside it."""
    directory = os.path.dirname(__file__)
    return os.path.join(directory, "guest.config"), os.path.join(directory, f"{architecture}.config")


def read_shipped(architecture: str) -> dict[str, str]:
    """Both fragments; where they differ, the CPU's own wins."""
    common, own = shipped_paths(architecture)
    return read_fragment(common) | read_fragment(own)


def read_fragment(path: str) -> dict[str, str]:
    """Read a fragment, or a whole .config: name -> value, "n" for what is to be off.

    Raises `UsageError` for a line that is neither a setting nor a comment, and for a symbol that is set twice.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return parse_fragment(file.read(), path)
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not a kernel configuration", hint="lines are CONFIG_NAME=value") from None
    except OSError as error:
        raise HostError.from_os(error, "cannot read the kernel configuration") from None


def parse_fragment(text: str, where: str) -> dict[str, str]:
    """See `read_fragment`; `where` names the text in errors."""
    settings: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        off = _NOT_SET.fullmatch(line)
        match = off or _LINE.fullmatch(line)
        if match is None:
            if line and not line.startswith("#"):
                raise UsageError(f"{where}:{number}: not a kernel setting: {line}", hint="lines are CONFIG_NAME=value")
            continue
        if match[1] in settings:
            raise UsageError(f"{where}:{number}: {match[1]} is set a second time", hint="keep one of the two lines")
        settings[match[1]] = NO if off else match[2]
    return settings


def render(settings: dict[str, str]) -> str:
    """The settings in the kernel's own format, without reasons, in a fixed order."""
    return "".join(f"{name}={value}\n" for name, value in sorted(settings.items()))


def find_lost(wanted: dict[str, str], config: dict[str, str]) -> list[Lost]:
    """What a finished .config has otherwise than it was wanted."""
    found = ((name, value, config.get(name, NO)) for name, value in wanted.items())
    return [Lost(name, value, has) for name, value, has in found if value != has]
