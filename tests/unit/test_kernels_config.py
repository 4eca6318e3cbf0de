"""Fragments of a kernel configuration, and the one that we ship."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nagaya.errors import HostError, UsageError
from nagaya.kernels.architectures import ARCHITECTURES
from nagaya.kernels.config import Lost, find_lost, parse_fragment, read_fragment, read_shipped, render, shipped_paths


def test_values_comments_and_what_is_off() -> None:
    text = (
        "# a comment\n\n"
        "CONFIG_SMP=y   # a reason, with = and # in it\n"
        'CONFIG_CMDLINE="a=1 # b \\"c\\""  # a reason\n'
        "CONFIG_NR_CPUS=64\n"
        "# CONFIG_PCI is not set\n"
        "CONFIG_PM=n\n"
        "CONFIG_PHYSICAL_START=0x1000000\n"
    )
    assert parse_fragment(text, "here") == {
        "CONFIG_SMP": "y",
        "CONFIG_CMDLINE": '"a=1 # b \\"c\\""',
        "CONFIG_NR_CPUS": "64",
        "CONFIG_PCI": "n",
        "CONFIG_PM": "n",
        "CONFIG_PHYSICAL_START": "0x1000000",
    }


@pytest.mark.parametrize(
    "line", ["SMP=y", "CONFIG_SMP", "CONFIG_SMP=", "CONFIG_SMP= y", "CONFIG_SMP=y z", 'CONFIG_A="open', "CONFIG_A-B=y"]
)
def test_anything_else_is_refused_with_its_place(line: str) -> None:
    with pytest.raises(UsageError, match=r"^some/file:3: not a kernel setting: "):
        parse_fragment(f"CONFIG_X=y\n\n{line}\n", "some/file")


def test_a_symbol_is_set_once() -> None:
    with pytest.raises(UsageError, match="here:2: CONFIG_A is set a second time"):
        parse_fragment("CONFIG_A=y\n# CONFIG_A is not set\n", "here")


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="cannot read the kernel configuration"):
        read_fragment(str(tmp_path / "missing"))
    (tmp_path / "binary").write_bytes(b"\x7fELF\xff")
    with pytest.raises(UsageError, match="not a kernel configuration"):
        read_fragment(str(tmp_path / "binary"))


def test_order_of_lines_does_not_matter() -> None:
    one, other = parse_fragment("CONFIG_B=y\nCONFIG_A=m", "x"), parse_fragment("CONFIG_A=m\nCONFIG_B=y # why", "y")
    assert render(one) == render(other) == "CONFIG_A=m\nCONFIG_B=y\n"


def test_what_did_not_survive() -> None:
    wanted = {"CONFIG_A": "y", "CONFIG_B": "n", "CONFIG_C": "y", "CONFIG_D": "n", "CONFIG_E": "64"}
    config = {"CONFIG_A": "y", "CONFIG_D": "y", "CONFIG_E": "8"}
    assert find_lost(wanted, config) == [
        Lost("CONFIG_C", "y", "n"),
        Lost("CONFIG_D", "n", "y"),
        Lost("CONFIG_E", "64", "8"),
    ]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_line_that_we_ship_has_its_reason(architecture: str) -> None:
    for path in shipped_paths(architecture):
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        settings = [line for line in lines if line.startswith("CONFIG_")]
        assert len(settings) == len(read_fragment(path)) > 10
        assert [line for line in settings if not re.search(r" +# \S.+", line)] == []
        assert max(map(len, lines)) <= 130


def test_a_cpus_own_line_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common, own = tmp_path / "guest.config", tmp_path / "x86_64.config"
    common.write_text("CONFIG_A=y\nCONFIG_B=y\n")
    own.write_text("CONFIG_B=n\n")
    monkeypatch.setattr("nagaya.kernels.config.shipped_paths", lambda architecture: (str(common), str(own)))
    assert read_shipped("x86_64") == {"CONFIG_A": "y", "CONFIG_B": "n"}


@pytest.mark.parametrize(
    "needed",
    [
        "VIRTIO_MMIO",
        "VIRTIO_BLK",
        "VIRTIO_NET",
        "VIRTIO_CONSOLE",
        "VIRTIO_VSOCKETS",
        "EXT4_FS",
        "OVERLAY_FS",
        "SMP",
        "FUSE_FS",
        "VIRTIO_FS",
    ],
)
def test_what_a_machine_needs_is_on(needed: str) -> None:
    for architecture in ARCHITECTURES:
        assert read_shipped(architecture)[f"CONFIG_{needed}"] == "y"
    assert read_shipped("x86_64")["CONFIG_PVH"] == "y"
