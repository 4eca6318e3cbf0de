"""What a user, or a host's administrator, has settled for all machines: two TOML files, and the environment above them.

/etc/nagaya/config.toml                         the host's
$XDG_CONFIG_HOME/nagaya/config.toml             the user's (~/.config), which wins
NAGAYA_TYPE                                     wins over both

type = "kvm"        # container | kvm | emulated | auto
"""

from __future__ import annotations

import os

from nagaya.engines import TYPES
from nagaya.errors import UsageError
from nagaya.static import Any

SYSTEM_FILE = "/etc/nagaya/config.toml"
AUTO = "auto"
CHOICES = (*TYPES, AUTO)
DEFAULT_TYPE = "container"
NOBODY = "Nagaya"  # has settled what nobody else has


def choose_type(wanted: str, *, platform: str = "") -> str:
    """The type for a new machine: `wanted`, or what is settled when that is empty; `auto` becomes a real one.

    Where nobody has settled one, a machine for another `platform` than this host's is emulated: nothing else runs it.
    Raises `UsageError` for a type that there is not, naming who asked for it.
    """
    who, name = _first_choice(wanted)
    if name not in CHOICES:
        raise UsageError(f"{who}: unknown machine type '{name}'", hint=f"one of: {', '.join(CHOICES)}")
    if (name == AUTO or who == NOBODY) and _is_foreign(platform):
        return "emulated"
    return _find_best() if name == AUTO else name


def _is_foreign(platform: str) -> bool:
    if not platform:
        return False
    from nagaya.images.manifest import host_platform, normalise_platform  # lazy: few name a platform

    return normalise_platform(platform) != host_platform()


def _first_choice(wanted: str) -> tuple[str, str]:
    if wanted:
        return "--type", wanted
    settled = os.environ.get("NAGAYA_TYPE", "")
    if settled:
        return "NAGAYA_TYPE", settled
    for path in (user_file(), SYSTEM_FILE):
        found = read_file(path).get("type")
        if found is not None:
            return path, found
    return NOBODY, DEFAULT_TYPE


def _find_best() -> str:
    """`kvm` where the host's CPU does the work, else `emulated`: a software KVM boots a kernel more slowly than QEMU."""
    from nagaya.engines.kvm.known import HARDWARE, find_kvm  # lazy: only who does not choose
    from nagaya.errors import NagayaError

    try:
        return "kvm" if find_kvm().kind == HARDWARE else "emulated"
    except NagayaError:
        return "emulated"


def user_file() -> str:
    """Where this user's settings are, or would be."""
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return f"{base}/nagaya/config.toml"


def read_file(path: str) -> dict[str, Any]:
    """A file's settings; none when there is no such file. Raises `UsageError` for what is not TOML, or not a setting."""
    try:
        with open(path, "rb") as file:
            raw = file.read()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise UsageError(f"cannot read the settings in {path}: {error.strerror}") from None
    import tomllib  # lazy: 6 ms, for those who have such a file

    try:
        found = tomllib.loads(raw.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not TOML: {error}", hint='a line is like: type = "kvm"') from None
    for key, value in found.items():
        if key != "type":
            raise UsageError(f"{path}: there is no setting '{key}'", hint="there is one: type")
        if not isinstance(value, str):
            raise UsageError(f"{path}: 'type' is not a text", hint=f"one of: {', '.join(CHOICES)}, in quotation marks")
    return found
