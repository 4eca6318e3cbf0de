"""Whole machines on the real /dev/kvm, each with a kernel of a few bytes, in 64-bit mode with 4 GiB mapped one to one."""

from __future__ import annotations

import os
import random
import struct
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from nagaya.engines.kvm import cpuid, layout, power, vm
from nagaya.engines.kvm.boot import image
from nagaya.engines.kvm.boot.image import BootImage
from nagaya.engines.kvm.known import HARDWARE, PVM
from nagaya.engines.kvm.machine import Hardware, Machine
from nagaya.engines.kvm.probe import probe_kvm
from nagaya.engines.kvm.serial import COM1_PORT
from nagaya.engines.kvm.vcpu import Ending
from nagaya.errors import Conflict, HostError, NotFound, Unsupported, UsageError
from nagaya.memory import GuestMemory
from nagaya.virtio import mmio
from nagaya.virtio.blk import Blk
from nagaya.virtio.device import Device
from nagaya.virtio.rng import Rng
from tests.kernel_images import Load, make_elf
from tests.virtio_rig import Ring

TEXT_GPA = 0x1000000
COUNTER_GPA = 0x1800000
FLAG_GPA = 0x1800008
MEMORY_BYTES = 32 << 20
PATIENCE_S = 10.0
LOCAL_APIC_GPA, IO_APIC_GPA = layout.LOCAL_APIC_GPA, layout.IO_APIC_GPA

# Instructions.
HLT = b"\xf4"
CLI = b"\xfa"
UD2 = b"\x0f\x0b"
READ_EBX = b"\x8b\x03"  # mov (%rbx), %eax
STRING_OUT, STRING_IN = b"\xf3\x6e", b"\xf3\x6c"  # rep outsb, rep insb


def set_register(name: str, value: int) -> bytes:
    """mov $value, %e..: clears the upper half."""
    return bytes([0xB8 + ("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi").index(name)]) + struct.pack(
        "<I", value
    )


def out_register(port: int, size: int = 1) -> bytes:
    """out %al, %ax or %eax."""
    return set_register("edx", port) + {1: b"\xee", 2: b"\x66\xef", 4: b"\xef"}[size]


def out(port: int, value: int, size: int = 1) -> bytes:
    return set_register("eax", value) + out_register(port, size)


def read_port(port: int, size: int = 1) -> bytes:
    return set_register("eax", 0) + set_register("edx", port) + {1: b"\xec", 2: b"\x66\xed", 4: b"\xed"}[size]


def read_memory(gpa: int) -> bytes:
    return set_register("ebx", gpa) + READ_EBX


def write_memory(gpa: int, value: int) -> bytes:
    return set_register("ebx", gpa) + b"\xc7\x03" + struct.pack("<I", value)  # movl $value, (%rbx)


def forever(text: bytes) -> bytes:
    return text + b"\xe9" + struct.pack("<i", -len(text) - 5)


def until_equal(text: bytes, value: int) -> bytes:
    """`text` again and again until it leaves `value` in EAX."""
    text += b"\x3d" + struct.pack("<I", value)  # cmp $value, %eax
    return text + b"\x0f\x85" + struct.pack("<i", -len(text) - 6)  # jne


EXIT_WITH_EAX = out_register(power.EXIT_PORT, 4) + forever(HLT)
COUNT = forever(set_register("ebx", COUNTER_GPA) + b"\x48\xff\x03")  # incq (%rbx)


@pytest.fixture(autouse=True)
def kvm_and_nothing_left() -> Iterator[None]:
    """Every test gives back all threads, descriptors and memory files."""
    try:
        os.close(vm.open_kvm())
    except Unsupported as error:
        pytest.skip(f"needs kvm: {error}")
    before = (open_files(), running_threads())
    yield
    end = time.monotonic() + 5
    while running_threads() != before[1] and time.monotonic() < end:  # one that was waited for may have a step left
        time.sleep(0.001)
    assert (open_files(), running_threads()) == before


def running_threads() -> set[str]:
    """The kernel's list: Python's has not got those that were started without `threading`."""
    return set(os.listdir("/proc/self/task"))


def open_files() -> list[str]:
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:  # the listing's own
            continue
    return sorted(found)


MakeMachine = Callable[..., Machine]


@pytest.fixture
def machine(tmp_path: Path, kvm_and_nothing_left: None) -> Iterator[MakeMachine]:
    """Make a machine that runs these instructions; it is closed after the test."""
    made: list[Machine] = []

    def make(text: bytes, *, devices: tuple[Device, ...] = (), **others: object) -> Machine:
        kernel = tmp_path / f"kernel{len(made)}"
        kernel.write_bytes(make_elf([Load(text, TEXT_GPA)], entry=TEXT_GPA))
        hardware = Hardware(kernel=str(kernel), memory_bytes=MEMORY_BYTES)._replace(**others)
        made.append(Machine(hardware, devices))
        return made[-1]

    yield make
    for each in made:
        each.close()


def run(machine: Machine) -> Ending:
    machine.start()
    return ended(machine)


def ended(machine: Machine) -> Ending:
    ending = machine.wait(PATIENCE_S)
    assert ending is not None, machine.counters()
    return ending


def memory_of(machine: Machine) -> GuestMemory:
    assert machine._parts is not None
    return machine._parts.memory


def count_of(machine: Machine) -> int:
    return int.from_bytes(memory_of(machine).read(COUNTER_GPA, 8), "little")


def read_what_there_is(fd: int) -> bytes:
    try:
        return os.read(fd, 1 << 16)
    except BlockingIOError:
        return b""


def wait_until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.002)


# -- exits


@pytest.mark.parametrize(("size", "status"), [(1, 0x44), (2, 0x3344), (4, 0x11223344)])
def test_exit_port_takes_a_status_of_any_size(machine: MakeMachine, size: int, status: int) -> None:
    ending = run(machine(out(power.EXIT_PORT, 0x11223344, size)))
    assert (ending.kind, ending.status) == ("exit", status)


@pytest.mark.parametrize(("size", "value"), [(1, 0xFF), (2, 0xFFFF), (4, 0xFFFFFFFF)])
def test_port_of_nobody_reads_as_ones_and_takes_writes(machine: MakeMachine, size: int, value: int) -> None:
    ending = run(machine(out(0x1234, 7, size) + read_port(0x1234, size) + EXIT_WITH_EAX))
    assert (ending.kind, ending.status) == ("exit", value)


def test_port_is_read_from_its_device(machine: MakeMachine) -> None:
    assert run(machine(read_port(power.PANIC_PORT) + EXIT_WITH_EAX)).status == 3


def test_string_io_moves_every_byte(machine: MakeMachine) -> None:
    said = b"Sent by one instruction.\n"
    code = (
        set_register("esi", TEXT_GPA + 0x800) + set_register("ecx", len(said)) + set_register("edx", COM1_PORT)
        + STRING_OUT
        + set_register("edi", COUNTER_GPA) + set_register("ecx", 4) + set_register("edx", power.PANIC_PORT)
        + STRING_IN
        + read_memory(COUNTER_GPA) + EXIT_WITH_EAX
    )  # fmt: skip
    reader, writer = os.pipe()
    try:
        ending = run(machine(code.ljust(0x800, b"\x90") + said, serial_fd=writer))
        assert os.read(reader, 100) == said
    finally:
        os.close(reader)
        os.close(writer)
    assert ending.status == 0x03030303


def test_serial_port_whose_reader_is_gone_does_not_end_the_machine(machine: MakeMachine) -> None:
    with open("/dev/full", "wb") as full:
        ending = run(machine(out(COM1_PORT, 0x41) + out(power.EXIT_PORT, 5), serial_fd=full.fileno()))
    assert (ending.kind, ending.status) == ("exit", 5)


def test_device_registers_answer_at_their_addresses(machine: MakeMachine) -> None:
    code = read_memory(layout.VIRTIO_GPA + mmio.MAGIC_VALUE) + EXIT_WITH_EAX
    assert run(machine(code, devices=(Rng(),))).status == mmio.MAGIC
    code = read_memory(layout.VIRTIO_GPA + layout.VIRTIO_STEP + mmio.DEVICE_ID) + EXIT_WITH_EAX
    assert run(machine(code, devices=(Rng("rng0"), Rng("rng1")))).status == 4


def test_device_registers_take_writes(machine: MakeMachine) -> None:
    code = (
        write_memory(layout.VIRTIO_GPA + mmio.DEVICE_FEATURES_SEL, 1)
        + read_memory(layout.VIRTIO_GPA + mmio.DEVICE_FEATURES)
        + EXIT_WITH_EAX
    )
    assert run(machine(code, devices=(Rng(),))).status == 1  # VERSION_1, of the upper half


def test_address_of_nobody_reads_as_ones_and_takes_writes(machine: MakeMachine) -> None:
    code = write_memory(0xE000_0000, 7) + read_memory(0xE000_0000) + EXIT_WITH_EAX
    assert run(machine(code)).status == 0xFFFF_FFFF


def test_exits_are_counted(machine: MakeMachine) -> None:
    made = machine(out(0x1234, 0) * 10 + read_memory(0xE000_0000) * 3 + out(power.EXIT_PORT, 0))
    run(made)
    exits = made.counters()["exits"]
    assert (exits["io"], exits["mmio"]) == (11, 3)


# -- how a guest ends


def test_power_off(machine: MakeMachine) -> None:
    s5 = 1 << 5 | power.SLEEP_TYPE_S5 << 2
    assert run(machine(out(power.SLEEP_CONTROL_PORT, s5) + forever(HLT))).kind == "power-off"


def test_other_sleep_types_are_no_power_off(machine: MakeMachine) -> None:
    code = out(power.SLEEP_CONTROL_PORT, power.SLEEP_TYPE_S5 << 2) + out(power.SLEEP_CONTROL_PORT, 1 << 5 | 3 << 2)
    assert run(machine(code + out(power.EXIT_PORT, 9))).status == 9


@pytest.mark.parametrize(("port", "value"), [(power.RESET_PORT, power.RESET_VALUE), (0x64, 0xFE)])
def test_reset_by_the_guest_and_a_new_start(machine: MakeMachine, port: int, value: int) -> None:
    made = machine(set_register("ebx", COUNTER_GPA) + b"\x48\xff\x03" + out(port, value) + forever(HLT))
    assert run(made).kind == "reset"
    assert count_of(made) == 1
    made.reset()
    assert ended(made).kind == "reset"
    assert count_of(made) == 1  # memory was new


def test_triple_fault_is_reported(machine: MakeMachine) -> None:
    ending = run(machine(UD2 + forever(HLT)))
    assert ending.kind == "triple-fault"
    assert "vCPU 0" in ending.reason


def test_halt_with_interrupts_off_sleeps_until_it_is_stopped(machine: MakeMachine) -> None:
    """With the local APIC in KVM nothing of it is seen here: the vCPU must not use the host's CPU, and must end."""
    made = machine(write_memory(COUNTER_GPA, 1) + CLI + forever(HLT))
    made.start()
    wait_until(lambda: count_of(made) == 1, "the guest does not run")
    used = time.process_time()
    assert made.wait(0.2) is None
    assert time.process_time() - used < 0.1
    begun = time.monotonic()
    made.power_off()
    assert time.monotonic() - begun < 1
    assert ended(made).kind == "stopped"


def test_the_first_reason_of_an_end_stays(machine: MakeMachine) -> None:
    made = machine(out(power.EXIT_PORT, 1) + out(power.EXIT_PORT, 2) + forever(b"\x90"))
    assert run(made).status == 1
    made.end(Ending("stopped", "later"))
    assert ended(made).status == 1


# -- pause, resume, reset, stop


def test_pause_stands_still_and_resume_goes_on(machine: MakeMachine) -> None:
    made = machine(COUNT)
    made.start()
    for _ in range(3):
        before = count_of(made)
        wait_until(lambda: count_of(made) > before, "the guest does not run")  # noqa: B023
        made.pause()
        stood = count_of(made)
        time.sleep(0.03)
        assert count_of(made) == stood
        with pytest.raises(Conflict):
            made.pause()
        made.resume()
        with pytest.raises(Conflict):
            made.resume()
        wait_until(lambda: count_of(made) > stood, "the guest does not go on")  # noqa: B023


def test_paused_machine_can_be_stopped(machine: MakeMachine) -> None:
    made = machine(COUNT, cpus=2)
    made.start()
    made.pause()
    made.power_off()
    assert ended(made).kind == "stopped"
    with pytest.raises(Conflict):
        made.resume()


def test_pause_in_the_middle_of_exits_loses_nothing(machine: MakeMachine) -> None:
    """Numbers go out one by one: none is missing, and none comes twice, however often the machine stood."""
    code = b"\xfe\xc0" + set_register("edx", COM1_PORT) + b"\xee"  # inc %al; out %al, %dx
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    try:
        made = machine(forever(code), serial_fd=writer)
        made.start()
        said = b""
        for _ in range(50):
            made.pause()
            said += read_what_there_is(reader)
            made.resume()
            time.sleep(0.001)
        made.power_off()
    finally:
        os.close(reader)
        os.close(writer)
    assert len(said) > 50
    assert {(later - earlier) & 0xFF for earlier, later in pairwise(said)} == {1}


def test_reset_from_outside_runs_again_with_empty_memory(machine: MakeMachine) -> None:
    made = machine(COUNT)
    made.start()
    wait_until(lambda: count_of(made) > 0, "the guest does not run")
    memory_of(made).write(FLAG_GPA, b"left")
    for _ in range(3):
        made.reset()
        assert memory_of(made).read(FLAG_GPA, 4) == bytes(4)
        wait_until(lambda: count_of(made) > 0, "the guest does not run")
    made.pause()
    made.reset()
    wait_until(lambda: count_of(made) > 0, "a paused machine does not run after a reset")


@pytest.mark.parametrize("text", [forever(b"\x90"), forever(out(0x1234, 0)), forever(read_memory(0xE000_0000))])
def test_busy_guest_is_stopped_within_a_second(machine: MakeMachine, text: bytes) -> None:
    made = machine(text)
    made.start()
    time.sleep(0.05)
    begun = time.monotonic()
    made.power_off()
    assert time.monotonic() - begun < 1
    assert ended(made).kind == "stopped"


def test_stop_at_any_moment_of_the_start(machine: MakeMachine) -> None:
    for number in range(10):
        made = machine(forever(HLT))
        made.start()
        time.sleep(number / 10_000)
        begun = time.monotonic()
        made.close()
        assert time.monotonic() - begun < 1


def test_what_does_not_fit_the_state_is_refused(machine: MakeMachine) -> None:
    made = machine(COUNT)
    for method in (made.pause, made.resume, made.reset, made.press_power_button):
        with pytest.raises(Conflict):
            method()
    assert made.wait(0.01) is None
    assert made.counters() == {}
    made.start()
    with pytest.raises(Conflict):
        made.start()
    made.press_power_button()
    made.power_off()
    for method in (made.pause, made.resume, made.reset, made.press_power_button):
        with pytest.raises(Conflict):
            method()
    made.close()
    made.close()


def test_controls_from_several_threads_take_turns(machine: MakeMachine) -> None:
    made = machine(COUNT, cpus=2, devices=(Rng(),))
    made.start()
    failures: list[str] = []

    def control(seed: int) -> None:
        chosen = random.Random(seed)
        for _ in range(15):
            name = chosen.choice(("pause", "resume", "reset", "press_power_button", "counters", "faults"))
            try:
                getattr(made, name)()
            except Conflict:
                pass
            except Exception as error:
                failures.append(f"{name}: {error!r}")

    threads = [threading.Thread(target=control, args=(seed,), daemon=True) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    assert failures == []


def test_end_while_the_machine_is_being_made(machine: MakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    made = machine(COUNT)
    real = image.write_image

    def write_image(what: BootImage, memory: GuestMemory) -> None:
        real(what, memory)
        made.end(Ending("stopped", "too early"))

    monkeypatch.setattr(image, "write_image", write_image)
    begun = time.monotonic()
    assert run(made).reason == "too early"
    assert time.monotonic() - begun < 2


def test_reset_that_fails_leaves_an_ended_machine(machine: MakeMachine) -> None:
    made = machine(COUNT)
    made.start()
    kernel = Path(made.hardware.kernel)
    content = kernel.read_bytes()
    kernel.unlink()
    with pytest.raises(NotFound):
        made.reset()
    assert ended(made).kind == "reset"
    assert made.counters() == {}
    with pytest.raises(Conflict):
        made.pause()
    kernel.write_bytes(content)
    made.reset()
    wait_until(lambda: count_of(made) > 0, "the guest does not run")


# -- several CPUs

REAL_MODE_GPA = 0x10000
REAL_MODE_COUNTER_GPA = 0x6800
# lock incw 0x6800; hlt; jmp to it
REAL_MODE = b"\xf0\xff\x06\x00\x68" + HLT + b"\xeb\xfd"
INIT_ALL_OTHERS, START_ALL_OTHERS = 0xC4500, 0xC4600 | REAL_MODE_GPA >> 12


@pytest.mark.parametrize("cpus", [2, 4])
def test_cpus_that_the_guest_never_starts(machine: MakeMachine, cpus: int) -> None:
    made = machine(COUNT, cpus=cpus)
    made.start()
    wait_until(lambda: count_of(made) > 0, "the guest does not run")
    made.pause()
    stood = count_of(made)
    made.resume()
    wait_until(lambda: count_of(made) > stood, "the guest does not go on")
    begun = time.monotonic()
    made.power_off()
    assert time.monotonic() - begun < 1


@pytest.mark.parametrize("cpus", [2, 4])
def test_guest_starts_its_other_cpus(machine: MakeMachine, cpus: int) -> None:
    place = b"".join(
        write_memory(REAL_MODE_GPA + at, int.from_bytes(REAL_MODE[at : at + 4].ljust(4, b"\x90"), "little"))
        for at in range(0, len(REAL_MODE), 4)
    )
    start = write_memory(LOCAL_APIC_GPA + 0x300, INIT_ALL_OTHERS) + write_memory(
        LOCAL_APIC_GPA + 0x300, START_ALL_OTHERS
    )
    code = place + start + until_equal(read_memory(REAL_MODE_COUNTER_GPA), cpus - 1) + EXIT_WITH_EAX
    assert run(machine(code, cpus=cpus)).status == cpus - 1


# -- instructions that a software KVM leaves to us: on any KVM the outcome is the CPU's own


@pytest.mark.parametrize(
    ("name", "text", "status"),
    [
        ("popcnt %ebx, %eax", set_register("ebx", 0xF0F0_0001) + b"\xf3\x0f\xb8\xc3", 9),
        ("popcnt (%rbx), %eax", write_memory(COUNTER_GPA, 0x7F) + b"\xf3\x0f\xb8\x03", 7),
        ("popcnt (%rbx), %rax", write_memory(COUNTER_GPA + 4, 3) + b"\xf3\x48\x0f\xb8\x43\x00", 2),
        (
            "popcnt %bx, %ax",
            set_register("eax", 0x12345678) + set_register("ebx", 0xFFFF_FFFF) + b"\x66\xf3\x0f\xb8\xc3",
            0x12340010,
        ),
        ("popcnt of 0 sets ZF", set_register("ebx", 0) + b"\xf3\x0f\xb8\xc3" + b"\x0f\x94\xc0", 1),  # sete %al
        ("popcnt of 1 clears ZF", set_register("ebx", 1) + b"\x31\xc0" + b"\xf3\x0f\xb8\xcb" + b"\x0f\x94\xc0", 0),
        ("fwait", set_register("eax", 0x5A) + b"\x9b", 0x5A),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_instruction_comes_out_as_the_cpus(machine: MakeMachine, name: str, text: bytes, status: int) -> None:
    ending = run(machine(text + EXIT_WITH_EAX))
    assert (ending.kind, ending.status) == ("exit", status)


# -- kicks and interrupts


def test_kick_and_interrupt_go_through_kvm_alone(machine: MakeMachine) -> None:
    """The guest kicks a device and sees its interrupt pending in the local APIC; rings are filled from outside."""
    vector, gsi = 0x41, layout.VIRTIO_GSIS[0]
    code = (
        write_memory(LOCAL_APIC_GPA + 0xF0, 0x1FF)  # software enable
        + write_memory(IO_APIC_GPA, 0x10 + 2 * gsi + 1) + write_memory(IO_APIC_GPA + 0x10, 0)
        + write_memory(IO_APIC_GPA, 0x10 + 2 * gsi) + write_memory(IO_APIC_GPA + 0x10, vector)
        + write_memory(COUNTER_GPA, 1)
        + until_equal(read_memory(FLAG_GPA), 1)
        + write_memory(layout.VIRTIO_GPA + mmio.QUEUE_NOTIFY, 0)
        + until_equal(read_memory(LOCAL_APIC_GPA + 0x220), 1 << (vector & 31))
        + read_memory(layout.VIRTIO_GPA + mmio.INTERRUPT_STATUS)
        + EXIT_WITH_EAX
    )  # fmt: skip
    made = machine(code, devices=(Rng(),))
    made.start()
    wait_until(lambda: count_of(made) == 1, "the guest does not get ready")
    assert made._parts is not None
    transport = made._parts.transports[0]
    # A ring whose only request is for 64 bytes, given to the transport as a driver does it.
    ring = Ring(memory_of(made), 0, 64)
    buffer, table = 0x100000, 0x101000
    memory_of(made).write(table, struct.pack("<QIHH", buffer, 64, 2, 0))
    ring.lend(None, table, 1)  # type: ignore[arg-type]  # what was lent is of no interest here
    for register, value in (
        (mmio.STATUS, 0), (mmio.STATUS, 3),
        (mmio.DRIVER_FEATURES_SEL, 0), (mmio.DRIVER_FEATURES, 1 << 28),  # indirect descriptors
        (mmio.DRIVER_FEATURES_SEL, 1), (mmio.DRIVER_FEATURES, 1),
        (mmio.STATUS, 11), (mmio.QUEUE_SEL, 0), (mmio.QUEUE_NUM, 64),
        (mmio.QUEUE_DESC_LOW, ring.descriptors), (mmio.QUEUE_DRIVER_LOW, ring.available),
        (mmio.QUEUE_DEVICE_LOW, ring.used), (mmio.QUEUE_READY, 1), (mmio.STATUS, 15),
    ):  # fmt: skip
        transport.write(register, value.to_bytes(4, "little"))
    memory_of(made).write(FLAG_GPA, b"\1\0\0\0")
    assert ended(made).status == mmio.USED_BUFFER
    ring.collect()
    assert [written for _, written in ring.done] == [64]
    assert memory_of(made).read(buffer, 64) != bytes(64)
    counters = made.counters()
    # The kick itself was none of the exits: of device registers the guest read one, the interrupt's status.
    assert (counters["rng0"]["kicks"], counters["exits"]["mmio"]) == (1, 1)
    assert made.faults() == {}


# -- what is asked for and cannot be had


def test_more_cpus_than_there_can_be(machine: MakeMachine) -> None:
    for cpus in (0, -1, 256):
        with pytest.raises(UsageError, match="CPUs"):
            machine(COUNT, cpus=cpus)


def test_too_little_memory(machine: MakeMachine) -> None:
    with pytest.raises(UsageError, match="too few"):
        machine(COUNT, memory_bytes=4096)
    with pytest.raises(UsageError, match="memory"):
        machine(COUNT, memory_bytes=2 << 20).start()  # the kernel goes to 16 MiB
    with pytest.raises(UsageError, match="memory"):
        machine(COUNT, memory_bytes=MEMORY_BYTES + 1).start()


def test_too_many_devices() -> None:
    devices = tuple(Rng(f"rng{number}") for number in range(len(layout.VIRTIO_GSIS) + 1))
    with pytest.raises(UsageError, match="devices"):
        Machine(Hardware(kernel="vmlinux"), devices)


def test_kernel_that_is_missing_or_none(machine: MakeMachine, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="kernel"):
        machine(b"", kernel=str(tmp_path / "missing")).start()
    (tmp_path / "text").write_bytes(b"not a kernel at all\n" * 100)
    with pytest.raises(UsageError, match="not a kernel"):
        machine(b"", kernel=str(tmp_path / "text")).start()
    (tmp_path / "arm").write_bytes(make_elf([Load(COUNT, TEXT_GPA)], entry=TEXT_GPA, machine=183))
    with pytest.raises(Unsupported, match="another CPU"):
        machine(b"", kernel=str(tmp_path / "arm")).start()
    with pytest.raises(NotFound, match="initial RAM disk"):
        machine(COUNT, initrd=str(tmp_path / "missing")).start()


def test_disk_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises((NotFound, HostError)):
        Blk("blk0", str(tmp_path / "missing"))


def test_machine_that_did_not_start_can_only_be_closed(machine: MakeMachine, tmp_path: Path) -> None:
    made = machine(b"", kernel=str(tmp_path / "missing"), cpus=2)
    with pytest.raises(NotFound):
        made.start()
    with pytest.raises(Conflict):
        made.start()
    with pytest.raises(Conflict):
        made.pause()


# -- KVM itself


def test_probe_knows_the_kind_in_little_time() -> None:
    best = 1.0
    for _ in range(3):
        begun = time.monotonic()
        finding = probe_kvm()
        best = min(best, time.monotonic() - begun)
        assert finding.kind in (HARDWARE, PVM)
        assert finding.how
    assert best < 0.1


def test_host_without_kvm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, machine: MakeMachine) -> None:
    made = machine(COUNT)
    monkeypatch.setattr(vm, "DEVICE", str(tmp_path / "kvm"))
    for attempt in (probe_kvm, made.start):
        with pytest.raises(Unsupported, match="has no KVM") as caught:
            attempt()
        assert caught.value.hint and caught.value.finding


def test_user_who_may_not_use_kvm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("needs root")
    device = tmp_path / "kvm"
    device.touch(mode=0o600)
    tmp_path.chmod(0o755)
    real = os.open

    def as_nobody(path: str, flags: int) -> int:
        os.seteuid(65534)
        try:
            return real(path, flags)
        finally:
            os.seteuid(0)

    monkeypatch.setattr(vm, "DEVICE", str(device))
    monkeypatch.setattr(vm.os, "open", as_nobody)
    with pytest.raises(Unsupported, match="may not use"):
        probe_kvm()


def test_file_in_the_place_of_kvms_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vm, "DEVICE", "/dev/null")
    with pytest.raises(Unsupported, match="not KVM's device"):
        probe_kvm()


def test_kvm_takes_what_we_say_of_the_cpus() -> None:
    """KVM refuses an answer that cannot be; it is asked for both policies and every number of CPUs that matters."""
    memory = GuestMemory.allocate(1 << 20)
    made = vm.Vm(memory)
    made.create_interrupt_controllers(timer=False)
    fd = made.create_vcpu(0)
    try:
        leaves = cpuid.supported(made.kvm_fd)
        for policy in (cpuid.HOST, cpuid.BASELINE):
            for count in (1, 2, 16, 255):
                cpuid.set_leaves(fd, cpuid.plan_leaves(leaves, policy, index=0, count=count))
    finally:
        os.close(fd)
        made.close()
        memory.close()
