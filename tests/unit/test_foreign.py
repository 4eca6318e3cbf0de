"""Another CPU's programs: the rule that the kernel is told, and how a system of them is made."""

from __future__ import annotations

import re

import pytest

from nagaya.errors import Unsupported
from nagaya.images.foreign import find_emulator, plan_rule
from nagaya.manager.building import ARCHITECTURES, _plan_bootstrap
from nagaya.storage.disk_images.assemble import PLATFORMS


def matches(rule: bytes, program: bytes) -> bool:
    """As binfmt_misc does (Documentation/admin-guide/binfmt-misc.rst)."""
    fields = rule.decode("ascii").split(":")
    assert fields[2:4] == ["M", ""] and fields[7] == "OCF"
    magic, mask = (bytes.fromhex(text.replace("\\x", "")) for text in fields[4:6])
    assert len(magic) == len(mask) == 20
    return all(a & m == b & m for a, b, m in zip(program, magic, mask, strict=False))


def elf(machine: int, *, kind: int = 2, bits: int = 2) -> bytes:
    return b"\x7fELF" + bytes([bits, 1, 1, 0]) + bytes(8) + kind.to_bytes(2, "little") + machine.to_bytes(2, "little")


def test_the_rule_is_for_programs_of_that_cpu_alone() -> None:
    rule = plan_rule("aarch64", "/usr/bin/qemu-aarch64-static")
    assert matches(rule, elf(183)) and matches(rule, elf(183, kind=3))  # linked anywhere: a shared object
    for other in (elf(62), elf(243), elf(183, kind=1), elf(183, bits=1), b"#!/bin/sh\n" + bytes(10)):
        assert not matches(rule, other)
    assert matches(plan_rule("riscv64", "/x"), elf(243))


def test_a_cpu_without_an_emulator() -> None:
    with pytest.raises(Unsupported, match="no programs for"):
        find_emulator("vax")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_mmdebstrap_is_asked_for(architecture: str) -> None:
    ours = _plan_bootstrap(architecture, ("vim",), foreign=False)
    assert len(ours) == 2 and ours[1].endswith(",vim")
    assert any(re.search(rf"linux-image-{ARCHITECTURES[architecture][0]}\b", word) for word in ours)
    foreign = _plan_bootstrap(architecture, (), foreign=True)
    assert f"--architectures={ARCHITECTURES[architecture][0]}" in foreign
    hooks = [word for word in foreign if word.startswith("--essential-hook=")]
    removed = next(word for word in foreign if word.startswith("--customize-hook="))
    for hook in hooks:  # what the first initramfs is told is gone when the disk is made
        path = hook.rsplit('"', 2)[1]
        assert path.startswith("$1/etc/initramfs-tools/") and f'"{path}"' in removed
    assert architecture in PLATFORMS
