"""From what a caller asked for and what the image says to a machine's record."""

from __future__ import annotations

import os
import time

from nagaya.engines import TYPES, open_engine
from nagaya.errors import Unsupported, UsageError
from nagaya.manager.options import CreateOptions, ExecOptions
from nagaya.model.spec import MachineSpec, Mount, PortMapping, Process

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.images.store import Image, ImageConfig

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SMALLEST_MEMORY = 6 << 20
PROPAGATIONS = ("private", "rprivate", "slave", "rslave", "shared", "rshared")
MODES = ("bridge", "host", "none", "user")
RESTARTS = ("no", "on-failure", "always", "unless-stopped")


def host_platform() -> str:
    machine = os.uname().machine
    return "linux/" + {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine)


def plan_machine(options: CreateOptions, image: Image, *, type_: str, machine_id: str, name: str) -> MachineSpec:
    """The record of a machine of `type_`. Raises `UsageError` or `Unsupported` for anything that could not work; changes nothing."""
    check_options(options)
    config = image.config
    hostname = options.hostname or machine_id[:12]
    check_platform(image.platform, options.image, type_=type_)
    spec = MachineSpec(
        id=machine_id,
        name=name,
        type=type_,
        image=options.image,
        image_id=image.id,
        platform=image.platform,
        process=Process(
            argv=_argv(options, config),
            env=_environment(options, config, hostname),
            workdir=options.workdir if options.workdir is not None else (config.workdir or "/"),
            user=options.user if options.user is not None else config.user,
            tty=options.tty,
            stdin=options.stdin,
            rows=options.rows,
            columns=options.columns,
        ),
        hostname=hostname,
        created_ns=time.time_ns(),
        init=options.init,
        read_only=options.read_only,
        userns=options.userns,
        network=options.network,
        attachments=options.attachments,
        ports=options.ports + _exposed_ports(options, config),
        net_rate_bits=options.net_rate_bits,
        allow_host=options.allow_host,
        mounts=options.mounts + _image_volumes(options, config),
        devices=options.devices,
        ulimits=options.ulimits,
        sysctls=options.sysctls,
        security=options.security,
        limits=options.limits,
        restart=options.restart,
        log=options.log,
        auto_remove=options.auto_remove,
        stop_signal=options.stop_signal or parse_stop_signal(config.stop_signal),
        stop_timeout_s=options.stop_timeout_s,
        labels=tuple(dict(config.labels + options.labels).items()),
        dns=options.dns,
        extra_hosts=options.extra_hosts,
        kernel=options.kernel,
        append=options.append,
        template=options.template,
    )
    open_engine(type_).check(spec)
    return spec


def check_platform(platform: str, image: str, *, type_: str) -> None:
    """Raise `Unsupported` when a machine of `type_` cannot run programs of the image's platform."""
    if type_ == TYPES[0] and platform != host_platform():
        raise Unsupported(
            f"image '{image}' is for {platform}, and a {type_} runs on this host's CPU, {host_platform()}",
            hint=f"use --type emulated, or get the image for this host: "
            f"nagaya pull --platform {host_platform()} {image}",
        )


def name_volumes(mounts: tuple[Mount, ...]) -> tuple[Mount, ...]:
    """The mounts with every anonymous volume named. Makes nothing."""
    return tuple(
        mount._replace(source=os.urandom(16).hex(), anonymous=True)
        if mount.kind == "volume" and not mount.source
        else mount
        for mount in mounts
    )


def check_options(options: CreateOptions) -> None:
    """What can be said without the image. Raises `UsageError`."""
    _check_texts(options)
    if options.network not in MODES:
        raise UsageError(f"unknown network '{options.network}'", hint=f"one of: {', '.join(MODES)}")
    if options.attachments or options.ports or options.publish_all or options.net_rate_bits or options.allow_host:
        from nagaya.manager.network_options import check_network_options  # lazy: most machines have the default network

        check_network_options(options)
    if options.userns not in ("", "auto", "host"):
        raise UsageError(f"unknown user namespace mode '{options.userns}'", hint="one of: auto, host")
    if options.restart.policy not in RESTARTS:
        raise UsageError(f"unknown restart policy '{options.restart.policy}'", hint=f"one of: {', '.join(RESTARTS)}")
    if options.restart.policy != "no" and options.auto_remove:
        raise UsageError("--rm and --restart exclude each other", hint="a removed machine cannot be restarted")
    if options.stop_timeout_s < 0:
        raise UsageError("the stop timeout cannot be negative")
    if not 0 <= options.stop_signal <= 64:
        raise UsageError(f"there is no signal {options.stop_signal}")
    limits = options.limits
    if limits.memory_bytes and limits.memory_bytes < SMALLEST_MEMORY:
        raise UsageError(
            "the memory limit is below the smallest that a machine can start with, 6 MiB", hint="for example -m 64m"
        )
    if limits.cpus_milli < 0 or limits.cpus_milli > 1000 * (os.cpu_count() or 1):
        raise UsageError(
            f"--cpus {limits.cpus_milli / 1000:g} is not between 0 and the {os.cpu_count()} CPUs of this host"
        )
    if limits.storage_bytes:
        from nagaya.storage.disks import LEAST_BYTES  # lazy: most machines take the size that there is

        if limits.storage_bytes < LEAST_BYTES:
            raise UsageError(
                f"--storage: a machine's disk needs {LEAST_BYTES >> 20} MiB or more",
                hint="leave it away for 10 GiB; it takes only as much of the host's as is written to it",
            )
    if limits.blkio_weight and not 10 <= limits.blkio_weight <= 1000:
        raise UsageError(f"the block I/O weight {limits.blkio_weight} is not between 10 and 1000")
    if options.log.max_bytes < 1024 or not 1 <= options.log.files <= 1000:
        raise UsageError("a log needs a max-size of at least 1k and a max-file from 1 to 1000")
    _check_mounts(options.mounts)


def _check_texts(options: CreateOptions) -> None:
    for text in options.command + (options.entrypoint or ()) + (options.workdir or "", options.user or ""):
        if "\0" in text:
            raise UsageError("an argument contains a NUL byte")
    for pair in options.env:
        if "=" not in pair[1:] or "\0" in pair:
            raise UsageError(f"'{pair}' is not NAME=value", hint="for example -e LANG=C.UTF-8")
    if options.workdir is not None and not options.workdir.startswith("/"):
        raise UsageError(f"the working directory '{options.workdir}' is not an absolute path")
    hostname = options.hostname
    if hostname and (
        len(hostname) > 63 or not hostname.replace("-", "").replace(".", "").isalnum() or hostname[0] == "-"
    ):
        raise UsageError(f"'{hostname}' is not a valid host name", hint="letters, digits, '-' and '.', at most 63")


def _check_mounts(mounts: tuple[Mount, ...]) -> None:
    seen: set[str] = set()
    for mount in mounts:
        target = os.path.normpath(mount.target)
        if not mount.target.startswith("/") or target == "/":
            raise UsageError(f"the mount target '{mount.target}' is not an absolute path below /")
        if target in seen:
            raise UsageError(f"two mounts have the same target '{target}'")
        seen.add(target)
        if mount.propagation not in PROPAGATIONS:
            raise UsageError(
                f"unknown mount propagation '{mount.propagation}'", hint=f"one of: {', '.join(PROPAGATIONS)}"
            )


def _argv(options: CreateOptions, config: ImageConfig) -> tuple[str, ...]:
    if options.entrypoint is not None:  # as Docker: an own entrypoint drops the image's Cmd too
        argv = options.entrypoint + options.command
    else:
        argv = config.entrypoint + (options.command or config.command)
    if not argv or not argv[0]:
        raise UsageError(f"image '{options.image}' names no command to run", hint="give one after the image's name")
    return argv


def _environment(options: CreateOptions, config: ImageConfig, hostname: str) -> tuple[str, ...]:
    merged = {"PATH": DEFAULT_PATH, "HOSTNAME": hostname}
    if options.tty:
        merged["TERM"] = "xterm"
    for pair in config.env + options.env:
        key, _, value = pair.partition("=")
        merged[key] = value
    return tuple(f"{key}={value}" for key, value in merged.items())


def _image_volumes(options: CreateOptions, config: ImageConfig) -> tuple[Mount, ...]:
    """Volumes that the image declares and the caller did not mount over, as anonymous ones without a name yet."""
    given = {os.path.normpath(mount.target) for mount in options.mounts}
    return tuple(
        Mount("volume", "", target, anonymous=True)
        for target in config.volumes
        if os.path.normpath(target) not in given
    )


def _exposed_ports(options: CreateOptions, config: ImageConfig) -> tuple[PortMapping, ...]:
    """With `publish_all`, the ports that the image exposes and the caller did not publish. What is no port is left out."""
    if not options.publish_all:
        return ()
    given = {(port.guest_port, port.protocol) for port in options.ports}
    found = []
    for text in config.exposed_ports:
        number, _, protocol = text.partition("/")
        first, dash, last = number.partition("-")
        last = last if dash else first
        if not (first.isascii() and first.isdigit() and last.isascii() and last.isdigit()):
            continue
        for port in range(int(first), min(int(last), 65535) + 1):
            if port and protocol in ("", "tcp", "udp") and (port, protocol or "tcp") not in given:
                found.append(PortMapping("", 0, port, protocol or "tcp"))
                given.add((port, protocol or "tcp"))
    return tuple(found)


def parse_stop_signal(text: str) -> int:
    """The image's StopSignal: "SIGTERM", "TERM" or "15"; SIGTERM when it says nothing or nonsense."""
    if not text:
        return 15
    if text.isdigit():
        return int(text) if 1 <= int(text) <= 64 else 15
    import signal

    name = text if text.startswith("SIG") else "SIG" + text
    return int(getattr(signal, name, 15))


def plan_exec(options: ExecOptions, main: Process) -> Process:
    """The process of an `exec`: the machine's main program's surroundings with the caller's changes."""
    if not options.argv or not options.argv[0]:
        raise UsageError("no command to execute", hint="for example nagaya exec MACHINE ls -l")
    merged = dict(pair.split("=", 1) for pair in main.env)
    if options.tty:
        merged.setdefault("TERM", "xterm")
    for pair in options.env:
        if "=" not in pair[1:] or "\0" in pair:
            raise UsageError(f"'{pair}' is not NAME=value", hint="for example -e LANG=C.UTF-8")
        key, _, value = pair.partition("=")
        merged[key] = value
    workdir = main.workdir if options.workdir is None else options.workdir
    if not workdir.startswith("/"):
        raise UsageError(f"the working directory '{workdir}' is not an absolute path")
    return Process(
        argv=options.argv,
        env=tuple(f"{key}={value}" for key, value in merged.items()),
        workdir=workdir,
        user=main.user if options.user is None else options.user,
        tty=options.tty,
        stdin=options.stdin,
        rows=options.rows,
        columns=options.columns,
    )
