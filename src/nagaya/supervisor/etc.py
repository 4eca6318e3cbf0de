"""The files that every machine gets bound over its own: /etc/hosts, /etc/hostname, /etc/resolv.conf."""

from __future__ import annotations

import os

from nagaya.model.spec import MachineSpec
from nagaya.net import names
from nagaya.net.plan import NetworkPlan
from nagaya.storage.paths import make_directory
from nagaya.storage.records import write_file

MOST_BYTES = 1 << 20


def write_etc(directory: str, spec: MachineSpec, network: NetworkPlan) -> tuple[tuple[str, str], ...]:
    """Write them below `directory`; answers (path inside, host file) pairs."""
    make_directory(directory, 0o755)
    contents = plan_etc(spec, network)
    for name, text in contents.items():
        write_file(f"{directory}/{name}", text.encode(), mode=0o644)
    return tuple((f"/etc/{name}", f"{directory}/{name}") for name in contents)


def rewrite_etc(directory: str, spec: MachineSpec, before: NetworkPlan, after: NetworkPlan) -> None:
    """The same for a machine that runs with them: in place, for what it has bound is the file. What it has changed stays."""
    new = plan_etc(spec, after)
    for name, old in plan_etc(spec, before).items():
        if name not in new or old == new[name]:
            continue
        with open(f"{directory}/{name}", "r+", encoding="utf-8", errors="replace", opener=_open_own) as file:
            if file.read(MOST_BYTES) == old:
                file.seek(0)
                file.write(new[name])
                file.truncate()


def replace_etc(directory: str, spec: MachineSpec, after: NetworkPlan) -> tuple[tuple[str, bytes, bytes], ...]:
    """The same on the host alone, for a machine that has its own copies; (path inside, before, after) of what has changed."""
    changed = []
    for name, text in plan_etc(spec, after).items():
        try:
            with open(f"{directory}/{name}", "rb", opener=_open_own) as file:
                before = file.read(MOST_BYTES)
        except FileNotFoundError:
            continue  # the machine was started without
        if before != text.encode():
            write_file(f"{directory}/{name}", text.encode(), mode=0o644)
            changed.append((f"/etc/{name}", before, text.encode()))
    return tuple(changed)


def _open_own(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)


def plan_etc(spec: MachineSpec, network: NetworkPlan) -> dict[str, str]:
    """What is in them, by their names in /etc."""
    contents = {
        "hosts": names.hosts(spec.hostname, network.addresses, (*network.hosts, *spec.extra_hosts)),
        "hostname": spec.hostname + "\n",
    }
    if network.kind != "none":
        # Those of our networks ask the machine's own servers in its place, beside that they know its neighbours' names.
        dns = (spec.dns or network.nameservers) if network.is_user else (network.nameservers or spec.dns)
        contents["resolv.conf"] = names.resolv_conf(
            _host_resolv_conf(), dns, own_namespace=network.kind != "host", search=network.search
        )
    return contents


def read_host_nameservers() -> tuple[str, ...]:
    """Those of the host that a machine can reach, or public ones."""
    text = names.resolv_conf(_host_resolv_conf(), (), own_namespace=True)
    return tuple(line.split()[1] for line in text.splitlines() if line.startswith("nameserver "))


def _host_resolv_conf() -> str:
    try:
        with open("/etc/resolv.conf", encoding="utf-8", errors="replace") as file:
            return file.read(64 << 10)
    except OSError:
        return ""
