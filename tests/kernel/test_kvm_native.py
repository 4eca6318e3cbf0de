"""Functions of a kernel in user mode, on a software KVM: what they do, what the kernel sees of it, and what stays."""

from __future__ import annotations

import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nagaya.engines.kvm import cpuid
from nagaya.engines.kvm.boot.symbols import find_functions, list_functions
from nagaya.engines.kvm.bus import Bus
from nagaya.engines.kvm.known import PVM, find_kvm
from nagaya.engines.kvm.native import IMAGE_BASE, Native, Plan
from nagaya.engines.kvm.pvm import Pvm
from nagaya.engines.kvm.vcpu import Vcpu
from nagaya.engines.kvm.vm import Vm
from nagaya.errors import NagayaError
from nagaya.memory import GuestMemory

SOURCE = Path(__file__).with_name("native.s")
TEXT_GPA, STACK_GPA, TABLES_GPA = 0x40000, 0x60000, 0x1000
MANY = 20_000_000  # 30 s where it is emulated
PLAN = Plan(run=("work", "locked", "endless"), begin=("begun",), skip=("nothing",), end="over")
NAMES = (*PLAN.run, *PLAN.begin, *PLAN.skip, PLAN.end)
IF = 1 << 9


class Result:
    """The port that ends it."""

    vcpu: Vcpu

    def read_port(self, port: int, size: int) -> int:
        return 0

    def write_port(self, port: int, size: int, value: int) -> None:
        self.vcpu.stop()


class Guest:
    """One vCPU in kernel mode, at the start of the program."""

    def __init__(self, elf: Path, text: bytes) -> None:
        self.functions = find_functions(str(elf), NAMES)
        self.symbols = {name: address for address, name in list_functions(str(elf))}
        self.text = text
        self.memory = GuestMemory.allocate(4 << 20)
        self.vm = Vm(self.memory)
        self.pvm = Pvm(self.vm)
        self.memory.write(TEXT_GPA, text)
        for table, entry, value in ((0, 0, 0x2007), (0, 511, 0x4007), (1, 0, 0x3007), (3, 510, 0x3007), (2, 0, 0x83)):
            self.memory.write(TABLES_GPA + 0x1000 * table + 8 * entry, struct.pack("<Q", value))
        self.native = self.pvm.native = Native(self.vm, self.functions, PLAN, port=self.pvm.port, cpus=1)
        self.vcpu = Vcpu(self.vm, 0)
        cpuid.set_leaves(self.vcpu.fd, cpuid.supported(self.vm.kvm_fd))
        self.pvm.prepare(self.vcpu)
        self.bus, result = Bus(), Result()
        result.vcpu = self.vcpu
        self.bus.add_ports(0x10, 1, result)
        self.begin("_start")

    def begin(self, symbol: str) -> None:
        special = self.vcpu.sregs()
        for name in ("cs", "ds", "es", "fs", "gs", "ss"):
            segment = getattr(special, name)
            code = name == "cs"
            segment.base, segment.limit, segment.selector = 0, 0xFFFF_FFFF, 8 if code else 16
            segment.type, segment.present, segment.dpl, segment.s, segment.g = (0xB if code else 3), 1, 0, 1, 1
            segment.l, segment.db, segment.unusable = int(code), int(not code), 0
        special.cr0, special.cr3, special.cr4, special.efer = 0x8005_0033, TABLES_GPA, 0x20, 0x500
        self.vcpu.set_sregs(special)
        registers = self.vcpu.regs()
        registers.rip, registers.rsp, registers.rflags = self.symbols[symbol], IMAGE_BASE + STACK_GPA, 2
        self.vcpu.set_regs(registers)

    def results(self) -> tuple[int, ...]:
        return struct.unpack("<7Q", self.memory.read(self.symbols["results"] - IMAGE_BASE, 56))

    def close(self) -> None:
        self.vcpu.close()
        self.pvm.close()
        self.vm.close()
        self.memory.close()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    try:
        if find_kvm().kind != PVM:
            pytest.skip("this host's KVM is hardware")
    except NagayaError as error:
        pytest.skip(error.message)
    place = tmp_path_factory.mktemp("native")
    elf, text = place / "program", place / "text"
    link = ["-nostdlib", "-static", f"-Wl,-Ttext={IMAGE_BASE + TEXT_GPA:#x}", "-Wl,--build-id=none"]
    define = [f"-Wa,--defsym,MANY={MANY}", "-Wa,--defsym,FOREVER=0xffffffff"]
    subprocess.run(["gcc", *define, *link, "-o", str(elf), str(SOURCE)], check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", str(elf), str(text)], check=True)
    return elf, text.read_bytes()


@pytest.fixture
def guest(program: tuple[Path, bytes]) -> Iterator[Guest]:
    made = Guest(*program)
    yield made
    made.close()


@pytest.mark.timeout(60)
def test_they_do_what_they_do_and_the_kernel_sees_no_difference(guest: Guest) -> None:
    assert set(guest.functions) == set(NAMES)
    assert guest.vcpu.loop(guest.bus, guest.pvm) is None
    nothing, worked, flags_off, begun_off, begun_on, emulated, code_segment = guest.results()
    assert nothing == 0, "it was to be left out"
    assert worked == MANY and emulated == 1000
    assert not flags_off & IF and not begun_off & IF, "interrupts were off"
    assert begun_on & IF, "interrupts were on"
    assert code_segment == 8, "the kernel is the kernel again"
    assert guest.native.calls == 4
    assert sorted(guest.native.stops.values()) == [1, 1]  # the cli of `locked`, and of `begun` where interrupts were on
    assert guest.vcpu.sregs().cr3 == TABLES_GPA


def test_nothing_is_left_after_the_end(guest: Guest) -> None:
    guest.vcpu.loop(guest.bus, guest.pvm)
    changed = guest.symbols["results"] - IMAGE_BASE - TEXT_GPA
    assert guest.memory.read(TEXT_GPA, changed) == guest.text[:changed]


@pytest.mark.timeout(60)
def test_a_machine_that_is_saved_meanwhile_has_nothing_of_it(guest: Guest) -> None:
    guest.begin("call_endless")
    thread = threading.Thread(target=guest.vcpu.loop, args=(guest.bus, guest.pvm))
    thread.start()
    while not guest.native.calls:
        time.sleep(0.01)
    time.sleep(0.05)
    guest.vcpu.stop()
    thread.join()
    guest.vcpu.settle(guest.bus, guest.pvm)
    assert guest.vcpu.sregs().cs.dpl == 3
    guest.pvm.give_up_native([guest.vcpu])
    special, registers = guest.vcpu.sregs(), guest.vcpu.regs()
    assert (special.cs.dpl, special.cs.selector, special.cr3) == (0, 8, TABLES_GPA)
    assert guest.functions["endless"] < registers.rip < guest.symbols["call_endless"]
    returns_to = struct.unpack("<Q", guest.memory.read(STACK_GPA - 8, 8))[0]
    assert guest.symbols["call_endless"] < returns_to < guest.symbols["results"]
    changed = guest.symbols["results"] - IMAGE_BASE - TEXT_GPA
    assert guest.memory.read(TEXT_GPA, changed) == guest.text[:changed]
    before = registers.rax
    guest.vcpu.allow()
    thread = threading.Thread(target=guest.vcpu.loop, args=(guest.bus, guest.pvm))
    thread.start()
    time.sleep(0.2)
    guest.vcpu.stop()
    thread.join()
    assert guest.vcpu.regs().rax > before, "it goes on, emulated"
