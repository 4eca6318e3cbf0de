"""The answers to a Debian installer's questions: "preseeding", appendix B of Debian's installation guide.

Without a word of the user's: one file system on the first disk, root without a password, an ssh server, and packages from
where this host's come from.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from nagaya.errors import UsageError
from nagaya.static import NamedTuple


class Mirror(NamedTuple):
    """Where packages come from. `security`: the URI of Debian's security archive, "" = without it."""

    uri: str
    suite: str = ""  # "" = the one that the installer is of
    security: str = ""
    proxy: str = ""


class Answers(NamedTuple):
    hostname: str
    disk: str  # /dev/vda
    mirror: Mirror | None  # None: all that there will be is on the disc


_FIXED = """\
d-i debian-installer/locale string en_US.UTF-8
d-i keyboard-configuration/xkb-keymap select us
d-i netcfg/choose_interface select auto
d-i netcfg/get_domain string
d-i hw-detect/load_firmware boolean false
d-i passwd/root-login boolean true
d-i passwd/root-password-crypted password *
d-i passwd/make-user boolean false
d-i clock-setup/utc boolean true
d-i clock-setup/ntp boolean false
d-i time/zone string Etc/UTC
d-i partman-auto/method string regular
d-i partman-auto/choose_recipe select atomic
d-i partman-lvm/device_remove_lvm boolean true
d-i partman-partitioning/confirm_write_new_label boolean true
d-i partman/choose_partition select finish
d-i partman/confirm boolean true
d-i partman/confirm_nooverwrite boolean true
d-i base-installer/install-recommends boolean false
d-i apt-setup/enable-source-repositories boolean false
d-i apt-setup/cdrom/set-first boolean false
d-i apt-setup/disable-cdrom-entries boolean true
tasksel tasksel/first multiselect
d-i pkgsel/update-policy select none
d-i grub-installer/only_debian boolean true
d-i grub-installer/bootdev string default
d-i grub-installer/force-efi-extra-removable boolean true
d-i finish-install/keep-consoles boolean true
d-i finish-install/reboot_in_progress note
"""


def make_preseed(answers: Answers, own: bytes = b"") -> bytes:
    """The file; the user's `own` lines are behind ours, and so win. Raises `UsageError` for a mirror without HTTP."""
    lines = [
        *_FIXED.splitlines(),
        f"d-i netcfg/get_hostname string {answers.hostname}",
        f"d-i netcfg/hostname string {answers.hostname}",
        f"d-i partman-auto/disk string {answers.disk}",
        *(_mirror(answers.mirror) if answers.mirror is not None else _NO_MIRROR),
    ]
    return "".join(f"{line}\n" for line in lines).encode() + own


_NO_MIRROR = (
    "d-i apt-setup/use_mirror boolean false",
    "d-i apt-setup/services-select multiselect",
    "d-i pkgsel/include string openssh-server",
    "d-i pkgsel/upgrade select none",
)


def _mirror(mirror: Mirror) -> list[str]:
    scheme, host, directory = split_mirror(mirror.uri)
    lines = [
        f"d-i mirror/protocol string {scheme}",
        "d-i mirror/country string manual",
        f"d-i mirror/{scheme}/hostname string {host}",
        f"d-i mirror/{scheme}/directory string {directory}",
        f"d-i mirror/{scheme}/proxy string {mirror.proxy}".rstrip(),
        "d-i pkgsel/include string openssh-server qemu-guest-agent",
        "d-i pkgsel/upgrade select full-upgrade",
    ]
    if mirror.suite:
        lines.append(f"d-i mirror/suite string {mirror.suite}")
    if not mirror.security:
        return [*lines, "d-i apt-setup/services-select multiselect updates"]
    _, host, directory = split_mirror(mirror.security)
    return [
        *lines,
        "d-i apt-setup/services-select multiselect security, updates",
        f"d-i apt-setup/security_host string {host}",
        f"d-i apt-setup/security_path string {directory}",
    ]


def split_mirror(uri: str) -> tuple[str, str, str]:
    """Scheme, host and directory. Raises `UsageError` for one that is not asked over HTTP."""
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https") or not parts.netloc or "@" in parts.netloc:
        raise UsageError(
            "an installer gets its packages over HTTP, without a password",
            hint="say where from in a file of your own: --preseed FILE",
        )
    return parts.scheme, parts.netloc, parts.path.rstrip("/") or "/"
