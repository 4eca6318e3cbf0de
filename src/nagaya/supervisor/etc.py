"""The files that every machine gets bound over its own: /etc/hosts, /etc/hostname, /etc/resolv.conf."""

from __future__ import annotations

from nagaya.model.spec import MachineSpec
from nagaya.net import names
from nagaya.net.plan import NetworkPlan
from nagaya.storage.paths import make_directory
from nagaya.storage.records import write_file


def write_etc(directory: str, spec: MachineSpec, network: NetworkPlan) -> tuple[tuple[str, str], ...]:
    """Write them below `directory`; answers (path inside, host file) pairs."""
    make_directory(directory, 0o755)
    contents = {
        "hosts": names.hosts(spec.hostname, network.addresses, (*network.hosts, *spec.extra_hosts)),
        "hostname": spec.hostname + "\n",
    }
    if network.kind != "none":
        dns = spec.dns or network.nameservers
        contents["resolv.conf"] = names.resolv_conf(
            _host_resolv_conf(), dns, own_namespace=network.kind != "host", search=network.search
        )
    for name, text in contents.items():
        write_file(f"{directory}/{name}", text.encode(), mode=0o644)
    return tuple((f"/etc/{name}", f"{directory}/{name}") for name in contents)


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
