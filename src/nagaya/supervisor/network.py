"""Wiring a machine up before its boot, changing its links while it runs, and letting go of it after its end."""

from __future__ import annotations

from contextlib import ExitStack

from nagaya.errors import Conflict, Unsupported
from nagaya.net.plan import NetworkPlan
from nagaya.supervisor.etc import rewrite_etc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.supervisor.supervisor import Supervisor

CLOSE_AFTER_S = 0.05


def wire_up(machine: Supervisor, stack: ExitStack) -> NetworkPlan:
    """Take the published ports, plan the network, claim its addresses and bring its bridges up. The engine connects the
    machine to them. Ports stay taken while the machine waits for its restart: no other program gets one.
    """
    paths, spec = machine.paths, machine.spec
    if spec.network in ("none", "host"):
        return NetworkPlan(spec.network)
    from nagaya.net import attach  # lazy: ten modules, which a machine without networks does without

    if spec.ports:
        from nagaya.supervisor.published import Published  # lazy: only who publishes ports

        machine.published = machine.published or Published(machine.loop, paths, spec)
        spec = spec._replace(ports=machine.published.hold(machine.state.ports))
    plan = attach.plan_network(spec, paths)
    if plan.links and not plan.is_user:
        stack.callback(_let_go, machine)
    if machine.published is not None:
        if plan.is_user:
            plan = plan._replace(forwards=machine.published.choose_private())
        machine.published.plan = plan
    return plan


def _let_go(machine: Supervisor) -> None:
    """What it was done with is closed a little later: that waits for RCU, and somebody may wait for the machine's end."""
    from nagaya.kernel.nftables import Nftables
    from nagaya.net import attach

    nftables = Nftables()
    machine.loop.after(CLOSE_AFTER_S, nftables.close)
    attach.let_go(machine.paths, machine.spec.id, nftables)


def plug(machine: Supervisor, network: str) -> None:
    """Give a machine that runs a link to a network that its record names by now. Nothing has changed when it raises."""
    from nagaya.net import attach, planning

    if "plug" not in machine.engine.capabilities or machine.booted is None:
        raise Unsupported(
            f"a machine of type '{machine.spec.type}' gets a new network card at its next start only",
            hint=f"nagaya restart {machine.spec.name}",
        )
    attachment = next((one for one in planning.attachments(machine.spec) if one.network == network), None)
    if attachment is None:
        raise Conflict(f"the record of machine '{machine.spec.name}' does not name the network '{network}'")
    before = attach.describe(machine.paths, machine.spec.id)
    link = attach.plug(machine.paths, machine.spec, attachment)
    try:
        machine.engine.plug(link)  # type: ignore[attr-defined]
    except BaseException:
        attach.unplug(machine.paths, machine.spec.id, network, keep_device=False)
        raise
    _tell(machine, before)


def unplug(machine: Supervisor, network: str) -> None:
    """Cut a machine that runs off a network. A virtual machine keeps the card, whose cable is pulled out."""
    from nagaya.net import attach

    pluggable = "plug" in machine.engine.capabilities
    before = attach.describe(machine.paths, machine.spec.id)
    link = attach.unplug(machine.paths, machine.spec.id, network, keep_device=not pluggable)
    if link is not None and pluggable:
        machine.engine.unplug(link)  # type: ignore[attr-defined]
    _tell(machine, before)


def _tell(machine: Supervisor, before: NetworkPlan | None) -> None:
    """The machine's links have changed: its default routes and the files of its /etc, and where its ports lead."""
    from nagaya.net import attach

    plan = attach.describe(machine.paths, machine.spec.id)
    if plan is None or before is None:
        return
    if machine.published is not None:
        machine.published.plan = plan
        machine.published.lead()
    if "plug" in machine.engine.capabilities:
        for link in plan.links:
            if link in before.links or link.name not in {one.name for one in before.links}:
                continue  # nothing is new about it, or it was set up whole
            machine.engine.route(link)  # type: ignore[attr-defined]
        rewrite_etc(f"{machine.paths.machine(machine.spec.id)}/etc", machine.spec, before, plan)
