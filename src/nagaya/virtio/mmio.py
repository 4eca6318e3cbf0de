"""The virtio-mmio transport, modern (virtio 1.2, section 4.2): registers on one side, a device on the other.

vCPU threads read and write the registers. Whatever concerns the device itself happens on its loop's thread.
"""

from __future__ import annotations

import _thread
import os
from functools import partial

from nagaya.errors import GuestFault, IntegrityError, Unsupported
from nagaya.memory import GuestMemory
from nagaya.static import Any
from nagaya.virtio.device import (
    NET,
    RING_EVENT_IDX,
    RING_INDIRECT_DESC,
    VERSION_1,
    Activated,
    Device,
    QueuePlace,
    as_direct,
    make_queue,
)
from nagaya.virtio.loop import Loop
from nagaya.virtio.queue import Queue

SIZE_BYTES = 0x200
MAGIC = 0x7472_6976  # "virt"
VERSION = 2
VENDOR = 0x4147_414E  # "NAGA"
CONFIG = 0x100

# Section 4.2.2, table 4.1.
MAGIC_VALUE, DEVICE_VERSION, DEVICE_ID, VENDOR_ID = 0x00, 0x04, 0x08, 0x0C
DEVICE_FEATURES, DEVICE_FEATURES_SEL, DRIVER_FEATURES, DRIVER_FEATURES_SEL = 0x10, 0x14, 0x20, 0x24
QUEUE_SEL, QUEUE_NUM_MAX, QUEUE_NUM, QUEUE_READY, QUEUE_NOTIFY = 0x30, 0x34, 0x38, 0x44, 0x50
INTERRUPT_STATUS, INTERRUPT_ACK, STATUS = 0x60, 0x64, 0x70
QUEUE_DESC_LOW, QUEUE_DESC_HIGH = 0x80, 0x84
QUEUE_DRIVER_LOW, QUEUE_DRIVER_HIGH = 0x90, 0x94
QUEUE_DEVICE_LOW, QUEUE_DEVICE_HIGH = 0xA0, 0xA4
SHM_SEL, SHM_LEN_LOW, SHM_LEN_HIGH, SHM_BASE_LOW, SHM_BASE_HIGH = 0xAC, 0xB0, 0xB4, 0xB8, 0xBC
QUEUE_RESET, CONFIG_GENERATION = 0xC0, 0xFC

# Device status: section 2.1.
ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, DEVICE_NEEDS_RESET, FAILED = 1, 2, 4, 8, 64, 128
USED_BUFFER, CONFIG_CHANGE = 1, 2
_ALL_ONES = 0xFFFF_FFFF
_MOST_CONFIG_BYTES = 256
_MAC_BYTES = 6
_HALVES = {
    QUEUE_DESC_LOW: (0, 0), QUEUE_DESC_HIGH: (0, 32), QUEUE_DRIVER_LOW: (1, 0), QUEUE_DRIVER_HIGH: (1, 32),
    QUEUE_DEVICE_LOW: (2, 0), QUEUE_DEVICE_HIGH: (2, 32),
}  # fmt: skip


class _QueueRegisters:
    """What the driver says of one queue before it is made."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.size = most
        self.ready = False
        self.addresses = [0, 0, 0]
        """Descriptor table, available ring, used ring."""


class MmioTransport:
    """One device's registers: `SIZE_BYTES` of addresses. A wrong access of the guest's is ignored, never raised."""

    def __init__(self, device: Device, memory: GuestMemory, loop: Loop, *, interrupt_fd: int) -> None:
        """`interrupt_fd`: an eventfd, each write to which is an edge on the device's interrupt line."""
        self.device = device
        self._direct = as_direct(device)
        self.fault = ""
        """What the guest did wrong last; the device stands still from then until the driver resets it."""
        self.faults = 0
        self.kicks = 0
        self.interrupts = 0
        self._memory = memory
        self._loop = loop
        self._interrupt_fd = interrupt_fd
        self._offered = device.features | VERSION_1 | RING_EVENT_IDX | RING_INDIRECT_DESC
        self.kick_fds = tuple(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in device.queue_sizes)
        """One for each queue; a write is the driver's notification."""
        self._lock = _thread.allocate_lock()
        self._pending = 0
        self._generation = 0
        self._active = False
        self._queues: tuple[Queue | None, ...] = ()
        self._clear()

    def _clear(self) -> None:
        """Registers as after a reset."""
        self._status = 0
        self._features = 0
        self._feature_words = [0, 0]
        self._selected = {DEVICE_FEATURES_SEL: 0, DRIVER_FEATURES_SEL: 0, QUEUE_SEL: 0, SHM_SEL: 0}
        self._registers = [_QueueRegisters(most) for most in self.device.queue_sizes]

    # -- registers, on vCPU threads

    def read(self, offset: int, size: int) -> bytes:
        """See `MemoryDevice`."""
        if offset >= CONFIG:
            data = self.device.read_config(offset - CONFIG, size)
            return data[:size].ljust(size, b"\0")
        if size != 4 or offset % 4:  # section 4.2.2.2: only 32-bit accesses
            return bytes(size)
        return (self._read(offset) & _ALL_ONES).to_bytes(4, "little")

    def _read(self, offset: int) -> int:
        constant = _CONSTANTS.get(offset)
        if constant is not None:
            return constant
        if offset == DEVICE_ID:
            return self.device.device_id
        if offset == DEVICE_FEATURES:
            word = self._selected[DEVICE_FEATURES_SEL]
            return self._offered >> 32 * word if word < 2 else 0
        if offset == INTERRUPT_STATUS:
            return self._pending | (USED_BUFFER if self._direct is not None and self._direct.is_raised() else 0)
        if offset == STATUS:
            return self._status
        if offset == CONFIG_GENERATION:
            return self._generation
        registers = self._queue_registers()
        if offset == QUEUE_NUM_MAX:
            return registers.most if registers else 0
        if offset == QUEUE_READY:
            return int(registers.ready) if registers else 0
        return 0

    def write(self, offset: int, data: bytes) -> None:
        """See `MemoryDevice`."""
        if offset >= CONFIG:
            self.device.write_config(offset - CONFIG, data)
            return
        if len(data) != 4 or offset % 4:
            return
        value = int.from_bytes(data, "little")
        if offset == QUEUE_NOTIFY:  # only where no ioeventfd took it
            if value < len(self.kick_fds):
                os.eventfd_write(self.kick_fds[value], 1)
        elif offset == INTERRUPT_ACK:
            with self._lock:
                self._pending &= ~value
                if self._direct is not None and value & USED_BUFFER:
                    self._direct.acknowledged()
        elif offset == STATUS:
            self._loop.call(partial(self._set_status, value))
        elif offset in self._selected:
            self._selected[offset] = value
        elif offset == DRIVER_FEATURES:
            self._write_features(value)
        else:
            self._write_queue(offset, value)

    def _write_features(self, value: int) -> None:
        word = self._selected[DRIVER_FEATURES_SEL]
        if word < 2 and not self._status & FEATURES_OK:
            self._feature_words[word] = value

    def _queue_registers(self) -> _QueueRegisters | None:
        number = self._selected[QUEUE_SEL]
        return self._registers[number] if number < len(self._registers) else None

    def _write_queue(self, offset: int, value: int) -> None:
        registers = self._queue_registers()
        if registers is None or self._status & DRIVER_OK:
            return
        if offset == QUEUE_READY:
            registers.ready = bool(value & 1)
        elif registers.ready:  # its place cannot change under it
            return
        elif offset == QUEUE_NUM:
            registers.size = value
        elif offset in _HALVES:
            which, shift = _HALVES[offset]
            kept = registers.addresses[which] & _ALL_ONES << (32 - shift)
            registers.addresses[which] = kept | value << shift

    # -- the device, on its loop's thread

    def save(self) -> dict[str, Any]:
        """Registers, queues and device, while no vCPU runs and the loop stands. See `Device.save` for what it raises."""
        device = self.device.save()
        unpopped = device.pop("unpopped", {})
        indices = device.pop("indices", None)
        if indices is None and self._active:
            indices = []
            for queue in self._queues:
                available, used = queue.state() if queue is not None else (0, 0)
                count = unpopped.get(queue.index, 0) if queue is not None else 0
                indices.append(((available - count) & 0xFFFF, used) if queue is not None else None)
        return {
            "status": self._status, "features": self._features, "feature_words": self._feature_words,
            "selected": list(self._selected.items()), "generation": self._generation, "active": self._active,
            "pending": self._pending | (USED_BUFFER if self._direct is not None and self._direct.is_raised() else 0),
            "registers": [(each.size, each.ready, each.addresses) for each in self._registers],
            "indices": indices if self._active else None, "device": device,
            "offered": self._offered, "config": self._config().hex(),
        }  # fmt: skip

    def mark_rings(self) -> None:
        """Mark the used rings as written: while no vCPU runs and the device is held."""
        for registers in self._registers if self._active else ():
            if registers.ready:
                self._memory.mark(registers.addresses[2], 6 + 8 * registers.size)

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from what `save` answered, on a transport that no driver has touched. Before its loop starts.

        Raises `Unsupported` when the device is another one, `IntegrityError` for what makes no sense.
        """
        if saved["offered"] != self._offered or len(saved["registers"]) != len(self._registers):
            raise Unsupported(
                f"the machine was saved with another device in the place of '{self.device.name}'",
                finding=f"features {saved['offered']:#x}, here {self._offered:#x}",
            )
        self._status, self._features, self._feature_words = saved["status"], saved["features"], saved["feature_words"]
        self._selected = dict(saved["selected"])
        self._generation, self._pending = saved["generation"], saved["pending"]
        for registers, (size, ready, addresses) in zip(self._registers, saved["registers"], strict=True):
            registers.size, registers.ready, registers.addresses = size, ready, addresses
        if not saved["active"]:
            return
        try:
            self._activate(saved)
        except GuestFault as fault:
            raise IntegrityError(
                f"the saved state of the device '{self.device.name}' makes no sense: {fault}"
            ) from None
        # What was signalled and had not arrived: once too often is harmless on both sides.
        for fd in self.kick_fds:
            os.eventfd_write(fd, 1)
        if self._config().hex() != saved["config"]:
            self._config_changed()
        elif self._pending:
            os.eventfd_write(self._interrupt_fd, 1)

    def _config(self) -> bytes:
        """What drivers look at again when they hear of a change: not a network card's address."""
        config = self.device.read_config(0, _MOST_CONFIG_BYTES)
        return config[_MAC_BYTES:] if self.device.device_id == NET else config

    def _set_status(self, value: int) -> None:
        if value == 0:
            self._reset()
            return
        new = value & ~self._status
        self._status |= value & ~DEVICE_NEEDS_RESET  # which is the device's to set
        if new & FEATURES_OK:
            features = self._feature_words[0] | self._feature_words[1] << 32
            if features & ~self._offered or not features & VERSION_1:
                self._status &= ~FEATURES_OK  # section 3.1.1: the driver reads it back, and sees that it may not
            else:
                self._features = features
        if new & DRIVER_OK and self._status & FEATURES_OK and not self._active:
            self._start()

    def _start(self) -> None:
        try:
            self._activate()
        except GuestFault as fault:
            self._fail(fault)

    def _activate(self, saved: dict[str, Any] | None = None) -> None:
        queues = tuple(self._make_queue(number) for number in range(len(self._registers)))
        if saved is not None:
            for queue, indices in zip(queues, saved["indices"], strict=True):
                if queue is not None:
                    queue.restore(tuple(indices))
        self._queues = queues
        self._active = True
        for number, fd in enumerate(self.kick_fds):
            if queues[number] is not None and self._direct is None:
                self._loop.watch(fd, partial(self._kicked, number))
        self.device.activate(
            Activated(
                self._memory, queues, self._features, self._loop, self._config_changed, self._fail, self.kick_fds,
                self._interrupt_fd, saved["device"] if saved is not None else None,
            )
        )  # fmt: skip

    def _make_queue(self, number: int) -> Queue | None:
        registers = self._registers[number]
        if not registers.ready:
            return None
        size = registers.size  # once: another CPU of the guest may be about to write it
        if size > registers.most:
            raise GuestFault(f"queue {number} has {size} entries; at most {registers.most} are offered")
        place = QueuePlace(number, size, *registers.addresses)
        return make_queue(self._memory, place, self._features, partial(self._interrupt, USED_BUFFER))

    def _kicked(self, number: int) -> None:
        try:
            os.eventfd_read(self.kick_fds[number])
        except BlockingIOError:
            return
        self.kicks += 1
        if self._active:
            try:
                self.device.kicked(number)
            except GuestFault as fault:
                self._fail(fault)

    def _fail(self, fault: GuestFault) -> None:
        """Stop the device and ask the driver for a reset (section 2.1.2)."""
        self.fault = str(fault)
        self.faults += 1
        self._stop()
        self._status |= DEVICE_NEEDS_RESET
        if self._status & DRIVER_OK:
            self._interrupt(CONFIG_CHANGE)

    def _stop(self) -> None:
        for fd in self.kick_fds:
            self._loop.unwatch(fd)
        self._queues = ()
        if self._active:
            self._active = False
            self.device.reset()

    def _reset(self) -> None:
        self._stop()
        with self._lock:
            self._pending = 0
        self._clear()

    # -- towards the driver, on any thread

    def _interrupt(self, cause: int) -> None:
        with self._lock:
            self._pending |= cause
        self.interrupts += 1
        os.eventfd_write(self._interrupt_fd, 1)

    def _config_changed(self) -> None:
        self._generation = (self._generation + 1) & _ALL_ONES
        self._interrupt(CONFIG_CHANGE)

    # -- life

    def reset(self) -> None:
        """As if the driver had asked for it: what a machine's reset does to its devices."""
        self._loop.call(self._reset)

    def close(self) -> None:
        """Reset the device and close the kicks. The device, the loop and the interrupt are the caller's."""
        self.reset()
        for fd in self.kick_fds:
            os.close(fd)
        self.kick_fds = ()

    def counters(self) -> dict[str, int]:
        """The device's, and the transport's own."""
        counters = self.device.counters()
        for key, count in (("kicks", self.kicks), ("interrupts", self.interrupts), ("faults", self.faults)):
            counters[key] = count + (counters.get(key, 0) if self._direct is not None else 0)
        return counters


_CONSTANTS = {
    MAGIC_VALUE: MAGIC, DEVICE_VERSION: VERSION, VENDOR_ID: VENDOR,
    # No shared memory: a length of -1 says that the region does not exist (section 4.2.2).
    SHM_LEN_LOW: _ALL_ONES, SHM_LEN_HIGH: _ALL_ONES, SHM_BASE_LOW: _ALL_ONES, SHM_BASE_HIGH: _ALL_ONES,
}  # fmt: skip
