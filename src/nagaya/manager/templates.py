"""Building templates ahead of the first machine that would have one built: `nagaya template build`."""

from __future__ import annotations

import os
from collections.abc import Callable

from nagaya.engines import open_engine
from nagaya.engines.kvm.known import find_kvm
from nagaya.engines.kvm.sources import command_line
from nagaya.engines.kvm.template import Mold, Prepared, make_id
from nagaya.engines.kvm.template_build import build
from nagaya.engines.vm import rules
from nagaya.engines.vm.agent import agent_path
from nagaya.images.progress import Silent
from nagaya.images.rootimage import make_root_image
from nagaya.kernel.netlink import Netlink
from nagaya.kernels import cache
from nagaya.manager.host import Host
from nagaya.model.spec import Limits, MachineSpec, Process
from nagaya.net.plan import LinkPlan
from nagaya.net.planning import way_out_mtu
from nagaya.storage.disks import DEFAULT_BYTES

_FILES = ("/etc/hosts", "/etc/hostname")
_WITH_NETWORK = (*_FILES, "/etc/resolv.conf")


def build_template(
    host: Host,
    image: str,
    *,
    memory_bytes: int = 0,
    cpus_milli: int = 0,
    network: bool = True,
    report: Callable[[str], None] = lambda text: None,
) -> str:
    """The id of the template that `nagaya run` of `image` begins from; "" = of the one for every image.

    Raises `Unsupported` where machines of type kvm do not run, `NotFound` for the image, `LaunchError`.
    """
    open_engine("kvm").check_host()
    limits = Limits(memory_bytes=memory_bytes, cpus_milli=cpus_milli)
    spec = MachineSpec("", "", "kvm", image, "", "", Process(()), "", 0, limits=limits)
    cards = ("stream" if os.geteuid() else "tap",) if network else ()
    mold = Mold(
        kernel=cache.get_kernel().path, agent=agent_path(), command_line=command_line(spec),
        memory_bytes=rules.memory_bytes(spec), cpus=rules.cpus(spec), cards=cards, kvm=find_kvm().kind,
    )  # fmt: skip
    if image:
        root = make_root_image(host.images, host.images.get(image), progress=Silent())
        mold = mold._replace(
            prepared=Prepared(
                image=root, data_bytes=DEFAULT_BYTES, read_only=False, unmask=False, own_pids=False, pids=0,
                files=_WITH_NETWORK if network else _FILES, mtu=_mtu(cards),
                capabilities=rules.plan_policy(spec).capabilities,
            )
        )  # fmt: skip
    build(mold, report=report)
    return make_id(mold.key)


def _mtu(cards: tuple[str, ...]) -> int:
    """What the default network's links have."""
    if "tap" not in cards:
        return LinkPlan().mtu if cards else 0
    with Netlink() as netlink:
        return way_out_mtu(netlink)
