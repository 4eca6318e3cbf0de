"""A virtual machine whose cards go to other networks while it runs, and what its inside is told of that."""

from __future__ import annotations

from nagaya.engines.vm.setup import plan_link
from nagaya.errors import HostError
from nagaya.kernel.netlink import Netlink, index_of
from nagaya.net import rates
from nagaya.net.plan import LinkPlan
from nagaya.protocol.setup import renewal_payload


def replug(link: LinkPlan) -> None:
    """See `Replugging.replug`: the VMM has the tap device open still, which left its bridge."""
    try:
        with Netlink() as netlink:
            netlink.enslave(index_of(link.host_link), master=index_of(link.bridge), mtu=link.mtu)
        rates.limit(link.host_link, link.rate_bits)
    except OSError as error:
        raise HostError.from_os(error, f"cannot connect the machine to the network '{link.network}'") from None


def plan_renewal(links: tuple[LinkPlan, ...], files: tuple[tuple[str, bytes, bytes], ...]) -> bytes:
    """See `Replugging.plan_renewal`."""
    return renewal_payload(tuple(map(plan_link, links)), files)
