"""The plans of machines that run: what the firewall and the name servers are rebuilt from after anybody's damage.

RUN/ID/network.json, from before anything is made on the host until all of it is gone; a reboot takes the plans away
with what they describe.
"""

from __future__ import annotations

import os

from nagaya.errors import IntegrityError
from nagaya.net.plan import NetworkPlan
from nagaya.storage import records
from nagaya.storage.paths import Paths, make_directory

NAME = "network.json"


def store(paths: Paths, machine_id: str, plan: NetworkPlan) -> None:
    make_directory(paths.runtime(machine_id))
    records.store(f"{paths.runtime(machine_id)}/{NAME}", plan)


def load(paths: Paths, machine_id: str) -> NetworkPlan | None:
    """None when it has none, or one that cannot be read."""
    try:
        return records.load(f"{paths.runtime(machine_id)}/{NAME}", NetworkPlan)
    except (OSError, IntegrityError):
        return None


def remove(paths: Paths, machine_id: str) -> None:
    try:
        os.unlink(f"{paths.runtime(machine_id)}/{NAME}")
    except (FileNotFoundError, NotADirectoryError):
        return


def load_all(paths: Paths) -> dict[str, NetworkPlan]:
    """The plan of every machine that has one, by id."""
    try:
        found = os.listdir(paths.run)
    except FileNotFoundError:
        return {}
    plans = {machine_id: load(paths, machine_id) for machine_id in found if len(machine_id) == 32}
    return {machine_id: plan for machine_id, plan in plans.items() if plan is not None}
