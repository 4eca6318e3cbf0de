"""Our VMM against QEMU's on the same /dev/kvm: a guest of a few bytes from process start to exit, and what an exit costs."""

from __future__ import annotations

import os
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial

from benches.measure import Check, command, report, take_turns
from benches.virtio import BATCH, Reader
from nagaya.engines.kvm.bus import Bus
from nagaya.engines.kvm.cpuid import set_leaves, supported
from nagaya.engines.kvm.vcpu import Vcpu, share_interpreter
from nagaya.engines.kvm.vm import Vm
from nagaya.memory import GuestMemory
from nagaya.virtio.apart import DeviceProcess
from nagaya.virtio.blk import Blk

STATUS = 7
LOAD_GPA = 0x10_0000
CODE = b"\x66\xba\xf4\x00\xb0" + bytes((STATUS,)) + b"\xee\xf4"  # mov $0xf4, %dx; mov $STATUS, %al; out %al, (%dx); hlt
RESET_VECTOR = 0xFFF0
ROM_BYTES = 0x10000
LIBRARY = """
import os, sys
from nagaya.engines.kvm.machine import Hardware, Machine
with Machine(Hardware(kernel=sys.argv[1], memory_bytes=16 << 20, interrupts=False)) as machine:
    machine.start()
    ending = machine.wait()
os._exit(ending.status)  # as the supervisor's VMM ends: taking the interpreter down is 3 ms of work for nobody
"""
EXITS = 20_000
EXIT_ROUNDS = 5
DISK_BYTES = 4 << 20
# cli; again: out %al, $0x10; jmp again
LOOP = b"\xfa\xe6\x10\xeb\xfc"


def main(rounds: int) -> bool:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        print("no /dev/kvm that this user may use: nothing to measure")
        return True
    with tempfile.TemporaryDirectory(prefix="nagaya-bench-") as place:
        kept = _bench_start(place, rounds)
    return _bench_exits() and kept


def _bench_start(place: str, rounds: int) -> bool:
    kernel, rom = f"{place}/kernel", f"{place}/rom"
    with open(kernel, "wb") as file:
        file.write(make_elf(CODE))
    with open(rom, "wb") as file:
        code = bytes((0xB0, STATUS, 0xE6, 0xF4, 0xF4))  # mov $STATUS, %al; out %al, $0xf4; hlt
        file.write(bytes(RESET_VECTOR) + code.ljust(ROM_BYTES - RESET_VECTOR, b"\x90"))
    contestants: dict[str, Callable[[], float]] = {}
    qemu = shutil.which("qemu-system-x86_64")
    if qemu:
        contestants["QEMU -M microvm,accel=kvm"] = command(
            [qemu, "-M", "microvm,accel=kvm,x-option-roms=off", "-bios", rom, "-m", "16", "-nodefaults", "-display", "none",
             "-no-reboot", "-device", "isa-debug-exit,iobase=0xf4"], status=2 * STATUS + 1,  # isa-debug-exit's way of it
        )  # fmt: skip
    contestants["nagaya's VMM, as a library"] = command([sys.executable, "-c", LIBRARY, kernel], status=STATUS)
    front_door = [sys.executable, "-m", "nagaya.engines.kvm", kernel, "--memory", "16", "--no-interrupts"]
    contestants["python -m nagaya.engines.kvm"] = command(front_door, status=STATUS)
    contestants["bare interpreter"] = command([sys.executable, "-c", "pass"])
    samples = take_turns(contestants, rounds=rounds)
    checks = [Check("tiny guest, of QEMU's time", samples[1].median / samples[0].median, 0.6)] if qemu else []
    return report("a guest of a few bytes, process start to exit", samples, checks)


def make_elf(code: bytes) -> bytes:
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, LOAD_GPA, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    return header + struct.pack("<IIQQQQQQ", 1, 5, 120, LOAD_GPA, LOAD_GPA, len(code), len(code), 0x1000) + code


class _Counter:
    """Takes the guest's bytes, and stops the vCPU after enough of them."""

    def __init__(self, vcpu: Vcpu, enough: int) -> None:
        self._vcpu, self._left = vcpu, enough

    def read_port(self, port: int, size: int) -> int:
        return 0

    def write_port(self, port: int, size: int, value: int) -> None:
        self._left -= 1
        if not self._left:
            self._vcpu.stop()


def _bench_exits() -> bool:
    """A port exit's round trip, and what a device's thread beside it makes of that: a disk's, and one that never rests."""
    share_interpreter()
    with tempfile.NamedTemporaryFile(prefix="nagaya-bench-") as disk:
        disk.truncate(DISK_BYTES)
        contestants = {
            "alone": lambda: _run_beside(None),
            "beside a machine's disk that reads 4 KiB, 32 at a time": lambda: _run_beside(
                partial(_read_apart, disk.name)
            ),
            "beside such a disk on a thread": lambda: _run_beside(partial(_read_disk, disk.name)),
            "beside a thread that only computes": lambda: _run_beside(_compute),
        }
        samples = take_turns(contestants, rounds=EXIT_ROUNDS)
    check = Check("port exits, of their time beside a busy disk", samples[1].median / samples[0].median, 2.0)
    return report("a thousand port exits and their answers", samples, [check])


def _run_beside(work: Callable[[threading.Event], None] | None) -> float:
    stop = threading.Event()
    busy = threading.Thread(target=work, args=(stop,)) if work is not None else None
    if busy is not None:
        busy.start()
    try:
        return _run_exits()
    finally:
        stop.set()
        if busy is not None:
            busy.join()


def _read_apart(path: str, stop: threading.Event) -> None:
    """A disk at work as the machine's ones are: in a process of its own."""
    process = DeviceProcess((Blk("blk0", path),))
    process.start()
    _read(Reader(path, size_bytes=4096, device=process.devices[0]), stop)
    process.close()


def _read_disk(path: str, stop: threading.Event) -> None:
    _read(Reader(path, size_bytes=4096), stop)


def _read(reader: Reader, stop: threading.Event) -> None:
    """The disk's thread here, and a driver that is no thread of ours, as a guest's is not."""
    driver = os.fork()
    if driver == 0:
        try:
            while True:
                reader.ask(BATCH)
        finally:
            os._exit(1)
    reader.driver.loop.start()
    stop.wait()
    os.kill(driver, signal.SIGKILL)
    os.waitpid(driver, 0)
    reader.driver.loop.call(lambda: None)
    reader.driver.loop.close()
    reader.close()


def _compute(stop: threading.Event) -> None:
    while not stop.is_set():
        sum(range(1000))


def _run_exits() -> float:
    """Milliseconds for a thousand exits."""
    memory = GuestMemory.allocate(1 << 20)
    vm = Vm(memory)
    vcpu = Vcpu(vm, 0)
    try:
        set_leaves(vcpu.fd, supported(vm.kvm_fd))
        memory.write(0x1000, LOOP)
        special = vcpu.sregs()
        special.cs.base, special.cs.selector = 0, 0  # real mode
        vcpu.set_sregs(special)
        registers = vcpu.regs()
        registers.rip, registers.rflags = 0x1000, 2
        vcpu.set_regs(registers)
        bus = Bus()
        bus.add_ports(0x10, 1, _Counter(vcpu, EXITS))
        start = time.perf_counter()
        vcpu.loop(bus)
        return (time.perf_counter() - start) * 1e6 / EXITS
    finally:
        vcpu.close()
        vm.close()
        memory.close()
