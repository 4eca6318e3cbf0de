"""Telling the system of a whole machine who it is, where it has cloud-init."""

from __future__ import annotations

from nagaya.model.spec import MachineSpec
from nagaya.net.plan import LinkPlan, NetworkPlan
from nagaya.storage.disk_images.seed import SeedLink, network_config, write_seed
from nagaya.supervisor.etc import read_host_nameservers


def seed(directory: str, spec: MachineSpec, network: NetworkPlan) -> None:
    """Make its CD, if it is to have one."""
    if spec.hardware is None or spec.hardware.seed is None:
        return
    links = tuple(_link(link) for link in network.links)
    nameservers = () if network.is_user else network.nameservers or spec.dns or read_host_nameservers()
    write_seed(
        directory,
        machine_id=spec.id,
        hostname=spec.hostname,
        keys=spec.hardware.seed.ssh_keys,
        network=network_config(links, nameservers, network.search),
    )


def _link(link: LinkPlan) -> SeedLink:
    if link.driver == "user":
        return SeedLink(link.name, link.mac)
    pairs = ((link.address, link.prefix), (link.address6, link.prefix6))
    return SeedLink(
        link.name,
        link.mac,
        tuple(f"{address}/{prefix}" for address, prefix in pairs if address),
        tuple(gateway for gateway in (link.gateway, link.gateway6) if gateway),
    )
