"""What users write as flag values, turned into the model's data.

Every `parse_*` raises `UsageError` with one sentence and a hint that shows a right value. Names of flags appear in the
messages as the caller gives them (`what`).
"""

from __future__ import annotations

import os

from nagaya.errors import NotFound, UsageError
from nagaya.model.spec import Device, LogLimits, Mount, Restart, Security, Ulimit

_BINARY = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40, "p": 1 << 50}
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DIGITS = "0123456789."
ULIMITS = (
    "as", "core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nice", "nofile", "nproc", "rss", "rtprio",
    "rttime", "sigpending", "stack",
)  # fmt: skip
PROPAGATIONS = ("private", "rprivate", "slave", "rslave", "shared", "rshared")
_MOUNT_FLAGS = ("nosuid", "nodev", "noexec", "suid", "dev", "exec")
# SELinux labels and macOS consistency: nothing to do on the hosts that we run on, and in every second compose file.
_IGNORED_VOLUME_OPTIONS = ("z", "Z", "cached", "delegated", "consistent")


def parse_size(text: str, what: str) -> int:
    """Bytes of "512m", "1g", "1.5GiB", "64kb", "4096". Units are binary, as with Docker's -m."""
    number, unit = _split_number(text)
    unit = unit.lower().removesuffix("ib").removesuffix("b")
    if not number or unit not in _BINARY:
        raise UsageError(f"{what}: '{text}' is not a size", hint="for example 512m, 1g or 1.5GiB")
    return int(float(number) * _BINARY[unit])


def parse_duration(text: str, what: str) -> float:
    """Seconds of "10", "1.5", "500ms", "1m30s", "2h"."""
    rest, total, first = text.strip(), 0.0, True
    while rest or first:
        number, rest = _split_number(rest)
        length = 0
        while length < len(rest) and rest[length] not in _DIGITS:
            length += 1
        unit, rest = rest[:length], rest[length:]
        if not number or (unit not in _SECONDS and not (first and not unit and not rest)):
            raise UsageError(f"{what}: '{text}' is not a duration", hint="for example 10, 500ms or 1m30s")
        total += float(number) * _SECONDS.get(unit, 1.0)
        first = False
    return total


def _split_number(text: str) -> tuple[str, str]:
    """The digits (at most one point) that `text` begins with, "" when they are no number, and what follows."""
    length = 0
    text = text.strip()
    while length < len(text) and text[length] in _DIGITS:
        length += 1
    number = text[:length]
    good = number.count(".") <= 1 and number.strip(".") and number.isascii()
    return (number if good else ""), text[length:].strip()


def parse_timeout(text: str, what: str) -> float:
    """Seconds to wait before SIGKILL; Docker's -1, "for ever", is a year here."""
    if text == "-1":
        return 365 * 86400.0
    return parse_duration(text, what)


def parse_time(text: str, what: str, *, now_ns: int) -> int:
    """Unix nanoseconds of RFC 3339 ("2026-11-23T13:37:50Z", also a mere date), Unix seconds, or "10m" ago."""
    if text.isascii() and text.replace(".", "", 1).isdigit():
        whole, _, fraction = text.partition(".")
        return int(whole or "0") * 1_000_000_000 + int((fraction + "000000000")[:9])
    if "-" not in text:
        try:
            return now_ns - int(parse_duration(text, what) * 1e9)
        except UsageError:
            pass  # the message below names every form
    else:
        parsed = _parse_rfc3339(text)
        if parsed is not None:
            return parsed
    raise UsageError(
        f"{what}: '{text}' is not a time",
        hint="for example 2026-11-23T13:37:50Z, 1795440000 or 10m for ten minutes ago",
    )


def _parse_rfc3339(text: str) -> int | None:
    from datetime import datetime  # lazy: 1 ms, and few commands read times

    # `fromisoformat` keeps six digits of a fraction: cut ours off and add it as an integer.
    head, point, tail = text.partition(".")
    digits = tail[: len(tail) - len(tail.lstrip("0123456789"))]
    try:
        moment = datetime.fromisoformat((head + tail[len(digits) :]).replace(" ", "T", 1))
    except ValueError:
        return None
    if point and not digits:
        return None
    if moment.tzinfo is None:
        moment = moment.astimezone()
    return int(moment.timestamp()) * 1_000_000_000 + int((digits + "000000000")[:9])


def parse_integer(text: str, what: str, *, least: int, most: int = (1 << 63) - 1) -> int:
    """A whole number between two bounds."""
    try:
        number = int(text)
    except ValueError:
        raise UsageError(f"{what}: '{text}' is not a whole number") from None
    if not least <= number <= most:
        bounds = f"at least {least}" if most >= 1 << 62 else f"from {least} to {most}"
        raise UsageError(f"{what}: {number} is out of range", hint=f"a number {bounds}")
    return number


def parse_cpus(text: str, what: str = "--cpus") -> int:
    """Thousandths of a CPU: "1.5" is 1500."""
    number, rest = _split_number(text)
    if not number or rest:
        raise UsageError(f"{what}: '{text}' is not a number of CPUs", hint="for example 1.5")
    milli = round(float(number) * 1000)
    if milli < 1 and float(number) > 0:
        raise UsageError(f"{what}: {text} is too small", hint="the smallest is 0.001")
    return milli


def parse_pids(text: str) -> int:
    """0 for no limit, which Docker's users write as -1 or 0."""
    return max(0, parse_integer(text, "--pids-limit", least=-1, most=1 << 22))


def parse_cpuset(text: str) -> str:
    """A list of CPUs in the kernel's notation, cpuset(7): "0-3,6"."""
    for part in text.split(",") if text else ():
        first, dash, last = part.partition("-")
        if not (first.isascii() and first.isdigit() and (not dash or (last.isascii() and last.isdigit()))):
            raise UsageError(f"--cpuset-cpus: '{text}' is not a list of CPUs", hint="for example 0-3,6")
    return text


def parse_weight(text: str) -> int:
    """Block I/O weight; 0 for none."""
    weight = parse_integer(text, "--blkio-weight", least=0, most=1000)
    if 0 < weight < 10:
        raise UsageError(f"--blkio-weight: {weight} is out of range", hint="a number from 10 to 1000")
    return weight


def parse_signal(text: str) -> int:
    """A signal's number: "KILL", "SIGKILL", "kill", "9", "RTMIN+3"."""
    import signal  # lazy: its enumerations cost 1 ms

    if text.isascii() and text.isdigit():
        if 1 <= int(text) <= 64:
            return int(text)
    else:
        name = text.upper()
        name = name if name.startswith("SIG") else "SIG" + name
        base, sign, offset = name.partition("+" if "+" in name else "-")
        number = getattr(signal, base, None)
        if isinstance(number, signal.Signals):
            if not sign:
                return int(number)
            if base in ("SIGRTMIN", "SIGRTMAX") and offset.isascii() and offset.isdigit():
                moved = int(number) + (int(offset) if sign == "+" else -int(offset))
                if signal.SIGRTMIN <= moved <= signal.SIGRTMAX:
                    return moved
    raise UsageError(f"there is no signal '{text}'", hint="for example KILL, SIGTERM, HUP or 9")


def parse_detach_keys(text: str) -> bytes:
    """The bytes of "ctrl-p,ctrl-q" or "a,ctrl-a"; "" turns detaching off."""
    keys = bytearray()
    for part in text.split(",") if text else ():
        if len(part) == 1 and part.isascii() and part.isprintable():
            keys.append(ord(part))
        elif len(part) == 6 and part[:5].lower() == "ctrl-" and (part[5].isalpha() or part[5] in "@[\\]^_"):
            keys.append(ord(part[5].upper()) & 0x1F)
        else:
            raise UsageError(
                f"--detach-keys: '{part}' is not a key",
                hint="letters and ctrl-LETTER, separated by commas: ctrl-p,ctrl-q",
            )
    return bytes(keys)


# -- environment and labels


def parse_environment(pairs: list[str], files: list[str]) -> tuple[str, ...]:
    """NAME=value pairs of --env-file files, then of -e: later ones win. A bare NAME comes from our environment."""
    given = [line for path in files for line in _read_lines(path, "--env-file")] + pairs
    result = []
    for text in given:
        name, equals, value = text.partition("=")
        _check_variable(name, text)
        if equals:
            result.append(f"{name}={value}")
        elif name in os.environ:
            result.append(f"{name}={os.environ[name]}")
    return tuple(result)


def _check_variable(name: str, text: str) -> None:
    if not name or any(letter.isspace() for letter in name):
        raise UsageError(
            f"'{text}' is not NAME=value: a variable's name is not empty and has no blanks",
            hint="for example -e LANG=C",
        )


def parse_labels(pairs: list[str], files: list[str]) -> tuple[tuple[str, str], ...]:
    """(key, value) of --label-file files, then of --label: later ones win; a bare key has the value ""."""
    labels: dict[str, str] = {}
    for text in [line for path in files for line in _read_lines(path, "--label-file")] + pairs:
        key, _, value = text.partition("=")
        if not key.strip():
            raise UsageError(f"'{text}' is not a label", hint="for example -l tier=web")
        labels[key] = value
    return tuple(labels.items())


def _read_lines(path: str, what: str) -> list[str]:
    """The lines that say something. Leading blanks and a byte order mark are dropped, comments begin with '#'."""
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            lines = file.read(1 << 22).split("\n")
    except FileNotFoundError:
        raise NotFound(f"{what}: there is no file '{path}'") from None
    except UnicodeDecodeError:
        raise UsageError(f"{what}: '{path}' is not UTF-8 text") from None
    except OSError as error:
        raise UsageError(f"{what}: cannot read '{path}': {error.strerror}") from None
    stripped = (line.lstrip().removesuffix("\r") for line in lines)
    return [line for line in stripped if line and not line.startswith("#")]


# -- mounts


def parse_volume(text: str) -> Mount:
    """-v: HOST:TARGET[:OPTIONS], NAME:TARGET[:OPTIONS], or TARGET for an anonymous volume."""
    parts = text.split(":")
    if len(parts) > 3 or not all(parts):
        raise UsageError(f"-v: '{text}' is not SOURCE:TARGET[:OPTIONS]", hint="for example -v /srv/data:/data:ro")
    if len(parts) == 1:
        return Mount("volume", "", _target(parts[0], "-v", text), anonymous=True)
    source, target = parts[0], _target(parts[1], "-v", text)
    kind = "volume"
    if source.startswith(("/", "./", "../", "~/")) or source in (".", "..", "~"):
        kind, source = "bind", os.path.abspath(os.path.expanduser(source))
    elif "/" in source:
        raise UsageError(f"-v: '{source}' is neither a path nor a volume's name", hint=f"a path would be ./{source}")
    read_only, propagation, options = False, "rprivate", []
    for option in parts[2].split(",") if len(parts) == 3 else ():
        if option in ("ro", "rw"):
            read_only = option == "ro"
        elif option in PROPAGATIONS:
            propagation = option
        elif option in _MOUNT_FLAGS or (option == "nocopy" and kind == "volume"):
            options.append(option)
        elif option not in _IGNORED_VOLUME_OPTIONS:
            hint = f"one of: ro, rw, nocopy (volumes), {', '.join(_MOUNT_FLAGS)}, {', '.join(PROPAGATIONS)}"
            raise UsageError(f"-v: unknown option '{option}' in '{text}'", hint=hint)
    return Mount(kind, source, target, read_only, propagation, options=tuple(options))


def parse_tmpfs(text: str) -> Mount:
    """--tmpfs: TARGET[:size=64m,mode=1777,exec,…]. As with Docker it is nosuid, nodev, noexec unless told otherwise."""
    target, _, rest = text.partition(":")
    mount = Mount("tmpfs", "", _target(target, "--tmpfs", text))
    options: list[str] = []
    for option in rest.split(",") if rest else ():
        key, _, value = option.partition("=")
        if key == "size":
            mount = mount._replace(size_bytes=parse_size(value, "--tmpfs size"))
        elif key == "mode":
            mount = mount._replace(mode=_mode(value, "--tmpfs"))
        elif option in ("ro", "rw"):
            mount = mount._replace(read_only=option == "ro")
        elif option in _MOUNT_FLAGS:
            options.append(option)
        else:
            raise UsageError(
                f"--tmpfs: unknown option '{option}' in '{text}'", hint=f"size=, mode=, ro, {', '.join(_MOUNT_FLAGS)}"
            )
    return mount._replace(options=tuple(options))


def parse_mount(text: str) -> Mount:
    """--mount: type=bind|volume|tmpfs,source=…,target=…[,readonly][,…], as CSV."""
    fields = _mount_fields(text)
    kind = fields.pop("type", "volume")
    if kind not in ("bind", "volume", "tmpfs"):
        raise UsageError(f"--mount: unknown type '{kind}'", hint="one of: bind, volume, tmpfs")
    if "target" not in fields:
        raise UsageError(f"--mount: '{text}' has no target", hint="for example type=bind,source=/srv,target=/srv")
    source, target = fields.pop("source", ""), _target(fields.pop("target"), "--mount", text)
    if kind == "bind":
        if not source:
            raise UsageError(
                f"--mount: '{text}' has no source", hint="type=bind,source=/path/on/this/host,target=/path"
            )
        source = os.path.abspath(os.path.expanduser(source))
    elif kind == "tmpfs" and source:
        raise UsageError("--mount: a tmpfs has no source")
    mount = Mount(kind, source, target, anonymous=kind == "volume" and not source)
    if "readonly" in fields:
        mount = mount._replace(read_only=_truth(fields.pop("readonly"), "--mount: readonly"))
    if kind == "bind" and "bind-propagation" in fields:
        mount = mount._replace(propagation=_propagation(fields.pop("bind-propagation")))
    if kind == "volume" and "volume-nocopy" in fields and _truth(fields.pop("volume-nocopy"), "--mount: volume-nocopy"):
        mount = mount._replace(options=("nocopy",))
    if kind == "tmpfs":
        mount = mount._replace(
            size_bytes=parse_size(fields.pop("tmpfs-size", "0"), "--mount: tmpfs-size"),
            mode=_mode(fields.pop("tmpfs-mode", "1777"), "--mount"),
        )
    fields.pop("consistency", None)
    if fields:
        raise UsageError(f"--mount: unknown key '{next(iter(fields))}' for type={kind}", hint=_MOUNT_KEYS[kind])
    return mount


_MOUNT_KEYS = {
    "bind": "type, source, target, readonly, bind-propagation",
    "volume": "type, source, target, readonly, volume-nocopy",
    "tmpfs": "type, target, readonly, tmpfs-size, tmpfs-mode",
}
_MOUNT_SYNONYMS = {"src": "source", "dst": "target", "destination": "target", "ro": "readonly"}


def _mount_fields(text: str) -> dict[str, str]:
    parts = text.split(",")
    if '"' in text:
        import csv  # lazy: only a quoted comma needs it

        parts = next(csv.reader([text]), [])
    fields: dict[str, str] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        key = _MOUNT_SYNONYMS.get(key.strip().lower(), key.strip().lower())
        if not equals and key not in ("readonly", "volume-nocopy"):
            raise UsageError(
                f"--mount: '{part}' is not key=value", hint="for example type=bind,source=/srv,target=/srv"
            )
        fields[key] = value if equals else "true"
    return fields


def _target(path: str, what: str, text: str) -> str:
    if not path.startswith("/"):
        raise UsageError(f"{what}: the target '{path}' in '{text}' is not an absolute path", hint=f"write /{path}")
    return path


def _mode(text: str, what: str) -> int:
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o7777:
        raise UsageError(f"{what}: '{text}' is not a file mode", hint="octal digits, for example mode=1777")
    return mode


def _truth(text: str, what: str) -> bool:
    if text.lower() in ("true", "1"):
        return True
    if text.lower() in ("false", "0"):
        return False
    raise UsageError(f"{what} is true or false, not '{text}'")


def _propagation(text: str) -> str:
    if text not in PROPAGATIONS:
        raise UsageError(f"--mount: unknown propagation '{text}'", hint=f"one of: {', '.join(PROPAGATIONS)}")
    return text


# -- everything else that `run` takes


def parse_device(text: str) -> Device:
    """--device: HOST[:PATH][:rwm]."""
    parts = text.split(":")
    access = "rwm"
    if len(parts) > 1 and parts[-1] and not parts[-1].startswith("/"):
        access = parts.pop()
    if not 1 <= len(parts) <= 2 or not all(part.startswith("/") for part in parts):
        raise UsageError(f"--device: '{text}' is not HOST[:PATH][:rwm]", hint="for example --device /dev/fuse")
    if not set(access) <= set("rwm") or len(set(access)) != len(access):
        raise UsageError(f"--device: '{access}' is not made of r, w and m", hint="for example /dev/sda:/dev/disk:r")
    return Device(parts[0], parts[-1], access)


def parse_ulimit(text: str) -> Ulimit:
    """--ulimit: NAME=SOFT[:HARD]; -1 and "unlimited" mean no limit."""
    name, equals, rest = text.partition("=")
    if name not in ULIMITS:
        raise UsageError(f"--ulimit: there is no limit '{name}'", hint=f"one of: {', '.join(ULIMITS)}")
    soft, colon, hard = rest.partition(":")
    if not equals or not soft or (colon and not hard):
        raise UsageError(f"--ulimit: '{text}' is not NAME=SOFT[:HARD]", hint="for example nofile=1024:4096")
    limits = [
        -1 if part == "unlimited" else parse_integer(part, f"--ulimit {name}", least=-1)
        for part in (soft, hard or soft)
    ]
    if limits[1] != -1 and (limits[0] == -1 or limits[0] > limits[1]):
        raise UsageError(f"--ulimit: the soft limit of '{text}' is above the hard one")
    return Ulimit(name, limits[0], limits[1])


def parse_restart(text: str) -> Restart:
    """--restart: no, always, unless-stopped, on-failure[:RETRIES]."""
    policy, colon, retries = text.partition(":")
    if policy not in ("no", "always", "unless-stopped", "on-failure"):
        raise UsageError(
            f"--restart: unknown policy '{policy}'", hint="one of: no, on-failure[:RETRIES], always, unless-stopped"
        )
    if not colon:
        return Restart(policy)
    if policy != "on-failure":
        raise UsageError(f"--restart: '{policy}' takes no number of retries", hint="only on-failure does: on-failure:3")
    return Restart(policy, parse_integer(retries, "--restart on-failure", least=0, most=1 << 31))


def parse_security(cap_add: list[str], cap_drop: list[str], options: list[str]) -> Security:
    """--cap-add, --cap-drop and --security-opt together."""
    security = Security(tuple(map(_capability, cap_add)), tuple(map(_capability, cap_drop)))
    for option in options:
        at = min((option.index(mark) for mark in "=:" if mark in option), default=len(option))
        key, value = option[:at], option[at + 1 :]
        if key == "seccomp" and value:
            profile = {"builtin": "default", "default": "default", "unconfined": "unconfined"}.get(value)
            security = security._replace(seccomp=profile or os.path.abspath(value))
        elif key == "no-new-privileges":
            security = security._replace(no_new_privileges=_truth(value or "true", "--security-opt no-new-privileges"))
        elif option in ("systempaths=unconfined", "unmask=all", "unmask=ALL"):
            security = security._replace(unmask=True)
        elif option not in ("apparmor=unconfined", "label=disable"):  # nothing is confined that way here
            raise UsageError(
                f"--security-opt: '{option}' is not known",
                hint="seccomp=unconfined|PROFILE.json, no-new-privileges[=false], systempaths=unconfined",
            )
    return security


def _capability(text: str) -> str:
    return text.upper().removeprefix("CAP_")


_SWAPPED = {ord("."): "/", ord("/"): "."}


def parse_sysctls(pairs: list[str]) -> tuple[tuple[str, str], ...]:
    """--sysctl: KEY=VALUE. As in sysctl(8), the first separator says what the other one is: a part of a name.

    The keys have dots between their parts: "net.ipv4.conf.eth0/5.mtu", and for "net/ipv4/conf/eth0.5/mtu" the same.
    """
    result: dict[str, str] = {}
    for text in pairs:
        key, equals, value = text.partition("=")
        if not key or not equals or "\0" in text or ".." in key:
            raise UsageError(f"--sysctl: '{text}' is not KEY=VALUE", hint="for example net.core.somaxconn=1024")
        first = next((letter for letter in key if letter in "./"), ".")
        result[key if first == "." else key.translate(_SWAPPED)] = value
    return tuple(result.items())


def parse_log_options(pairs: list[str]) -> LogLimits:
    """--log-opt: max-size=10m, max-file=3."""
    limits = LogLimits()
    for text in pairs:
        key, _, value = text.partition("=")
        if key == "max-size":
            limits = limits._replace(max_bytes=parse_size(value, "--log-opt max-size"))
        elif key == "max-file":
            limits = limits._replace(files=parse_integer(value, "--log-opt max-file", least=1, most=1000))
        else:
            raise UsageError(f"--log-opt: unknown option '{key}'", hint="max-size=10m or max-file=3")
    return limits


def parse_hosts(texts: list[str]) -> tuple[tuple[str, str], ...]:
    """--add-host: NAME:ADDRESS or NAME=ADDRESS."""
    result = []
    for text in texts:
        at = min((text.index(mark) for mark in "=:" if mark in text), default=0)
        name, address = text[:at], text[at + 1 :].strip("[]")
        if not name or any(letter.isspace() for letter in name):
            raise UsageError(f"--add-host: '{text}' is not NAME:ADDRESS", hint="for example --add-host db:10.0.0.5")
        result.append((name, parse_address(address, "--add-host")))
    return tuple(result)


def parse_address(text: str, what: str) -> str:
    """An IPv4 or IPv6 address, as it was written."""
    import _socket  # lazy: few machines name addresses

    for family in (_socket.AF_INET, _socket.AF_INET6):
        try:
            _socket.inet_pton(family, text.partition("%")[0])
        except OSError:
            continue
        return text
    raise UsageError(f"{what}: '{text}' is not an IP address", hint="for example 10.0.0.5 or fd00::5")
