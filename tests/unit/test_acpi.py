"""ACPI and MP tables: checksums and lengths by our own reading, and the whole of them by ACPICA's compiler."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from nagaya.engines.kvm import acpi, aml, layout, mptable
from nagaya.errors import UsageError

PORTS = acpi.Ports(sleep_control=0x600, sleep_status=0x601, reset=0x602, reset_value=1, panic=0x505)
DEVICES = [layout.MmioDevice(0xD000_0000 + i * 0x1000, 0x200, gsi) for i, gsi in enumerate(layout.VIRTIO_GSIS)]
FULL = acpi.Machine(3, PORTS, DEVICES, acpi.SerialPort(0x3F8, 4), cpu_objects=True)
MACHINES = [acpi.Machine(1, PORTS._replace(panic=0)), FULL, FULL._replace(cpus=300)]
IDS = ["least", "full", "300-cpus"]


def table(tables: acpi.Tables, signature: str) -> bytes:
    at, size = tables.places[signature]
    return tables.content[at : at + size]


@pytest.mark.parametrize("machine", MACHINES, ids=IDS)
def test_every_table_has_its_length_and_sums_to_zero(machine: acpi.Machine) -> None:
    tables = acpi.plan_tables(machine)
    assert set(tables.places) == {"RSDP", "XSDT", "FACP", "APIC", "DSDT"}
    for signature in set(tables.places) - {"RSDP"}:
        data = table(tables, signature)
        assert data[:4].decode() == signature
        assert struct.unpack_from("<I", data, 4)[0] == len(data)
        assert sum(data) % 256 == 0
    rsdp = table(tables, "RSDP")
    assert (sum(rsdp[:20]) % 256, sum(rsdp) % 256) == (0, 0)


@pytest.mark.parametrize("machine", MACHINES, ids=IDS)
def test_a_kernel_finds_each_table_from_the_rsdp(machine: acpi.Machine) -> None:
    tables = acpi.plan_tables(machine, gpa=0xE0000)
    assert tables.rsdp_gpa == 0xE0000 and tables.content[:8] == b"RSD PTR "
    xsdt_gpa = struct.unpack_from("<Q", tables.content, 24)[0]
    assert xsdt_gpa == 0xE0000 + tables.places["XSDT"][0]
    pointers = struct.unpack_from("<2Q", table(tables, "XSDT"), 36)
    assert [tables.content[p - 0xE0000 :][:4] for p in pointers] == [b"FACP", b"APIC"]
    dsdt_gpa = struct.unpack_from("<Q", table(tables, "FACP"), 140)[0]
    assert tables.content[dsdt_gpa - 0xE0000 :][:4] == b"DSDT"
    assert all(offset % 16 == 0 for offset, _ in tables.places.values())


def madt_entries(data: bytes) -> list[tuple[int, bytes]]:
    found, at = [], 44
    while at < len(data):
        found.append((data[at], data[at : at + data[at + 1]]))
        at += data[at + 1]
    assert at == len(data)
    return found


@pytest.mark.parametrize("cpus", [1, 2, 255, 256, 1000])
def test_the_madt_names_every_cpu_once(cpus: int) -> None:
    entries = madt_entries(acpi.make_madt(cpus))
    ids = [e[3] for kind, e in entries if kind == 0] + [
        struct.unpack_from("<I", e, 4)[0] for kind, e in entries if kind == 9
    ]
    assert ids == list(range(cpus))
    assert all(struct.unpack_from("<I", e, 4)[0] == 1 for kind, e in entries if kind == 0)
    assert [e for kind, e in entries if kind == 1] == [struct.pack("<BBBBII", 1, 12, 0, 0, 0xFEC0_0000, 0)]


def test_the_fadt_is_of_hardware_that_is_not_there() -> None:
    fadt = acpi.make_fadt(PORTS, 0x12345678)
    assert (len(fadt), fadt[8], fadt[131]) == (276, 6, 5)
    flags = struct.unpack_from("<I", fadt, 112)[0]
    assert flags & 1 << 20 and flags & 1 << 10  # hardware-reduced; a reset register
    assert struct.unpack_from("<BBBBQ", fadt, 116) == (1, 8, 0, 1, 0x602)
    assert fadt[128] == 1
    assert struct.unpack_from("<BBBBQ", fadt, 244) == (1, 8, 0, 1, 0x600)
    assert struct.unpack_from("<BBBBQ", fadt, 256) == (1, 8, 0, 1, 0x601)
    assert not any(fadt[36:45]) and not any(fadt[48:109])  # no FACS, no SMI, no event blocks, no timer


def test_tables_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match="room for 4096"):
        acpi.plan_tables(FULL._replace(cpus=300), most_bytes=4096)


def test_the_largest_machine_fits() -> None:
    assert len(acpi.plan_tables(FULL._replace(cpus=1024)).content) <= layout.ACPI_BYTES


# -- by another's eyes


@pytest.fixture
def iasl(tmp_path: Path) -> Path:
    if not shutil.which("iasl"):
        pytest.skip("iasl (package acpica-tools) is not installed")
    return tmp_path


def run_iasl(directory: Path, *arguments: str) -> str:
    done = subprocess.run(["iasl", *arguments], cwd=directory, capture_output=True, text=True, timeout=60)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    return output


@pytest.mark.parametrize("machine", MACHINES, ids=IDS)
def test_the_dsdt_survives_disassembly_and_compilation(machine: acpi.Machine, iasl: Path) -> None:
    ours = table(acpi.plan_tables(machine), "DSDT")
    (iasl / "dsdt.aml").write_bytes(ours)
    run_iasl(iasl, "-d", "dsdt.aml")
    output = run_iasl(iasl, "-oa", "-p", "again", "dsdt.dsl")
    assert "0 Errors, 0 Warnings, 0 Remarks" in output
    again = (iasl / "again.aml").read_bytes()
    assert again[36:] == ours[36:]  # the header names the compiler
    assert again[:8] == ours[:8]


@pytest.mark.parametrize("machine", MACHINES, ids=IDS)
@pytest.mark.parametrize("signature", ["FACP", "APIC", "XSDT"])
def test_the_other_tables_survive_it_too(machine: acpi.Machine, signature: str, iasl: Path) -> None:
    ours = table(acpi.plan_tables(machine), signature)
    (iasl / "table.aml").write_bytes(ours)
    output = run_iasl(iasl, "-d", "table.aml")
    assert "rror" not in output and "arning" not in output and "nvalid" not in output
    run_iasl(iasl, "-p", "again", "table.dsl")
    again = (iasl / "again.aml").read_bytes()
    header = slice(9, 36)  # checksum, and who compiled it
    assert again[:9] == ours[:9] and again[header.stop :] == ours[header.stop :]


def test_the_namespace_is_what_was_asked_for(iasl: Path) -> None:
    (iasl / "dsdt.aml").write_bytes(table(acpi.plan_tables(FULL), "DSDT"))
    run_iasl(iasl, "-d", "dsdt.aml")
    text = " ".join((iasl / "dsdt.dsl").read_text().split())
    for device in DEVICES:
        assert f"Memory32Fixed (ReadWrite, 0x{device.gpa:08X}, // Address Base 0x00000200," in text
        assert f"Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive, ,, ) {{ 0x{device.gsi:08X}, }}" in text
    assert 'EisaId ("PNP0C0C")' in text and 'EisaId ("PNP0501")' in text
    assert "If ((Arg0 == 0x09)) { Notify (\\_SB.PWRB, 0x80)" in text
    assert "Name (\\_S5, Package (0x04)" in text
    assert text.count('"ACPI0007"') == 3 and text.count('"LNRO0005"') == len(DEVICES)
    assert '"QEMU0001"' in text and "IO (Decode16, 0x0505," in text


# -- AML


@pytest.mark.parametrize(
    "size", [0, 1, 58, 59, 60, 61, 4087, 4088, 4089, 4090, 1 << 16, (1 << 20) - 8, 1 << 20, 1 << 21]
)
def test_package_lengths_count_themselves(size: int) -> None:
    term = aml.scope("ABCD", bytes(size))
    lead = term[1]
    more = lead >> 6
    length = lead & 0x3F if not more else lead & 0xF | int.from_bytes(term[2 : 2 + more], "little") << 4
    assert length == len(term) - 1
    assert term[2 + more : 6 + more] == b"ABCD"


def test_a_term_can_be_too_long() -> None:
    with pytest.raises(ValueError):
        aml.scope("ABCD", bytes(1 << 28))


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        (0, "00"), (1, "01"), (2, "0a02"), (255, "0aff"), (256, "0b0001"), (65535, "0bffff"), (65536, "0c00000100"),
        (1 << 32, "0e0000000001000000"), ((1 << 64) - 1, "0effffffffffffffff"),
    ],
)  # fmt: skip
def test_integers_are_as_short_as_can_be(value: int, encoded: str) -> None:
    assert aml.integer(value).hex() == encoded


@pytest.mark.parametrize("value", [-1, 1 << 64])
def test_integers_have_64_bits(value: int) -> None:
    with pytest.raises(ValueError):
        aml.integer(value)


@pytest.mark.parametrize(
    ("path", "encoded"),
    [
        ("\\", b"\\\0"), ("_SB", b"_SB_"), ("\\_SB", b"\\_SB_"), ("^A", b"^A___"), ("\\_SB.PWRB", b"\\\x2e_SB_PWRB"),
        ("A.B.C", b"\x2f\x03A___B___C___"),
    ],
)  # fmt: skip
def test_names(path: str, encoded: bytes) -> None:
    assert aml.name_string(path) == encoded


@pytest.mark.parametrize("path", ["a", "ABCDE", "1AB", "A..B", "A B"])
def test_names_that_are_none(path: str) -> None:
    with pytest.raises(ValueError):
        aml.name_string(path)


def test_eisa_identities() -> None:
    assert aml.eisa_id("PNP0C0C") == bytes.fromhex("0c41d00c0c")
    for wrong in ("PNP0C0", "pnp0C0C", "PNP0C0CX"):
        with pytest.raises(ValueError):
            aml.eisa_id(wrong)


def test_strings_and_resources_end_where_they_should() -> None:
    assert aml.string("ACPI0013") == b"\x0dACPI0013\0"
    with pytest.raises(ValueError):
        aml.string("a\0b")
    template = aml.resource_template(aml.memory32_fixed(0xD000_0000, 0x1000), aml.interrupt(5))
    content = template[4:]  # opcode, length, size
    assert content[-2:] == b"\x79\0" and template[3] == len(content) == 12 + 9 + 2


# -- MultiProcessor table


@pytest.mark.parametrize("cpus", [1, 2, 16, 254, 255, 1024])
def test_the_mp_table_names_cpus_and_pins(cpus: int) -> None:
    (pointer_gpa, pointer), (gpa, data) = mptable.plan_mp_table(cpus)
    assert pointer_gpa == 0 and pointer[:4] == b"_MP_" and sum(pointer) % 256 == 0 and len(pointer) == 16
    assert struct.unpack_from("<I", pointer, 4)[0] == gpa
    signature, length, revision = struct.unpack_from("<4sHB", data, 0)
    assert (signature, length, revision, sum(data) % 256) == (b"PCMP", len(data), 4, 0)
    assert len(data) <= layout.MP_TABLE_BYTES and gpa + layout.MP_TABLE_BYTES <= layout.BOOT_PARAMS_GPA
    count, local_apic = struct.unpack_from("<HI", data, 34)
    at, entries = 44, []
    while at < len(data):
        size = 20 if data[at] == 0 else 8
        entries.append(data[at : at + size])
        at += size
    assert len(entries) == count and local_apic == 0xFEE0_0000
    processors = [e for e in entries if e[0] == 0]
    assert [e[1] for e in processors] == list(range(min(cpus, 254)))
    assert [e[3] for e in processors] == [3] + [1] * (min(cpus, 254) - 1)  # one of them boots the machine
    (io_apic,) = [e for e in entries if e[0] == 2]
    assert io_apic[1] not in {e[1] for e in processors} and struct.unpack_from("<I", io_apic, 4)[0] == 0xFEC0_0000
    assert [(e[5], e[7]) for e in entries if e[0] == 3] == [(pin, pin) for pin in range(24)]
    assert {e[6] for e in entries if e[0] == 3} == {io_apic[1]}
