"""Functions of a guest's kernel that run in user mode: there a software KVM (PVM) lets the CPU work, instead of emulating.

A boot's long loops need no privilege: clearing the page structs, comparing arguments with names, unpacking. Such a
function begins with an `out` to our port. Upon it the vCPU gets page tables of ours, in which the kernel and all RAM are
user mode's, and goes on behind the `out` in user mode, with the return address replaced by one of ours: another `out`. There
all is put back. Whatever the function may not do in user mode raises an exception, and the descriptor tables are ours
meanwhile: the function then goes on where it is as it would have without us, emulated.

Nothing of it is left when the kernel frees what only its boot needed: no program of the guest's runs before that. The
area that it takes is no RAM of the guest's.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from ctypes import sizeof
from struct import Struct

from nagaya.engines.kvm import layout
from nagaya.engines.kvm.instructions import REGISTERS, measure
from nagaya.engines.kvm.vcpu import Vcpu
from nagaya.engines.kvm.vm import Vm
from nagaya.errors import GuestFault
from nagaya.kernel import kvm
from nagaya.kernel.kvm import kvm_run
from nagaya.memory import PAGE_BYTES
from nagaya.static import NamedTuple

IMAGE_BASE = 0xFFFF_FFFF_8000_0000
"""__START_KERNEL_map: where Linux has physical address 0 for its own code and data, when it was not relocated."""
DIRECT_BASE = 0xFFFF_8880_0000_0000
"""Where it has all RAM (four levels of page tables, not randomized)."""
VMEMMAP_BASE, VMEMMAP_END = 0xFFFF_EA00_0000_0000, 0xFFFF_EB00_0000_0000
"""Where it has the page structs: mapped when they are made, and never again."""
_MOST_DIRECT_BYTES = 64 << 30
_LARGE_BYTES = 2 << 20
_IMAGE_BYTES = 64 << 20
_AREA = IMAGE_BASE + (1 << 30) - _LARGE_BYTES
"""Near enough to the kernel for a jump of 32 bits, and nothing of the kernel's."""

_PRESENT, _WRITABLE, _USER, _ACCESSED, _DIRTY, _LARGE = 1, 2, 4, 32, 64, 128
_TABLE = _PRESENT | _WRITABLE | _USER | _ACCESSED
_LEAF = _TABLE | _DIRTY
_ADDRESS = 0x000F_FFFF_FFFF_F000

# The area, by pages.
_DESCRIPTORS, _STUBS, _TRAMPOLINES, _PML4, _AREA_TABLE, _IMAGE_DIRECTORY, _IMAGE_POINTERS = range(7)
_FIRST_TASK = 7  # one for each vCPU, then page tables
_SPARE_TABLES = 32
_IDT = 0x100
_VECTORS = 32
_CODE, _USER_DATA, _USER_CODE, _TASK = 0x08, 0x20, 0x28, 0x30
_SEGMENTS = (0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0, 0x00CFF3000000FFFF, 0x00AFFB000000FFFF)
_GATE = Struct("<HHBBHII")
_INTERRUPT_GATE = 0x8E
_STUB_BYTES = 4
_LEAVE = 0x800
"""In the page of trampolines: where a function returns to."""
_TRAMPOLINE_BYTES = 32
_ONCE = 16
"""In a trampoline: the same start of a function, for one that is to go on emulated."""
_MOST_START_BYTES = _ONCE - 5
_TASK_BYTES = 0x68
_WITH_CODE = frozenset((8, 10, 11, 12, 13, 14, 17))
_PAGE_FAULT = 14
_FAULT_PRESENT = 1

_U64 = Struct("<Q")
_FRAME = Struct("<5Q")
_IF = 1 << 9
_KEPT_FLAGS = 0xCD5  # carry to overflow, and the direction
_FIXED_FLAG = 1 << 1
_REGS_AT = kvm_run.s.offset + kvm.kvm_sync_regs.regs.offset
_RSP_AT = _REGS_AT + kvm.kvm_regs.rsp.offset
_RIP_AT = _REGS_AT + kvm.kvm_regs.rip.offset
_FLAGS_AT = _REGS_AT + kvm.kvm_regs.rflags.offset
_SREGS_AT = kvm_run.s.offset + kvm.kvm_sync_regs.sregs.offset
_SREGS_END = _SREGS_AT + sizeof(kvm.kvm_sregs)
_VALID_AT, _DIRTY_AT = kvm_run.kvm_valid_regs.offset, kvm_run.kvm_dirty_regs.offset
_CR2_AT = _SREGS_AT + kvm.kvm_sregs.cr2.offset
_CR3 = kvm.kvm_sregs.cr3.offset
_BOTH = kvm.KVM_SYNC_X86_REGS | kvm.KVM_SYNC_X86_SREGS
_OUT = 0xE6
_PUSHF, _POP, _REX_B, _CLI = 0x9C, 0x58, 0x41, 0xFA
_RETURN_ZERO = b"\x31\xc0\xc3"  # xor %eax, %eax; ret


class Plan(NamedTuple):
    """What to do with a kernel's functions, by their names."""

    run: tuple[str, ...]
    """In user mode."""
    begin: tuple[str, ...]
    """In user mode up to what they may not do there; where interrupts are on."""
    skip: tuple[str, ...]
    """Not at all: they answer 0."""
    end: str
    """The function whose call ends all this."""


class _Window:
    """A function in user mode, on one vCPU."""

    __slots__ = ("flags", "return_address", "return_at", "special")

    def __init__(self, special: bytes, flags: int, return_at: int, return_address: int) -> None:
        self.special, self.flags = special, flags
        self.return_at, self.return_address = return_at, return_address


class Native:
    """The functions of one machine's kernel. Made after the kernel is in memory and before the vCPUs are."""

    def __init__(self, vm: Vm, functions: dict[str, int], plan: Plan, *, port: int, cpus: int) -> None:
        """`functions` are those that the kernel has, by linear address; the plan's end is one. Raises `OSError`."""
        self._memory = vm.memory
        self._port = port
        self._windows: dict[int, _Window] = {}
        self._user_mode: dict[int, tuple[tuple[int, bytes], ...]] = {}
        """By vCPU: what differs in the special registers, as places in the shared page."""
        self._entries: dict[int, int] = {}
        """Behind the `out` of each function: where it goes on."""
        self._moved: dict[int, int] = {}
        """By trampoline: the function whose start it has."""
        self._passed: dict[int, int] = {}
        """Behind the start of each function that is to go on emulated: where that is."""
        self._with_interrupts: set[int] = set()
        """Those entries that may be taken only where interrupts are on."""
        self._sizes: dict[int, int] = {}
        """How long that start is."""
        self._patched: dict[int, tuple[bytes, bytes]] = {}
        """By gpa: what was there, and what is there now."""
        self._end = 0
        self.calls = 0
        """Of functions that went on in user mode."""
        self.stops: dict[int, int] = {}
        """Where some of them could not, and how often."""
        self._lay_out(vm, cpus)
        for name in plan.skip:
            if name in functions:
                self._patch(functions[name], _RETURN_ZERO)
        for name in plan.run:
            if name in functions:
                self._hook(functions[name])
        for name in plan.begin:
            if name in functions and self._hook(functions[name]):
                self._with_interrupts.add(functions[name] + 2)
        self._patch(functions[plan.end], bytes((_OUT, port)))
        self._end = functions[plan.end] + 2

    # -- what is laid out once

    def _lay_out(self, vm: Vm, cpus: int) -> None:
        regions = vm.memory.regions
        gigabytes = [
            gpa
            for region in regions
            for gpa in range(region.gpa & -(1 << 30), min(region.gpa + region.size_bytes, _MOST_DIRECT_BYTES), 1 << 30)
        ]
        self._free_table = _FIRST_TASK + cpus
        pages = self._free_table + 1 + len(gigabytes) + _SPARE_TABLES
        self._area = mmap.mmap(-1, pages * PAGE_BYTES)
        self._area.madvise(mmap.MADV_DONTFORK)
        self._last_table = pages
        vm.add_memory(layout.NATIVE_GPA, self._area)
        area, port = self._area, self._port
        for number, segment in enumerate(_SEGMENTS):
            _U64.pack_into(area, 8 * number, segment)
        for vector in range(_VECTORS):
            at = _STUBS * PAGE_BYTES + vector * _STUB_BYTES
            area[at : at + _STUB_BYTES] = bytes((_OUT, port, 0xF4, 0xF4))  # out %al, $port; hlt
            target = _AREA + at
            _GATE.pack_into(
                area, _IDT + vector * _GATE.size, target & 0xFFFF, _CODE, 0, _INTERRUPT_GATE, target >> 16 & 0xFFFF,
                target >> 32, 0,
            )  # fmt: skip
        at = _TRAMPOLINES * PAGE_BYTES + _LEAVE
        area[at : at + 2] = bytes((_OUT, port))
        self._leave = _AREA + at
        for index in range(cpus):
            at = (_FIRST_TASK + index) * PAGE_BYTES
            _U64.pack_into(area, at + 4, _AREA + at + PAGE_BYTES)  # RSP0
            area[at + 0x66 : at + 0x68] = _TASK_BYTES.to_bytes(2, "little")  # where the map of ports is: ours is open
            ports = bytearray(b"\xff" * (port // 8 + 2))
            ports[port // 8] &= ~(1 << port % 8)
            area[at + _TASK_BYTES : at + _TASK_BYTES + len(ports)] = bytes(ports)
        # Page tables: the kernel's image and the area, then all RAM.
        self._set(_PML4, 511, _IMAGE_POINTERS)
        self._set(_IMAGE_POINTERS, 510, _IMAGE_DIRECTORY)
        for number in range(min(_IMAGE_BYTES, regions[0].size_bytes) // _LARGE_BYTES):
            self._put(_IMAGE_DIRECTORY, number, number * _LARGE_BYTES | _LEAF | _LARGE)
        self._set(_IMAGE_DIRECTORY, 511, _AREA_TABLE)
        for page in range(
            min(pages, 512)
        ):  # exceptions are the kernel's: with SMEP and SMAP its pages are not user mode's
            user = _USER if page == _TRAMPOLINES else 0
            gpa = layout.NATIVE_GPA + page * PAGE_BYTES
            self._put(_AREA_TABLE, page, gpa | _PRESENT | _WRITABLE | _ACCESSED | _DIRTY | user)
        pointers = self._take_table()
        self._set(_PML4, DIRECT_BASE >> 39 & 511, pointers)
        for start in gigabytes:
            directory = self._take_table()
            self._set(pointers, start >> 30 & 511, directory)
            for number in range(512):
                gpa = start + number * _LARGE_BYTES
                if any(region.gpa <= gpa < region.gpa + region.size_bytes for region in regions):
                    self._put(directory, number, gpa | _LEAF | _LARGE)

    def _take_table(self) -> int:
        number = self._free_table
        if number >= self._last_table:
            raise GuestFault("more page tables than a boot needs")
        self._free_table += 1
        return number

    def _set(self, table: int, entry: int, page: int) -> None:
        self._put(table, entry, layout.NATIVE_GPA + page * PAGE_BYTES | _TABLE)

    def _put(self, table: int, entry: int, value: int) -> None:
        _U64.pack_into(self._area, table * PAGE_BYTES + 8 * entry, value)

    def _get(self, table: int, entry: int) -> int:
        value: int = _U64.unpack_from(self._area, table * PAGE_BYTES + 8 * entry)[0]
        return value

    def _hook(self, address: int) -> bool:
        """Put an `out` at a function's start; False when that start cannot be moved."""
        gpa = address - IMAGE_BASE
        try:
            start = self._memory.read(gpa, 16)
        except GuestFault:
            return False
        size = 0
        while size < 2:
            step = measure(start[size:])
            if not step:
                return False
            size += step
        at = _TRAMPOLINES * PAGE_BYTES + _TRAMPOLINE_BYTES * len(self._entries)
        if _TRAMPOLINE_BYTES * (len(self._entries) + 1) > _LEAVE:
            return False
        if size > _MOST_START_BYTES:
            return False
        jump = address + size - (_AREA + at + size + 5)
        self._area[at : at + size + 5] = start[:size] + b"\xe9" + jump.to_bytes(4, "little", signed=True)
        once = at + _ONCE
        self._area[once : once + size + 2] = start[:size] + bytes((_OUT, self._port))
        self._passed[_AREA + once + size + 2] = address + size
        self._patch(address, bytes((_OUT, self._port)))
        self._entries[address + 2] = _AREA + at
        self._moved[_AREA + at] = address
        self._sizes[_AREA + at] = size
        return True

    def _patch(self, address: int, code: bytes) -> None:
        gpa = address - IMAGE_BASE
        try:
            before = self._memory.read(gpa, len(code))
            self._memory.write(gpa, code)
        except GuestFault:
            return
        self._patched[gpa] = (before, code)

    def restore(self) -> None:
        """Put all functions back as they were; those that run in user mode still come back."""
        while self._patched:
            self._restore(next(iter(self._patched)))

    def _restore(self, gpa: int) -> None:
        before, now = self._patched.pop(gpa, (b"", b""))  # another vCPU may have been quicker
        if now and self._memory.read(gpa, len(now)) == now:
            self._memory.write(gpa, before)

    # -- while the guest boots

    def called(self, vcpu: Vcpu) -> bool:
        """Whether the `out` that a vCPU has just made was one of ours."""
        page = vcpu.page
        rip = _U64.unpack_from(page, _RIP_AT)[0]
        window = self._windows.get(vcpu.index)
        if rip == self._end:
            self.restore()
            self._go(page, rip - 2)
            return True
        entry = self._entries.get(rip)
        if entry is not None:
            if window is not None:  # one of them calls another
                self._go(page, entry)
            elif not self._enter(vcpu, entry):
                self._restore(rip - 2 - IMAGE_BASE)
                self._go(page, rip - 2)
            return True
        if window is None:
            return False
        if rip == self._leave + 2:
            self._return(vcpu, window)
        elif rip in self._passed:
            self._leave_window(vcpu, window, self._passed[rip], _U64.unpack_from(page, _FLAGS_AT)[0])
        else:
            vector = (rip - _AREA - _STUBS * PAGE_BYTES) // _STUB_BYTES
            if not 0 <= vector < _VECTORS or not self._has_frame(vcpu.index, _U64.unpack_from(page, _RSP_AT)[0]):
                return False
            self._interrupted(vcpu, window, vector)
        return True

    def _has_frame(self, index: int, rsp: int) -> bool:
        """Whether an exception's frame may be there: a guest may say what it likes."""
        start = _AREA + (_FIRST_TASK + index) * PAGE_BYTES
        return start <= rsp <= start + PAGE_BYTES - _FRAME.size

    @staticmethod
    def _go(page: mmap.mmap, rip: int) -> None:
        _U64.pack_into(page, _RIP_AT, rip)
        page[_DIRTY_AT] |= kvm.KVM_SYNC_X86_REGS

    def _enter(self, vcpu: Vcpu, entry: int) -> bool:
        """False when it cannot be, or is no longer to be."""
        page = vcpu.page
        rip = _U64.unpack_from(page, _RIP_AT)[0]
        rsp = _U64.unpack_from(page, _RSP_AT)[0]
        slot = self._find(rsp)
        if slot is None or not self._patched:
            return False
        special = page[_SREGS_AT:_SREGS_END]
        flags = _U64.unpack_from(page, _FLAGS_AT)[0]
        window = _Window(special, flags, slot, _U64.unpack(self._memory.read(slot, 8))[0])
        self._memory.write(slot, _U64.pack(self._leave))
        self._windows[vcpu.index] = window
        self.calls += 1
        self._set_user_mode(vcpu)
        _U64.pack_into(page, _FLAGS_AT, flags & _KEPT_FLAGS | _FIXED_FLAG)
        self._go(page, entry + (_ONCE if rip in self._with_interrupts and not flags & _IF else 0))
        return True

    def _find(self, address: int) -> int | None:
        """The gpa of 8 bytes of the kernel's stack."""
        if address >= IMAGE_BASE:
            gpa = address - IMAGE_BASE
        elif DIRECT_BASE <= address < DIRECT_BASE + _MOST_DIRECT_BYTES:
            gpa = address - DIRECT_BASE
        else:
            return None
        try:
            self._memory.slice(gpa, 8)
        except GuestFault:
            return None
        return gpa

    def _set_user_mode(self, vcpu: Vcpu) -> None:
        for at, data in self._user_mode[vcpu.index]:
            vcpu.page[at : at + len(data)] = data
        vcpu.page[_DIRTY_AT] |= kvm.KVM_SYNC_X86_SREGS

    def prepare(self, vcpu: Vcpu) -> None:
        """Have KVM copy the special registers into the shared page too, at each exit."""
        _U64.pack_into(vcpu.page, _VALID_AT, _BOTH)
        ours = kvm.kvm_sregs()
        for segment, selector, kind in ((ours.cs, _USER_CODE, 0xB), (ours.ss, _USER_DATA, 3)):
            segment.base, segment.limit, segment.selector = 0, 0xFFFF_FFFF, selector | 3
            segment.type, segment.present, segment.dpl, segment.s, segment.g, segment.unusable = kind, 1, 3, 1, 1, 0
            segment.l, segment.db = int(kind == 0xB), int(kind != 0xB)
        task = ours.tr
        task.base, task.limit, task.selector = _AREA + (_FIRST_TASK + vcpu.index) * PAGE_BYTES, 0xFF, _TASK
        task.type, task.present, task.s, task.unusable = 0xB, 1, 0, 0
        ours.gdt.base, ours.gdt.limit = _AREA + _DESCRIPTORS * PAGE_BYTES, 8 * len(_SEGMENTS) - 1
        ours.idt.base, ours.idt.limit = _AREA + _IDT, _VECTORS * _GATE.size - 1
        ours.cr3 = layout.NATIVE_GPA + _PML4 * PAGE_BYTES
        content = bytes(ours)
        spans = [
            (first.offset, last.offset + last.size)
            for first, last in (
                (kvm.kvm_sregs.cs, kvm.kvm_sregs.cs), (kvm.kvm_sregs.ss, kvm.kvm_sregs.tr),
                (kvm.kvm_sregs.gdt, kvm.kvm_sregs.idt), (kvm.kvm_sregs.cr3, kvm.kvm_sregs.cr3),
            )
        ]  # fmt: skip
        self._user_mode[vcpu.index] = tuple((_SREGS_AT + start, content[start:end]) for start, end in spans)

    def _return(self, vcpu: Vcpu, window: _Window) -> None:
        """The function has come to its end."""
        page = vcpu.page
        self._set_kernel_mode(vcpu, window)
        flags = _U64.unpack_from(page, _FLAGS_AT)[0]
        _U64.pack_into(page, _FLAGS_AT, window.flags & ~_KEPT_FLAGS | flags & _KEPT_FLAGS)
        self._go(page, window.return_address)

    def _interrupted(self, vcpu: Vcpu, window: _Window, vector: int) -> None:
        """An exception. Go on in user mode when there was only something to map, else as the kernel."""
        page = vcpu.page
        rip, flags, rsp, code = self._read_frame(vector, _U64.unpack_from(page, _RSP_AT)[0])
        _U64.pack_into(page, _RSP_AT, rsp)
        if vector == _PAGE_FAULT and not code & _FAULT_PRESENT and self._map(vcpu, window):
            self._set_user_mode(vcpu)
            _U64.pack_into(page, _FLAGS_AT, flags & _KEPT_FLAGS | _FIXED_FLAG)
            self._go(page, rip)
            return
        self.stops[rip] = self.stops.get(rip, 0) + 1
        self._mend_flags(page, window, rip)
        self._leave_window(vcpu, window, self._emulated(rip, window), flags)

    def _mend_flags(self, page: mmap.mmap, window: _Window, rip: int) -> None:
        """Before a `cli`, the kernel notes whether interrupts were on: in user mode the CPU says so, always.

        `pushf; pop %reg; cli`: spin_lock_irqsave() and its like, where it is not inlined and torn apart by the compiler.
        """
        if window.flags & _IF:
            return
        try:
            code = self._memory.read(rip - IMAGE_BASE - 3, 4)
        except GuestFault:
            return
        if code[3] != _CLI or code[2] & 0xF8 != _POP:
            return
        number = code[2] & 7
        if code[1] == _REX_B and self._memory.read(rip - IMAGE_BASE - 4, 1)[0] == _PUSHF:
            number += 8
        elif code[1] != _PUSHF:
            return
        at = _REGS_AT + getattr(kvm.kvm_regs, REGISTERS[number]).offset
        _U64.pack_into(page, at, _U64.unpack_from(page, at)[0] & ~_IF)

    def _leave_window(self, vcpu: Vcpu, window: _Window, rip: int, flags: int) -> None:
        """Go on at `rip` as the kernel."""
        self._close(vcpu, window)
        _U64.pack_into(vcpu.page, _FLAGS_AT, window.flags & ~_KEPT_FLAGS | flags & _KEPT_FLAGS)
        self._go(vcpu.page, rip)

    def _close(self, vcpu: Vcpu, window: _Window) -> None:
        """It returns to where it was called from, and is the kernel again."""
        self._memory.write(window.return_at, _U64.pack(window.return_address))
        self._set_kernel_mode(vcpu, window)

    def _set_kernel_mode(self, vcpu: Vcpu, window: _Window) -> None:
        del self._windows[vcpu.index]
        vcpu.page[_SREGS_AT:_SREGS_END] = window.special
        vcpu.page[_DIRTY_AT] |= kvm.KVM_SYNC_X86_SREGS

    def _emulated(self, rip: int, window: _Window) -> int:
        """Where the kernel goes on for what was at `rip` in user mode."""
        if rip == self._leave:
            return window.return_address
        start = rip - (rip - _AREA) % _TRAMPOLINE_BYTES
        address = self._moved.get(start)
        if address is None:
            return rip
        return address + min((rip - start) % _ONCE, self._sizes[start])  # behind what was moved is the jump back

    def give_up(self, vcpus: Iterable[Vcpu]) -> None:
        """End all this at once, on vCPUs that stand: nothing of it is to be saved with them."""
        self.restore()
        for vcpu in vcpus:
            window = self._windows.get(vcpu.index)
            if window is None:
                continue
            registers = vcpu.regs()
            rip, rsp, flags = registers.rip, registers.rsp, registers.rflags
            vector = (rip - _AREA - _STUBS * PAGE_BYTES) // _STUB_BYTES
            if 0 <= vector < _VECTORS and self._has_frame(vcpu.index, rsp):  # about to tell us of an exception
                rip, flags, rsp, _ = self._read_frame(vector, rsp)
            self._close(vcpu, window)
            registers.rip, registers.rsp = self._emulated(rip, window), rsp
            registers.rflags = window.flags & ~_KEPT_FLAGS | flags & _KEPT_FLAGS
            vcpu.set_sregs(kvm.kvm_sregs.from_buffer_copy(window.special))
            vcpu.set_regs(registers)
            _U64.pack_into(vcpu.page, _DIRTY_AT, 0)

    def _read_frame(self, vector: int, rsp: int) -> tuple[int, int, int, int]:
        """What an exception has left on the stack: RIP, flags, RSP, and its code."""
        at, code = rsp - _AREA, 0
        if vector in _WITH_CODE:
            code = _U64.unpack_from(self._area, at)[0]
            at += 8
        rip, _, flags, before, _ = _FRAME.unpack_from(self._area, at)
        return rip, flags, before, code

    def _map(self, vcpu: Vcpu, window: _Window) -> bool:
        """Take a page of the page structs over from the guest's own tables."""
        address = _U64.unpack_from(vcpu.page, _CR2_AT)[0]
        if not VMEMMAP_BASE <= address < VMEMMAP_END:
            return False
        entry = _U64.unpack_from(window.special, _CR3)[0]
        try:
            for shift in (39, 30, 21, 12):
                place = (entry & _ADDRESS) + 8 * (address >> shift & 511)
                entry = _U64.unpack(self._memory.read(place, 8))[0]
                if not entry & _PRESENT:
                    return False
                if shift < 39 and entry & _LARGE:
                    break
            table = _PML4
            for above in (39, 30, 21):
                if above == shift:
                    break
                number = address >> above & 511
                below = self._get(table, number)
                if below & _PRESENT:
                    table = ((below & _ADDRESS) - layout.NATIVE_GPA) // PAGE_BYTES
                else:
                    fresh = self._take_table()
                    self._set(table, number, fresh)
                    table = fresh
            self._put(table, address >> shift & 511, entry & (_ADDRESS | _WRITABLE | _LARGE) | _TABLE | _DIRTY)
        except GuestFault:
            return False
        return True

    def close(self) -> None:
        """After the virtual machine is closed."""
        self._area.close()
