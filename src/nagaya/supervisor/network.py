"""Wiring a machine up before its boot, changing its links while it runs, and letting go of it after its end."""

from __future__ import annotations

from contextlib import ExitStack

from nagaya.errors import Conflict, ExecError, HostError, NagayaError, Unsupported
from nagaya.model.state import PAUSED
from nagaya.net.plan import NetworkPlan
from nagaya.supervisor.etc import replace_etc, rewrite_etc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.model.spec import Attachment
    from nagaya.supervisor.renewal import Done
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


def plug(machine: Supervisor, network: str, on_done: Done) -> None:
    """Give a machine that runs a link to a network that its record names by now. Nothing has changed when it raises.

    `on_done` is called once all has been done, or with why nothing, or not all, could be.
    """
    from nagaya.net import attach, planning

    can_replug = "replug" in machine.engine.capabilities
    if not (can_replug or "plug" in machine.engine.capabilities) or machine.booted is None:
        raise Unsupported(
            f"a machine of type '{machine.spec.type}' gets a new network card at its next start only",
            hint=f"nagaya restart {machine.spec.name}",
        )
    attachment = next((one for one in planning.attachments(machine.spec) if one.network == network), None)
    if attachment is None:
        raise Conflict(f"the record of machine '{machine.spec.name}' does not name the network '{network}'")
    if not can_replug:
        _plug(machine, attachment, on_done)
        return
    from nagaya.supervisor.renewal import ask_first

    machine.refuse_while_saving()
    attach.check_card(machine.paths, machine.spec, attachment)

    def able() -> None:
        try:
            machine.refuse_while_saving()
            _plug(machine, attachment, on_done)
        except NagayaError as problem:
            on_done(problem)
        except OSError as error:
            on_done(HostError.from_os(error, "cannot connect the network"))

    ask_first(machine, able, on_done)


def _plug(machine: Supervisor, attachment: Attachment, on_done: Done) -> None:
    from nagaya.net import attach

    can_replug = "replug" in machine.engine.capabilities
    before = attach.describe(machine.paths, machine.spec.id)
    link = attach.plug(machine.paths, machine.spec, attachment, has_card=can_replug)
    try:
        if can_replug:
            machine.engine.replug(link)  # type: ignore[attr-defined]
        else:
            machine.engine.plug(link)  # type: ignore[attr-defined]
    except BaseException:
        attach.unplug(machine.paths, machine.spec.id, link.network, keep_device=can_replug)
        raise
    _tell(machine, before, on_done)


def unplug(machine: Supervisor, network: str, on_done: Done) -> None:
    """Cut a machine that runs off a network. A virtual machine keeps the card, whose cable is pulled out.

    `on_done` as in `plug`: the machine has been cut off whatever that says.
    """
    from nagaya.net import attach

    if "replug" in machine.engine.capabilities:
        machine.refuse_while_saving()
    pluggable = "plug" in machine.engine.capabilities
    before = attach.describe(machine.paths, machine.spec.id)
    link = attach.unplug(machine.paths, machine.spec.id, network, keep_device=not pluggable)
    if link is not None and pluggable:
        machine.engine.unplug(link)  # type: ignore[attr-defined]
    _tell(machine, before, on_done)


def refuse_free_card(machine: Supervisor) -> None:
    """Raise `Conflict` for a machine that could not go on from its memory: it is given cards for its networks, and has more."""
    from nagaya.net import attach

    if machine.spec.network in ("bridge", "none") and attach.has_free_card(machine.paths, machine.spec.id):
        raise Conflict(
            f"machine '{machine.spec.name}' has a network card that is on no network, which its memory would miss later on",
            hint="connect it to one ('nagaya network connect'), restart it, or save its disks alone (--no-memory)",
        )


def _tell(machine: Supervisor, before: NetworkPlan | None, on_done: Done) -> None:
    """The machine's links have changed: its default routes and the files of its /etc, and where its ports lead."""
    from nagaya.net import attach

    plan = attach.describe(machine.paths, machine.spec.id)
    if plan is None or before is None:
        on_done(None)
        return
    if machine.published is not None:
        machine.published.plan = plan
        machine.published.lead()
    known = {one.name for one in before.links}
    if "plug" in machine.engine.capabilities:
        for link in plan.links:
            if link in before.links or link.name not in known:
                continue  # nothing is new about it, or it was set up whole
            machine.engine.route(link)  # type: ignore[attr-defined]
        rewrite_etc(_etc(machine), machine.spec, before, plan)
    elif "replug" in machine.engine.capabilities and machine.programs is not None:
        _renew(machine, before, plan, on_done)
        return
    on_done(None)


def _renew(machine: Supervisor, before: NetworkPlan, plan: NetworkPlan, on_done: Done) -> None:
    """The same inside of a virtual machine. What it has been told, or will have when it is no longer paused, is on the host."""
    from nagaya.engines.mount_rules import covers  # lazy: rare
    from nagaya.supervisor.renewal import Renewal

    kept = {link.name for link in plan.links}
    off = tuple(
        link._replace(address="", address6="", gateway="", gateway6="")
        for link in before.links
        if link.name not in kept
    )
    changed = tuple(link for link in plan.links if link not in before.links)
    files = replace_etc(_etc(machine), machine.spec, plan)
    own = tuple(file for file in files if not covers(machine.spec.mounts, file[0]))
    payload: bytes = machine.engine.plan_renewal((*off, *changed), own)  # type: ignore[attr-defined]
    if machine.state.phase == PAUSED:
        Renewal(machine, payload, lambda problem: None)
        on_done(None)
        return

    def renewed(problem: NagayaError | None) -> None:
        on_done(None if isinstance(problem, ExecError) else problem)  # an older agent: as it comes to its next start

    Renewal(machine, payload, renewed)


def _etc(machine: Supervisor) -> str:
    return f"{machine.paths.machine(machine.spec.id)}/etc"
