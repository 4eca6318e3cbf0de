"""What a caller may ask for, before an image's defaults and this host's checks are applied."""

from __future__ import annotations

from nagaya.model.spec import (
    Attachment,
    Device,
    Limits,
    LogLimits,
    Mount,
    PortMapping,
    Restart,
    Security,
    Ulimit,
)
from nagaya.static import NamedTuple


class CreateOptions(NamedTuple):
    """`None` means "as the image says"; empty tuples mean "nothing beyond the image's"."""

    image: str
    command: tuple[str, ...] = ()  # replaces the image's Cmd
    entrypoint: tuple[str, ...] | None = None  # () clears the image's Entrypoint
    name: str = ""  # "" = a generated one
    type: str = ""  # "" = the host's default
    platform: str = ""
    pull: str = "missing"  # missing | always | never
    env: tuple[str, ...] = ()  # "NAME=value", later ones win
    workdir: str | None = None
    user: str | None = None
    hostname: str = ""  # "" = the first 12 digits of the id
    tty: bool = False
    stdin: bool = False
    rows: int = 0
    columns: int = 0
    init: bool = True
    read_only: bool = False
    userns: str = ""
    network: str = "bridge"
    attachments: tuple[Attachment, ...] = ()  # empty with "bridge" = the default network
    ports: tuple[PortMapping, ...] = ()
    publish_all: bool = False  # those that the image exposes too
    net_rate_bits: int = 0
    allow_host: bool = False
    mounts: tuple[Mount, ...] = ()
    devices: tuple[Device, ...] = ()
    ulimits: tuple[Ulimit, ...] = ()
    sysctls: tuple[tuple[str, str], ...] = ()
    security: Security = Security()
    limits: Limits = Limits()
    restart: Restart = Restart()
    log: LogLimits = LogLimits()
    auto_remove: bool = False
    stop_signal: int = 0  # 0 = as the image says, else SIGTERM
    stop_timeout_s: float = 10.0
    labels: tuple[tuple[str, str], ...] = ()
    dns: tuple[str, ...] = ()
    extra_hosts: tuple[tuple[str, str], ...] = ()
    kernel: str = ""  # absolute path on this host; "" = Nagaya's own
    append: str = ""  # words for the kernel's command line
    template: bool = True  # whether it may begin from one, where its type has them
    insecure: bool = False  # plain HTTP or unverified TLS to a loopback registry


class ExecOptions(NamedTuple):
    """`None` = as the machine's main program has it."""

    argv: tuple[str, ...]
    env: tuple[str, ...] = ()  # added to the machine's
    workdir: str | None = None
    user: str | None = None
    tty: bool = False
    stdin: bool = False
    rows: int = 0
    columns: int = 0


class UpdateOptions(NamedTuple):
    """`None` = leave as it is. Limits apply live, restart policy at once; type and storage while it does not run."""

    type: str | None = None  # container | kvm | emulated | auto
    storage_bytes: int | None = None  # only more than it has
    memory_bytes: int | None = None
    cpus_milli: int | None = None
    pids: int | None = None
    cpuset_cpus: str | None = None
    blkio_weight: int | None = None
    restart: Restart | None = None
