"""What a KVM without hardware behind it (PVM, the pagetable virtual machine) needs of its VMM. On by `probe` alone.

Such a KVM runs a guest's user mode natively, and emulates its kernel mode instruction by instruction. Two things are
left to us: instructions that the emulator does not know, and the `syscall` instruction, which in native user mode jumps
to LSTAR without becoming privileged, so that the guest's kernel meets a page fault instead of a system call.
"""

from __future__ import annotations

from ctypes import addressof, c_uint64
from struct import Struct

from nagaya.engines.kvm import cpuid
from nagaya.engines.kvm.cpuid import ALL, EAX, EBX, ECX, EDX, Mask
from nagaya.engines.kvm.vcpu import MSR_TSC, MSR_TSC_DEADLINE, Vcpu
from nagaya.engines.kvm.vm import Vm
from nagaya.errors import GuestFault
from nagaya.kernel import kvm
from nagaya.kernel.kvm import kvm_run
from nagaya.memory import PAGE_BYTES, GuestMemory
from nagaya.static import Any

TYPE_CHECKING = False
if TYPE_CHECKING:  # a kernel that leaves privileged mode needs neither
    from nagaya.engines.kvm.instructions import Instruction
    from nagaya.engines.kvm.ticks import ThreadTimes, Ticks

PORT = 0xB7
"""Of nobody else: 0xf4 is the exit port of test programs."""
MSR_STAR = 0xC000_0081
MSR_LSTAR = 0xC000_0082
MSR_SFMASK = 0xC000_0084
MSR_KERNEL_GS_BASE = 0xC000_0102

_AC = 1 << 18
_FIXED_FLAG = 1 << 1
_VECTOR_BP = 3
_VECTOR_PF = 14
_USER_FETCH = 0x14  # page-fault error code: from user mode, by an instruction fetch
_GATE_BYTES = 16
_GATE = Struct("<HHBBHII")
_FRAME = Struct("<6Q")
_VALID_AT = kvm_run.kvm_valid_regs.offset
_REGS_AT = kvm_run.s.offset + kvm.kvm_sync_regs.regs.offset
_RSP_AT = _REGS_AT + kvm.kvm_regs.rsp.offset
_RIP_AT = _REGS_AT + kvm.kvm_regs.rip.offset
_U64 = Struct("=Q")
_TWO_U64 = Struct("=QQ")
_STUB = Struct("<BBBi")
_PADDING = b"\xcc"
_SEARCH_PAGES = 512

# The emulator lacks these: a guest that is not told of them does not use them in its kernel. (User mode sees the host's
# own CPUID whatever we say, and runs natively: there they work.)
POLICY: tuple[Mask, ...] = (
    # Hypercalls: waking a CPU, interrupts to many CPUs, yielding to one, migration. A `vmcall` on AMD, or `vmmcall` on Intel,
    # is to be replaced by the other one; the emulator does not get past that, and the CPU stands still for ever.
    Mask(cpuid.LEAF_KVM_FEATURES, EAX, 1 << 7 | 1 << 11 | 1 << 13 | 1 << 16 | 1 << 17),
    # cmpxchg16b, fma, movbe, popcnt, xsave, osxsave, avx, f16c, rdrand
    Mask(
        cpuid.LEAF_FEATURES,
        ECX,
        1 << 13 | 1 << 12 | 1 << 22 | 1 << 23 | 1 << 26 | 1 << 27 | 1 << 28 | 1 << 29 | 1 << 30,
    ),
    *(Mask(cpuid.LEAF_EXTENDED_FEATURES, register, ALL) for register in (EAX, EBX, ECX, EDX)),
    *(Mask(cpuid.LEAF_XSAVE, register, ALL) for register in (EAX, EBX, ECX, EDX)),
)

# A kernel in user mode may use all that the CPU has, but for what takes privileged mode in its switches of programs.
DEPRIVILEGED_POLICY: tuple[Mask, ...] = (
    POLICY[0],
    Mask(cpuid.LEAF_EXTENDED_FEATURES, EBX, 1 << 0 | 1 << 7 | 1 << 10 | 1 << 20),  # fsgsbase, smep, invpcid, smap
    Mask(cpuid.LEAF_EXTENDED_FEATURES, ECX, 1 << 2 | 1 << 3 | 1 << 4),  # umip, pku, ospke
)


class Pvm:
    """The fix-ups of one machine. Made before its vCPUs; `prepare` each of those before it runs."""

    port = PORT

    def __init__(self, vm: Vm, *, deprivileged: bool = False) -> None:
        """`deprivileged`: the guest's kernel leaves privileged mode by itself (`nagaya.kernels`), and needs little of this."""
        self.deprivileged = deprivileged
        self.policy = DEPRIVILEGED_POLICY if deprivileged else POLICY
        self._memory = vm.memory
        self._stub = 0
        self._entries: dict[int, tuple[int, int]] = {}
        self._frames: dict[int, tuple[int, memoryview]] = {}
        self.completed: dict[str, int] = {}
        """How often each instruction was completed here, by its opcode."""
        self.system_calls = 0
        vm.enable(kvm.KVM_CAP_EXIT_ON_EMULATION_FAILURE, 1)
        self._ticks: dict[int, Ticks] = {}
        self._times: list[ThreadTimes] = []
        self._begin_spent = False
        if not deprivileged:
            self._watch_msrs(vm)

    def _watch_msrs(self, vm: Vm) -> None:
        vm.enable(kvm.KVM_CAP_X86_USER_SPACE_MSR, kvm.KVM_MSR_EXIT_REASON_FILTER)
        # The filter keeps a pointer to the bitmap only while the request is made.
        denied = c_uint64(0)
        request = kvm.kvm_msr_filter()
        for place, index in zip(request.ranges, (MSR_LSTAR, MSR_TSC_DEADLINE), strict=False):
            place.flags, place.nmsrs, place.base, place.bitmap = kvm.KVM_MSR_FILTER_WRITE, 1, index, addressof(denied)
        kvm.ioctl("KVM_X86_SET_MSR_FILTER", vm.fd, kvm.KVM_X86_SET_MSR_FILTER, request)

    def prepare(self, vcpu: Vcpu) -> None:
        """Have KVM copy the general registers into the shared page at each exit: system calls come by the thousand."""
        _U64.pack_into(vcpu.page, _VALID_AT, kvm.KVM_SYNC_X86_REGS)

    def _ticks_of(self, vcpu: Vcpu) -> Ticks:
        """Made when the guest sets its first timer."""
        if vcpu.index not in self._ticks:
            from nagaya.engines.kvm.ticks import ThreadTimes, Ticks

            self._times.append(ThreadTimes())
            ticks = Ticks(kvm.ioctl("KVM_GET_TSC_KHZ", vcpu.fd, kvm.KVM_GET_TSC_KHZ), self._times[-1])
            if self._begin_spent:
                ticks.begin_spent()
            self._ticks[vcpu.index] = ticks
        return self._ticks[vcpu.index]

    def wrote_msr(self, vcpu: Vcpu, index: int, value: int) -> bool:
        """Of the two that are looked at. See `Quirks`."""
        if index == MSR_TSC_DEADLINE:
            value = self._ticks_of(vcpu).grant(value, vcpu.msr(MSR_TSC))
        try:
            vcpu.set_msr(index, value)
        except OSError:
            return False
        if index == MSR_LSTAR:
            # Linux writes SFMASK after LSTAR: read at the first system call.
            self._entries.pop(vcpu.index, None)
            self._frames.pop(vcpu.index, None)
            self._hook(vcpu)  # by now the guest's kernel has its page-fault handler too
        return True

    def save(self) -> dict[str, Any]:
        """What the guest's memory and its vCPUs' registers do not tell."""
        return {"stub": self._stub, "deprivileged": self.deprivileged}

    def restore(self, saved: dict[str, Any]) -> None:
        """After the vCPUs' registers."""
        self._stub = saved["stub"]
        self._begin_spent = True

    def close(self) -> None:
        """No vCPU runs any more."""
        for times in self._times:
            times.close()

    @property
    def postponed_ticks(self) -> int:
        """Timer interrupts that came later than the guest wanted them."""
        return sum(ticks.postponed for ticks in self._ticks.values())

    # -- system calls

    def _hook(self, vcpu: Vcpu) -> None:
        """Put a stub before the guest's page-fault handler: `out %al, $PORT`, then `jmp` to the handler.

        It goes into the padding between functions near the handler, where text is mapped in every address space.
        """
        table = vcpu.sregs().idt
        gate_gpa = vcpu.translate(table.base + _VECTOR_PF * _GATE_BYTES)
        if gate_gpa is None or table.limit < (_VECTOR_PF + 1) * _GATE_BYTES - 1:
            return
        low, selector, stack, kind, middle, high, zero = _GATE.unpack(self._memory.read(gate_gpa, _GATE_BYTES))
        handler = low | middle << 16 | high << 32
        if handler == self._stub:
            return
        found = _find_padding(vcpu, self._memory, handler, _STUB.size)
        if found is None:
            return
        stub, stub_gpa = found
        self._memory.write(stub_gpa, _STUB.pack(0xE6, PORT, 0xE9, handler - (stub + _STUB.size)))
        gate = _GATE.pack(stub & 0xFFFF, selector, stack, kind, stub >> 16 & 0xFFFF, stub >> 32, zero)
        self._memory.write(gate_gpa, gate)
        self._stub = stub

    def called(self, vcpu: Vcpu) -> None:
        """The stub ran: make it a system call if that is what it was. Else the guest's handler is next anyway."""
        page = vcpu.page
        rsp = _U64.unpack_from(page, _RSP_AT)[0]
        number = rsp // PAGE_BYTES
        # From user mode the CPU takes the kernel's entry stack, which is at one place for each vCPU.
        known = self._frames.get(vcpu.index)
        if known is None or known[0] != number:
            gpa = vcpu.translate(number * PAGE_BYTES)
            if gpa is None:
                return
            try:
                known = (number, self._memory.slice(gpa, PAGE_BYTES))
            except GuestFault:
                return
            self._frames[vcpu.index] = known
        offset = rsp % PAGE_BYTES
        if offset > PAGE_BYTES - _FRAME.size:
            return
        code, rip, _, flags, user_rsp, _ = _FRAME.unpack_from(known[1], offset)
        if code & _USER_FETCH != _USER_FETCH:
            return
        entry = self._entries.get(vcpu.index)
        if entry is None:
            entry = self._entries[vcpu.index] = (vcpu.msr(MSR_LSTAR), vcpu.msr(MSR_SFMASK))
        if rip != entry[0]:
            return
        self.system_calls += 1
        _U64.pack_into(page, _RSP_AT, user_rsp)
        _TWO_U64.pack_into(page, _RIP_AT, rip, flags & ~entry[1] | _FIXED_FLAG)
        _TWO_U64.pack_into(page, _VALID_AT, kvm.KVM_SYNC_X86_REGS, kvm.KVM_SYNC_X86_REGS)

    # -- instructions

    def emulation_failed(self, vcpu: Vcpu) -> bool:
        """Complete the instruction at RIP in KVM's place."""
        registers = vcpu.regs()
        from nagaya.engines.kvm.instructions import LONGEST, decode

        instruction = decode(_read(vcpu, self._memory, registers.rip, LONGEST))
        if instruction is None:
            return False
        name = _key(instruction)
        complete = _COMPLETIONS.get(name)
        if complete is None or not complete(self, vcpu, registers, instruction):
            return False
        self.completed[name] = self.completed.get(name, 0) + 1
        return True

    def _clac(self, vcpu: Vcpu, registers: kvm.kvm_regs, instruction: Instruction) -> bool:
        registers.rflags &= ~_AC
        return _advance(vcpu, registers, instruction)

    def _stac(self, vcpu: Vcpu, registers: kvm.kvm_regs, instruction: Instruction) -> bool:
        registers.rflags |= _AC
        return _advance(vcpu, registers, instruction)

    def _skip(self, vcpu: Vcpu, registers: kvm.kvm_regs, instruction: Instruction) -> bool:
        return _advance(vcpu, registers, instruction)

    def _breakpoint(self, vcpu: Vcpu, registers: kvm.kvm_regs, instruction: Instruction) -> bool:
        """int3 and int n: the return address is the next instruction's."""
        _advance(vcpu, registers, instruction)
        events = kvm.kvm_vcpu_events()
        kvm.ioctl("KVM_GET_VCPU_EVENTS", vcpu.fd, kvm.KVM_GET_VCPU_EVENTS, events)
        if instruction.opcode == b"\xcc":
            events.exception_injected, events.exception_nr, events.exception_has_error_code = 1, _VECTOR_BP, 0
            events.exception_pending = 0
        else:
            events.interrupt_injected, events.interrupt_nr, events.interrupt_soft = 1, instruction.immediate, 1
        kvm.ioctl("KVM_SET_VCPU_EVENTS", vcpu.fd, kvm.KVM_SET_VCPU_EVENTS, events)
        return True

    def _swapgs(self, vcpu: Vcpu, registers: kvm.kvm_regs, instruction: Instruction) -> bool:
        special = vcpu.sregs()
        other = vcpu.msr(MSR_KERNEL_GS_BASE)
        vcpu.set_msr(MSR_KERNEL_GS_BASE, special.gs.base)
        special.gs.base = other
        vcpu.set_sregs(special)
        return _advance(vcpu, registers, instruction)

    def _sysret(self, vcpu: Vcpu, registers: kvm.kvm_regs, instruction: Instruction) -> bool:
        selector = vcpu.msr(MSR_STAR) >> 48
        special = vcpu.sregs()
        wide = instruction.size == 8
        set_user_segment(special.cs, selector + (16 if wide else 0), code=True, wide=wide)
        set_user_segment(special.ss, selector + 8, code=False, wide=False)
        vcpu.set_sregs(special)
        registers.rip = registers.rcx if wide else registers.rcx & 0xFFFF_FFFF
        registers.rflags = registers.r11 & 0x003C_7FD7 | _FIXED_FLAG
        vcpu.set_regs(registers)
        return True

    def _popcnt(self, vcpu: Vcpu, registers: kvm.kvm_regs, instruction: Instruction) -> bool:
        mask = (1 << 8 * instruction.size) - 1
        if instruction.operand.register:
            source = getattr(registers, instruction.operand.register) & mask
        else:
            data = _read(vcpu, self._memory, _address(vcpu, registers, instruction), instruction.size)
            if len(data) < instruction.size:
                return False
            source = int.from_bytes(data, "little")
        kept = getattr(registers, instruction.register) & ~mask if instruction.size == 2 else 0
        setattr(registers, instruction.register, kept | source.bit_count())
        registers.rflags = registers.rflags & ~0x8D5 | (0x40 if source == 0 else 0)
        return _advance(vcpu, registers, instruction)

    def _load_mxcsr(self, vcpu: Vcpu, registers: kvm.kvm_regs, instruction: Instruction) -> bool:
        if instruction.operand.register or instruction.repeat:  # then it is wrfsbase
            return False
        data = _read(vcpu, self._memory, _address(vcpu, registers, instruction), 4)
        if len(data) < 4:
            return False
        from nagaya.kernel import kvm_state

        state = kvm_state.kvm_xsave()
        kvm.ioctl("KVM_GET_XSAVE", vcpu.fd, kvm_state.KVM_GET_XSAVE, state)
        state.region[6] = int.from_bytes(data, "little")  # MXCSR is at byte 24 of the FXSAVE area
        kvm.ioctl("KVM_SET_XSAVE", vcpu.fd, kvm_state.KVM_SET_XSAVE, state)
        return _advance(vcpu, registers, instruction)


_COMPLETIONS = {
    "0f01ca": Pvm._clac,
    "0f01cb": Pvm._stac,
    "9b": Pvm._skip,  # fwait: no x87 exception is pending in a kernel
    "cc": Pvm._breakpoint,
    "cd": Pvm._breakpoint,
    "0f01f8": Pvm._swapgs,
    "0f07": Pvm._sysret,
    "f30fb8": Pvm._popcnt,
    "0fae/2": Pvm._load_mxcsr,
}


def _key(instruction: Instruction) -> str:
    """How `_COMPLETIONS` names an instruction: opcode, with the whole ModRM or its reg field where that is opcode too."""
    name = instruction.opcode.hex()
    if instruction.opcode == b"\x0f\x01":
        return f"{name}{instruction.modrm:02x}"
    if instruction.opcode in (b"\x0f\xae", b"\x0f\xc7"):
        return f"{name}/{instruction.modrm >> 3 & 7}"
    return f"{instruction.repeat:x}{name}" if instruction.opcode == b"\x0f\xb8" else name


def _advance(vcpu: Vcpu, registers: kvm.kvm_regs, instruction: Instruction) -> bool:
    registers.rip += instruction.length
    vcpu.set_regs(registers)
    return True


def _address(vcpu: Vcpu, registers: kvm.kvm_regs, instruction: Instruction) -> int:
    from nagaya.engines.kvm.instructions import address_of

    return address_of(
        instruction, lambda name: int(getattr(registers, name)), lambda name: int(getattr(vcpu.sregs(), name).base)
    )


def set_user_segment(segment: kvm.kvm_segment, selector: int, *, code: bool, wide: bool) -> None:
    """A flat segment of user mode; `wide` is 64-bit code."""
    segment.base, segment.limit, segment.selector = 0, 0xFFFF_FFFF, selector & 0xFFFF | 3
    segment.type, segment.present, segment.dpl, segment.s, segment.g = (0xB if code else 3), 1, 3, 1, 1
    segment.l, segment.db, segment.unusable = int(wide), int(not wide), 0


def _read(vcpu: Vcpu, memory: GuestMemory, address: int, size: int) -> bytes:
    """Guest memory by linear address; fewer bytes where a page is not mapped, or not RAM."""
    data = b""
    while len(data) < size:
        gpa = vcpu.translate(address + len(data))
        if gpa is None:
            break
        take = min(size - len(data), PAGE_BYTES - (address + len(data)) % PAGE_BYTES)
        try:
            data += memory.read(gpa, take)
        except GuestFault:
            break
    return data


def _find_padding(vcpu: Vcpu, memory: GuestMemory, near: int, size: int) -> tuple[int, int] | None:
    """`size` bytes of padding between functions, as close as there are: (linear address, gpa)."""
    wanted = _PADDING * (size + 2)  # one of them stays before the stub, and one after it
    first = near // PAGE_BYTES * PAGE_BYTES
    for step in range(_SEARCH_PAGES):
        for page in {first + step * PAGE_BYTES, first - step * PAGE_BYTES}:
            gpa = vcpu.translate(page)
            if gpa is None:
                continue
            try:
                at = memory.read(gpa, PAGE_BYTES).find(wanted)
            except GuestFault:
                continue
            if at >= 0:
                return page + at + 1, gpa + at + 1
    return None
