"""`nagaya inspect`, and the same for one kind of thing: `machine inspect`, `image inspect`, `volume inspect`."""

from __future__ import annotations

import sys

from nagaya.cli.context import Context
from nagaya.cli.each import each_name
from nagaya.cli.flags import MANY, Command, Flag, Parsed
from nagaya.cli.listing import print_json
from nagaya.cli.views import volume_record
from nagaya.errors import NotFound, UsageError

KINDS = ("machine", "image", "volume")
_FORMAT = Flag("-f --format", "A Go template such as '{{.State.Phase}}', or json", value="FORMAT")
_JSON = Flag("--json", "Print one JSON array (as without it)")


def inspect(context: Context, parsed: Parsed) -> int:
    """A machine of that name, else an image, else a volume."""
    kind = parsed.text("type")
    kind = "machine" if kind == "container" else kind
    if kind and kind not in KINDS:
        raise UsageError(f"--type: unknown kind '{kind}'", hint=f"one of: {', '.join(KINDS)}")
    return _inspect(context, parsed, (kind,) if kind else KINDS)


def inspect_machine(context: Context, parsed: Parsed) -> int:
    return _inspect(context, parsed, ("machine",))


def inspect_image(context: Context, parsed: Parsed) -> int:
    return _inspect(context, parsed, ("image",))


def inspect_volume(context: Context, parsed: Parsed) -> int:
    return _inspect(context, parsed, ("volume",))


def _inspect(context: Context, parsed: Parsed, kinds: tuple[str, ...]) -> int:
    """What was found is printed even when something else was not."""
    found: list[dict[str, object]] = []
    status = each_name(context, parsed.words, lambda name: found.append(_look(context, name, kinds)))
    format = parsed.text("format")
    if format and format != "json":
        from nagaya.cli.template import Template  # lazy: only --format

        template = Template(format)
        for data in found:
            sys.stdout.write(template.render(docker_view(data)) + "\n")
    else:
        print_json(found)
    return status


def _look(context: Context, name: str, kinds: tuple[str, ...]) -> dict[str, object]:
    for kind in kinds:
        try:
            if kind == "machine":
                return context.host.machines.get(name).inspect()
            if kind == "image":
                found: dict[str, object] = context.host.images.inspect(name)
                return found
            return volume_record(context.host.volumes.get(name))
        except NotFound:
            if len(kinds) == 1:
                raise
    raise NotFound(
        f"there is no machine, image or volume '{name}'", hint="'nagaya ps -a' and 'nagaya images' list them"
    )


def docker_view(data: dict[str, object]) -> dict[str, object]:
    """A machine's record with the paths that Docker's users write in templates, next to its own fields."""
    process, state = data.get("process"), data.get("state")
    if not isinstance(process, dict) or not isinstance(state, dict):
        return data
    phase = state.get("phase")
    docker_state = {
        **state, "Status": phase, "Running": phase in ("running", "paused", "restarting"), "Paused": phase == "paused",
        "Restarting": phase == "restarting", "ExitCode": state.get("exit_code"), "Error": state.get("error"),
        "OOMKilled": state.get("oom_killed"), "Pid": state.get("pid"), "Origin": state.get("origin", ""),
    }  # fmt: skip
    limits, restart = _dict(data.get("limits")), _dict(data.get("restart"))
    argv = process.get("argv")
    argv = list(argv) if isinstance(argv, (list, tuple)) else []
    return {
        **data,
        "State": docker_state,
        "state": docker_state,
        "Path": argv[0] if argv else "",
        "Args": argv[1:],
        "Config": {
            "Env": process.get("env"), "Cmd": argv, "User": process.get("user"), "WorkingDir": process.get("workdir"),
            "Tty": process.get("tty"), "OpenStdin": process.get("stdin"), "Image": data.get("image"),
            "Hostname": data.get("hostname"), "Labels": data.get("labels"), "StopSignal": data.get("stop_signal"),
        },
        "HostConfig": {
            "Memory": limits.get("memory_bytes"), "NanoCpus": _number(limits.get("cpus_milli")) * 1_000_000,
            "PidsLimit": limits.get("pids"), "CpusetCpus": limits.get("cpuset_cpus"),
            "BlkioWeight": limits.get("blkio_weight"), "NetworkMode": data.get("network"),
            "AutoRemove": data.get("auto_remove"), "ReadonlyRootfs": data.get("read_only"),
            "RestartPolicy": {"Name": restart.get("policy"), "MaximumRetryCount": restart.get("max_retries")},
        },
        "NetworkSettings": {
            "IPAddress": state.get("address"),
            "Networks": {str(link.get("network")): _docker_link(link) for link in _links(data)},
        },
        "RestartCount": state.get("restarts"),
        "LogPath": data.get("log_path"),
    }  # fmt: skip


def _links(data: dict[str, object]) -> list[dict[str, object]]:
    links = data.get("links")
    return [link for link in links if isinstance(link, dict)] if isinstance(links, list) else []


def _docker_link(link: dict[str, object]) -> dict[str, object]:
    return {
        "IPAddress": link.get("address"), "IPPrefixLen": link.get("prefix"), "Gateway": link.get("gateway"),
        "GlobalIPv6Address": link.get("address6"), "GlobalIPv6PrefixLen": link.get("prefix6"),
        "IPv6Gateway": link.get("gateway6"), "MacAddress": link.get("mac"), "Aliases": link.get("names"),
    }  # fmt: skip


def _dict(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0


_EXAMPLES = (
    ("nagaya inspect web", ""),
    ("nagaya inspect -f '{{.State.Status}} {{.State.Pid}}' web", ""),
    ("nagaya inspect -f '{{json .Config.Env}}' web", ""),
)
_ABOUT = (
    "Templates find fields by their names in the JSON, in any case (.State.ExitCode is exit_code); for machines also"
    " by Docker's common paths: .State.Status, .State.Running, .Config.*, .HostConfig.*, .NetworkSettings.IPAddress."
)
INSPECT = Command(
    inspect,
    usage="NAME [NAME...]",
    words=(1, MANY),
    flags=(_FORMAT, _JSON, Flag("--type", "Look only for a machine, image or volume", value="KIND")),
    about=_ABOUT,
    examples=_EXAMPLES,
)
INSPECT_MACHINE = Command(
    inspect_machine, usage="MACHINE [MACHINE...]", words=(1, MANY), flags=(_FORMAT, _JSON), about=_ABOUT
)
INSPECT_IMAGE = Command(inspect_image, usage="IMAGE [IMAGE...]", words=(1, MANY), flags=(_FORMAT, _JSON))
INSPECT_VOLUME = Command(inspect_volume, usage="VOLUME [VOLUME...]", words=(1, MANY), flags=(_FORMAT, _JSON))
