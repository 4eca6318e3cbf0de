"""What a user, or a host's administrator, has settled for all new machines: two TOML files, and the environment above them.

/etc/nagaya/config.toml                         the host's
$XDG_CONFIG_HOME/nagaya/config.toml             the user's (~/.config), which wins
NAGAYA_TYPE                                     wins over both; a flag wins over all

type = "kvm"        # container | kvm | emulated | auto
memory = "1g"       # of those that are not given --memory
cpus = 2
storage = "20g"     # of virtual machines that are not given --storage
network = "none"    # bridge | host | none
templates = false   # machines of type kvm boot, and none is built for them
"""

from __future__ import annotations

import os

from nagaya.engines import TYPES
from nagaya.errors import UsageError
from nagaya.static import NamedTuple

SYSTEM_FILE = "/etc/nagaya/config.toml"
AUTO = "auto"
CHOICES = (*TYPES, AUTO)
DEFAULT_TYPE = AUTO
NETWORKS = ("bridge", "host", "none")
NOBODY = "Nagaya"  # has settled what nobody else has
# key -> (what it has to be, the texts that it may be; () = whatever the flag of that name takes)
KEYS: dict[str, tuple[str, tuple[str, ...]]] = {
    "type": (f"one of: {', '.join(CHOICES)}", CHOICES),
    "memory": ("a size", ()),
    "cpus": ("a number of CPUs", ()),
    "storage": ("a size", ()),
    "network": (f"one of: {', '.join(NETWORKS)}", NETWORKS),
    "templates": ("true or false", ()),
}
SWITCHES = ("templates",)
ON, OFF = "true", "false"
NUMBERS = ("memory", "cpus", "storage")  # may be TOML's numbers as well as texts
EXAMPLES = {
    "type": '"kvm"',
    "memory": '"1g"',
    "cpus": "2",
    "storage": '"20g"',
    "network": '"none"',
    "templates": "false",
}


class Setting(NamedTuple):
    """`source` begins a sentence about it: the file and the key."""

    text: str
    source: str


class Choice(NamedTuple):
    """A type for a machine. `reason`: why `auto` is one that whoever did not choose it may not expect; "" for nothing."""

    type: str
    reason: str = ""

    @property
    def note(self) -> str:
        """The reason for who has named no type, as a sentence."""
        if not self.reason:
            return ""
        return f"no type was asked for, and this is a {self.type}, because {self.reason}; --type {self.type} says so"


def choose_type(wanted: str, *, platform: str = "", kernel: str = "") -> Choice:
    """The type for a new machine: `wanted`, or what is settled when that is empty; `auto` becomes a real one.

    `auto` is `emulated` for another `platform` than this host's, which nothing else runs; with a `kernel` of the
    machine's own it does not ask for ours. Raises `UsageError` for a type that there is not, naming who asked for it.
    """
    name = choose_first(wanted)
    if name != AUTO:
        return Choice(name)
    return Choice("emulated") if _is_foreign(platform) else _find_best(kernel)


def choose_first(wanted: str) -> str:
    """`wanted`, or what is settled: one of `CHOICES`, as it stands there. Raises `UsageError`."""
    who, name = _first_choice(wanted)
    if name not in CHOICES:
        raise UsageError(f"{who}: unknown machine type '{name}'", hint=f"one of: {', '.join(CHOICES)}")
    return name


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
    found = read_settings().get("type")
    return (found.source, found.text) if found is not None else (NOBODY, DEFAULT_TYPE)


def _find_best(kernel: str) -> Choice:
    """`kvm` where the CPU does the work, else `emulated`: a software KVM boots most kernels more slowly than QEMU.

    Root can do without a kernel or QEMU: a container is the thinner wall, so it is said that it was taken.
    """
    from nagaya.errors import NagayaError  # lazy: only who does not choose
    from nagaya.kernels.cache import find_kernel

    if not kernel and find_kernel() is None:
        return _settle_for_container("no guest kernel has been built (once: 'nagaya kernel build')")
    from nagaya.engines.kvm.speed import runs_well

    try:
        if runs_well(kernel):
            return Choice("kvm")
    except NagayaError:
        pass
    from nagaya.engines import open_engine

    try:
        open_engine("emulated").check_host(kernel=kernel)
    except NagayaError as error:
        return _settle_for_container(error.message)
    return Choice("emulated")


def _settle_for_container(reason: str) -> Choice:
    if os.geteuid():
        return Choice("emulated")  # which says what is missing: a plain user has no containers
    return Choice("container", reason)


def user_file() -> str:
    """Where this user's settings are, or would be."""
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return f"{base}/nagaya/config.toml"


def read_settings() -> dict[str, Setting]:
    """What the two files say, by key. Raises `UsageError` for a file that is damaged, or a key that there is not."""
    found = {}
    for path in (SYSTEM_FILE, user_file()):
        for key, text in read_file(path).items():
            found[key] = Setting(text, f"{path}: '{key}'")
    return found


def _can_enter(directory: str) -> bool:
    try:
        os.stat(f"{directory}/.")
    except OSError:
        return False
    return True


def read_file(path: str) -> dict[str, str]:
    """A file's settings as texts; none when there is no such file. Raises `UsageError`."""
    try:
        with open(path, "rb") as file:
            raw = file.read()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except PermissionError as error:
        if not _can_enter(os.path.dirname(path)):  # $HOME is another user's, as after su(1): there is nothing of ours
            return {}
        raise UsageError(f"cannot read the settings in {path}: {error.strerror}") from None
    except OSError as error:
        raise UsageError(f"cannot read the settings in {path}: {error.strerror}") from None
    import tomllib  # lazy: 6 ms, for those who have such a file

    try:
        found = tomllib.loads(raw.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not TOML: {error}", hint='a line is like: type = "kvm"') from None
    return {key: _check(path, key, value) for key, value in found.items()}


def _check(path: str, key: str, value: object) -> str:
    """A setting as text. What the text says is for whoever uses it to judge, as with a flag's."""
    if key not in KEYS:
        raise UsageError(f"{path}: there is no setting '{key}'", hint=f"there are: {', '.join(KEYS)}")
    what, choices = KEYS[key]
    if key in SWITCHES:
        if isinstance(value, bool):
            return ON if value else OFF
    elif isinstance(value, str) and (not choices or value in choices):
        return value
    if key in NUMBERS and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    raise UsageError(f"{path}: '{key}' is not {what}", hint=f"for example: {key} = {EXAMPLES[key]}")
