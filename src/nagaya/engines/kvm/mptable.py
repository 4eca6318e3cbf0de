"""The table of Intel's MultiProcessor Specification 1.4, chapter 4, as data: CPUs and I/O APIC for kernels without ACPI.

Linux looks for it before it looks for ACPI, and does not use it once it has ACPI's.
"""

from __future__ import annotations

import struct

from nagaya.engines.kvm import layout
from nagaya.engines.kvm.acpi import seal_table

_POINTER_BYTES = 16
_CHECKSUM_AT = 7
_HEADER = struct.Struct("<4sHBB8s12sIHHIHBx")
_SPECIFICATION = 4  # 1.4
_APIC_VERSION = 0x14
_IO_APIC_VERSION = 0x11
_CPU_ENABLED, _CPU_BOOTS = 1 << 0, 1 << 1
_SIGNATURE, _FEATURES = 0x600, 1 << 9 | 1 << 0  # family 6; an APIC and an FPU
_IO_APIC_ENABLED = 1 << 0
_ISA = 0
_INTERRUPT, _NMI, _EXTERNAL = 0, 1, 3
_EVERY_APIC = 0xFF
_PINS = 24
_MOST_CPUS = 254
"""Ids are bytes; one is the I/O APIC's, and 255 means everybody."""


def plan_mp_table(cpus: int) -> tuple[tuple[int, bytes], ...]:
    """The floating pointer structure and the table, each with its gpa. CPUs after the 254th are left out."""
    cpus = min(cpus, _MOST_CPUS)
    io_apic = cpus
    entries = [
        struct.pack(
            "<BBBBIIxxxxxxxx", 0, index, _APIC_VERSION, _CPU_ENABLED | (_CPU_BOOTS if index == 0 else 0),
            _SIGNATURE, _FEATURES,
        )
        for index in range(cpus)
    ]  # fmt: skip
    entries.append(struct.pack("<BB6s", 1, _ISA, b"ISA   "))
    entries.append(struct.pack("<BBBBI", 2, io_apic, _IO_APIC_VERSION, _IO_APIC_ENABLED, layout.IO_APIC_GPA))
    # KVM's routes are one to one: the timer is at pin 0, and not at 2 as on a PC. Flags 0: as the bus has it, an edge.
    entries += [struct.pack("<BBHBBBB", 3, _INTERRUPT, 0, _ISA, pin, io_apic, pin) for pin in range(_PINS)]
    entries.append(struct.pack("<BBHBBBB", 4, _EXTERNAL, 0, _ISA, 0, 0, 0))
    entries.append(struct.pack("<BBHBBBB", 4, _NMI, 0, _ISA, 0, _EVERY_APIC, 1))
    body = b"".join(entries)
    head = _HEADER.pack(
        b"PCMP", _HEADER.size + len(body), _SPECIFICATION, 0, b"NAGAYA  ", b"NAGAYA".ljust(12), 0, 0, len(entries),
        layout.LOCAL_APIC_GPA, 0, 0,
    )  # fmt: skip
    table = seal_table(head + body, _CHECKSUM_AT)
    pointer = struct.pack("<4sIBBBxxxxx", b"_MP_", layout.MP_TABLE_GPA, _POINTER_BYTES // 16, _SPECIFICATION, 0)
    return (layout.MP_POINTER_GPA, seal_table(pointer, 10)), (layout.MP_TABLE_GPA, table)
