"""The flags that `run` and `create` share, and what they mean to the manager."""

from __future__ import annotations

import os

from nagaya.cli import values
from nagaya.cli.flags import Flag, Parsed
from nagaya.cli.network_flags import NetworkOptions
from nagaya.cli.network_flags import read as read_network
from nagaya.cli.progress import open_progress
from nagaya.engines import open_engine
from nagaya.errors import Conflict, HostError, NotFound, UsageError
from nagaya.manager.options import CreateOptions
from nagaya.manager.settings import ON, Setting, choose_type, read_settings
from nagaya.model.spec import Limits, Mount

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.cli.context import Context
    from nagaya.manager.machine import Machine

FLAGS = (
    Flag("--type", "Kind of wall: container, kvm, emulated, auto (default; NAGAYA_TYPE)", value="TYPE"),
    Flag("--name", "Name of the machine (default: a made-up one)", value="NAME"),
    Flag("-i --interactive", "Pass standard input to the program"),
    Flag("-t --tty", "Give the program a terminal"),
    Flag("--rm", "Remove the machine when its program has ended"),
    Flag("--pull", "When to get the image: missing (default), always, never", value="POLICY"),
    Flag("--platform", "Platform of the image (DOCKER_DEFAULT_PLATFORM)", value="OS/ARCH"),
    Flag("-e --env", "Set an environment variable; a mere NAME passes ours on", value="NAME[=VALUE]", many=True),
    Flag("--env-file", "Read environment variables from a file", value="FILE", many=True),
    Flag("-v --volume", "Mount a path of this host or a volume", value="SOURCE:TARGET[:OPTIONS]", many=True),
    Flag("--mount", "Mount, in key=value form: type=bind|volume|tmpfs,source=,target=", value="KEY=VALUE,…", many=True),
    Flag("--tmpfs", "Mount an empty file system in memory", value="TARGET[:OPTIONS]", many=True),
    Flag("-w --workdir", "Working directory of the program", value="DIR"),
    Flag("-u --user", "User (and group) of the program, names or numbers", value="USER[:GROUP]"),
    Flag("--entrypoint", "Program to start instead of the image's entry point", value="PROGRAM"),
    Flag("-h --hostname", "Host name inside the machine", value="NAME"),
    Flag("-l --label", "Label the machine", value="KEY[=VALUE]", many=True),
    Flag("--label-file", "Read labels from a file", value="FILE", many=True),
    Flag(
        "--net --network",
        "Network: bridge (default), host, none, user, or NAME[:ip=,ip6=,mac=,alias=] of 'network ls'; several are fine",
        value="NETWORK",
        many=True,
    ),
    Flag("--ip", "IPv4 address in its (first) network", value="ADDRESS"),
    Flag("--ip6", "IPv6 address in its (first) network", value="ADDRESS"),
    Flag("--mac-address", "MAC address in its (first) network", value="ADDRESS"),
    Flag("--network-alias", "Further name on its networks", value="NAME", many=True),
    Flag("-p --publish", "Publish a port on this host", value="[ADDRESS:][HOST:]GUEST[/udp]", many=True),
    Flag("-P --publish-all", "Publish all ports that the image exposes, on free ports of this host"),
    Flag("--net-rate", "Most bits per second in each direction, for example 10mbit", value="RATE"),
    Flag("--allow-host", "Let the machine reach what listens on this host"),
    Flag("--cpus", "Most CPUs to use, for example 1.5", value="NUMBER"),
    Flag("-m --memory", "Most memory to use, for example 512m", value="SIZE"),
    Flag("--pids-limit", "Most processes to have (-1: no limit)", value="NUMBER"),
    Flag("--cpuset-cpus", "CPUs to run on, for example 0-3,6", value="CPUS"),
    Flag("--blkio-weight", "Share of block I/O, 10 to 1000", value="WEIGHT"),
    Flag("--storage", "Size of a virtual machine's own disk (default 10g)", value="SIZE"),
    Flag("--read-only", "Make the root file system read-only"),
    Flag("--device", "Show a device of this host", value="HOST[:PATH][:rwm]", many=True),
    Flag("--cap-add", "Give the program a capability (or ALL)", value="CAPABILITY", many=True),
    Flag("--cap-drop", "Take a capability (or ALL) from the program", value="CAPABILITY", many=True),
    Flag(
        "--security-opt",
        "seccomp=unconfined|PROFILE.json, no-new-privileges[=false], systempaths=unconfined",
        value="OPTION",
        many=True,
    ),
    Flag("--kernel", "Boot this kernel instead of Nagaya's own (virtual machines)", value="PATH"),
    Flag("--append", "Words to add to the kernel's command line (virtual machines)", value="TEXT"),
    Flag("--no-template", "Boot, where it could begin from a template (type kvm)"),
    Flag("--ulimit", "Set a resource limit of setrlimit(2)", value="NAME=SOFT[:HARD]", many=True),
    Flag("--sysctl", "Set a kernel parameter of the machine's namespaces", value="KEY=VALUE", many=True),
    Flag("--init", "Run the program below an init that reaps and forwards signals", default=True),
    Flag("--userns", "User namespace: auto (an own range of ids) or host", value="MODE"),
    Flag("--restart", "no (default), on-failure[:RETRIES], always, unless-stopped", value="POLICY"),
    Flag("--stop-signal", "Signal that 'stop' sends first", value="SIGNAL"),
    Flag("--stop-timeout", "Seconds that 'stop' waits before SIGKILL (default 10)", value="SECONDS"),
    Flag("--log-opt", "max-size=10m, max-file=3", value="KEY=VALUE", many=True),
    Flag("--dns", "Name server to use", value="ADDRESS", many=True),
    Flag("--add-host", "Line for /etc/hosts", value="NAME:ADDRESS", many=True),
    Flag("--cidfile", "Write the machine's id to a new file", value="FILE"),
    Flag("--insecure", "Allow a registry on loopback without TLS"),
    Flag("-q --quiet", "Show no progress while the image is fetched"),
)


def read_options(parsed: Parsed) -> CreateOptions:
    """What the manager is asked for. Raises `UsageError`."""
    image, *command = parsed.words
    if not image:
        raise UsageError("the image's name is empty", hint="for example nagaya run debian")
    settings = read_settings()
    network = _network(parsed, settings)
    return CreateOptions(
        image=image,
        command=tuple(command),
        entrypoint=_entrypoint(parsed),
        name=parsed.text("name"),
        type=parsed.text("type"),
        platform=_platform(parsed),
        pull=_pull(parsed.text("pull", "missing")),
        env=values.parse_environment(parsed.texts("env"), parsed.texts("env-file")),
        workdir=parsed.text("workdir") if parsed.text("workdir") else None,
        user=parsed.text("user") if parsed.given("user") else None,
        hostname=parsed.text("hostname"),
        tty=parsed.switch("tty"),
        stdin=parsed.switch("interactive"),
        init=parsed.switch("init"),
        read_only=parsed.switch("read-only"),
        userns=parsed.text("userns"),
        network=network.network,
        attachments=network.attachments,
        ports=network.ports,
        publish_all=parsed.switch("publish-all"),
        net_rate_bits=network.net_rate_bits,
        allow_host=network.allow_host,
        mounts=_mounts(parsed),
        devices=tuple(values.parse_device(text) for text in parsed.texts("device")),
        ulimits=tuple(values.parse_ulimit(text) for text in parsed.texts("ulimit")),
        sysctls=values.parse_sysctls(parsed.texts("sysctl")),
        security=values.parse_security(parsed.texts("cap-add"), parsed.texts("cap-drop"), parsed.texts("security-opt")),
        limits=_limits(parsed, settings),
        restart=values.parse_restart(parsed.text("restart", "no")),
        log=values.parse_log_options(parsed.texts("log-opt")),
        auto_remove=parsed.switch("rm"),
        stop_signal=values.parse_signal(parsed.text("stop-signal")) if parsed.given("stop-signal") else 0,
        stop_timeout_s=_stop_timeout(parsed),
        labels=values.parse_labels(parsed.texts("label"), parsed.texts("label-file")),
        dns=tuple(values.parse_address(text, "--dns") for text in parsed.texts("dns")),
        extra_hosts=values.parse_hosts(parsed.texts("add-host")),
        kernel=os.path.abspath(parsed.text("kernel")) if parsed.text("kernel") else "",
        append=parsed.text("append"),
        template=settled_switch(settings, "templates") and not parsed.switch("no-template"),
        insecure=parsed.switch("insecure"),
    )


def _entrypoint(parsed: Parsed) -> tuple[str, ...] | None:
    if not parsed.given("entrypoint"):
        return None
    program = parsed.text("entrypoint")
    return (program,) if program else ()


def _pull(policy: str) -> str:
    if policy not in ("missing", "always", "never"):
        raise UsageError(f"--pull: unknown policy '{policy}'", hint="one of: missing, always, never")
    return policy


def _stop_timeout(parsed: Parsed) -> float:
    if not parsed.given("stop-timeout"):
        return CreateOptions(image="").stop_timeout_s
    return values.parse_timeout(parsed.text("stop-timeout"), "--stop-timeout")


def _mounts(parsed: Parsed) -> tuple[Mount, ...]:
    mounts = [values.parse_mount(text) for text in parsed.texts("mount")]
    mounts += [values.parse_volume(text) for text in parsed.texts("volume")]
    mounts += [values.parse_tmpfs(text) for text in parsed.texts("tmpfs")]
    return tuple(mounts)


def settled(parsed: Parsed, settings: dict[str, Setting], key: str, default: str) -> Setting:
    """A flag's value, else what the files say, else the default."""
    if parsed.given(key):
        return Setting(parsed.text(key), f"--{key}")
    return settings.get(key) or Setting(default, f"--{key}")


def settled_switch(settings: dict[str, Setting], key: str) -> bool:
    """A setting that is on unless it is settled otherwise."""
    setting = settings.get(key)
    return setting is None or setting.text == ON


def _network(parsed: Parsed, settings: dict[str, Setting]) -> NetworkOptions:
    texts = parsed.texts("network") or [settled(parsed, settings, "network", "bridge").text]
    return read_network(parsed, texts)


def _platform(parsed: Parsed) -> str:
    return parsed.text("platform") or os.environ.get("DOCKER_DEFAULT_PLATFORM", "")


def _has_disk(parsed: Parsed) -> bool:
    chosen = choose_type(parsed.text("type"), platform=_platform(parsed), kernel=parsed.text("kernel"))
    return open_engine(chosen.type).rootfs_kind == "disk"


def _limits(parsed: Parsed, settings: dict[str, Setting]) -> Limits:
    memory, cpus, storage = (settled(parsed, settings, key, "0") for key in ("memory", "cpus", "storage"))
    if storage.source != "--storage" and not _has_disk(parsed):
        storage = Setting("0", "")  # settled for virtual machines, and this is none
    return Limits(
        memory_bytes=values.parse_size(*memory),
        cpus_milli=values.parse_cpus(*cpus),
        pids=values.parse_pids(parsed.text("pids-limit", "0")),
        cpuset_cpus=values.parse_cpuset(parsed.text("cpuset-cpus")),
        blkio_weight=values.parse_weight(parsed.text("blkio-weight", "0")),
        storage_bytes=values.parse_size(*storage),
    )


def create_machine(context: Context, parsed: Parsed, options: CreateOptions, *, starting: bool = False) -> Machine:
    """Create it, showing how the image comes, and write --cidfile."""
    cidfile = parsed.text("cidfile")
    if cidfile and os.path.lexists(cidfile):
        raise Conflict(
            f"--cidfile: '{cidfile}' exists already", hint=f"remove it, if its machine is gone: rm {cidfile}"
        )
    chosen = choose_type(options.type, platform=options.platform, kernel=options.kernel)
    if chosen.note:
        tell((chosen.note,))
    options = options._replace(type=chosen.type)
    with open_progress(quiet=parsed.switch("quiet"), eager=False) as progress:
        machine = context.host.machines.create(options, progress=progress, starting=starting)
    if cidfile:
        try:
            with open(cidfile, "x", encoding="ascii") as file:
                file.write(machine.id)
        except OSError as error:
            machine.remove(force=True, volumes=True)
            raise HostError.from_os(error, "--cidfile: cannot write the machine's id") from None
    return machine


def warn_of(machine: Machine) -> None:
    """Print what a machine that was started in the background had to do without."""
    try:
        warnings = machine.state.warnings
    except NotFound:
        return  # created with --rm, and over already
    tell(warnings)


def tell(warnings: tuple[str, ...]) -> None:
    """Print warnings; most hosts give a machine all that it asked for."""
    if warnings:
        from nagaya.cli.failures import warn  # lazy: rare

        warn(warnings)
