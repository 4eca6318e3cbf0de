"""The formats of disk images, as data. A format follows from a name or from what a caller says, never from content."""

from __future__ import annotations

from nagaya.errors import UsageError
from nagaya.static import NamedTuple


class Format(NamedTuple):
    """`driver` is QEMU's word for it, `extension` what we give to a file of it."""

    name: str
    driver: str
    extension: str
    others: tuple[str, ...] = ()  # further extensions that people use
    options: str = ""  # of qemu-img, for a new one
    resizes: bool = False
    layers: bool = False  # holds snapshots, and may stand on a backing file
    checks: bool = False
    in_order: bool = False  # is to be written front to back


FORMATS = (
    Format("qcow2", "qcow2", ".qcow2", options="compat=1.1,lazy_refcounts=off", resizes=True, layers=True, checks=True),
    Format("raw", "raw", ".raw", (".iso", ".img"), resizes=True),
    Format("vmdk", "vmdk", ".vmdk", options="subformat=monolithicSparse", checks=True),
    # QEMU's driver (7.2, block/vdi.c, vdi_co_pwritev) writes its count of blocks with each new one, and two such writes may
    # change places: the next block would be put where another one lies.
    Format("vdi", "vdi", ".vdi", checks=True, in_order=True),
    # Else QEMU rounds the size up to whole cylinders, and a disk that was converted twice would have grown.
    Format("vhd", "vpc", ".vhd", (".vpc",), options="subformat=dynamic,force_size=on"),
    Format("vhdx", "vhdx", ".vhdx", options="subformat=dynamic", checks=True),
)
NAMES = tuple(each.name for each in FORMATS)
_ALIASES = {"vpc": "vhd", "qcow": "qcow2", "img": "raw"}
# Ubuntu's cloud images are called so and are qcow2; others are raw.
AMBIGUOUS = (".img",)


def get_format(name: str, what: str = "--disk-format") -> Format:
    """By its name. Raises `UsageError`."""
    wanted = _ALIASES.get(name.lower(), name.lower())
    for each in FORMATS:
        if each.name == wanted:
            return each
    raise UsageError(f"{what}: unknown disk format '{name}'", hint=f"one of: {', '.join(NAMES)}")


def find_by_extension(path: str) -> Format | None:
    """What a file's name says that it is."""
    lower = path.lower()
    for each in FORMATS:
        if lower.endswith((each.extension, *each.others)):
            return each
    return None


def find_by_driver(driver: str) -> Format | None:
    """By QEMU's word, as it stands in a header."""
    return next((each for each in FORMATS if each.driver == driver), None)
