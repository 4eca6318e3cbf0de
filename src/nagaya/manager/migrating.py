"""Sending a running machine to another Nagaya, and finding out what became of it. docs/migration.md."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable

from nagaya import __version__
from nagaya.engines import engine_of
from nagaya.errors import Conflict, HostError, NagayaError, RemoteError, Unsupported
from nagaya.kernel import unix
from nagaya.manager.attachment import connect as connect_supervisor
from nagaya.migration import addresses, frames
from nagaya.migration.addresses import Address
from nagaya.migration.departure import Terms
from nagaya.migration.offer import Offer, digest_root
from nagaya.migration.stream import Stream
from nagaya.model.spec import Attachment, MachineSpec
from nagaya.model.state import ALIVE, require
from nagaya.net import live
from nagaya.protocol import control
from nagaya.static import Any, NamedTuple
from nagaya.storage import machines, migrations, rootfs
from nagaya.storage.records import to_data

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.manager.machine import Machine

ACCEPTED_WITHIN_S = 600.0  # the target may have to unpack an image, and to make a file system of it
ANSWERED_WITHIN_S = 30.0
_ASK_TRIES, _ASK_EVERY_S = 10, 0.5
_TAKEN_WITHIN_MS = 10_000
_BLOB_BYTES = frames.DATA_BYTES


class Sent(NamedTuple):
    """A machine that runs elsewhere by now. `downtime_ms` is from its standing here to its running there, `downtime_steps_ms`
    where that went (pause, state, rest, adopt, note, run), which another type may have fewer of.
    """

    machine_id: str
    downtime_ms: float
    downtime_steps_ms: dict[str, float]
    total_s: float
    rounds: int
    sent_bytes: int
    post_copy: bool


def send(
    machine: Machine, to: Address, terms: Terms, *, on_progress: Callable[[dict[str, object]], None] | None = None
) -> Sent:
    """Send it; it is not this store's any more when this returns. When this raises, it goes on here.

    The one exception says so: a `Conflict` of state "handed over", when the stream broke at the last step and the target
    could not be asked. Raises `Unsupported`, `Conflict`, `RemoteError`, `HostError`, and whatever the target refuses with.
    """
    began_s = time.monotonic()
    with machine.lock():
        machine.reload()
        require("migrate", machine.settled().phase, machine.name)
        _check(machine, terms)
        migration_id = os.urandom(16).hex()
        offer = plan_offer(machine, migration_id)
        try:
            with addresses.connect(to) as fds:
                _offer(machine, Stream(*fds), offer)
                moved = _leave(machine, fds, migration_id, to, terms, on_progress)
        except NagayaError:
            if migrations.find_leaving(machine.directory) is None:
                raise
            if not _ask_and_settle(machine, to):
                raise
            return Sent(machine.id, 0.0, {}, time.monotonic() - began_s, 0, 0, terms.post_copy)
    return Sent(
        machine.id, _number(moved, "paused_ms"), _steps(moved), time.monotonic() - began_s, int(_number(moved, "rounds")),
        int(_number(moved, "sent_bytes")), bool(moved.get("post_copy")),
    )  # fmt: skip


def _number(answer: dict[str, object], name: str) -> float:
    value = answer.get(name)
    return float(value) if isinstance(value, (int, float)) else 0.0


def _steps(answer: dict[str, object]) -> dict[str, float]:
    steps = answer.get("steps_ms")
    return {name: float(took) for name, took in steps.items()} if isinstance(steps, dict) else {}


def _check(machine: Machine, terms: Terms) -> None:
    """All that can be said against it here."""
    spec = machine.spec
    machine.need_agent("migrate it")
    engine = engine_of(spec)
    if "migrate" not in engine.capabilities:
        raise Unsupported(
            f"a machine of type '{spec.type}' cannot be migrated while it runs: {engine.missing.get('migrate', '')}",
            hint="stop it, and take its disk along: nagaya commit, nagaya save; or use --type kvm",
        )
    if terms.post_copy and "post-copy" not in engine.capabilities:
        raise Unsupported(
            f"a machine of type '{spec.type}' cannot run on the target before its memory is there",
            hint="leave --post-copy away; --max-downtime says how long it may stand",
        )
    mounts = [mount.target for mount in spec.mounts if mount.kind != "tmpfs"]
    if mounts:
        raise Unsupported(
            f"machine '{machine.name}' has '{mounts[0]}' from this host: what virtiofsd knows of it cannot be taken along",
            hint="a machine without volumes and directories of its host can be migrated",
        )
    if machine.snapshots.list():
        raise Conflict(
            f"machine '{machine.name}' has snapshots, which would not come along",
            hint=f"remove them first: nagaya snapshot rm --all {machine.name}",
            state="snapshots",
        )


def plan_offer(machine: Machine, migration_id: str) -> Offer:
    """What the target is told. The machine runs. Raises `RemoteError`, `HostError`, `IntegrityError`."""
    spec, state = machine.spec, machine.state
    disks = rootfs.plan_disks(machine.directory, spec)
    described = machine.ask("describe")
    size, digest = digest_root(disks.image)
    return Offer(
        id=migration_id, version=__version__, spec=_with_addresses(machine, spec), started_ns=state.started_ns,
        restarts=state.restarts, disk_bytes=os.stat(disks.data).st_size, root_bytes=size, root_digest=digest,
        engine=str(described.get("described")),
    )  # fmt: skip


def _with_addresses(machine: Machine, spec: MachineSpec) -> MachineSpec:
    """The record with the addresses that the machine has, for it to keep them."""
    plan = live.load(machine.paths, machine.id)
    if plan is None or plan.is_user or not plan.links:
        return spec
    known = {one.network: one for one in spec.attachments}
    kept = tuple(
        known.get(link.network, Attachment(link.network))._replace(
            address=link.address, address6=link.address6, mac=link.mac
        )
        for link in plan.links
    )
    return spec._replace(attachments=kept, ports=machine.state.ports or spec.ports)


def _offer(machine: Machine, stream: Stream, offer: Offer) -> None:
    """Until the target is ready for the machine: what it lacks is sent. Raises what it refuses with."""
    stream.greet()
    stream.send_json(frames.OFFER, to_data(offer))
    while True:
        frame = stream.receive(patience_s=ACCEPTED_WITHIN_S)
        if frame.type == frames.ACCEPT:
            return
        if frame.type == frames.REFUSE:
            raise frames.parse_refusal(frame)
        if frame.type == frames.WANT_IMAGE:
            _send_image(machine, stream)
        elif frame.type == frames.WANT_ROOT:
            send_file(stream, rootfs.plan_disks(machine.directory, machine.spec).image)
        else:
            raise frames.unexpected(frame)


def _send_image(machine: Machine, stream: Stream) -> None:
    """The machine's image as an archive, by way of a file: its size is known then, and its being whole."""
    path = f"{machine.directory}/image.tar.tmp"
    try:
        machine.images.save((machine.spec.image_id,), path)
        send_file(stream, path)
    finally:
        if os.path.lexists(path):
            os.unlink(path)


def send_file(stream: Stream, path: str) -> None:
    """Its content, in pieces, and that it is whole. Raises `HostError`, `RemoteError`."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            at = 0
            while data := os.read(fd, _BLOB_BYTES):
                stream.send(frames.BLOB, at, data)
                at += len(data)
        finally:
            os.close(fd)
    except OSError as error:
        raise HostError.from_os(error, "cannot read what the target needs") from None
    stream.send(frames.BLOB_END, at)


def _leave(
    machine: Machine, fds: tuple[int, int], migration_id: str, to: Address, terms: Terms,
    on_progress: Callable[[dict[str, object]], None] | None,
) -> dict[str, object]:  # fmt: skip
    """Hand the stream to the machine's supervisor, and wait for the end of it; what that said last."""
    name = f"migrate-{os.urandom(8).hex()}.sock"
    try:
        listener = unix.listen(machine.runtime_dir, name)
    except FileNotFoundError:
        raise RemoteError(f"machine '{machine.name}' ended while it was being migrated") from None
    connection = connect_supervisor(machine.runtime_dir, machine.name)
    last: dict[str, object] = {}

    def take(message: dict[str, object]) -> None:
        nonlocal last
        if message.get("gone"):
            last = message
        elif on_progress is not None:
            on_progress(message)

    try:
        request = control.request(
            "leave", socket=name, migration=migration_id, to=addresses.describe(to),
            max_downtime_ms=terms.max_downtime_ms, post_copy=terms.post_copy,
        )  # fmt: skip
        connection.send(request)
        hand_over_fds(listener, connection.fd, fds)
        try:
            connection.answer(take)
        except RemoteError:
            if not last:  # else it has been killed and discarded, as it should, and by somebody else a little earlier
                raise
    finally:
        connection.close()
        os.close(listener)
        try:
            os.unlink(f"{machine.runtime_dir}/{name}")
        except OSError:
            pass  # it went with the machine
    if not last:
        raise RemoteError(f"machine '{machine.name}' ended while it was being migrated")
    return last


def hand_over_fds(listener: int, other: int, fds: tuple[int, int]) -> None:
    """Give a supervisor the stream as soon as it comes for it, unless `other`, where it answers, says something first."""
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    poll.register(other, select.POLLIN)
    ready = dict(poll.poll(_TAKEN_WITHIN_MS))
    if listener not in ready:
        return
    place = unix.accept(listener)
    try:
        os.set_blocking(place, True)
        unix.send_with_fds(place, b"!", fds)
    except OSError:
        return  # it is gone, or would not have it, and says so where it answers
    finally:
        os.close(place)


# -- afterwards


def resolve(machine: Machine, *, to: Address | None = None, runs_there: bool | None = None) -> bool:
    """Whether a machine that was handed over runs there; it goes on here, or is discarded, accordingly.

    By what the target at `to` says, or by `runs_there`, for a user who has looked. Raises `Conflict` for a machine that was
    not handed over, `RemoteError`, `HostError` when the target cannot be asked: nothing has changed then.
    """
    with machine.lock():
        machine.reload()
        leaving = migrations.find_leaving(machine.directory)
        if leaving is None:
            raise Conflict(
                f"machine '{machine.name}' was not handed over to another store", hint="it is this store's alone"
            )
        if to is not None:
            runs_there = ask(machine, to, leaving.id)
        assert runs_there is not None
        _settle(machine, runs_there=runs_there)
    return runs_there


def ask(machine: Machine, to: Address, migration_id: str) -> bool:
    """Whether the machine has arrived there; if not, it never will. Raises `RemoteError`, `HostError`."""
    with addresses.connect(to) as fds:
        stream = Stream(*fds)
        stream.greet()
        stream.send_json(frames.QUESTION, {"migration": migration_id, "machine": machine.id})
        answer: dict[str, Any] = frames.parse_json(stream.expect(frames.ANSWER, patience_s=ANSWERED_WITHIN_S))
        if type(answer.get("arrived")) is not bool:
            raise RemoteError("migration protocol: the target does not say whether the machine has arrived")
        return bool(answer["arrived"])


def _ask_and_settle(machine: Machine, to: Address) -> bool:
    """After a stream that broke at the last step: whether the machine runs there. The target is asked for a few seconds.

    Raises `Conflict` of state "handed over" when it cannot be asked.
    """
    leaving = migrations.find_leaving(machine.directory)
    if leaving is None or to.kind == "-":
        migrations.refuse_left(machine.directory, machine.name)
        return False
    for _ in range(_ASK_TRIES):
        try:
            runs_there = ask(machine, to, leaving.id)
        except NagayaError:
            time.sleep(_ASK_EVERY_S)  # it may be about to listen again
            continue
        _settle(machine, runs_there=runs_there)
        return runs_there
    migrations.refuse_left(machine.directory, machine.name)
    return False


def _settle(machine: Machine, *, runs_there: bool) -> None:
    """Let it go on here, or be gone from here; under the command lock."""
    if machine.settled().phase in ALIVE:
        machine.ask("resolve", there=runs_there)
        return
    try:
        if runs_there:
            machines.discard(machine.paths, machine.id, machine.name)
            machine.record("migrate")
        else:
            migrations.remove_leaving(machine.directory)
    except OSError as error:
        raise HostError.from_os(error, "cannot settle where the machine is") from None
