"""A whole machine: memory, vCPUs and devices put together, started, paused and ended.

console = Console("console0", (Port("console", console=True, output_fd=own_descriptor(1)),))
with Machine(Hardware(kernel="vmlinux", command_line="console=hvc0"), (console,)) as machine:
    machine.start()
    print(machine.wait().reason)
"""

from __future__ import annotations

import _thread
import os
import sys

from nagaya.engines.kvm import layout
from nagaya.engines.kvm.assembly import Hardware, Parts, check
from nagaya.engines.kvm.known import PVM, find_kvm
from nagaya.engines.kvm.vcpu import EXIT_NAMES, Ending, Vcpu, share_interpreter
from nagaya.errors import Conflict, HostError, NagayaError
from nagaya.kernel.light_threads import Condition, Thread
from nagaya.memory import PAGE_BYTES, GuestMemory, WriteLog
from nagaya.static import Any, Callable, Self

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType

    from nagaya.engines.kvm.behind import Order
    from nagaya.engines.kvm.saved import Files, Saved
    from nagaya.virtio.apart import DeviceProcess
    from nagaya.virtio.device import Device
    from nagaya.virtio.loop import Loop
    from nagaya.virtio.vhost_net import VhostNet

__all__ = ["Hardware", "Machine"]


class Machine:
    """One machine. A context manager: leaving it ends the machine and gives everything back, the devices too.

    States: made, running, paused, ended; what does not fit the state raises `Conflict`. Methods are for any thread.
    """

    def __init__(
        self,
        hardware: Hardware,
        devices: tuple[Device, ...] = (),
        *,
        apart: DeviceProcess | None = None,
        saved: Saved | None = None,
        shared: bool = False,
        bare: dict[str, Any] | None = None,
    ) -> None:
        """Check what was asked for. Takes nothing of the host yet. Raises `UsageError`.

        `apart` is the process of those `devices` that are to have one of their own: it starts and ends with the machine.
        `saved` is what to go on from, rather than boot; it stays the caller's, and is not needed after `start`. Its memory
        is copied where other processes work on it: where there are some of `apart`, or with `shared`.
        With `bare`, what `describe` has answered elsewhere, it is made with nothing in it, for `adopt` to fill before `start`.
        """
        check(hardware, devices)
        self.hardware = hardware
        self.devices = devices
        self._apart = apart
        self._saved = saved
        self._bare = bare
        self._writes = WriteLog(hardware.memory_bytes, PAGE_BYTES)
        self._shared = shared or apart is not None
        self.software_kvm = False
        self._control = _thread.RLock()
        """Held by all that changes the state from outside: one at a time. `end` and `wait` do without it."""
        self._state = Condition()
        self._ending: Ending | None = None
        self._begun = False
        self._paused = False
        self._writers = 0  # processes that write what it was
        self._parked = 0
        self._made: Parts | None = None  # until the start
        self._kvm_fd = -1  # between a reset that failed and the next
        self._parts: Parts | None = None
        self._loops: list[Loop] = []
        self._loop_of: dict[str, Loop] = {}
        self._threads: list[Thread] = []

    def make(self) -> None:
        """Take from the host all that the machine needs: after it, `start` asks for no file and no right any more.

        Raises `Unsupported` without a usable KVM, `HostError`, and what `load_kernel` raises; it can only be closed then.
        """
        with self._control:
            if self._begun:
                raise Conflict("the machine has been started already", state="started", required="new")
            self._begun = True
            self.software_kvm = find_kvm().kind == PVM
            if self.devices:
                self._make_loops()
            self._made = self._assemble()
            self._made.memory.writes = self._writes

    def start(self) -> None:
        """Power on. Raises as `make`, which it does where it has not been done."""
        with self._control:
            if self._made is None:
                self.make()
            parts, self._made = self._made, None
            assert parts is not None
            share_interpreter()
            if self._apart is not None:
                self._start_apart(self._apart, parts)
            saved, self._saved = self._saved, None
            if saved is not None:
                try:
                    parts.restore_devices(saved)
                except BaseException:
                    parts.close()
                    raise
            for loop in self._loops:
                loop.start()
            self._run(parts)
            if self.hardware.serial_input_fd >= 0:
                Thread(self._type)

    def _start_apart(self, process: DeviceProcess, parts: Parts) -> None:
        parts.keep_from_children()
        process.memory_writes = self._writes
        for remote in process.devices:
            remote.on_lost = lambda reason: self.end(Ending("failed", reason))
        try:
            process.start()
        except OSError as error:
            parts.close()
            raise HostError.from_os(error, "cannot start the process of the machine's devices") from None

    def _make_loops(self) -> None:
        from nagaya.virtio.device import BLOCK
        from nagaya.virtio.loop import Loop

        shared = Loop("devices")
        own = {device.name: Loop(device.name) for device in self.devices if device.device_id == BLOCK}  # it blocks
        self._loops = [shared, *own.values()]
        self._loop_of = {device.name: own.get(device.name, shared) for device in self.devices}

    def _assemble(self, *, kvm_fd: int = -1) -> Parts:
        devices = tuple((device, self._loop_of[device.name]) for device in self.devices)
        return Parts(
            self.hardware, devices, software_kvm=self.software_kvm, end=self.end, saved=self._saved, shared=self._shared,
            kvm_fd=kvm_fd, bare=self._bare,
        )  # fmt: skip

    def _type(self) -> None:
        """What is typed at the far end of the serial line, until that is hung up, to the UART that there is just now."""
        import select

        poll = select.poll()
        poll.register(self.hardware.serial_input_fd, select.POLLIN)
        while poll.poll():
            try:
                data = os.read(self.hardware.serial_input_fd, 4096)
            except BlockingIOError:
                continue
            except OSError:
                return
            if not data:
                return
            parts = self._parts
            if parts is not None and parts.serial is not None:
                parts.serial.type_in(data)

    def _run(self, parts: Parts, *, anew: bool = False) -> None:
        with self._state:
            if anew:
                self._ending, self._paused, self._parked = None, False, 0
            self._parts = parts
            if self._ending is not None:  # while the parts were made
                for vcpu in parts.vcpus:
                    vcpu.stop()
            self._threads = [Thread(self._run_vcpu, vcpu) for vcpu in parts.vcpus]

    def _built(self) -> Parts:
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
            self._state.wait_for(lambda: not self._paused or self._ending is not None)
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
                if not thread.is_current:
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

    def save(self, directory: str, *, notes: dict[str, Any] | None = None) -> None:
        """Write the machine, which is paused and stays so, into the empty `directory`. See `saved`.

        `notes` are the caller's own, in `Saved.state["notes"]`. Raises `Conflict`, `HostError`, and `Unsupported` for
        what cannot be saved.
        """
        from nagaya.engines.kvm import saved

        try:
            files = saved.create(directory)
            try:
                self.save_to(files, notes=notes)
            finally:
                files.close()
            saved.commit(directory)
        except OSError as error:
            raise HostError.from_os(error, "cannot save the machine") from None

    def save_to(self, files: Files, *, notes: dict[str, Any] | None = None) -> None:
        """The same, into files that somebody else has made, and will commit."""
        from nagaya.engines.kvm import saved

        self._standing(
            lambda parts: saved.write(files, parts.memory, {**parts.save(self.hardware), "notes": notes or {}})
        )

    def save_behind(self, order: Order) -> None:
        """The same, but that the machine may go on when this returns: what it was is written meanwhile, and then answered."""
        self._standing(lambda parts: self._save_behind(order, parts))

    def _save_behind(self, order: Order, parts: Parts) -> None:
        from nagaya.engines.kvm import behind

        state = parts.save(self.hardware)
        parts.keep_from_children(memory=False)
        self._writers += 1
        if self._shared:
            copy = parts.memory.copy()  # other processes work on it, which copying on a write would leave behind
            try:
                behind.start(order, copy, state, lambda: self._written(parts))
            finally:
                copy.close()
        else:
            parts.memory.detach()
            behind.start(order, parts.memory, state, lambda: self._written(parts))

    def _written(self, parts: Parts) -> None:
        """A writer has ended. With the last one goes what the machine has replaced since."""
        with self._control:
            self._writers -= 1
            if self._parts is parts and not self._writers:
                parts.memory.drop_replaced()

    def _standing(self, call: Callable[[Parts], None]) -> None:
        """Call it while nothing changes of a machine that is paused: devices stand between two requests. Raises `Conflict`, `HostError`."""
        with self._control:
            parts = self._built()
            with self._state:
                self._require(paused=True)
            release = self.hold_devices()
            try:
                call(parts)
            except OSError as error:
                raise HostError.from_os(error, "cannot save the machine") from None
            finally:
                release()

    def hold_devices(self) -> Callable[[], None]:
        """Have all devices stand between two requests until the answer is called."""
        from nagaya.virtio.device import as_direct

        releases = [loop.hold() for loop in self._loops]
        releases += [direct.hold() for device in self.devices if (direct := as_direct(device)) is not None]

        def release() -> None:
            for one in releases:
                one()

        return release

    # -- on its way to another host

    def describe(self) -> dict[str, Any]:
        """What it is made of, for another host to compare. Raises `Conflict`, `HostError`."""
        with self._control:
            return self._built().describe(self.hardware)

    def log_writes(self, on: bool) -> None:
        """Log from here on what the guest, KVM and the devices write to memory, and the devices to disks; or stop it.

        Raises `OSError`.
        """
        with self._control:
            parts = self._built()
            logs = [self._writes, *(writes for device in self.devices if (writes := writes_of(device)) is not None)]
            for log in logs:
                if on:
                    log.start()
                else:
                    log.stop()
            parts.vm.log_writes(on)
            self._each_kernel_card(lambda card: card.log_writes(on))

    def log_disk(self, name: str, on: bool) -> None:
        """Log from here on what is written to the disk of that name, or stop it."""
        writes = self._find_log(name)
        if on:
            writes.start()
        else:
            writes.stop()

    def take_disk_log(self, name: str) -> list[tuple[int, int]]:
        """(offset, bytes) of the disk that was written since the last time, by requests that have been answered."""
        with self._control:
            self._built()
            release = self.hold_devices()
            try:
                return self._find_log(name).take()
            finally:
                release()

    def _find_log(self, name: str) -> WriteLog:
        for device in self.devices:
            if device.name == name and (writes := writes_of(device)) is not None:
                return writes
        raise Conflict(f"the machine has no disk '{name}' to write to", state="missing", required="disk")

    def take_written(self) -> list[tuple[int, int]]:
        """(offset, bytes) of the memory that was written since the last time, in order. Raises `OSError`."""
        with self._control:
            parts = self._built()
            self._each_kernel_card(lambda card: card.mark_written())
            return merge_runs(parts.vm.take_written() + self._writes.take())

    def _each_kernel_card(self, call: Callable[[VhostNet], None]) -> None:
        for device in self.devices:
            if hasattr(device, "mark_written"):
                loop = self._loop_of[device.name]
                call(device) if loop.is_held else loop.call(lambda card=device: call(card))  # type: ignore[arg-type,misc]

    def save_standing(self) -> dict[str, Any]:
        """All but the memory, of a machine that is paused and whose devices are held. Raises `OSError`, as `save`."""
        with self._control:
            parts = self._built()
            with self._state:
                self._require(paused=True)
            state = parts.save(self.hardware)
            parts.mark_rings()
            return state

    @property
    def memory(self) -> GuestMemory:
        """Of a machine that has been made."""
        parts = self._made or self._parts
        if parts is None:
            raise Conflict("the machine has not been made", state="made", required="running")
        return parts.memory

    def adopt(self, state: dict[str, Any]) -> None:
        """Be what `save_standing` answered elsewhere; the memory is in place. `start` lets it run.

        Raises `IntegrityError`, `Unsupported`, `HostError`.
        """
        with self._control:
            if self._made is None or self._bare is None:
                raise Conflict("the machine is not one that can be filled", state="started", required="bare")
            try:
                self._made.adopt(self.hardware, state)
            except OSError as error:
                raise HostError.from_os(error, "cannot go on with the machine") from None

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
            if self._kvm_fd < 0:  # else a reset failed before this one, and its parts are closed
                self._kvm_fd = os.dup(parts.vm.kvm_fd)  # we may have no right to open it by now
            parts.close()
            # When that raises, the machine has ended by its reset.
            self._run(self._assemble(kvm_fd=self._kvm_fd), anew=True)
            self._close_kvm()

    def _close_kvm(self) -> None:
        fd, self._kvm_fd = self._kvm_fd, -1
        if fd >= 0:
            os.close(fd)

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
                    "postponed-ticks": parts.pvm.postponed_ticks,
                }
            return {"exits": exits, **{item.device.name: item.counters() for item in parts.transports}}

    def processes(self) -> tuple[int, ...]:
        """Processes that work for the machine beside this one."""
        return (self._apart.pid,) if self._apart is not None and self._apart.pid else ()

    def faults(self) -> dict[str, str]:
        """What the guest did wrong last, by device."""
        with self._control:
            transports = self._parts.transports if self._parts is not None else []
            return {item.device.name: item.fault for item in transports if item.fault}

    def close(self) -> None:
        """End the machine if it runs, and give everything back. May be called twice."""
        with self._control:
            made, self._made = self._made, None
            if made is not None:
                made.close()
            if self._parts is not None:
                self.power_off()
                self._parts.close()
                self._parts = None
            for loop in self._loops:
                loop.close()
            for device in self.devices:  # on no thread of their own any more
                device.close()
            if self._apart is not None:
                self._apart.close()
            self.devices, self._loops, self._apart = (), [], None
            self._close_kvm()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def writes_of(device: Device) -> WriteLog | None:
    """The log of a disk that is written."""
    writes: WriteLog | None = getattr(device, "writes", None)
    return writes


def merge_runs(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(offset, bytes) of all of them, in order and apart from each other."""
    merged: list[tuple[int, int]] = []
    for start, count in sorted(runs):
        if merged and start <= sum(merged[-1]):
            merged[-1] = (merged[-1][0], max(sum(merged[-1]), start + count) - merged[-1][0])
        else:
            merged.append((start, count))
    return merged
