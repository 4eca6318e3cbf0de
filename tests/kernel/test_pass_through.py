"""Devices of the host in a whole machine, for real: on a host with an IOMMU that QEMU emulates. Takes five minutes.

NAGAYA_PASS_THROUGH=1 NAGAYA_TEST_NETWORK=host have it run, for its kernel comes by apt.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.kernel.emulated_host import run_there

pytestmark = pytest.mark.timeout(1200)
DEVICES = (
    "-device intel-iommu,intremap=on", "-device pcie-root-port,id=above,chassis=1", "-netdev user,id=net",
    "-device e1000e,bus=above,netdev=net", "-device qemu-xhci", "-device usb-mouse",
)  # fmt: skip
SCRIPT = """
nagaya() { %s "$@"; }
create() { nagaya machine create --disk 64m --network none --type emulated -m 64m "$@"; }
devices=/sys/bus/pci/devices
card=$(basename $(dirname $(grep -l 0x10d3 $devices/*/device)))
echo "== bound"; create --name card --pci $card
echo vfio-pci > $devices/$card/driver_override
echo $card > $devices/$card/driver/unbind
echo $card > /sys/bus/pci/drivers_probe
echo "== ready"; create --name card --pci $card && create --name other --pci $card && create --name mouse --usb 0627:0001
echo "== started"; nagaya start card
qemu=$(pidof qemu-system-x86_64)
ls -l /proc/$qemu/fd | grep -o '/dev/vfio/.*\\|.vfio-device.'
grep -E 'VmLck|CapEff|Uid' /proc/$qemu/status
grep -c . /sys/fs/cgroup/nagaya/*/cgroup.procs
ls -l /dev/vfio
echo "== other"; nagaya start other
echo "== memory"; nagaya snapshot create card one
echo "== mouse"; nagaya start mouse
for qemu in $(pidof qemu-system-x86_64); do ls -l /proc/$qemu/fd; done | grep -o '/dev/bus/usb/.*' | sort -u
nagaya kill card mouse
echo "== left"; ls /sys/fs/cgroup/nagaya
"""


def test_devices_of_a_host_with_an_iommu(tmp_path: Path) -> None:
    if not os.environ.get("NAGAYA_PASS_THROUGH"):
        pytest.skip("takes five minutes: NAGAYA_PASS_THROUGH=1 has it run")
    if os.geteuid():
        pytest.skip("needs root")
    command = f"{os.path.dirname(sys.executable)}/nagaya --root /tmp/root --run-dir /tmp/run"
    said = run_there(
        tmp_path, SCRIPT % command, modules=("vfio_pci", "vfio_iommu_type1", "e1000e", "xhci_pci", "usbhid"),
        devices=DEVICES, within_s=1100,
    )  # fmt: skip
    print(said)
    parts = {part.partition("\n")[0]: part.partition("\n")[2] for part in said.split("== ")[1:]}
    assert "this host's driver 'e1000e' has it" in parts["bound"] and "driver_override" in parts["bound"]
    assert len([line for line in parts["ready"].splitlines() if len(line) == 32]) == 3
    started = parts["started"]
    assert "[vfio-device]" in started and "/dev/vfio/vfio" in started
    locked_kib = next(int(line.split()[1]) for line in started.splitlines() if line.startswith("VmLck"))
    assert locked_kib > 60 << 10  # all that the guest has
    assert "CapEff:\t0000000000000000" in started and "\n1\n" in started
    user = next(line.split()[1] for line in started.splitlines() if line.startswith("Uid"))
    assert int(user) > 0x6E000000
    assert not [line for line in started.splitlines() if line.startswith("crw") and " root " not in line]  # the host's
    assert "is in use" in parts["other"]
    assert "cannot be saved" in parts["memory"]
    assert "/dev/bus/usb/001/002" in parts["mouse"]
    assert "No such file" in parts["left"] and "ended" in said
