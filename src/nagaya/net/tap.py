"""Connecting a virtual machine to its bridge: a tap device, whose descriptor its VMM reads and writes frames by.

What a veth pair is to a container (net/attach.py). The device goes when its last descriptor does, so with the VMM.
"""

from __future__ import annotations

import os

from nagaya.errors import HostError
from nagaya.kernel import tun
from nagaya.kernel.netlink import Netlink, index_of
from nagaya.net.plan import LinkPlan


def open_link(link: LinkPlan) -> int:
    """A tap device named `link.host_link`, up and in `link.bridge`; its descriptor, which does not block.

    Every frame has a `struct virtio_net_hdr` before it. Raises `HostError`; there is no device then.
    """
    if link.driver == "macvlan":
        return _open_macvtap(link)
    try:
        fd = tun.open_tap(link.host_link)
        try:
            with Netlink() as netlink:
                netlink.enslave(index_of(link.host_link), master=index_of(link.bridge), mtu=link.mtu)
            if link.rate_bits:
                from nagaya.net import rates  # lazy: few links have one

                rates.limit(link.host_link, link.rate_bits)
        except BaseException:
            os.close(fd)
            raise
    except OSError as error:
        raise HostError.from_os(
            error, "cannot connect the machine to its network", hint="use --network none, or run it as root"
        ) from None
    return fd


def _open_macvtap(link: LinkPlan) -> int:
    """The same on the local network: a link on `link.bridge`, the host's own, which stays until somebody deletes it."""
    try:
        with Netlink() as netlink:
            netlink.delete_link(link.host_link)  # of a supervisor that was killed
            netlink.add_macvlan(
                link.host_link, parent=index_of(link.bridge), mac=link.mac, mtu=link.mtu, kind="macvtap"
            )
            try:
                return tun.open_macvtap(link.host_link, index_of(link.host_link))
            except BaseException:
                netlink.delete_link(link.host_link)
                raise
    except OSError as error:
        raise HostError.from_os(
            error,
            f"cannot connect the machine to the network on {link.bridge}",
            hint="use a network of the driver 'bridge'",
        ) from None
