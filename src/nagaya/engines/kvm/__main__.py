"""`python -m nagaya.engines.kvm KERNEL`: one machine in the foreground, its console on this terminal. For engineers."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from nagaya.engines.kvm.machine import Hardware, Machine
from nagaya.engines.kvm.vcpu import Ending
from nagaya.errors import HostError, NagayaError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.virtio.apart import DeviceProcess
    from nagaya.virtio.blk import Blk
    from nagaya.virtio.device import Device

EXAMPLES = """\
examples:
  python -m nagaya.engines.kvm vmlinux --initrd initramfs.cpio
  python -m nagaya.engines.kvm /boot/vmlinuz --disk root.ext4 --append 'root=/dev/vda rw'
  python -m nagaya.engines.kvm vmlinux --cpus 4 --memory 1024 --net tap0 --trace

The console is hvc0; Ctrl-] ends the machine. The exit status is 0 after a power-off, and what the guest wrote to the
exit port (0xf4) if it did; 1 for any other end.
"""
_ESCAPE = b"\x1d"  # Ctrl-]
_NO_KEY = b"\0"  # _POSIX_VDISABLE


def main(arguments: list[str] | None = None) -> int:
    """The command: its exit status."""
    options = _parse(arguments)
    try:
        return _run(options)
    except NagayaError as error:
        print(f"nagaya.engines.kvm: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m nagaya.engines.kvm",
        description="Run a kernel in a virtual machine, with its console here.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "kernel",
        metavar="KERNEL",
        nargs="?",
        help="a vmlinux or bzImage; without one, the kernel that 'nagaya kernel build' made",
    )
    add("--initrd", metavar="FILE", help="initial RAM disk")
    add("--append", metavar="ARGS", default="", help="kernel command line, after our own arguments")
    add("--plain", action="store_true", help="no arguments of ours on the command line: for a guest that is not Linux")
    add("--memory", metavar="MIB", type=int, default=256, help="memory in MiB (256)")
    add("--cpus", metavar="N", type=int, default=1, help="virtual CPUs (1)")
    add("--disk", metavar="FILE[,ro]", action="append", default=[], help="a disk: vda, vdb, ...; may be repeated")
    add("--disk-queues", metavar="N", type=int, default=1, help="queues of each disk (1)")
    add("--net", metavar="TAP", action="append", default=[], help="a network card on a tap device; may be repeated")
    add("--no-vhost", action="store_true", help="move frames here, although the host's kernel could (vhost-net)")
    add("--vsock", metavar="DIRECTORY", help="a vsock device, whose host side is Unix sockets in DIRECTORY")
    add("--balloon", action="store_true", help="a memory balloon that also gives free pages back")
    add("--serial", action="store_true", help="an early serial port (earlyprintk=serial,0x3f8), on standard error")
    add("--protocol", choices=("auto", "linux", "pvh", "multiboot"), default="auto", help="how the kernel is entered")
    add("--cpu", choices=("host", "baseline"), default="host", help="the host's CPU, or one that every host has")
    add("--no-acpi", action="store_true", help="describe the machine by an MP table and kernel arguments")
    add(
        "--no-interrupts",
        action="store_true",
        help="no interrupt controllers: for a guest of a few bytes, which ends sooner",
    )
    add("--pit", action="store_true", help="the old timer, for kernels without kvm-clock")
    add("--huge-pages", action="store_true", help="take memory from the host's reserved huge pages")
    add("--verbose", action="store_true", help="let the kernel print its messages")
    add("--timeout", metavar="SECONDS", type=float, help="end the machine after this time")
    add("--trace", action="store_true", help="count exits and requests, and print them at the end")
    return parser.parse_args(arguments)


def _run(options: argparse.Namespace) -> int:
    if options.timeout is not None and options.timeout <= 0:
        raise UsageError(f"a machine cannot run for {options.timeout:g} s", hint="a number of seconds above 0")
    hardware = Hardware(
        kernel=options.kernel or _find_kernel(), initrd=options.initrd,
        command_line=options.append if options.plain else f"console=hvc0 panic=-1 {options.append}".strip(), plain=options.plain, memory_bytes=options.memory << 20,
        cpus=options.cpus, huge_pages=options.huge_pages, acpi=not options.no_acpi, protocol=options.protocol,
        cpu=options.cpu, interrupts=not options.no_interrupts, pit=options.pit, serial_fd=2 if options.serial else -1, quiet=not options.verbose,
    )  # fmt: skip
    with ExitStack() as stack:
        drives = _move_disks(options) if options.disk else None
        devices = (*_make_devices(options), *(drives.devices if drives is not None else ()))
        machine = stack.enter_context(Machine(hardware, devices, apart=drives))
        stack.enter_context(_raw_terminal())
        machine.start()
        try:
            ending = machine.wait(options.timeout) or Ending("timeout", f"the machine ran for {options.timeout:g} s")
        except KeyboardInterrupt:
            ending = Ending("stopped", "interrupted")
        machine.end(ending)
        machine.wait()
        trace, faults = machine.counters(), machine.faults()
    for name, fault in faults.items():
        print(f"{name}: {fault}", file=sys.stderr)
    if options.trace:
        for name, counters in trace.items():
            print(f"{name}: {' '.join(f'{key}={count}' for key, count in counters.items() if count)}", file=sys.stderr)
    if ending.kind not in ("power-off", "exit"):
        print(f"nagaya.engines.kvm: {ending.reason} ({ending.kind})", file=sys.stderr)
    return ending.status & 0xFF if ending.kind == "exit" else int(ending.kind != "power-off")


def _find_kernel() -> str:
    from nagaya.kernels.cache import get_kernel

    return get_kernel().path


def _make_devices(options: argparse.Namespace) -> Iterator[Device]:
    from nagaya.kernel.tun import open_tap
    from nagaya.virtio.balloon import Balloon
    from nagaya.virtio.console import Console, Port, own_descriptor
    from nagaya.virtio.rng import Rng
    from nagaya.virtio.vhost_net import make_tap_card

    if not options.no_interrupts:
        port = Port("console", console=True, input_fd=own_descriptor(0), output_fd=own_descriptor(1))
        size = os.get_terminal_size(1) if os.isatty(1) else os.terminal_size((0, 0))
        yield Console("console0", (port,), columns=size.columns, rows=size.lines)
        yield Rng("rng0")
    for number, tap in enumerate(options.net):
        with _host_error(f"cannot open the tap device {tap}"):
            fd = open_tap(tap)
        yield make_tap_card(f"net{number}", fd, mac=bytes((2, 0x6E, 0x67, *os.urandom(3))), vhost=not options.no_vhost)
    if options.vsock:
        from nagaya.kernel.unix import listen
        from nagaya.virtio.vsock import Vsock

        with _host_error("cannot listen for the guest's vsock connections"):
            listener = listen(options.vsock, "vsock")
        yield Vsock("vsock0", guest_cid=3, listener_fd=listener, directory=options.vsock, socket_name="vsock")
    if options.balloon:
        yield Balloon("balloon0")


def _move_disks(options: argparse.Namespace) -> DeviceProcess:
    from nagaya.virtio.apart import DeviceProcess

    return DeviceProcess(tuple(_make_disks(options)))


def _make_disks(options: argparse.Namespace) -> Iterator[Blk]:
    from nagaya.virtio.blk import Blk

    for number, disk in enumerate(options.disk):
        path, _, mode = disk.partition(",")
        if mode not in ("", "ro", "rw"):
            raise UsageError(f"'{mode}' is no mode of a disk", hint="FILE, or FILE,ro")
        yield Blk(f"blk{number}", path, read_only=mode == "ro", queues=options.disk_queues)


@contextmanager
def _host_error(operation: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise HostError.from_os(error, operation) from None


@contextmanager
def _raw_terminal() -> Iterator[None]:
    """Every key goes to the guest, as long as the machine runs; but Ctrl-] is what interrupts, as Ctrl-C does elsewhere."""
    if not os.isatty(0):
        yield
        return
    import termios
    import tty

    before = termios.tcgetattr(0)
    try:
        tty.setraw(0)
        raw = termios.tcgetattr(0)
        raw[tty.LFLAG] |= termios.ISIG
        raw[tty.CC][termios.VINTR] = _ESCAPE
        for key in (termios.VQUIT, termios.VSUSP):
            raw[tty.CC][key] = _NO_KEY
        termios.tcsetattr(0, termios.TCSADRAIN, raw)
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # the machine is closed: taking the interpreter down besides costs 3 ms
