"""From what a machine is made of to the parts that one power-on needs: memory, vCPUs, devices in their places, a kernel."""

from __future__ import annotations

import mmap
import os

from nagaya.engines.kvm import cpuid, layout
from nagaya.engines.kvm.bus import Bus
from nagaya.engines.kvm.known import HARDWARE, PVM
from nagaya.engines.kvm.layout import MmioDevice
from nagaya.engines.kvm.power import Power
from nagaya.engines.kvm.vcpu import Ending, Vcpu
from nagaya.engines.kvm.vm import Vm
from nagaya.errors import HostError, IntegrityError, Unsupported, UsageError
from nagaya.kernels.arguments import plan_arguments
from nagaya.memory import GuestMemory, check_size
from nagaya.static import Any, Callable, Literal, NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:  # what a machine without devices, on a hardware KVM, does not need: 8 ms
    from nagaya.engines.kvm.boot.image import EntryState
    from nagaya.engines.kvm.boot.load import Protocol
    from nagaya.engines.kvm.cpuid import Leaf
    from nagaya.engines.kvm.pvm import Pvm
    from nagaya.engines.kvm.saved import Saved
    from nagaya.engines.kvm.serial import Serial
    from nagaya.virtio.device import Device
    from nagaya.virtio.loop import Loop
    from nagaya.virtio.mmio import MmioTransport

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
    interrupts: bool = True
    """Local APICs and an I/O APIC in KVM; taking them down takes the host 15 ms. Without: one CPU and no devices."""
    pit: bool = False
    """The old timer too (8 ms more), for kernels that know neither kvm-clock nor the TSC's frequency."""
    serial_fd: int = -1
    """Where the serial port's output goes; -1 = the machine has none."""
    serial_input_fd: int = -1
    """Where its input comes from: a stream; -1 = from nowhere."""
    quiet: bool = True
    plain: bool = False
    """Nothing but `command_line` on the command line: for a guest that is not Linux."""


def check(hardware: Hardware, devices: tuple[Device, ...]) -> None:
    """Raise `UsageError` for what no host could run."""
    if not 1 <= hardware.cpus <= MOST_CPUS:
        raise UsageError(f"a machine cannot have {hardware.cpus} CPUs", hint=f"from 1 to {MOST_CPUS}")
    if hardware.memory_bytes < _LEAST_MEMORY_BYTES:
        raise UsageError(
            f"{hardware.memory_bytes} bytes of memory are too few for a machine", hint="give it 64 MiB or more"
        )
    check_size(hardware.memory_bytes, huge=hardware.huge_pages)
    if len(devices) > len(layout.VIRTIO_GSIS):
        raise UsageError(
            f"{len(devices)} devices are too many", hint=f"a machine has room for {len(layout.VIRTIO_GSIS)}"
        )
    if not hardware.interrupts and (devices or hardware.cpus > 1 or hardware.serial_fd >= 0 or hardware.pit):
        raise UsageError("a machine without interrupts has one CPU and no devices", hint="leave interrupts on")


_FIXED = ("memory_bytes", "cpus", "acpi", "cpu", "interrupts", "pit")
"""Of `Hardware`: what a machine that was saved has for good."""


def check_saved(state: dict[str, Any], hardware: Hardware, *, software_kvm: bool) -> None:
    """Raise `Unsupported` for what was saved of other hardware, or on a KVM of another kind."""
    kind = PVM if software_kvm else HARDWARE
    if state["kvm"] != kind:
        raise Unsupported(
            f"the machine was saved on a {state['kvm']} KVM, and this host's is a {kind} one",
            hint="restore it on a host like the one where it was saved, or start the machine anew",
        )
    for name in _FIXED:
        if state["hardware"].get(name) != getattr(hardware, name):
            raise Unsupported(
                f"the machine was saved with {name}={state['hardware'].get(name)}, and is to have {getattr(hardware, name)}",
                hint="a machine's size cannot change while it runs: start it anew",
            )
    if len(state["vcpus"]) != hardware.cpus:
        raise IntegrityError("the saved machine has not got all its CPUs")


def check_cpu(state: dict[str, Any], leaves: tuple[Leaf, ...]) -> None:
    """Raise `Unsupported` when this host's CPU, or what its KVM shows of it, is not the one that the guest knows."""
    now = [[leaf.function, leaf.subleaf, leaf.flags, list(leaf.registers)] for leaf in leaves]
    if state["leaves"] == now:
        return
    here = cpuid.brand(leaves)
    then = {(leaf[0], leaf[1]): leaf[3] for leaf in state["leaves"]}
    first = next((leaf for leaf in leaves if then.get((leaf.function, leaf.subleaf)) != list(leaf.registers)), None)
    where = f"CPUID {first.function:#x}.{first.subleaf}" if first is not None else "CPUID has fewer leaves here"
    raise Unsupported(
        f"the machine was saved on another CPU ({state['cpu']}; here it would have {here})",
        hint="restore it on a host with that CPU, or start the machine anew", finding=f"it differs in {where}",
    )  # fmt: skip


def plan_cpus(kvm_fd: int, hardware: Hardware, quirks: tuple[cpuid.Mask, ...]) -> list[tuple[Leaf, ...]]:
    """What each CPU of the guest is told of itself on this host. Raises `OSError`."""
    leaves = cpuid.supported(kvm_fd)
    policy = (*(cpuid.HOST if hardware.cpu == "host" else cpuid.BASELINE), *quirks)
    return [cpuid.plan_leaves(leaves, policy, index=index, count=hardware.cpus) for index in range(hardware.cpus)]


def check_host(state: dict[str, Any], hardware: Hardware, *, software_kvm: bool) -> None:
    """All of that, without making a machine. Raises `Unsupported`, `IntegrityError`, `HostError`."""
    from nagaya.engines.kvm.vm import open_kvm

    check_saved(state, hardware, software_kvm=software_kvm)
    quirks: tuple[cpuid.Mask, ...] = ()
    if software_kvm:
        from nagaya.engines.kvm.pvm import DEPRIVILEGED_POLICY, POLICY

        quirks = DEPRIVILEGED_POLICY if is_deprivileged(state) else POLICY
    fd = open_kvm()
    try:
        check_cpu(state, plan_cpus(fd, hardware, quirks)[0])
    except OSError as error:
        raise HostError.from_os(error, "cannot ask this host's KVM for its CPUs") from None
    finally:
        os.close(fd)


def is_deprivileged(state: dict[str, Any]) -> bool:
    """Whether a machine, which was saved or described, has a kernel that leaves privileged mode by itself."""
    return bool((state.get("pvm") or {}).get("deprivileged"))


class Parts:
    """What lives from one power-on to the next: all that a reset makes anew. Nothing of it is left when it raises."""

    def __init__(
        self,
        hardware: Hardware,
        devices: tuple[tuple[Device, Loop], ...],
        *,
        software_kvm: bool,
        end: Callable[[Ending], None],
        saved: Saved | None = None,
        shared: bool = True,
        kvm_fd: int = -1,
        bare: dict[str, Any] | None = None,
    ) -> None:
        """Devices come with the loop of each; `end` hears when the guest ends itself.

        With `saved` no kernel is loaded: the machine is as it was then, but for its devices, which `restore_devices` brings
        there. `shared`: other processes are to be shown the memory. `kvm_fd`: see `Vm`. One that is
        `bare`, of which that was described (`describe`), has no vCPUs yet: `adopt` makes them.

        Raises `Unsupported` without a usable KVM, `HostError`, and what `load_kernel` raises.
        """
        self.vcpus: list[Vcpu] = []
        self.transports: list[MmioTransport] = []
        self.pvm: Pvm | None = None
        self.serial: Serial | None = None
        self._interrupts: list[int] = []
        self.bus = Bus()
        if saved is not None:
            check_saved(saved.state, hardware, software_kvm=software_kvm)
            self.memory = saved.map_memory(shared=shared)
        else:
            self.memory = GuestMemory.allocate(hardware.memory_bytes, huge=hardware.huge_pages)
            if kvm_fd < 0:  # otherwise we may not, and are a machine that is never saved
                self.memory.open_page_map()
        try:
            self.vm = Vm(self.memory, kvm_fd=kvm_fd)
        except BaseException:
            self.memory.close()
            raise
        try:
            self._assemble(hardware, devices, software_kvm, end, saved, bare)
        except OSError as error:
            self.close()
            raise HostError.from_os(error, "cannot assemble the machine") from None
        except BaseException:
            self.close()
            raise

    def _assemble(
        self,
        hardware: Hardware,
        devices: tuple[tuple[Device, Loop], ...],
        software_kvm: bool,
        end: Callable[[Ending], None],
        saved: Saved | None,
        bare: dict[str, Any] | None,
    ) -> None:
        vm = self.vm
        if hardware.cpus > vm.most_vcpus:
            raise UsageError(
                f"this host's KVM runs no machine with {hardware.cpus} CPUs", hint=f"at most {vm.most_vcpus}"
            )
        if software_kvm:
            from nagaya.engines.kvm.pvm import Pvm

            self.pvm = Pvm(vm, deprivileged=self._is_deprivileged(hardware, saved.state if saved else bare))
        if hardware.interrupts:
            vm.create_interrupt_controllers(timer=hardware.pit)
        Power(end).attach(self.bus)
        if hardware.serial_fd >= 0:
            from nagaya.engines.kvm.serial import COM1_GSI, COM1_PORT, PORTS, Serial

            self.serial = Serial(hardware.serial_fd, lambda level: vm.set_line(COM1_GSI, level))
            self.bus.add_ports(COM1_PORT, PORTS, self.serial)
        places = self._attach(devices) if devices else []
        if bare is not None:
            return
        if saved is not None:
            self._restore(hardware, saved.state)
            return
        from nagaya.engines.kvm.boot.image import write_image  # lazy: who goes on from what was saved loads no kernel
        from nagaya.engines.kvm.boot.load import load_kernel

        rsdp_gpa = self._describe(hardware, places)
        command_line = self._command_line(hardware, places)
        image = load_kernel(
            hardware.kernel, memory=self.memory.regions, command_line=command_line,
            initrd=hardware.initrd, protocol=hardware.protocol, rsdp_gpa=rsdp_gpa, rng_seed=os.urandom(_RNG_SEED_BYTES),
        )  # fmt: skip
        write_image(image, self.memory)
        self._create_vcpus(hardware, image.state)

    def _is_deprivileged(self, hardware: Hardware, state: dict[str, Any] | None) -> bool:
        """Whether the kernel can leave privileged mode by itself."""
        if state is not None:
            return is_deprivileged(state)
        if hardware.plain or not hardware.interrupts:
            return False  # it is not Linux
        from nagaya.engines.kvm.speed import can_leave_privileged_mode

        return can_leave_privileged_mode(hardware.kernel)

    def _attach(self, devices: tuple[tuple[Device, Loop], ...]) -> list[MmioDevice]:
        from nagaya.virtio.mmio import QUEUE_NOTIFY, SIZE_BYTES, MmioTransport

        places = []
        for number, (device, loop) in enumerate(devices):
            gpa, gsi = layout.VIRTIO_GPA + number * layout.VIRTIO_STEP, layout.VIRTIO_GSIS[number]
            interrupt_fd = self.vm.create_interrupt(gsi)
            self._interrupts.append(interrupt_fd)
            transport = MmioTransport(device, self.memory, loop, interrupt_fd=interrupt_fd)
            self.transports.append(transport)
            for queue, fd in enumerate(transport.kick_fds):
                self.vm.bind_kick(fd, gpa + QUEUE_NOTIFY, queue)  # the value is the queue's number
            self.bus.add_pages(gpa, SIZE_BYTES, transport)
            places.append(MmioDevice(gpa, SIZE_BYTES, gsi))
        return places

    def _describe(self, hardware: Hardware, places: list[MmioDevice]) -> int:
        """Write the tables that tell the kernel its hardware; where the RSDP is, or 0."""
        if not hardware.interrupts:
            return 0
        from nagaya.engines.kvm.mptable import plan_mp_table

        # Linux looks for this table before ACPI's, and where there is none it searches the first megabyte for it: 3 s where
        # its code is emulated.
        for gpa, data in plan_mp_table(hardware.cpus):
            self.memory.write(gpa, data)
        if not hardware.acpi:
            return 0
        from nagaya.engines.kvm import acpi, power
        from nagaya.engines.kvm.serial import COM1_GSI, COM1_PORT

        ports = acpi.Ports(
            power.SLEEP_CONTROL_PORT, power.SLEEP_STATUS_PORT, power.RESET_PORT, power.RESET_VALUE, power.PANIC_PORT
        )
        serial = acpi.SerialPort(COM1_PORT, COM1_GSI) if hardware.serial_fd >= 0 else None
        tables = acpi.plan_tables(acpi.Machine(hardware.cpus, ports, devices=places, serial=serial))
        self.memory.write(tables.rsdp_gpa, tables.content)
        return tables.rsdp_gpa

    def _command_line(self, hardware: Hardware, places: list[MmioDevice]) -> str:
        """Ours first: where a kernel takes the last of two, the user's wins."""
        if hardware.plain:
            return hardware.command_line
        words = plan_arguments(
            software_kvm=self.pvm is not None, cpus=hardware.cpus, quiet=hardware.quiet,
            deprivileged=self.pvm is not None and self.pvm.deprivileged,
        )  # fmt: skip
        if not hardware.acpi:
            words.append("acpi=off")
            words += [f"virtio_mmio.device={place.size_bytes}@{place.gpa:#x}:{place.gsi}" for place in places]
        return " ".join([*words, hardware.command_line]).strip()

    def _create_vcpus(self, hardware: Hardware, state: EntryState) -> None:
        for index, leaves in enumerate(self._plan_leaves(hardware)):
            vcpu = self._create_vcpu(index, leaves)
            vcpu.set_msr(_MSR_MTRR_DEFAULT_TYPE, _MTRR_ENABLED_WRITE_BACK)  # else a kernel takes all RAM as uncached
        self.vcpus[0].enter(state)

    def _plan_leaves(self, hardware: Hardware) -> list[tuple[Leaf, ...]]:
        return plan_cpus(self.vm.kvm_fd, hardware, self.pvm.policy if self.pvm else ())

    def _create_vcpu(self, index: int, leaves: tuple[Leaf, ...]) -> Vcpu:
        vcpu = Vcpu(self.vm, index)
        self.vcpus.append(vcpu)
        cpuid.set_leaves(vcpu.fd, leaves)
        if self.pvm is not None:
            self.pvm.prepare(vcpu)
        return vcpu

    # -- saved, and gone on from

    def save(self, hardware: Hardware) -> dict[str, Any]:
        """All but the memory, while no vCPU runs and the loops stand. Raises `OSError`, and what `Device.save` raises."""
        from nagaya.engines.kvm import cpu_state

        for vcpu in self.vcpus:
            vcpu.settle(self.bus, self.pvm)
        indices = cpu_state.msr_indices(self.vm)
        leaves = self._plan_leaves(hardware)
        return {
            **self._describe_hardware(hardware, leaves[0]),
            "vm": cpu_state.save_vm(self.vm, interrupts=hardware.interrupts, timer=hardware.pit),
            "vcpus": [cpu_state.save_vcpu(vcpu, indices, local_apic=hardware.interrupts) for vcpu in self.vcpus],
            "pvm": self.pvm.save() if self.pvm is not None else None,
            "devices": [{"name": each.device.name, **each.save()} for each in self.transports],
        }  # fmt: skip

    def describe(self, hardware: Hardware) -> dict[str, Any]:
        """What `check_host` looks at elsewhere. Raises `HostError`."""
        try:
            leaves = self._plan_leaves(hardware)
        except OSError as error:
            raise HostError.from_os(error, "cannot ask this host's KVM for its CPUs") from None
        pvm = self.pvm.save() if self.pvm is not None else None
        return {**self._describe_hardware(hardware, leaves[0]), "vcpus": [{}] * hardware.cpus, "pvm": pvm}

    def _describe_hardware(self, hardware: Hardware, leaves: tuple[Leaf, ...]) -> dict[str, Any]:
        return {
            "hardware": {name: getattr(hardware, name) for name in _FIXED}, "kvm": PVM if self.pvm else HARDWARE,
            "cpu": cpuid.brand(leaves), "leaves": [list(leaf) for leaf in leaves],
        }  # fmt: skip

    def mark_rings(self) -> None:
        """Mark in the memory's log what devices write without saying so each time: the used rings."""
        for transport in self.transports:
            transport.mark_rings()

    def adopt(self, hardware: Hardware, state: dict[str, Any]) -> None:
        """Be what `save` answered elsewhere, devices too; of parts that were made bare, with the memory in place.

        Whoever wrote it may be anybody. Raises `Unsupported`, `IntegrityError`, `OSError`.
        """
        try:
            check_saved(state, hardware, software_kvm=self.pvm is not None)
            self._restore(hardware, state)
            self._restore_devices(state["devices"])
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise IntegrityError(f"the machine's state makes no sense: {type(error).__name__}: {error}") from None

    def _restore(self, hardware: Hardware, state: dict[str, Any]) -> None:
        from nagaya.engines.kvm import cpu_state

        leaves = self._plan_leaves(hardware)
        check_cpu(state, leaves[0])
        for index, saved in enumerate(state["vcpus"]):
            cpu_state.restore_vcpu(self._create_vcpu(index, leaves[index]), saved)
        cpu_state.restore_vm(self.vm, state["vm"])
        if self.pvm is not None:
            self.pvm.restore(state["pvm"])

    def restore_devices(self, saved: Saved) -> None:
        """Before the loops start, and after a process of devices has. Raises `Unsupported`, `IntegrityError`."""
        self._restore_devices(saved.state["devices"])

    def _restore_devices(self, states: list[dict[str, Any]]) -> None:
        names = [each.device.name for each in self.transports]
        if [state["name"] for state in states] != names:
            raise Unsupported(
                "the machine was saved with other devices than it has now",
                finding=f"{', '.join(state['name'] for state in states)}; now {', '.join(names)}",
            )
        for transport, state in zip(self.transports, states, strict=True):
            transport.restore(state)

    def keep_from_children(self, *, memory: bool = True) -> None:
        """Let a process forked from now on have no part in the virtual machine, which would live as long as it does."""
        if memory:
            self.memory.keep_from_children()
        for vcpu in self.vcpus:
            vcpu.page.madvise(mmap.MADV_DONTFORK)

    def close(self) -> None:
        """Give back everything but devices and loops. No vCPU runs any more."""
        if self.serial is not None:
            self.serial.close()
        for transport in self.transports:
            transport.close()
        for vcpu in self.vcpus:
            vcpu.close()
        for fd in self._interrupts:
            os.close(fd)
        if self.pvm is not None:
            self.pvm.close()
        self.vm.close()
        self.memory.close()
        self.vcpus, self.transports, self._interrupts = [], [], []
