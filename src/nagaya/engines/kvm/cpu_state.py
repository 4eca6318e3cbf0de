"""All that KVM keeps of a machine that stands: each vCPU's registers, the interrupt controllers, the old timer, the clock.

As plain data (JSON's), in the kernel's own structures as hexadecimal text. The order of the requests matters to KVM, and
is that of QEMU and Firecracker: what is read later may be completed by what is read before it, and likewise written.
"""

from __future__ import annotations

import ctypes

from nagaya.engines.kvm.vcpu import MSR_TSC, MSR_TSC_DEADLINE, Vcpu
from nagaya.engines.kvm.vm import Vm
from nagaya.errors import Unsupported
from nagaya.kernel import kvm, kvm_state
from nagaya.static import Any

_CHIPS = (0, 1, 2)  # the two PICs, the I/O APIC
_TSC_SLACK = 1 << 32  # cycles: about a second; a TSC that was set is off by far less, one that was not by far more


def save_vcpu(vcpu: Vcpu, indices: tuple[int, ...], *, local_apic: bool) -> dict[str, Any]:
    """One vCPU, which stands and has nothing left to complete (`Vcpu.settle`). Raises `OSError`.

    `indices` are the MSRs that this KVM knows (`msr_indices`).
    """
    state = {"mp_state": _get(vcpu.fd, "KVM_GET_MP_STATE", kvm_state.kvm_mp_state())} if local_apic else {}
    state["regs"] = _get(vcpu.fd, "KVM_GET_REGS", kvm.kvm_regs())
    state["sregs"] = _get(vcpu.fd, "KVM_GET_SREGS", kvm.kvm_sregs())
    state["xsave"] = _get(vcpu.fd, "KVM_GET_XSAVE", kvm_state.kvm_xsave())
    state["xcrs"] = _get(vcpu.fd, "KVM_GET_XCRS", kvm_state.kvm_xcrs())
    state["debugregs"] = _get(vcpu.fd, "KVM_GET_DEBUGREGS", kvm_state.kvm_debugregs())
    if local_apic:
        state["lapic"] = _get(vcpu.fd, "KVM_GET_LAPIC", kvm_state.kvm_lapic_state())
    state["msrs"] = _read_msrs(vcpu.fd, indices)
    state["events"] = _get(vcpu.fd, "KVM_GET_VCPU_EVENTS", kvm.kvm_vcpu_events())
    return state


def restore_vcpu(vcpu: Vcpu, state: dict[str, Any]) -> None:
    """Give a vCPU, which has its CPUID and has not run, what `save_vcpu` read. Raises `OSError`, `Unsupported`."""
    if "mp_state" in state:
        _set(vcpu.fd, "KVM_SET_MP_STATE", kvm_state.kvm_mp_state, state["mp_state"])
    _set(vcpu.fd, "KVM_SET_REGS", kvm.kvm_regs, state["regs"])
    _set(vcpu.fd, "KVM_SET_SREGS", kvm.kvm_sregs, state["sregs"])
    _set(vcpu.fd, "KVM_SET_XSAVE", kvm_state.kvm_xsave, state["xsave"])
    _set(vcpu.fd, "KVM_SET_XCRS", kvm_state.kvm_xcrs, state["xcrs"])
    _set(vcpu.fd, "KVM_SET_DEBUGREGS", kvm_state.kvm_debugregs, state["debugregs"])
    if "lapic" in state:
        _set(vcpu.fd, "KVM_SET_LAPIC", kvm_state.kvm_lapic_state, state["lapic"])
    _write_msrs(vcpu, bytes.fromhex(state["msrs"]))
    _set(vcpu.fd, "KVM_SET_VCPU_EVENTS", kvm.kvm_vcpu_events, state["events"])


def save_vm(vm: Vm, *, interrupts: bool, timer: bool) -> dict[str, Any]:
    """What the vCPUs share. Raises `OSError`."""
    state: dict[str, Any] = {}
    if interrupts:
        state["chips"] = [_get(vm.fd, "KVM_GET_IRQCHIP", kvm.kvm_irqchip(chip_id=number)) for number in _CHIPS]
    if timer:
        state["pit"] = _get(vm.fd, "KVM_GET_PIT2", kvm_state.kvm_pit_state2())
    clock = kvm_state.kvm_clock_data()
    kvm.ioctl("KVM_GET_CLOCK", vm.fd, kvm_state.KVM_GET_CLOCK, clock)
    state["clock"] = clock.clock
    return state


def restore_vm(vm: Vm, state: dict[str, Any]) -> None:
    """The same again: of the guest's kvm-clock, no time has gone by. Raises `OSError`."""
    for chip in state.get("chips", ()):
        _set(vm.fd, "KVM_SET_IRQCHIP", kvm.kvm_irqchip, chip)
    if "pit" in state:
        _set(vm.fd, "KVM_SET_PIT2", kvm_state.kvm_pit_state2, state["pit"])
    clock = kvm_state.kvm_clock_data(clock=state["clock"])
    kvm.ioctl("KVM_SET_CLOCK", vm.fd, kvm_state.KVM_SET_CLOCK, clock)


def msr_indices(vm: Vm) -> tuple[int, ...]:
    """The MSRs that this KVM saves. Raises `OSError`."""
    room = 512
    head, entries = _with_indices(room)
    head.nmsrs = room
    kvm.ioctl("KVM_GET_MSR_INDEX_LIST", vm.kvm_fd, kvm_state.KVM_GET_MSR_INDEX_LIST, head)
    return tuple(entries[: head.nmsrs])


def _with_indices(count: int) -> tuple[Any, Any]:
    size = ctypes.sizeof(kvm_state.kvm_msr_list)
    buffer = ctypes.create_string_buffer(size + 4 * count)
    return kvm_state.kvm_msr_list.from_buffer(buffer), (ctypes.c_uint32 * count).from_buffer(buffer, size)


def _read_msrs(fd: int, indices: tuple[int, ...]) -> str:
    """The values, as `kvm_msr_entry` after `kvm_msr_entry`. Those that this vCPU has not got are left out."""
    read = []
    waiting = list(indices)
    while waiting:
        head, entries = kvm.with_entries(kvm.kvm_msrs, kvm.kvm_msr_entry, len(waiting))
        head.nmsrs = len(waiting)
        for entry, index in zip(entries, waiting, strict=True):
            entry.index = index
        count = kvm.ioctl("KVM_GET_MSRS", fd, kvm.KVM_GET_MSRS, head)
        read += [bytes(entry) for entry in entries[:count]]
        waiting = waiting[count + 1 :]  # it stops at the first that it cannot read
    return b"".join(read).hex()


def _write_msrs(vcpu: Vcpu, saved: bytes) -> None:
    size = ctypes.sizeof(kvm.kvm_msr_entry)
    waiting = [kvm.kvm_msr_entry.from_buffer_copy(saved, at) for at in range(0, len(saved), size)]
    values = {entry.index: entry.data for entry in waiting}
    deadline = values.get(MSR_TSC_DEADLINE, 0)
    waiting = [entry for entry in waiting if entry.index != MSR_TSC_DEADLINE]
    while waiting:
        head, entries = kvm.with_entries(kvm.kvm_msrs, kvm.kvm_msr_entry, len(waiting))
        head.nmsrs = len(waiting)
        for entry, source in zip(entries, waiting, strict=True):
            entry.index, entry.data = source.index, source.data
        count = kvm.ioctl("KVM_SET_MSRS", vcpu.fd, kvm.KVM_SET_MSRS, head)
        if count < len(waiting):
            _accept(vcpu, waiting[count])
        waiting = waiting[count + 1 :]
    if deadline:
        # A timer that is set counts from the TSC: some KVMs have no other than the host's, which goes its own way.
        then, now = values.get(MSR_TSC, 0), vcpu.msr(MSR_TSC)
        if abs(now - then) > _TSC_SLACK:
            deadline = max(1, now + deadline - then)
        vcpu.set_msr(MSR_TSC_DEADLINE, deadline)


def _accept(vcpu: Vcpu, entry: Any) -> None:
    """A register that KVM shows and does not let be written is as it was, or the machine cannot go on here."""
    if vcpu.msr(entry.index) != entry.data:
        raise Unsupported(
            "this host's KVM cannot go on with the saved machine",
            hint="restore it on a host like the one where it was saved",
            finding=f"MSR {entry.index:#x} cannot be {entry.data:#x}",
        )


def _get(fd: int, call: str, structure: ctypes.Structure) -> str:
    kvm.ioctl(call, fd, _request(call), structure)
    return bytes(structure).hex()


def _set(fd: int, call: str, kind: type[ctypes.Structure], saved: str) -> None:
    kvm.ioctl(call, fd, _request(call), kind.from_buffer_copy(bytes.fromhex(saved)))


def _request(call: str) -> int:
    number: int = getattr(kvm_state if hasattr(kvm_state, call) else kvm, call)
    return number
