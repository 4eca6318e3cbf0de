"""Wiring a machine up before its boot and letting go of it after its end."""

from __future__ import annotations

from contextlib import ExitStack

from nagaya.model.spec import MachineSpec
from nagaya.net import attach
from nagaya.net.plan import NetworkPlan
from nagaya.storage.paths import Paths


def wire_up(paths: Paths, spec: MachineSpec, stack: ExitStack) -> NetworkPlan:
    """Plan the network, claim its addresses and bring its bridges up. The engine connects the machine to them."""
    if spec.network in ("none", "host"):
        return NetworkPlan(spec.network)
    plan = attach.plan_network(spec, paths.root)
    if plan.is_user:
        return plan
    stack.callback(attach.release, paths.root, spec.id)
    stack.callback(attach.disconnect, plan)
    return plan
