"""From a machine to QEMU's command line. Pure: every file is a descriptor already, named by its number in QEMU.

QEMU gets nothing that it could open by itself: it runs as a user who owns nothing.
"""

from __future__ import annotations

from nagaya.engines.qemu.boards import Board
from nagaya.kernels import arguments as kernel
from nagaya.model.spec import PortMapping
from nagaya.static import NamedTuple

CONSOLE_PORTS = 4  # hvc0, the agent's, and room for QEMU's count from zero
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
USER_NETWORK = "10.0.2.0/24"  # QEMU's own, whose .2 is the gateway, .3 the name server and .15 the machine


class Card(NamedTuple):
    """A network card: on the tap device `tap`, on passt at the other end of `stream`, or in QEMU's user-mode network.

    The last listens for `ports` by itself and leads them to the machine.
    """

    mac: str
    tap: int = -1
    stream: int = -1
    ports: tuple[PortMapping, ...] = ()

    @property
    def is_own(self) -> bool:
        """Whether QEMU makes the machine's connections, and needs the host's network for that."""
        return self.tap < 0 and self.stream < 0


class Share(NamedTuple):
    """A directory of the host, served by a virtiofsd at the other end of `socket`."""

    tag: str
    socket: int


class Machine(NamedTuple):
    """All that the command line says. Descriptors are numbers in QEMU's process."""

    board: Board
    name: str
    cpus: int
    memory_bytes: int
    kernel: int
    initrd: int
    root: int  # read-only
    data: int  # read and write
    monitor: int
    agent: int
    console: int
    cards: tuple[Card, ...] = ()
    shares: tuple[Share, ...] = ()
    tsc_khz: int = 0  # how fast the time stamp counter runs; 0 = the guest has to find out
    append: str = ""
    moves: int = -1  # where a further monitor is listened for: that of whoever moves the machine to another host
    incoming: bool = False  # waits to be told what to go on from


def plan_command(machine: Machine) -> list[str]:
    """QEMU's argv. No value in it comes from a user but the kernel's arguments, which are a word of their own."""
    board = machine.board
    command = [
        board.program, "-no-user-config", "-nodefaults", "-display", "none", "-no-reboot",
        "-sandbox", SANDBOX,
        "-name", f"guest={machine.name}",
        "-machine", board.machine + (",memory-backend=ram" if machine.shares else ""),
        "-accel", "tcg,thread=multi",
        "-cpu", board.cpu,
        "-smp", str(machine.cpus),
        "-m", f"{machine.memory_bytes >> 10}k",
        "-global", "virtio-mmio.force-legacy=false",
        "-kernel", _path(machine.kernel),
        "-initrd", _path(machine.initrd),
        "-append", " ".join(_kernel_arguments(machine)),
    ]  # fmt: skip
    if machine.shares:  # virtiofsd works in the guest's memory
        command += ["-object", f"memory-backend-memfd,id=ram,size={machine.memory_bytes >> 10}k,share=on"]
    command += _monitor(machine)
    command += _console(machine)
    command += _disk("root", machine.root, number=1, options="read-only=on,auto-read-only=off")
    command += _disk("data", machine.data, number=2, options="discard=unmap")
    command += ["-device", "virtio-rng-device"]
    # Memory that the guest has freed goes back to the host by itself.
    command += ["-device", "virtio-balloon-device,free-page-reporting=on,deflate-on-oom=on"]
    for number, card in enumerate(machine.cards):
        command += _network(card, number)
    for number, share in enumerate(machine.shares):
        command += ["-chardev", f"socket,id=share{number},fd={share.socket}"]
        command += ["-device", f"vhost-user-fs-device,chardev=share{number},tag={share.tag}"]
    if machine.incoming:
        command += ["-S", "-incoming", "defer"]
    return command


OWN_DEVICES = 5  # console, two disks, random numbers, balloon


def devices(machine: Machine) -> int:
    """How many virtio devices the machine has."""
    return OWN_DEVICES + len(machine.cards) + len(machine.shares)


def _path(descriptor: int) -> str:
    """Opening it again needs no right to the way there, only to the file."""
    return f"/proc/self/fd/{descriptor}"


def _kernel_arguments(machine: Machine) -> list[str]:
    """The user's last: where a kernel takes the last of two, theirs wins."""
    board = machine.board
    words = [*board.arguments, *kernel.QUIET]
    if machine.cpus == 1:
        words += board.one_cpu_arguments
    if machine.tsc_khz:
        # On a busy host a guest's own measuring against its timer fails ("TSC unstable"): then it counts time in steps
        # of 10 ms. And nothing that it could compare the counter with later is better than the counter.
        words += [f"tsc_early_khz={machine.tsc_khz}", "tsc=reliable"]
    return [*words, *machine.append.split()]


def _monitor(machine: Machine) -> list[str]:
    command = ["-chardev", f"socket,id=monitor,fd={machine.monitor}", "-mon", "chardev=monitor,mode=control"]
    if machine.moves >= 0:
        command += ["-chardev", f"socket,id=moves,fd={machine.moves},server=on,wait=off"]
        command += ["-mon", "chardev=moves,mode=control"]
    return command


def _console(machine: Machine) -> list[str]:
    return [
        "-device", f"virtio-serial-device,max_ports={CONSOLE_PORTS}",
        "-chardev", f"socket,id=console,fd={machine.console}",
        "-device", "virtconsole,chardev=console",
        "-chardev", f"socket,id=agent,fd={machine.agent}",
        "-device", "virtserialport,chardev=agent,name=nagaya.agent",
    ]  # fmt: skip


def _disk(name: str, descriptor: int, *, number: int, options: str) -> list[str]:
    """A raw disk. The host's page cache holds it, and a guest's flush is an fdatasync of the file."""
    return [
        "-add-fd", f"fd={descriptor},set={number}",
        "-blockdev", f"driver=file,node-name={name},filename=/dev/fdset/{number},locking=off,"
                     f"cache.direct=off,cache.no-flush=off,{options}",
        "-device", f"virtio-blk-device,drive={name},serial={name}",
    ]  # fmt: skip


def _network(card: Card, number: int) -> list[str]:
    name = f"net{number}"
    if card.tap >= 0:
        backend = f"tap,id={name},fd={card.tap},vhost=off"
    elif card.stream >= 0:
        backend = f"stream,id={name},server=off,addr.type=fd,addr.str={card.stream}"
    else:
        backend = f"user,id={name},net={USER_NETWORK},ipv6=off{forwards(card)}"
    return ["-netdev", backend, "-device", f"virtio-net-device,netdev={name},mac={card.mac}"]


def forwards(card: Card) -> str:
    """What QEMU's user-mode network leads to the machine, as options of its own."""
    return "".join(
        f",hostfwd={port.protocol}:{port.host_address}:{port.host_port}-:{port.guest_port}" for port in card.ports
    )
