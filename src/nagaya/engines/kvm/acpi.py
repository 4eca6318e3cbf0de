r"""The ACPI tables of a machine, as data: RSDP, XSDT, FADT (hardware-reduced), MADT and DSDT. Source: ACPI 6.5, chapter 5.

Hardware-reduced means that there is no fixed hardware: no SCI, no ACPI timer, and the power button is an interrupt of the
Generic Event Device, whose `_EVT` notifies `\_SB.PWRB`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from nagaya.engines.kvm import aml, layout
from nagaya.errors import UsageError
from nagaya.static import NamedTuple

_OEM = b"NAGAYA"
_OEM_TABLE = b"NAGAYA  "
_CREATOR = b"NGYA"
_HEADER = struct.Struct("<4sIBB6s8sI4sI")
_CHECKSUM_AT = 9
_ALIGN = 16

# FADT, section 5.2.9.
_FADT_BYTES = 276
_FADT_MINOR = 5
_PROFILE_ENTERPRISE_SERVER = 4
_NO_VGA, _NO_CMOS_CLOCK = 1 << 2, 1 << 5  # nor a keyboard controller, nor anything else that is not listed: bits 0, 1
_FLAGS = 1 << 0 | 1 << 4 | 1 << 5 | 1 << 10 | 1 << 20
"""WBINVD works; buttons are not fixed hardware (two bits); there is a reset register; hardware-reduced."""
_SYSTEM_IO, _BYTE_ACCESS = 1, 1

# MADT, section 5.2.12.
_HAS_8259 = 1 << 0
_ENABLED = 1 << 0
_EDGE_HIGH = 1 | 1 << 2
_LOCAL_INTERRUPT_NMI = 1
_MOST_LOCAL_APICS = 255
"""Local APIC ids above 254 do not fit into 8 bits (255 is the broadcast): those CPUs are named as x2APICs."""

SLEEP_TYPE_S5 = 5
"""What `\\_S5` tells a guest to write: SLP_TYP of the sleep control register."""
_STATUS_PRESENT = 0xF
_NOTIFY_PRESSED = 0x80


class Ports(NamedTuple):
    """I/O ports of a machine's own registers; `reset_value` is what `reset` takes."""

    sleep_control: int
    sleep_status: int
    reset: int
    reset_value: int
    panic: int = 0
    """pvpanic; 0: none."""


class SerialPort(NamedTuple):
    """An 8250 or one of its kind."""

    port: int
    gsi: int


class Machine(NamedTuple):
    """What the tables describe."""

    cpus: int
    """vCPUs; the local APIC's id of each is its number."""
    ports: Ports
    devices: Sequence[layout.MmioDevice] = ()
    serial: SerialPort | None = None
    cpu_objects: bool = False
    """An object in the namespace for each CPU too. Linux needs none, and evaluates every one."""


class Tables(NamedTuple):
    """`content` belongs at `rsdp_gpa`, and begins with the RSDP."""

    rsdp_gpa: int
    content: bytes
    places: dict[str, tuple[int, int]]
    """Signature to (offset in `content`, length)."""


def plan_tables(machine: Machine, *, gpa: int = layout.ACPI_GPA, most_bytes: int = layout.ACPI_BYTES) -> Tables:
    """All tables in a row, to be written at `gpa`. Raises `UsageError` when they are more than `most_bytes`."""
    content, places = bytearray(36), {"RSDP": (0, 36)}

    def add(table: bytes) -> int:
        content.extend(bytes(-len(content) % _ALIGN))
        places[table[:4].decode("ascii")] = len(content), len(table)
        content.extend(table)
        return gpa + places[table[:4].decode("ascii")][0]

    dsdt = add(make_dsdt(machine))
    tables = [add(make_fadt(machine.ports, dsdt)), add(make_madt(machine.cpus))]
    xsdt = add(make_table(b"XSDT", 1, struct.pack(f"<{len(tables)}Q", *tables)))
    content[:36] = make_rsdp(xsdt)
    if len(content) > most_bytes:
        raise UsageError(
            f"the machine's description has {len(content)} bytes, and there is room for {most_bytes}",
            hint="give the machine fewer CPUs or devices",
        )
    return Tables(gpa, bytes(content), places)


def make_rsdp(xsdt_gpa: int) -> bytes:
    """Root System Description Pointer, section 5.2.5.3. The first checksum is of what revision 0 had: 20 bytes."""
    first = seal_table(struct.pack("<8sB6sBI", b"RSD PTR ", 0, _OEM, 2, 0), 8)
    return seal_table(first + struct.pack("<IQB3x", 36, xsdt_gpa, 0), 32)


def make_table(signature: bytes, revision: int, body: bytes) -> bytes:
    """A table with its header, section 5.2.6."""
    length = _HEADER.size + len(body)
    head = _HEADER.pack(signature, length, revision, 0, _OEM, _OEM_TABLE, 1, _CREATOR, 1)
    return seal_table(head + body, _CHECKSUM_AT)


def make_fadt(ports: Ports, dsdt_gpa: int) -> bytes:
    """Fixed ACPI Description Table. What it does not name is zero: fixed hardware that is not there."""
    body = bytearray(_FADT_BYTES - _HEADER.size)

    def put(at: int, form: str, *values: int | bytes) -> None:
        struct.pack_into(form, body, at - _HEADER.size, *values)

    def put_port(at: int, port: int) -> None:
        put(at, "<BBBBQ", _SYSTEM_IO, 8, 0, _BYTE_ACCESS, port)

    put(45, "<B", _PROFILE_ENTERPRISE_SERVER)
    # Linux takes the SCI's number even here, and makes that line a level: 0 would be the timer's.
    put(46, "<H", layout.POWER_BUTTON_GSI)
    put(109, "<H", _NO_VGA | _NO_CMOS_CLOCK)
    put(112, "<I", _FLAGS)
    put_port(116, ports.reset)
    put(128, "<B", ports.reset_value)
    put(131, "<B", _FADT_MINOR)
    put(140, "<Q", dsdt_gpa)
    put_port(244, ports.sleep_control)
    put_port(256, ports.sleep_status)
    put(268, "<8s", _OEM_TABLE)  # hypervisor vendor identity
    return make_table(b"FACP", 6, bytes(body))


def make_madt(cpus: int) -> bytes:
    """Multiple APIC Description Table: CPUs, one I/O APIC with pins 0 to 23, and the lines that differ from ISA's."""
    body = bytearray(struct.pack("<II", layout.LOCAL_APIC_GPA, _HAS_8259))
    for index in range(cpus):
        if index < _MOST_LOCAL_APICS:
            body += struct.pack("<BBBBI", 0, 8, index, index, _ENABLED)
        else:
            body += struct.pack("<BBHIII", 9, 16, 0, index, _ENABLED, index)
    body += struct.pack("<BBBBII", 1, 12, 0, 0, layout.IO_APIC_GPA, 0)
    gsi = layout.POWER_BUTTON_GSI
    body += struct.pack("<BBBBIH", 2, 10, 0, gsi, gsi, _EDGE_HIGH)
    body += struct.pack("<BBBHB", 4, 6, 0xFF, 0, _LOCAL_INTERRUPT_NMI)
    if cpus > _MOST_LOCAL_APICS:
        body += struct.pack("<BBHIB3x", 0xA, 12, 0, 0xFFFF_FFFF, _LOCAL_INTERRUPT_NMI)
    return make_table(b"APIC", 5, bytes(body))


def make_dsdt(machine: Machine) -> bytes:
    """Differentiated System Description Table: the devices, in AML."""
    button = aml.device("PWRB", aml.name("_HID", aml.eisa_id("PNP0C0C")))
    devices = [_describe_virtio(index, device) for index, device in enumerate(machine.devices)]
    if machine.serial is not None:
        devices.append(_describe_serial(machine.serial))
    if machine.ports.panic:
        devices.append(_describe_panic(machine.ports.panic))
    if machine.cpu_objects:
        devices.append(_describe_cpus(machine.cpus))
    sleep = aml.package(aml.integer(SLEEP_TYPE_S5), aml.ZERO, aml.ZERO, aml.ZERO)
    content = aml.scope("\\_SB", button, _describe_events(), *devices) + aml.name("\\_S5", sleep)
    return make_table(b"DSDT", 2, content)


def _describe_events() -> bytes:
    gsi = layout.POWER_BUTTON_GSI
    pressed = aml.if_equal(aml.ARG0, aml.integer(gsi), aml.notify("\\_SB.PWRB", _NOTIFY_PRESSED))
    return aml.device(
        "GED",
        aml.name("_HID", aml.string("ACPI0013")),
        aml.name("_CRS", aml.resource_template(aml.interrupt(gsi))),
        aml.method("_EVT", pressed, arguments=1, serialized=True),
    )


def _describe_virtio(index: int, device: layout.MmioDevice) -> bytes:
    resources = aml.memory32_fixed(device.gpa, device.size_bytes), aml.interrupt(device.gsi)
    return aml.device(
        f"VR{index:02X}",
        aml.name("_HID", aml.string("LNRO0005")),
        aml.name("_UID", aml.integer(index)),
        aml.name("_CRS", aml.resource_template(*resources)),
    )


def _describe_serial(serial: SerialPort) -> bytes:
    resources = aml.io_ports(serial.port, 8), aml.interrupt(serial.gsi)
    return aml.device(
        "COM1",
        aml.name("_HID", aml.eisa_id("PNP0501")),
        aml.name("_UID", aml.ZERO),
        aml.name("_CRS", aml.resource_template(*resources)),
    )


def _describe_panic(port: int) -> bytes:
    return aml.device(
        "PEVT",
        aml.name("_HID", aml.string("QEMU0001")),
        aml.name("_STA", aml.integer(_STATUS_PRESENT)),
        aml.name("_CRS", aml.resource_template(aml.io_ports(port, 1))),
    )


def _describe_cpus(count: int) -> bytes:
    cpus = (
        aml.device(
            f"C{index:03X}", aml.name("_HID", aml.string("ACPI0007")), aml.name("_UID", aml.integer(index))
        )
        for index in range(count)
    )  # fmt: skip
    return aml.device("CPUS", aml.name("_HID", aml.string("ACPI0010")), *cpus)


def seal_table(table: bytes, checksum_at: int) -> bytes:
    """The table with the byte that makes the sum of all its bytes 0."""
    sealed = bytearray(table)
    sealed[checksum_at] = -sum(table) & 0xFF
    return bytes(sealed)
