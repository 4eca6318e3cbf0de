"""Templates: machines that were booted once and saved, for others like them to go on from. docs/snapshots.md.

    $XDG_CACHE_HOME/nagaya/templates/ID/memory, state     see `saved`
                                       /data              of a prepared one: its data disk at that moment
                                    /ID.failed            why it could not be built, for a while
                                    /build.*              one that is being built
                                    /lock                 held by whoever builds

A *bare* template has its kernel and its agent up, and no root yet: it is for every image. A *prepared* one has the root
of one image mounted on an empty data disk, and all else that is the same for each of its machines: it is for their
first starts.
"""

from __future__ import annotations

import os
import time
import zlib

from nagaya import __version__
from nagaya.engines.kvm import saved
from nagaya.errors import HostError, IntegrityError, NagayaError, NotFound, UsageError
from nagaya.static import NamedTuple
from nagaya.storage.paths import cache_directory

SWITCH = "NAGAYA_TEMPLATES"
_PLACEHOLDER_MAC = b"\x02naga%c"
REVISION = 4
"""Of how they are booted and prepared, beside what the key names: 2 has another clock on a software KVM, 3 several cards, 4 bounds its main program."""
MOST = 24
"""Kept at a time; the one that was used longest ago goes first."""
DATA = "data"
_FAILED_FOR_S = 600.0
_DIGITS = frozenset("0123456789abcdef")
_ID_DIGITS = 16


class Prepared(NamedTuple):
    """What a prepared template's machines have in common beside a bare one's."""

    image: str  # the root's file-system image
    data_bytes: int
    read_only: bool
    unmask: bool
    own_pids: bool
    pids: int
    files: tuple[str, ...]  # paths inside of what is mounted over the image's own
    mtu: int
    capabilities: int  # a mask: what the main program has at most


class Mold(NamedTuple):
    """All that machines of one template have in common. `prepared` None: a bare template's."""

    kernel: str
    agent: str
    command_line: str
    memory_bytes: int
    cpus: int
    cards: tuple[str, ...]  # "tap" | "stream": what each of its network cards, eth0, eth1, …, offers to the guest
    kvm: str
    shares: bool = False  # whether it has a device for directories of the host
    prepared: Prepared | None = None

    @property
    def key(self) -> str:
        """What tells it from others, in words. Files are known by their size and time: whatever changes one makes it anew."""
        words = [
            _origin(), f"kernel {_identify(self.kernel)}", f"agent {_identify(self.agent)}",
            f"line {self.command_line}", f"memory {self.memory_bytes} cpus {self.cpus} cards {' '.join(self.cards)} kvm {self.kvm}",
        ]  # fmt: skip
        if self.shares:
            words.append("shares")
        if self.prepared is not None:
            words += [f"image {_identify(self.prepared.image)}", repr(self.prepared[1:])]
        return "\n".join(words)


class Template(NamedTuple):
    """One that is there. `used_ns` is when a machine last began from it, or when it was made."""

    id: str
    path: str
    size_bytes: int  # on the host's disk
    used_ns: int
    image: str  # "" of a bare one
    memory_bytes: int
    cpus: int
    cards: str
    shares: bool


def placeholder_mac(number: int) -> bytes:
    """guest/proto.h: the agent knows by it that card `number` has no address of its machine's yet."""
    return _PLACEHOLDER_MAC % (ord("y") + number)


def _origin() -> str:
    return f"format {saved.FORMAT}.{REVISION} {__version__}"


def _identify(path: str) -> str:
    status = os.stat(path)
    return f"{path} {status.st_size} {status.st_mtime_ns} {status.st_ino}"


def make_id(key: str) -> str:
    """The name of a template's directory. Two keys may share it: the template itself has the whole key."""
    data = key.encode()
    return f"{zlib.crc32(data):08x}{zlib.adler32(data[::-1]):08x}"


def directory() -> str:
    """Where this user's templates are."""
    return cache_directory("templates")


def is_on() -> bool:
    """Whether machines are to start from templates, and templates to be built: NAGAYA_TEMPLATES=0 turns both off."""
    return os.environ.get(SWITCH, "1") not in ("0", "off", "no")


def find(mold: Mold) -> str:
    """The directory of its template; "" when there is none. Notes that it is used."""
    path = f"{directory()}/{make_id(mold.key)}"
    try:
        os.utime(f"{path}/{saved.STATE}")
    except OSError:
        return ""
    return path


def open_template(path: str, mold: Mold) -> saved.Saved | None:
    """What to go on from; None, and the template removed, when it is damaged, or another one's.

    Raises what `saved.read` raises for this host.
    """
    try:
        found = saved.read(path, check_memory=False)
    except IntegrityError:
        remove(os.path.basename(path))
        return None
    if found.state["notes"].get("key") != mold.key:
        found.close()
        return None
    return found


def failed_lately(mold: Mold) -> bool:
    try:
        return time.time() - os.stat(f"{directory()}/{make_id(mold.key)}.failed").st_mtime < _FAILED_FOR_S
    except OSError:
        return False


def list_templates() -> list[Template]:
    """Every whole one, the one that was used last first."""
    try:
        names = os.listdir(directory())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise HostError.from_os(error, "cannot read the cache of templates") from None
    found = [template for name in names if _is_id(name) and (template := _load(name)) is not None]
    return sorted(found, key=lambda template: template.used_ns, reverse=True)


def _is_id(name: str) -> bool:
    return len(name) == _ID_DIGITS and _DIGITS.issuperset(name)


def _load(name: str) -> Template | None:
    path = f"{directory()}/{name}"
    try:
        state = saved.read_state(path)
        used_ns = os.stat(f"{path}/{saved.STATE}").st_mtime_ns
        size = sum(os.lstat(f"{path}/{file}").st_blocks * 512 for file in os.listdir(path))
    except (OSError, NagayaError):
        return None
    notes, hardware = state["notes"], state["hardware"]
    return Template(
        name, path, size, used_ns, str(notes.get("image", "")), hardware["memory_bytes"], hardware["cpus"],
        str(notes.get("cards", "")), bool(notes.get("shares")),
    )  # fmt: skip


def is_current(one: Template) -> bool:
    """Whether the files that it was made of are still there, as they were."""
    try:
        key: str = saved.read_state(one.path)["notes"]["key"]
    except (NagayaError, KeyError):
        return False
    lines = key.splitlines()
    if lines[0] != _origin():
        return False
    known = [line.partition(" ")[2] for line in lines if line.startswith(("kernel ", "agent ", "image "))]
    try:
        return all(_identify(text.rsplit(" ", 3)[0]) == text for text in known)
    except OSError:
        return False


def get(name: str) -> Template:
    """The template whose id begins with `name`. Raises `NotFound`, `UsageError`."""
    matching = [template for template in list_templates() if template.id.startswith(name)]
    if not name or not matching:
        raise NotFound(f"there is no template '{name}'", hint="'nagaya template ls' lists them")
    if len(matching) > 1:
        raise UsageError(f"'{name}' begins the ids of {len(matching)} templates", hint="give more digits of the id")
    return matching[0]


def remove(name: str) -> None:
    """Take one away; machines that began from it keep what they have mapped. Raises `HostError`."""
    from nagaya.storage.tree import remove_tree  # lazy: no start removes one

    path = f"{directory()}/{name}"
    gone = f"{directory()}/build.gone-{os.getpid()}-{name}"
    try:
        os.rename(path, gone)  # first, so that no half of it is found
        remove_tree(gone)
    except FileNotFoundError:
        return
    except OSError as error:
        raise HostError.from_os(error, f"cannot remove the template {name}") from None


def prune(*, most: int = MOST, everything: bool = False) -> list[Template]:
    """Remove what nobody can use any more, what is left of builds that were killed, and all but the `most` used last.

    The caller holds the lock. Answers what was whole and is gone.
    """
    from nagaya.storage.tree import remove_tree

    place = directory()
    gone = []
    for number, template in enumerate(list_templates()):
        if everything or number >= most:
            remove(template.id)
            gone.append(template)
    kept = {template.id for template in list_templates()}
    for name in os.listdir(place) if os.path.isdir(place) else ():
        if (
            name.startswith("build.")
            or (_is_id(name) and name not in kept)
            or (everything and name.endswith(".failed"))
        ):
            remove_tree(f"{place}/{name}")
    return gone
