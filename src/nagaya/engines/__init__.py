"""Engines: what boots a machine. Siblings never import each other; this is the one place that knows their names."""

from __future__ import annotations

from nagaya.errors import UsageError

TYPES = ("container", "kvm", "emulated")
TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.engines.base import Engine
    from nagaya.model.spec import MachineSpec


def engine_of(spec: MachineSpec) -> Engine:
    """The engine that boots a machine. Whole machines with a firmware have the same one, whatever runs their CPUs."""
    if spec.hardware is None:
        return open_engine(spec.type)
    if spec.hardware.firmware == "direct":
        from nagaya.engines.kvm.direct import DirectEngine  # lazy: as below

        return DirectEngine()
    from nagaya.engines.qemu.pc import WholeMachineEngine  # lazy: as below

    return WholeMachineEngine(spec.type)


def open_engine(type_: str) -> Engine:
    """The engine for a machine type. Raises `UsageError` for an unknown one."""
    if type_ == "container":
        from nagaya.engines.container.engine import ContainerEngine  # lazy: each engine is large

        return ContainerEngine()
    if type_ == "emulated":
        from nagaya.engines.qemu.engine import EmulatedEngine

        return EmulatedEngine()
    if type_ == "kvm":
        from nagaya.engines.kvm.engine import KvmEngine

        return KvmEngine()
    raise UsageError(f"unknown machine type '{type_}'", hint=f"one of: {', '.join(TYPES)}")
