"""What clients may ask of a running machine: one function per request, all arguments checked here."""

from __future__ import annotations

import os

from nagaya.engines.base import Stats
from nagaya.errors import Conflict, HostError, NagayaError, RemoteError, Unsupported
from nagaya.model import state as phases
from nagaya.model.policy import APPLET
from nagaya.model.spec import Process
from nagaya.protocol import control
from nagaya.static import Any
from nagaya.storage import machines
from nagaya.storage.records import from_data, to_data, write_file
from nagaya.supervisor.client import Client

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.supervisor.supervisor import Supervisor


def handle(machine: Supervisor, client: Client, request: dict[str, object]) -> None:
    """Carry out one request; errors raised here go to the client, which is then closed."""
    op = str(request.get("op"))
    call = _REQUESTS.get(op)
    if call is None:
        raise RemoteError(
            f"control protocol: unknown request '{op}'", hint="the machine was started by another version"
        )
    call(machine, client, request)


def describe(request: dict[str, object]) -> str:
    """What was asked for, in a user's words, for a sentence that begins with "cannot"."""
    op = str(request.get("op"))
    return _WORDS.get(op, op.replace("_", " the "))


def tell_end(machine: Supervisor, clients: list[Client], status: int, problem: NagayaError | None) -> None:
    """The machine has ended for good: answer everyone who is still connected, and close."""
    launcher = machine.take_launcher()
    for client in clients:
        if client is launcher:
            client.fail(problem or RemoteError(f"the machine ended with status {status} before it was ready"))
        elif client in machine.waiters:
            client.finish(control.reply(exit_code=status))
        elif client.program is not None:
            client.finish(control.exited(status, problem.message if problem else ""))
        else:
            client.close()


def _number(request: dict[str, object], name: str, low: int, high: int) -> int:
    value = request.get(name)
    if type(value) is not int or not low <= value <= high:
        raise RemoteError(f"control protocol: '{name}' must be a number from {low} to {high}")
    return value


def _require(machine: Supervisor, command: str) -> None:
    phases.require(command, machine.state.phase, machine.spec.name)


def _need(machine: Supervisor, capability: str, what: str) -> None:
    if capability not in machine.engine.capabilities:
        raise Unsupported(f"a machine of type '{machine.spec.type}' cannot {what}")


def _attach(machine: Supervisor, client: Client, request: dict[str, object]) -> None:
    _require(machine, "attach")
    assert machine.main is not None
    client.send(control.reply(tty=machine.main.tty))
    machine.main.join(client, stdin=bool(request.get("stdin")) and machine.spec.process.stdin)


def _exec(machine: Supervisor, client: Client, request: dict[str, object]) -> None:
    """A further program (or, with `applet`, one of the agent's own functions) in the machine."""
    _require(machine, "exec")
    if machine.booted is None or machine.programs is None:
        raise Conflict(f"machine '{machine.spec.name}' is just ending", state=machine.state.phase)
    process = from_data(Process, request.get("process"), what="exec")
    applet, detach = bool(request.get("applet")), bool(request.get("detach"))
    policy = APPLET if applet else machine.booted.policy
    data_disk = applet and bool(request.get("data_disk")) and machine.engine.rootfs_kind == "disk"
    program = machine.programs.spawn(process, policy, applet=applet, discard=detach, data_disk=data_disk)

    runs = False

    def started(pid: int) -> None:
        nonlocal runs
        runs = True
        if detach:
            client.finish(control.reply(pid=pid))
        else:
            client.send(control.reply(pid=pid))

    def ended(status: int) -> None:
        if not runs:
            client.fail(
                Conflict(f"machine '{machine.spec.name}' ended before the program began", state=machine.state.phase)
            )
        elif client in program.clients:
            client.finish(control.exited(status))

    program.on_started, program.on_failed, program.on_exited = started, client.fail, ended
    if not detach:
        program.join(client, stdin=process.stdin)
    machine.programs.flush()
    if not applet:
        machine.record("exec", command=" ".join(process.argv)[:256])


def _stop(machine: Supervisor, client: Client, request: dict[str, object]) -> None:
    _require(machine, "stop")
    timeout_ms = _number(request, "timeout_ms", 0, 1 << 40)
    machine.waiters.append(client)
    machine.request_stop(timeout_ms / 1000)


def _kill(machine: Supervisor, client: Client, request: dict[str, object]) -> None:
    _require(machine, "kill")
    number = _number(request, "signal", 1, 64)
    machine.record("kill", signal=str(number))
    if number == 9:
        machine.keep = machine.keep or bool(request.get("keep"))
        machine.waiters.append(client)
        machine.request_kill()
        return
    assert machine.main is not None
    machine.main.signal(number)
    client.finish(control.reply())


def _pause(machine: Supervisor, client: Client, request: dict[str, object]) -> None:
    _require(machine, "pause")
    _need(machine, "pause", "be paused")
    machine.pause()
    client.finish(control.reply())


def _unpause(machine: Supervisor, client: Client, request: dict[str, object]) -> None:
    _require(machine, "unpause")
    machine.refuse_while_saving()
    machine.resume()
    client.finish(control.reply())


def _save(machine: Supervisor, client: Client, request: dict[str, object]) -> None:
    """Put what a snapshot is made of into a directory that the manager has made, below the machine's own."""
    from nagaya.supervisor.saving import Saving  # lazy: only snapshots

    _require(machine, "snapshot")
    machine.refuse_while_saving()
    place, memory, base = request.get("place"), bool(request.get("memory")), request.get("base", "")
    _need(machine, "pause", "be paused, which a snapshot of a running one takes")
    if memory:
        _need(machine, "memory", "have its memory saved")
    below = f"{machine.paths.machine(machine.spec.id)}/snapshots"
    if not isinstance(place, str) or os.path.dirname(place) != below:
        raise RemoteError("control protocol: a snapshot belongs below its machine's directory")
    if not isinstance(base, str) or (base and os.path.dirname(os.path.dirname(base)) != below):
        raise RemoteError("control protocol: a snapshot's base is one of its machine's")
    if machine.booted is None:
        raise Conflict(f"machine '{machine.spec.name}' is just ending", state=machine.state.phase)
    if machine.booted.setup and machine.state.phase == phases.PAUSED:
        raise Conflict(
            f"machine '{machine.spec.name}' is paused, and its own kernel has to write out what it has in memory first",
            hint=f"let it go on with 'nagaya unpause {machine.spec.name}'",
            state=machine.state.phase,
            required="running",
        )
    if memory and machine.state.phase == phases.PAUSED and machine.booted.agent >= 0:
        raise Unsupported(
            f"machine '{machine.spec.name}' is paused, and its agent has to come to rest before its memory is saved",
            hint=f"let it go on with 'nagaya unpause {machine.spec.name}'",
        )
    if memory and "replug" in machine.engine.capabilities:
        from nagaya.supervisor.network import refuse_free_card

        refuse_free_card(machine)
    machine.saving = Saving(machine, client, place, memory=memory, base=base)
    try:
        machine.saving.begin()
    except BaseException:
        machine.saving = None
        raise


def _describe(machine: Supervisor, client: Client, request: dict[str, object]) -> None:
    """What the machine is made of, for another host's engine to compare."""
    _require(machine, "migrate")
    _need(machine, "migrate", "be migrated while it runs")
    described: str = machine.engine.describe()  # type: ignore[attr-defined]
    client.finish(control.reply(described=described))


def _leave(machine: Supervisor, client: Client, request: dict[str, object]) -> None:
    """Send the machine to another host over the stream that the client hands us by a socket in the run-time directory."""
    from nagaya.supervisor.leaving import Leaving  # lazy: migrations alone

    _require(machine, "migrate")
    machine.refuse_while_saving()
    _need(machine, "migrate", "be migrated while it runs")
    socket, migration_id, to = (str(request.get(name)) for name in ("socket", "migration", "to"))
    if "/" in socket or not socket.startswith("migrate-"):
        raise RemoteError("control protocol: a migration's socket is in the machine's run-time directory")
    if machine.booted is None:
        raise Conflict(f"machine '{machine.spec.name}' is just ending", state=machine.state.phase)
    machine.saving = Leaving(machine, client, migration_id, to)
    try:
        machine.saving.begin(
            socket, max_downtime_ms=_number(request, "max_downtime_ms", 1, 1 << 30),
            post_copy=bool(request.get("post_copy")),
        )  # fmt: skip
    except BaseException as problem:
        machine.saving = None
        if isinstance(problem, OSError):
            raise HostError.from_os(problem, "cannot migrate the machine") from None
        raise


def _resolve(machine: Supervisor, client: Client, request: dict[str, object]) -> None:
    """What became of a machine that was handed over to a target which did not answer any more."""
    from nagaya.supervisor.leaving import Leaving  # lazy: migrations alone

    if not isinstance(machine.saving, Leaving):
        raise Conflict(f"machine '{machine.spec.name}' was not handed over to another host", state=machine.state.phase)
    machine.saving.resolve(client, runs_there=bool(request.get("there")))


def _wait(machine: Supervisor, client: Client, request: dict[str, object]) -> None:
    machine.waiters.append(client)


def _stats(machine: Supervisor, client: Client, request: dict[str, object]) -> None:
    _require(machine, "stats")
    _need(machine, "stats", "report its use of resources")
    stats: Stats = machine.engine.stats()  # type: ignore[attr-defined]
    client.finish(control.reply(**to_data(stats)))


def _update(machine: Supervisor, client: Client, request: dict[str, object]) -> None:
    """The manager has rewritten the record: take the limits and the restart policy from it."""
    spec = machines.load_spec(machine.paths, machine.spec.id)
    told: tuple[str, ...] = ()
    if spec.limits != machine.spec.limits:
        _need(machine, "limits", "change its limits while it runs")
        if machine.booted is not None:
            told = machine.engine.set_limits(spec.limits)  # type: ignore[attr-defined]
    if spec.name != machine.spec.name and spec.network == "bridge":
        from nagaya.net import attach  # lazy: rare

        attach.rename(machine.paths, spec)
    machine.spec = spec
    client.finish(control.reply(told=told))


def _plug(machine: Supervisor, client: Client, request: dict[str, object]) -> None:
    """The manager has put a network into the record: connect the machine to it."""
    from nagaya.net import live  # lazy: rare
    from nagaya.supervisor.network import plug

    before, network = machine.spec, str(request.get("network"))
    machine.spec = machines.load_spec(machine.paths, machine.spec.id)

    def done(problem: NagayaError | None) -> None:
        plan = live.load(machine.paths, machine.spec.id)
        is_plugged = plan is not None and any(link.network == network for link in plan.links)
        if problem is not None and not is_plugged:
            machine.spec = before
            client.fail(problem)
        else:
            client.finish(control.reply(problem=problem.message if problem is not None else ""))

    try:
        plug(machine, network, done)
    except BaseException:
        machine.spec = before
        raise


def _unplug(machine: Supervisor, client: Client, request: dict[str, object]) -> None:
    """The manager has taken a network out of the record: cut the machine off it."""
    from nagaya.supervisor.network import unplug  # lazy: rare

    machine.spec = machines.load_spec(machine.paths, machine.spec.id)

    def done(problem: NagayaError | None) -> None:
        client.finish(control.reply(problem=problem.message if problem is not None else ""))

    unplug(machine, str(request.get("network")), done)


def _screenshot(machine: Supervisor, client: Client, request: dict[str, object]) -> None:
    """The picture is too large for a reply: it lies in the run-time directory, for the client to take."""
    _require(machine, "screen")
    _need(machine, "screen", "show a screen")
    format_ = "ppm" if request.get("format") == "ppm" else "png"
    data = machine.engine.screenshot(format_)  # type: ignore[attr-defined]
    name = f"screen-{os.urandom(8).hex()}.{format_}"
    write_file(f"{machine.paths.runtime(machine.spec.id)}/{name}", data)
    client.finish(control.reply(file=name))


def _press_keys(machine: Supervisor, client: Client, request: dict[str, object]) -> None:
    _require(machine, "keys")
    _need(machine, "screen", "be typed to")
    words, text = request.get("keys"), request.get("text")
    if not isinstance(words, list) or not isinstance(text, str):
        raise RemoteError("control protocol: 'keys' must be a list, and 'text' a text")
    machine.engine.press_keys(tuple(map(str, words)), text)  # type: ignore[attr-defined]
    client.finish(control.reply())


def _find_login(machine: Supervisor, client: Client, request: dict[str, object]) -> None:
    """Where the ssh server of a whole machine is to be reached."""
    _require(machine, "login")
    _need(machine, "power", "be logged in to")
    port = machine.engine.find_forwarded()  # type: ignore[attr-defined]
    if port:
        client.finish(control.reply(host="127.0.0.1", port=port))
    else:
        client.finish(control.reply(host=machine.state.address, port=22))


def _find_guest_links(machine: Supervisor, client: Client, request: dict[str, object]) -> None:
    """What a whole machine's system says of its network, by QEMU's agent."""
    _require(machine, "login")
    _need(machine, "guest-agent", "tell what its system knows")
    client.finish(control.reply(links=machine.engine.find_guest_links()))  # type: ignore[attr-defined]


def _change_disc(machine: Supervisor, client: Client, request: dict[str, object]) -> None:
    """The manager has put another disc into the record: put it into the machine."""
    _require(machine, "disc")
    _need(machine, "discs", "get another disc")
    number = _number(request, "drive", 0, 1024)
    spec = machines.load_spec(machine.paths, machine.spec.id)
    if spec.hardware is None or number >= len(spec.hardware.drives) or not spec.hardware.drives[number].cdrom:
        raise RemoteError(f"control protocol: the machine's record has no CD drive {number}")
    drive = spec.hardware.drives[number]
    machine.engine.change_disc(number, drive.path, drive.format)  # type: ignore[attr-defined]
    machine.spec = spec
    client.finish(control.reply())


def _change_disks(machine: Supervisor, client: Client, request: dict[str, object]) -> None:
    """Of a whole machine: put a disk in, take one out, make one larger."""
    from nagaya.supervisor import plugging  # lazy: rare

    _require(machine, "plug")
    _need(machine, "disks", "change its disks while it runs")
    machine.refuse_while_saving()
    if request["op"] == "plug_disk":
        plugging.plug_disk(machine, _number(request, "slot", 0, 1024))  # 0: refused by the engine, which says why
    elif request["op"] == "unplug_disk":
        plugging.unplug_disk(machine, _number(request, "slot", 1, 1024))
    else:
        plugging.resize_disk(machine, _number(request, "drive", 0, 1024), _number(request, "size_bytes", 1, 1 << 62))
    client.finish(control.reply())


_WORDS = {
    "plug_disk": "attach the disk", "unplug_disk": "detach the disk", "login": "find out how to log in",
    "guest_links": "ask for its addresses", "press_keys": "press keys", "screenshot": "take a screenshot",
    "describe": "describe the machine", "leave": "migrate the machine", "resolve": "settle the migration",
    "wait": "wait for the machine", "stats": "read its statistics", "plug": "connect the network",
    "unplug": "disconnect the network",
}  # fmt: skip
_REQUESTS: dict[str, Any] = {
    "change_disc": _change_disc,
    "plug_disk": _change_disks,
    "unplug_disk": _change_disks,
    "resize_disk": _change_disks,
    "login": _find_login,
    "guest_links": _find_guest_links,
    "screenshot": _screenshot,
    "press_keys": _press_keys,
    "attach": _attach,
    "exec": _exec,
    "stop": _stop,
    "kill": _kill,
    "pause": _pause,
    "unpause": _unpause,
    "save": _save,
    "describe": _describe,
    "leave": _leave,
    "resolve": _resolve,
    "wait": _wait,
    "stats": _stats,
    "update": _update,
    "plug": _plug,
    "unplug": _unplug,
}
