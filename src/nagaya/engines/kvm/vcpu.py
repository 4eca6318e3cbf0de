"""One virtual CPU: its registers, and the loop that runs it and answers its exits."""

from __future__ import annotations

import _thread
import ctypes
import errno
import mmap
import os
import sys
from struct import Struct

from nagaya.engines.kvm.bus import Bus
from nagaya.engines.kvm.vm import Vm
from nagaya.errors import HostError
from nagaya.kernel import kvm
from nagaya.kernel.kvm import kvm_run
from nagaya.kernel.threads import interrupt_thread, make_thread_interruptible, make_thread_punctual
from nagaya.static import NamedTuple, Protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.engines.kvm.boot.image import EntryState, SegmentRegister

MSR_TSC = 0x10
MSR_TSC_DEADLINE = 0x6E0

_EXIT = kvm_run.exit.offset
_REASON = Struct("=I")
_REASON_AT = kvm_run.exit_reason.offset
_IO = Struct("=BBHIQ")
_MMIO = Struct("=Q8sIB")
_MSR = Struct("=IIQ")
_MSR_AT = _EXIT + kvm.kvm_run_msr.reason.offset
_VALUES = {1: Struct("=B"), 2: Struct("=H"), 4: Struct("=I")}
_MOST_REASONS = 64
_TURN_S = 5e-6
_FLAGS_AT_ENTRY = 1 << 1  # the bit that is always set; interrupts are off

EXIT_NAMES = {
    getattr(kvm, name): name.removeprefix("KVM_EXIT_").lower().replace("_", "-")
    for name in dir(kvm)
    if name.startswith("KVM_EXIT_") and not name.startswith("KVM_EXIT_IO_")
}


class Ending(NamedTuple):
    """Why a machine ended, or a vCPU cannot go on: `kind` for programs, `reason` for people."""

    kind: str
    """power-off, reset, exit, stopped; triple-fault, internal-error, entry-failed, halted, crash, failed."""
    reason: str
    status: int = 0
    """What the guest wrote to the exit port."""


class Quirks(Protocol):
    """What a KVM that is not hardware leaves to its VMM (`pvm`)."""

    port: int
    """A port that belongs to nobody else: an `out` to it is a call."""

    def called(self, vcpu: Vcpu) -> None: ...
    def emulation_failed(self, vcpu: Vcpu) -> bool:
        """Whether the guest can go on."""

    def wrote_msr(self, vcpu: Vcpu, index: int, value: int) -> bool:
        """Whether the register took it; else the guest gets a general protection fault."""


def share_interpreter() -> None:
    """Let threads take turns at Python often enough for a vCPU.

    A thread that comes back from KVM_RUN while another one computes waits for its turn: 5 ms, unless told otherwise.
    Beside a thread that never rests a vCPU made 32 times fewer exits; with this, and a punctual clock, 2 to 4 times fewer;
    beside a disk at work, which reads without the interpreter, hardly fewer (benches/vmm.py).
    """
    sys.setswitchinterval(min(sys.getswitchinterval(), _TURN_S))


class Vcpu:
    """A vCPU. Its registers are the caller's while it does not run."""

    def __init__(self, vm: Vm, index: int) -> None:
        self.index = index
        self.fd = vm.create_vcpu(index)
        try:
            self.page = mmap.mmap(self.fd, vm.run_bytes)
        except OSError:
            os.close(self.fd)
            raise
        self.run = kvm_run.from_buffer(self.page)
        self.exits = [0] * _MOST_REASONS
        """Exits so far, by reason. Written by the vCPU's thread alone."""
        self._thread_id = 0
        self._stopping = False

    # -- registers

    def regs(self) -> kvm.kvm_regs:
        registers = kvm.kvm_regs()
        kvm.ioctl("KVM_GET_REGS", self.fd, kvm.KVM_GET_REGS, registers)
        return registers

    def set_regs(self, registers: kvm.kvm_regs) -> None:
        kvm.ioctl("KVM_SET_REGS", self.fd, kvm.KVM_SET_REGS, registers)

    def sregs(self) -> kvm.kvm_sregs:
        registers = kvm.kvm_sregs()
        kvm.ioctl("KVM_GET_SREGS", self.fd, kvm.KVM_GET_SREGS, registers)
        return registers

    def set_sregs(self, registers: kvm.kvm_sregs) -> None:
        kvm.ioctl("KVM_SET_SREGS", self.fd, kvm.KVM_SET_SREGS, registers)

    def msr(self, index: int) -> int:
        """A model-specific register. Raises `OSError` when there is none of that number."""
        head, entries = kvm.with_entries(kvm.kvm_msrs, kvm.kvm_msr_entry, 1)
        head.nmsrs, entries[0].index = 1, index
        if kvm.ioctl("KVM_GET_MSRS", self.fd, kvm.KVM_GET_MSRS, head) != 1:  # the number of those it could read
            raise OSError(errno.EINVAL, f"KVM_GET_MSRS: there is no MSR {index:#x}")
        value: int = entries[0].data
        return value

    def set_msr(self, index: int, value: int) -> None:
        """Raises `OSError` when KVM refuses it."""
        head, entries = kvm.with_entries(kvm.kvm_msrs, kvm.kvm_msr_entry, 1)
        head.nmsrs, entries[0].index, entries[0].data = 1, index, value
        if kvm.ioctl("KVM_SET_MSRS", self.fd, kvm.KVM_SET_MSRS, head) != 1:
            raise OSError(errno.EINVAL, f"KVM_SET_MSRS: MSR {index:#x} cannot be {value:#x}")

    def translate(self, address: int) -> int | None:
        """The `gpa` behind a linear address under the vCPU's present page tables; None when nothing is mapped there."""
        request = kvm.kvm_translation(linear_address=address)
        kvm.ioctl("KVM_TRANSLATE", self.fd, kvm.KVM_TRANSLATE, request)
        return request.physical_address if request.valid else None

    def enter(self, state: EntryState) -> None:
        """Set the registers with which a boot protocol enters a kernel."""
        special = self.sregs()
        _copy_segment(special.cs, state.code)
        for segment in (special.ds, special.es, special.fs, special.gs, special.ss):
            _copy_segment(segment, state.data)
        _copy_segment(special.tr, state.task)
        special.gdt.base, special.gdt.limit = state.gdt_gpa, state.gdt_limit
        special.idt.base, special.idt.limit = 0, 0
        special.cr0, special.cr3, special.cr4, special.efer = state.cr0, state.cr3, state.cr4, state.efer
        self.set_sregs(special)
        self.set_regs(
            kvm.kvm_regs(
                rax=state.rax, rbx=state.rbx, rsi=state.rsi, rsp=state.rsp, rip=state.rip, rflags=_FLAGS_AT_ENTRY
            )
        )

    def tell_paused(self) -> None:
        """Let the guest know that time went on without it, so that its watchdogs do not take that for a hang."""
        try:
            kvm.ioctl("KVM_KVMCLOCK_CTRL", self.fd, kvm.KVM_KVMCLOCK_CTRL)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a guest without kvm-clock
                raise

    def settle(self, bus: Bus, quirks: Quirks | None = None) -> None:
        """Have KVM complete what the last exit was for: until then, the registers are from before it.

        Of a vCPU that was stopped, and stays so. Raises `HostError`, as `loop`.
        """
        self.run.immediate_exit = 1
        while kvm.raw_ioctl(self.fd, kvm.KVM_RUN, 0) == 0:  # of a string instruction, say: its next part
            reason = _REASON.unpack_from(self.page, _REASON_AT)[0]
            if reason == kvm.KVM_EXIT_IO:
                self._answer_io(bus, quirks)
            elif reason == kvm.KVM_EXIT_MMIO:
                self._answer_memory(bus)
            elif self._answer_rare(reason, quirks) is not None:
                return  # it will do so again when it goes on
        number = ctypes.get_errno()
        if number not in (errno.EINTR, errno.EAGAIN):
            error = OSError(number, f"KVM_RUN: {os.strerror(number)}")
            raise HostError.from_os(error, f"cannot stop vCPU {self.index}")

    # -- running

    def stop(self) -> None:
        """Make `loop` return soon. From any thread; for good, or until `allow`."""
        self._stopping = True
        self.run.immediate_exit = 1  # seen by a KVM_RUN that has not begun yet: the signal alone could come too early
        thread_id = self._thread_id  # once: `loop` may be returning
        if thread_id:
            interrupt_thread(thread_id)

    def allow(self) -> None:
        """Undo `stop`, before `loop` is called again."""
        self._stopping = False
        self.run.immediate_exit = 0

    def loop(self, bus: Bus, quirks: Quirks | None = None) -> Ending | None:
        """Run until `stop` (None) or until the CPU cannot go on. Raises `HostError` when KVM itself fails."""
        make_thread_interruptible()
        make_thread_punctual()  # it waits for its turn at Python by the clock, when another thread does not rest
        self._thread_id = _thread.get_native_id()
        try:
            return self._loop(bus, quirks)
        finally:
            self._thread_id = 0

    def _loop(self, bus: Bus, quirks: Quirks | None) -> Ending | None:
        run, fd, page, exits = kvm.raw_ioctl, self.fd, self.page, self.exits
        reason_of = _REASON.unpack_from
        while not self._stopping:
            if run(fd, kvm.KVM_RUN, 0) < 0:
                number = ctypes.get_errno()
                if number == errno.EINTR:
                    exits[kvm.KVM_EXIT_INTR] += 1
                    continue
                if number == errno.EAGAIN:  # a vCPU that waits for its start-up message
                    continue
                error = OSError(number, f"KVM_RUN: {os.strerror(number)}")
                raise HostError.from_os(error, f"cannot run vCPU {self.index}")
            reason = reason_of(page, _REASON_AT)[0]
            exits[reason] += 1
            if reason == kvm.KVM_EXIT_IO:
                self._answer_io(bus, quirks)
            elif reason == kvm.KVM_EXIT_MMIO:
                self._answer_memory(bus)
            elif reason == kvm.KVM_EXIT_INTR:
                continue
            else:
                ending = self._answer_rare(reason, quirks)
                if ending is not None:
                    return ending
        return None

    def _answer_memory(self, bus: Bus) -> None:
        page = self.page
        gpa, data, size, is_write = _MMIO.unpack_from(page, _EXIT)
        if is_write:
            bus.write_memory(gpa, data[:size])
        else:
            at = _EXIT + 8
            page[at : at + size] = bus.read_memory(gpa, size)

    def _answer_io(self, bus: Bus, quirks: Quirks | None) -> None:
        direction, size, port, count, at = _IO.unpack_from(self.page, _EXIT)
        if quirks is not None and port == quirks.port:
            quirks.called(self)
            return
        value = _VALUES[size]
        for offset in range(at, at + size * count, size):  # a string instruction moves `count` at once
            if direction == kvm.KVM_EXIT_IO_OUT:
                bus.write_port(port, size, value.unpack_from(self.page, offset)[0])
            else:
                value.pack_into(self.page, offset, bus.read_port(port, size) & (1 << 8 * size) - 1)

    def _answer_rare(self, reason: int, quirks: Quirks | None) -> Ending | None:
        exit_data = self.run.exit
        if reason == kvm.KVM_EXIT_SHUTDOWN:
            return Ending("triple-fault", f"vCPU {self.index} met a fault while it handled a double fault")
        if reason == kvm.KVM_EXIT_HLT:
            return Ending("halted", f"vCPU {self.index} halted, and nothing could wake it")
        if reason == kvm.KVM_EXIT_INTERNAL_ERROR:
            suberror = exit_data.internal.suberror
            if suberror == kvm.KVM_INTERNAL_ERROR_EMULATION and quirks is not None and quirks.emulation_failed(self):
                return None
            return Ending("internal-error", f"KVM could not go on: suberror {suberror}, {self.describe()}")
        if reason == kvm.KVM_EXIT_X86_WRMSR and quirks is not None:
            _, index, value = _MSR.unpack_from(self.page, _MSR_AT)
            self.page[_EXIT] = 0 if quirks.wrote_msr(self, index, value) else 1  # 1: the guest gets #GP
            return None
        if reason == kvm.KVM_EXIT_FAIL_ENTRY:
            code = exit_data.fail_entry.hardware_entry_failure_reason
            return Ending("entry-failed", f"the CPU refused the guest's state: {code:#x}, {self.describe()}")
        if reason == kvm.KVM_EXIT_SYSTEM_EVENT:
            kinds = {
                kvm.KVM_SYSTEM_EVENT_SHUTDOWN: "power-off", kvm.KVM_SYSTEM_EVENT_RESET: "reset",
                kvm.KVM_SYSTEM_EVENT_CRASH: "crash",
            }  # fmt: skip
            return Ending(kinds.get(exit_data.system_event.type, "system-event"), "KVM reported a system event")
        return Ending("unknown-exit", f"KVM stopped with reason {reason}, {self.describe()}")

    def describe(self) -> str:
        """Where the vCPU is, for an error message."""
        registers, special = self.regs(), self.sregs()
        gpa = self.translate(registers.rip)
        return f"at {registers.rip:#x} (gpa {'none' if gpa is None else hex(gpa)}), cr0 {special.cr0:#x}, cr3 {special.cr3:#x}"

    def close(self) -> None:
        """After `loop` has returned."""
        if self.fd < 0:
            return
        del self.run
        self.page.close()
        os.close(self.fd)
        self.fd = -1


def _copy_segment(segment: kvm.kvm_segment, source: SegmentRegister) -> None:
    for name, value in source._asdict().items():
        setattr(segment, name, value)
    segment.unusable = int(not source.present)
