"""A whole machine: memory, vCPUs and devices put together, started, paused and ended.

console = Console("console0", (Port("console", console=True, output_fd=own_descriptor(1)),))
with Machine(Hardware(kernel="vmlinux", command_line="console=hvc0"), (console,)) as machine:
    machine.start()
    print(machine.wait().reason)
"""

from __future__ import annotations

import os
import sys
import threading
from functools import partial
from types import TracebackType
from typing import Literal, NamedTuple, Self

from nagaya.engines.kvm import acpi, cpuid, layout, mptable, power
from nagaya.engines.kvm.boot.image import EntryState, write_image
from nagaya.engines.kvm.boot.load import Protocol, load_kernel
from nagaya.engines.kvm.bus import Bus
from nagaya.engines.kvm.power import Power
from nagaya.engines.kvm.probe import PVM, probe_kvm
from nagaya.engines.kvm.pvm import POLICY, Pvm
from nagaya.engines.kvm.serial import COM1_GSI, COM1_PORT, PORTS, Serial
from nagaya.engines.kvm.vcpu import EXIT_NAMES, Ending, Vcpu, share_interpreter
from nagaya.engines.kvm.vm import Vm
from nagaya.errors import Conflict, HostError, NagayaError, UsageError
from nagaya.kernels.arguments import plan_arguments
from nagaya.memory import GuestMemory
from nagaya.virtio.device import BLOCK, Device
from nagaya.virtio.loop import Loop
from nagaya.virtio.mmio import QUEUE_NOTIFY, SIZE_BYTES, MmioTransport

MOST_CPUS = 255
"""Local APIC ids of one byte."""
_LEAST_MEMORY_BYTES = 1 << 20
_RNG_SEED_BYTES = 32
_MSR_MTRR_DEFAULT_TYPE = 0x2FF
_MTRR_ENABLED_WRITE_BACK = 1 << 11 | 6


class Hardware(NamedTuple):
    """What a machine is made of, without its virtio devices."""

    kernel: str
    """A vmlinux or a bzImage."""
    initrd: str | None = None
    command_line: str = ""
    memory_bytes: int = 256 << 20
    cpus: int = 1
    huge_pages: bool = False
    acpi: bool = True
    """Without it the kernel finds its CPUs by an MP table, and its devices by arguments (`virtio_mmio.device=`)."""
    protocol: Protocol = "auto"
    cpu: Literal["host", "baseline"] = "host"
    serial_fd: int = -1
    """Where the early serial port's output goes; -1 = the machine has none."""
    quiet: bool = True


class Machine:
    """One machine. A context manager: leaving it ends the machine and gives everything back, the devices too.

    States: made, running, paused, ended; what does not fit the state raises `Conflict`. Methods are for any thread.
    """

    def __init__(self, hardware: Hardware, devices: tuple[Device, ...] = ()) -> None:
        """Check what was asked for. Takes nothing of the host yet. Raises `UsageError`."""
        if not 1 <= hardware.cpus <= MOST_CPUS:
            raise UsageError(f"a machine cannot have {hardware.cpus} CPUs", hint=f"from 1 to {MOST_CPUS}")
        if hardware.memory_bytes < _LEAST_MEMORY_BYTES:
            raise UsageError(
                f"{hardware.memory_bytes} bytes of memory are too few for a machine", hint="give it 64 MiB or more"
            )
        if len(devices) > len(layout.VIRTIO_GSIS):
            raise UsageError(
                f"{len(devices)} devices are too many", hint=f"a machine has room for {len(layout.VIRTIO_GSIS)}"
            )
        self.hardware = hardware
        self.devices = devices
        self.software_kvm = False
        self._control = threading.RLock()
        """Held by all that changes the state from outside: one at a time. `end` and `wait` do without it."""
        self._state = threading.Condition()
        self._ending: Ending | None = None
        self._started = False
        self._paused = False
        self._parked = 0
        self._parts: _Parts | None = None
        self._loops: list[Loop] = []
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Power on. Raises `Unsupported` without a usable KVM, `HostError`, and what `load_kernel` raises."""
        with self._control:
            with self._state:
                if self._started:
                    raise Conflict("the machine has been started already", state="started", required="made")
                self._started = True
            share_interpreter()
            self.software_kvm = probe_kvm().kind == PVM
            shared = Loop("devices")
            own = {device.name: Loop(device.name) for device in self.devices if device.device_id == BLOCK}  # it blocks
            self._loops = [shared, *own.values()]
            parts = _Parts(self, [own.get(device.name, shared) for device in self.devices])
            for loop in self._loops:
                loop.start()
            self._run(parts)

    def _run(self, parts: _Parts, *, anew: bool = False) -> None:
        with self._state:
            if anew:
                self._ending, self._paused, self._parked = None, False, 0
            self._parts = parts
            self._threads = [
                threading.Thread(target=self._run_vcpu, args=(vcpu,), name=f"vcpu{vcpu.index}", daemon=True)
                for vcpu in parts.vcpus
            ]
            if self._ending is not None:  # while the parts were made
                for vcpu in parts.vcpus:
                    vcpu.stop()
            for thread in self._threads:
                thread.start()

    def _built(self) -> _Parts:
        if self._parts is None:
            raise Conflict("the machine has not been started", state="made", required="running")
        return self._parts

    def _run_vcpu(self, vcpu: Vcpu) -> None:
        parts = self._built()
        try:
            while True:
                ending = vcpu.loop(parts.bus, parts.pvm)
                if ending is not None:
                    self.end(ending)
                if not self._park(vcpu):
                    return
        except NagayaError as error:
            self.end(Ending("failed", str(error)))
        except BaseException:
            self.end(Ending("failed", f"a fault of Nagaya's own on vCPU {vcpu.index}"))
            sys.excepthook(*sys.exc_info())

    def _park(self, vcpu: Vcpu) -> bool:
        """Wait while the machine is paused; whether it goes on then."""
        with self._state:
            self._parked += 1
            self._state.notify_all()
            while self._paused and self._ending is None:
                self._state.wait()
            self._parked -= 1
            self._state.notify_all()
            if self._ending is None:
                vcpu.allow()
            return self._ending is None

    def end(self, ending: Ending) -> None:
        """End the machine at once; the first reason stays. Does not wait for its vCPUs."""
        with self._state:
            if self._ending is None:
                self._ending = ending
            self._state.notify_all()
            vcpus = self._parts.vcpus if self._parts is not None else ()
        for vcpu in vcpus:
            vcpu.stop()

    def wait(self, timeout_s: float | None = None) -> Ending | None:
        """Why the machine ended; None when it still runs after `timeout_s`."""
        with self._state:
            self._state.wait_for(lambda: self._ending is not None, timeout_s)
            ending, threads = self._ending, self._threads
        if ending is not None:
            for thread in threads:
                if thread is not threading.current_thread():
                    thread.join()
        return ending

    def pause(self) -> None:
        """Stop all vCPUs between two instructions; returns when they stand. Devices finish what they have begun."""
        with self._control:
            parts = self._built()
            with self._state:
                self._require(paused=False)
                self._paused = True
            for vcpu in parts.vcpus:
                vcpu.stop()
            with self._state:
                self._state.wait_for(lambda: self._parked == len(parts.vcpus) or self._ending is not None)

    def resume(self) -> None:
        """Go on after `pause`."""
        with self._control:
            parts = self._built()
            with self._state:
                self._require(paused=True)
                for vcpu in parts.vcpus:
                    vcpu.tell_paused()
                self._paused = False
                self._state.notify_all()

    def press_power_button(self) -> None:
        """Ask the guest's system to shut down. It may not listen."""
        with self._control:
            parts = self._built()
            with self._state:
                self._require(paused=False)
            parts.vm.set_line(layout.POWER_BUTTON_GSI, 1)
            parts.vm.set_line(layout.POWER_BUTTON_GSI, 0)

    def power_off(self) -> None:
        """Pull the plug, and wait until the vCPUs stand."""
        with self._control:
            self.end(Ending("stopped", "the machine was powered off from outside"))
            self.wait()

    def reset(self) -> None:
        """Start anew with empty memory, on the same devices; of a running machine, or one that ended by a reset."""
        with self._control:
            parts = self._built()
            with self._state:
                if self._ending is not None and self._ending.kind != "reset":
                    raise Conflict("the machine has ended", state="ended", required="running")
            self.end(Ending("reset", "the machine was reset from outside"))
            self.wait()
            parts.close()
            self._run(_Parts(self, parts.loops), anew=True)  # when that raises, the machine has ended by its reset

    def _require(self, *, paused: bool) -> None:
        if self._ending is not None:
            raise Conflict("the machine has ended", state="ended", required="running")
        if self._paused != paused:
            state, required = ("running", "paused") if paused else ("paused", "running")
            raise Conflict(f"the machine is {state}", state=state, required=required)

    def counters(self) -> dict[str, dict[str, int]]:
        """Exits by reason, and each device's requests and bytes, since power-on."""
        with self._control:
            parts = self._parts
            if parts is None or not parts.vcpus:
                return {}
            exits = {
                EXIT_NAMES.get(reason, f"reason-{reason}"): count
                for reason in range(len(parts.vcpus[0].exits))
                if (count := sum(vcpu.exits[reason] for vcpu in parts.vcpus))
            }
            if parts.pvm is not None:
                exits |= {
                    "completed-instructions": sum(parts.pvm.completed.values()),
                    "system-calls": parts.pvm.system_calls,
                }
            return {"exits": exits, **{item.device.name: item.counters() for item in parts.transports}}

    def faults(self) -> dict[str, str]:
        """What the guest did wrong last, by device."""
        with self._control:
            transports = self._parts.transports if self._parts is not None else []
            return {item.device.name: item.fault for item in transports if item.fault}

    def close(self) -> None:
        """End the machine if it runs, and give everything back. May be called twice."""
        with self._control:
            if self._parts is not None:
                self.power_off()
                self._parts.close()
                self._parts = None
            for loop in self._loops:
                loop.close()
            for device in self.devices:  # on no thread of their own any more
                device.close()
            self.devices, self._loops = (), []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class _Parts:
    """What lives from one power-on to the next: all that a reset makes anew. Nothing of it is left when it raises."""

    def __init__(self, machine: Machine, loops: list[Loop]) -> None:
        hardware = machine.hardware
        self.loops = loops
        self.vcpus: list[Vcpu] = []
        self.transports: list[MmioTransport] = []
        self.pvm: Pvm | None = None
        self._interrupts: list[int] = []
        self.bus = Bus()
        self.memory = GuestMemory.allocate(hardware.memory_bytes, huge=hardware.huge_pages)
        try:
            self.vm = Vm(self.memory)
        except BaseException:
            self.memory.close()
            raise
        try:
            self._assemble(machine)
        except OSError as error:
            self.close()
            raise HostError.from_os(error, "cannot assemble the machine") from None
        except BaseException:
            self.close()
            raise

    def _assemble(self, machine: Machine) -> None:
        hardware, vm = machine.hardware, self.vm
        if hardware.cpus > vm.most_vcpus:
            raise UsageError(
                f"this host's KVM runs no machine with {hardware.cpus} CPUs", hint=f"at most {vm.most_vcpus}"
            )
        if machine.software_kvm:
            self.pvm = Pvm(vm)
        vm.create_interrupt_controllers(timer=True)
        Power(machine.end).attach(self.bus)
        if hardware.serial_fd >= 0:
            self.bus.add_ports(COM1_PORT, PORTS, Serial(hardware.serial_fd, partial(vm.set_line, COM1_GSI)))
        places = self._attach(machine.devices)
        rsdp_gpa = self._describe(hardware, places)
        image = load_kernel(
            hardware.kernel, memory=self.memory.regions, command_line=self._command_line(hardware, places),
            initrd=hardware.initrd, protocol=hardware.protocol, rsdp_gpa=rsdp_gpa, rng_seed=os.urandom(_RNG_SEED_BYTES),
        )  # fmt: skip
        write_image(image, self.memory)
        self._create_vcpus(hardware, image.state)

    def _attach(self, devices: tuple[Device, ...]) -> list[acpi.MmioDevice]:
        places = []
        for number, (device, loop) in enumerate(zip(devices, self.loops, strict=True)):
            gpa, gsi = layout.VIRTIO_GPA + number * layout.VIRTIO_STEP, layout.VIRTIO_GSIS[number]
            interrupt_fd = self.vm.create_interrupt(gsi)
            self._interrupts.append(interrupt_fd)
            transport = MmioTransport(device, self.memory, loop, interrupt_fd=interrupt_fd)
            self.transports.append(transport)
            for queue, fd in enumerate(transport.kick_fds):
                self.vm.bind_kick(fd, gpa + QUEUE_NOTIFY, queue)  # the value is the queue's number
            self.bus.add_pages(gpa, SIZE_BYTES, transport)
            places.append(acpi.MmioDevice(gpa, SIZE_BYTES, gsi))
        return places

    def _describe(self, hardware: Hardware, places: list[acpi.MmioDevice]) -> int:
        """Write the tables that tell the kernel its hardware; where the RSDP is, or 0."""
        # Linux looks for this table before ACPI's, and where there is none it searches the first megabyte for it: 3 s where
        # its code is emulated.
        for gpa, data in mptable.plan_mp_table(hardware.cpus):
            self.memory.write(gpa, data)
        if not hardware.acpi:
            return 0
        ports = acpi.Ports(
            power.SLEEP_CONTROL_PORT, power.SLEEP_STATUS_PORT, power.RESET_PORT, power.RESET_VALUE, power.PANIC_PORT
        )
        serial = acpi.SerialPort(COM1_PORT, COM1_GSI) if hardware.serial_fd >= 0 else None
        tables = acpi.plan_tables(acpi.Machine(hardware.cpus, ports, devices=places, serial=serial))
        self.memory.write(tables.rsdp_gpa, tables.content)
        return tables.rsdp_gpa

    def _command_line(self, hardware: Hardware, places: list[acpi.MmioDevice]) -> str:
        """Ours first: where a kernel takes the last of two, the user's wins."""
        words = plan_arguments(software_kvm=self.pvm is not None, cpus=hardware.cpus, quiet=hardware.quiet)
        if not hardware.acpi:
            words.append("acpi=off")
            words += [f"virtio_mmio.device={place.size_bytes}@{place.gpa:#x}:{place.gsi}" for place in places]
        return " ".join([*words, hardware.command_line]).strip()

    def _create_vcpus(self, hardware: Hardware, state: EntryState) -> None:
        leaves = cpuid.supported(self.vm.kvm_fd)
        policy = (*(cpuid.HOST if hardware.cpu == "host" else cpuid.BASELINE), *(POLICY if self.pvm else ()))
        for index in range(hardware.cpus):
            vcpu = Vcpu(self.vm, index)
            self.vcpus.append(vcpu)
            cpuid.set_leaves(vcpu.fd, cpuid.plan_leaves(leaves, policy, index=index, count=hardware.cpus))
            vcpu.set_msr(_MSR_MTRR_DEFAULT_TYPE, _MTRR_ENABLED_WRITE_BACK)  # else a kernel takes all RAM as uncached
            if self.pvm is not None:
                self.pvm.prepare(vcpu)
        self.vcpus[0].enter(state)

    def close(self) -> None:
        """Give back everything but devices and loops. No vCPU runs any more."""
        for transport in self.transports:
            transport.close()
        for vcpu in self.vcpus:
            vcpu.close()
        for fd in self._interrupts:
            os.close(fd)
        self.vm.close()
        self.memory.close()
        self.vcpus, self.transports, self._interrupts = [], [], []
