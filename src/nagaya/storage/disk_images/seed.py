"""What cloud-init finds at its first boot: a CD with the label CIDATA (cloud-init's documentation, "NoCloud").

It is made anew at every start, for the machine's addresses may have changed.
"""

from __future__ import annotations

import json
import os
import subprocess

from nagaya.errors import HostError, LaunchError, NotFound, Unsupported
from nagaya.static import NamedTuple
from nagaya.storage.records import write_file

SEED = "seed.iso"
USER_DATA = "user-data"
KEY = "id_ed25519"
MOST_USER_DATA = 4 << 20
LABEL = "CIDATA"
# Without a word of the user's: whoever has the machine's key may log in, as root as well.
DEFAULT_USER_DATA = "#cloud-config\ndisable_root: false\nssh_pwauth: false\n"
# Networks are set up at every boot: an address of ours may be another one then.
_NETWORK_ANEW = "#cloud-config\nupdates:\n  network:\n    when: [boot]\n"
# A disk that was another machine's has that one's id in it. Host keys are made anew by cloud-init, for a new instance.
_OWN_ID = """#!/bin/sh
for file in /etc/machine-id /var/lib/dbus/machine-id; do
    [ -f $file ] && [ ! -L $file ] && [ "$(cat $file)" != %s ] && echo %s > $file
done
exit 0
"""
_PROGRAMS = (("genisoimage",), ("mkisofs",), ("xorrisofs",))


class SeedLink(NamedTuple):
    """A network card as the system is told of it. Without addresses it asks by DHCP."""

    name: str
    mac: str
    addresses: tuple[str, ...] = ()  # with their prefixes: "10.87.0.2/24"
    gateways: tuple[str, ...] = ()


def require_seed_programs(*, disc: bool) -> None:
    """Raise `Unsupported` for what is not installed here: for the key, and for the CD if there is to be one."""
    if disc:
        _find(_PROGRAMS, "genisoimage", "the CD that tells cloud-init who it is")
    _find((("ssh-keygen",),), "openssh-client", "the machine's key")


def make_key(directory: str, name: str) -> None:
    """The machine's own key pair, by which `nagaya ssh` logs in."""
    _run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"nagaya:{name}", "-f", f"{directory}/{KEY}"])


def read_key(directory: str) -> str:
    """The public half of it, "" where there is none."""
    return _read(f"{directory}/{KEY}.pub").strip()


def network_config(links: tuple[SeedLink, ...], nameservers: tuple[str, ...], search: tuple[str, ...]) -> str:
    """Version 1 of cloud-init's network configuration. JSON is YAML."""
    config: list[dict[str, object]] = []
    for link in links:
        subnets: list[dict[str, object]] = []
        for address in link.addresses:
            version6 = ":" in address
            subnet: dict[str, object] = {"type": "static6" if version6 else "static", "address": address}
            gateway = next((one for one in link.gateways if (":" in one) == version6), "")
            subnets.append({**subnet, "gateway": gateway} if gateway else subnet)
        config.append(
            {
                "type": "physical", "name": link.name, "mac_address": link.mac, "subnets": subnets or [{"type": "dhcp4"}],
            }
        )  # fmt: skip
    if nameservers:
        config.append({"type": "nameserver", "address": list(nameservers), "search": list(search)})
    return json.dumps({"version": 1, "config": config})


def vendor_data(machine_id: str) -> str:
    """What we have to say beside the user, whose words win: an archive of cloud-init's, which is YAML, and JSON is."""
    parts = [
        {"type": "text/cloud-config", "content": _NETWORK_ANEW},
        {"type": "text/cloud-boothook", "content": _OWN_ID % (machine_id, machine_id)},
    ]
    return "#cloud-config-archive\n" + json.dumps(parts)


def write_seed(directory: str, *, machine_id: str, hostname: str, keys: tuple[str, ...], network: str) -> None:
    """Make the CD in the machine's directory, of what is there and what is given."""
    own = read_key(directory)
    user_data = _read(f"{directory}/{USER_DATA}") or DEFAULT_USER_DATA
    meta = {
        "instance-id": machine_id, "local-hostname": hostname, "public-keys": [key for key in (own, *keys) if key],
    }  # fmt: skip
    place = f"{directory}/seed"
    temporary = f"{directory}/{SEED}.tmp"
    try:
        os.makedirs(place, mode=0o700, exist_ok=True)
        for name, text in (
            ("meta-data", json.dumps(meta)), ("user-data", user_data), ("vendor-data", vendor_data(machine_id)),
            ("network-config", network),
        ):  # fmt: skip
            write_file(f"{place}/{name}", text.encode("utf-8", "surrogateescape"))
        program = _find(_PROGRAMS, "genisoimage", "the CD that tells cloud-init who it is")
        _run([*program, "-quiet", "-V", LABEL, "-J", "-R", "-o", temporary, place])
        os.replace(temporary, f"{directory}/{SEED}")
    except OSError as error:
        raise HostError.from_os(error, "cannot make the CD for cloud-init") from None


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read(MOST_USER_DATA)
    except FileNotFoundError:
        return ""


def _find(programs: tuple[tuple[str, ...], ...], package: str, what: str) -> tuple[str, ...]:
    for program in programs:
        if any(os.access(f"{place}/{program[0]}", os.X_OK) for place in os.environ.get("PATH", os.defpath).split(":")):
            return program
    raise Unsupported(
        f"{what} needs {programs[0][0]}, and it is not installed", hint=f"as root: apt-get install {package}"
    )


def _run(argv: list[str]) -> None:
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=60)
    except FileNotFoundError:
        raise NotFound(f"'{argv[0]}' is not installed") from None
    except subprocess.TimeoutExpired:
        raise LaunchError(f"{argv[0]} did not end within a minute", command=argv[0]) from None
    if done.returncode:
        said = done.stderr.strip()
        raise LaunchError(
            f"{argv[0]}: {said.splitlines()[-1] if said else done.returncode}", command=" ".join(argv),
            status=done.returncode, log_tail=said[-2000:],
        )  # fmt: skip
