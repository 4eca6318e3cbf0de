"""Nagaya: isolated Linux machines from one image, behind walls of the thickness that you pick.

import nagaya

host = nagaya.Host()
machine = host.machines.create(nagaya.CreateOptions("debian", command=("sleep", "600")))
machine.start()
print(machine.run(["cat", "/etc/os-release"]).stdout.decode())
machine.remove(force=True)
"""

from __future__ import annotations

__version__ = "0.1.0"

_HOMES = {
    "Host": "nagaya.manager.host",
    "Machine": "nagaya.manager.machine",
    "Completed": "nagaya.manager.machine",
    "Attachment": "nagaya.manager.attachment",
    "CreateOptions": "nagaya.manager.options",
    "ExecOptions": "nagaya.manager.options",
    "UpdateOptions": "nagaya.manager.options",
    "Limits": "nagaya.model.spec",
    "Mount": "nagaya.model.spec",
    "Security": "nagaya.model.spec",
    "Restart": "nagaya.model.spec",
    "MachineState": "nagaya.model.state",
    "NagayaError": "nagaya.errors",
}

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.errors import NagayaError as NagayaError
    from nagaya.manager.attachment import Attachment as Attachment
    from nagaya.manager.host import Host as Host
    from nagaya.manager.machine import Completed as Completed
    from nagaya.manager.machine import Machine as Machine
    from nagaya.manager.options import CreateOptions as CreateOptions
    from nagaya.manager.options import ExecOptions as ExecOptions
    from nagaya.manager.options import UpdateOptions as UpdateOptions
    from nagaya.model.spec import Limits as Limits
    from nagaya.model.spec import Mount as Mount
    from nagaya.model.spec import Restart as Restart
    from nagaya.model.spec import Security as Security
    from nagaya.model.state import MachineState as MachineState


def __getattr__(name: str) -> object:
    """Import a public name on first use: the CLI imports this package too, and pays for nothing that it does not use."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'nagaya' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(home), name)
