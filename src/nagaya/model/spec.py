"""What a machine is to be: written once at `create`, read by every layer below."""

from __future__ import annotations

from nagaya.static import NamedTuple


class Limits(NamedTuple):
    """Resource limits; 0 or "" means none. `cpus_milli` is thousandths of a CPU (1500 = 1.5 CPUs)."""

    memory_bytes: int = 0
    cpus_milli: int = 0
    pids: int = 0
    cpuset_cpus: str = ""
    storage_bytes: int = 0  # of a virtual machine's own disk; 0 = 10 GiB
    blkio_weight: int = 0  # 10..1000 as Docker's users know it; cgroup v2 maps it to io.weight 1..10000


class Mount(NamedTuple):
    """One mount inside the machine, in the order given. `source`: host path (bind), name (volume), "" (tmpfs)."""

    kind: str  # "bind" | "volume" | "tmpfs"
    source: str
    target: str  # absolute path inside the machine
    read_only: bool = False
    propagation: str = "rprivate"  # private | rprivate | slave | rslave | shared | rshared
    size_bytes: int = 0  # tmpfs only; 0 = kernel's default
    mode: int = 0o1777  # tmpfs only
    options: tuple[str, ...] = ()  # extra flags: nosuid, nodev, noexec (and exec, suid, dev to lift them on tmpfs)
    anonymous: bool = False  # a volume made for this machine alone: `rm -v` and --rm remove it


class Device(NamedTuple):
    """A host device node shown inside the machine, with cgroup access letters out of "rwm"."""

    host_path: str
    path: str
    access: str = "rwm"


class Ulimit(NamedTuple):
    name: str  # "nofile", as in setrlimit(2) without RLIMIT_
    soft: int  # -1 = unlimited
    hard: int


class Security(NamedTuple):
    """What the program may do. Capability names are without CAP_, upper case; "ALL" is allowed."""

    cap_add: tuple[str, ...] = ()
    cap_drop: tuple[str, ...] = ()
    no_new_privileges: bool = True
    seccomp: str = "default"  # "default" | "unconfined" | path of a profile in Docker's JSON format
    unmask: bool = False  # security-opt systempaths=unconfined: no masked or read-only paths under /proc and /sys


DEFAULT_NETWORK = "nagaya0"  # what `network = "bridge"` without attachments is plugged into


class Attachment(NamedTuple):
    """A network that the machine is plugged into, and what it asks of it. "" = what the network gives."""

    network: str  # name of a network of the store
    aliases: tuple[str, ...] = ()  # further names that others on the network find it by
    address: str = ""  # IPv4
    address6: str = ""  # IPv6
    mac: str = ""


class PortMapping(NamedTuple):
    """A port of the host that leads to one of the machine's."""

    host_address: str  # IPv4 or IPv6 of the host; "" = loopback of both
    host_port: int  # 0 = the host chooses a free one at each start
    guest_port: int
    protocol: str = "tcp"  # "tcp" | "udp"

    @property
    def host_end(self) -> str:
        """For people: "127.0.0.1:8080", "[::]:8080"; of both loopbacks the first."""
        address = self.host_address or "127.0.0.1"
        return f"[{address}]:{self.host_port}" if ":" in address else f"{address}:{self.host_port}"


class Restart(NamedTuple):
    policy: str = "no"  # no | on-failure | always | unless-stopped
    max_retries: int = 0  # on-failure only; 0 = without end


class Autostart(NamedTuple):
    """That a machine starts with the host: those of a lower order first, each so much later than the one before it."""

    order: int = 0
    delay_s: float = 0.0


class LogLimits(NamedTuple):
    max_bytes: int = 10 << 20
    files: int = 3


class Process(NamedTuple):
    """A program to run inside a machine: the machine's main one, or one that `exec` adds."""

    argv: tuple[str, ...]
    env: tuple[str, ...] = ()  # "NAME=value", complete: nothing is inherited
    workdir: str = "/"
    user: str = ""  # "user[:group]", names or numbers, looked up inside the machine; "" = root
    tty: bool = False
    stdin: bool = False
    rows: int = 0  # terminal size at start, 0 = unknown
    columns: int = 0


class Drive(NamedTuple):
    """A disk or CD of a whole machine. `path` is absolute, but for an `own` one's: that lies in the machine's directory."""

    path: str  # "" = a CD drive without a disc
    format: str  # "qcow2" | "raw" | "vmdk" | "vdi" | "vhd" | "vhdx"
    cdrom: bool = False
    read_only: bool = False
    own: bool = False  # made for this machine, and removed with it
    allow_backing: bool = False  # what it stands on may lie anywhere
    slot: int = 0  # where it is plugged in, and can be taken out while the machine runs; 0 = it cannot


class Seed(NamedTuple):
    """What the system is told at its first boot: by cloud-init, with the user-data in the machine's directory, or by its
    installer.
    """

    ssh_keys: tuple[str, ...] = ()  # whole lines, as in authorized_keys
    user: str = "root"  # whom `nagaya ssh` logs in as


class Install(NamedTuple):
    """What installs a whole machine's system at its first start. `disc`: the ISO that is in a drive meanwhile; "" = none."""

    source: str  # as the user gave it, for display
    disc: str = ""


class Hardware(NamedTuple):
    """A whole machine that boots from its disks, whatever is on them: there is no image, and no agent of ours inside."""

    firmware: str = "bios"  # "bios" | "uefi" | "direct": none, for our own VMM starts the kernel that is on the disk
    drives: tuple[Drive, ...] = ()  # in the order in which they are tried at boot, CDs first when `boot_cdrom`
    boot_cdrom: bool = False
    compat: bool = False  # devices that every system has drivers for, instead of virtio
    seed: Seed | None = None
    tpm: bool = False
    secure_boot: bool = False  # UEFI that starts only what is signed by a key that it knows
    usb: tuple[str, ...] = ()  # devices of this host: "VENDOR:PRODUCT" or "BUS.DEVICE"
    pci: tuple[str, ...] = ()  # the same: "0000:01:00.0"
    install: Install | None = None


class MachineSpec(NamedTuple):
    """The whole description of a machine. `id` is 32 hex digits; `name` is unique in its store."""

    id: str
    name: str
    type: str  # "container" | "kvm" | "emulated"
    image: str  # the reference as the user gave it, for display
    image_id: str  # "sha256:..." of the image's configuration
    platform: str  # "linux/amd64"
    process: Process
    hostname: str
    created_ns: int
    init: bool = True  # False: the program itself is PID 1
    read_only: bool = False
    userns: str = ""  # "" = host's user namespace, "auto" = own range of ids
    network: str = "bridge"  # "bridge": its `attachments`, or the default network | "host" | "none" | "user"
    attachments: tuple[Attachment, ...] = ()  # the first gives the default routes
    ports: tuple[PortMapping, ...] = ()
    net_rate_bits: int = 0  # bits per second in each direction; 0 = no limit
    allow_host: bool = False  # it may reach what listens on this host
    mounts: tuple[Mount, ...] = ()
    devices: tuple[Device, ...] = ()
    ulimits: tuple[Ulimit, ...] = ()
    sysctls: tuple[tuple[str, str], ...] = ()
    security: Security = Security()
    limits: Limits = Limits()
    restart: Restart = Restart()
    log: LogLimits = LogLimits()
    auto_remove: bool = False
    stop_signal: int = 15
    stop_timeout_s: float = 10.0
    labels: tuple[tuple[str, str], ...] = ()
    dns: tuple[str, ...] = ()  # nameservers; empty = the host's
    extra_hosts: tuple[tuple[str, str], ...] = ()  # (name, address) lines for /etc/hosts
    kernel: str = ""  # absolute host path of a virtual machine's kernel; "" = Nagaya's own
    append: str = ""  # words behind a virtual machine's kernel command line
    template: bool = True  # whether it may begin from one, and have one built for its kind
    autostart: Autostart | None = None
    hardware: Hardware | None = None  # of a whole machine; `image` is empty then
