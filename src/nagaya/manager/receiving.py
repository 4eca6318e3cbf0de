"""Receiving a machine from another Nagaya: everything is checked before anything of it is made. docs/migration.md."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from nagaya import __version__
from nagaya.engines import TYPES, open_engine
from nagaya.errors import (
    Conflict,
    HostError,
    IntegrityError,
    NagayaError,
    NotFound,
    RemoteError,
    Unsupported,
    UsageError,
)
from nagaya.kernel import unix
from nagaya.manager.attachment import Connection
from nagaya.manager.machine import Machine
from nagaya.manager.machines import Machines
from nagaya.manager.migrating import hand_over_fds
from nagaya.manager.naming import check_name
from nagaya.migration import frames
from nagaya.migration.frames import Frame
from nagaya.migration.offer import Offer, digest_root, parse_offer
from nagaya.migration.stream import Stream
from nagaya.model.state import STARTING, MachineState
from nagaya.static import NamedTuple
from nagaya.storage import machines, migrations, rootfs
from nagaya.storage.disks import reserve_data_disk
from nagaya.storage.lock import FileLock
from nagaya.supervisor.launch import launch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.images.store import Image
    from nagaya.manager.host import Host

OFFERED_WITHIN_S = 60.0
ROOT = "root.erofs"
_MOST_DISK_BYTES = 1 << 44
_MOST_BLOB_BYTES = 1 << 40


class Received(NamedTuple):
    """A machine that runs here by now."""

    machine: Machine
    warnings: tuple[str, ...]


def receive(host: Host, fds: tuple[int, int]) -> Received | None:
    """Serve one stream: a machine that wants to come, or the question whether one has come (None).

    Whatever is wrong is told to the other side too. Raises `NagayaError`; nothing of a machine is left then.
    """
    stream = Stream(*fds)
    stream.greet()
    frame = stream.receive(patience_s=OFFERED_WITHIN_S)
    if frame.type == frames.QUESTION:
        _answer(host, stream, frame)
        return None
    if frame.type != frames.OFFER:
        raise frames.unexpected(frame)
    with _told(stream):
        offer = parse_offer(frames.parse_json(frame))
        _check(host, offer)
        image = _find_image(host, stream, offer)
        machine, lock = _make(host, stream, offer, image)
        return _start(machine, lock, fds)


@contextmanager
def _told(stream: Stream) -> Iterator[None]:
    """Tell the source why not: it says so to its user."""
    try:
        yield
    except NagayaError as problem:
        try:
            stream.patience_s = 1.0
            stream.send_json(frames.REFUSE, frames.refusal(problem))
        except NagayaError:
            pass  # it is gone, and that may be why
        raise


def _answer(host: Host, stream: Stream, frame: Frame) -> None:
    asked = frames.parse_json(frame)
    migration_id, machine_id = asked.get("migration"), asked.get("machine")
    if not all(isinstance(text, str) and machines.is_id(text) for text in (migration_id, machine_id)):
        raise RemoteError("migration protocol: a question without the ids that it is about")
    try:
        arrived = migrations.settle_arrival(host.paths, str(migration_id), str(machine_id))
    except OSError as error:
        raise HostError.from_os(error, "cannot find out what became of a machine") from None
    stream.send_json(frames.ANSWER, {"arrived": arrived})


def _check(host: Host, offer: Offer) -> None:
    """Whether such a machine could be here at all."""
    spec = offer.spec
    if offer.version != __version__:
        raise Unsupported(
            f"the machine runs on Nagaya {offer.version}, and the target is {__version__}",
            hint="install the same version on both hosts; or stop the machine, and take its disk along",
        )
    if spec.type not in TYPES or spec.hardware is not None:
        raise Unsupported("only machines that were made from an image can be received")
    engine = open_engine(spec.type)
    if "migrate" not in engine.capabilities:
        raise Unsupported(f"a machine of type '{spec.type}' cannot be received while it runs")
    if not 0 < offer.disk_bytes <= _MOST_DISK_BYTES:
        raise IntegrityError(f"{offer.disk_bytes} bytes are no size of a machine's disk")
    if any(mount.kind != "tmpfs" for mount in spec.mounts):
        raise Unsupported("a machine with volumes or directories of its host cannot be received")
    check_name(spec.name)
    owner = machines.find_by_name(host.paths, spec.name)
    if owner and owner != spec.id:
        raise machines.name_taken(spec.name, owner)
    if os.path.lexists(host.paths.machine(spec.id)):
        raise Conflict(
            f"machine '{spec.name}' ({spec.id[:12]}) is in this store already",
            hint=f"remove it: nagaya rm {spec.id[:12]}",
        )
    engine.check_host(kernel=spec.kernel)
    engine.check(spec)
    engine.check_described(spec, offer.engine)  # type: ignore[attr-defined]


def _find_image(host: Host, stream: Stream, offer: Offer) -> Image:
    """The machine's image, from the source where it is not here."""
    spec = offer.spec
    image = host.images.find(spec.image_id)
    if image is not None:
        return image
    path = f"{host.paths.root}/migration-{offer.id}.tar"
    try:
        stream.send_json(frames.WANT_IMAGE, {"id": spec.image_id})
        _take_file(stream, path)
        host.images.load(path)
    finally:
        if os.path.lexists(path):
            os.unlink(path)
    image = host.images.find(spec.image_id)
    if image is None:
        raise NotFound(
            f"image '{spec.image}' is not here, and what the source sent in its place is another one",
            hint=f"bring it here first: nagaya pull {spec.image}, or nagaya save and nagaya load",
        )
    if host.images.find(spec.image) is None:
        try:
            host.images.tag(spec.image_id, spec.image)
        except (UsageError, Conflict):
            pass  # it keeps its id
    return image


def _take_file(stream: Stream, path: str, *, size_bytes: int = _MOST_BLOB_BYTES) -> None:
    """A file that the source sends. Raises `RemoteError`, `HostError`."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            at = 0
            while True:
                frame = stream.receive()
                if frame.type not in (frames.BLOB, frames.BLOB_END):
                    raise frames.unexpected(frame)
                if frame.where != at or at + len(frame.payload) > size_bytes:
                    raise RemoteError("migration protocol: a file in another order, or larger, than it was said to be")
                if frame.type == frames.BLOB_END:
                    return
                view = memoryview(frame.payload)
                while view:
                    written = os.write(fd, view)
                    view, at = view[written:], at + written
        finally:
            os.close(fd)
    except OSError as error:
        raise HostError.from_os(error, "cannot write what the source sends") from None


def _make(host: Host, stream: Stream, offer: Offer, image: Image) -> tuple[Machine, FileLock]:
    """The machine on disk, with its command lock held, marked as one that is only coming. Leaves nothing when it raises."""
    from nagaya.images.progress import Silent
    from nagaya.images.rootimage import make_root_image

    root_image = make_root_image(host.images, image, progress=Silent())
    same = digest_root(root_image) == (offer.root_bytes, offer.root_digest)
    all_ = Machines(host.paths, host)
    spec, directory = offer.spec, host.paths.machine(offer.spec.id)
    try:
        lock = all_.make_directory(spec.id)
    except FileExistsError:
        raise Conflict(f"machine '{spec.name}' is in this store already") from None
    try:
        migrations.begin_arrival(directory, offer.id, spec.id, offer.engine)
        all_.claim_name(spec)
        if not same:  # another mkfs.erofs made it: its blocks are elsewhere, and the guest knows where they were
            root_image = f"{directory}/{ROOT}"
            stream.send_json(frames.WANT_ROOT, {"digest": offer.root_digest})
            _take_file(stream, root_image, size_bytes=offer.root_bytes)
            if digest_root(root_image) != (offer.root_bytes, offer.root_digest):
                raise IntegrityError("the root image that the source sent is not the one that it offered")
            os.chmod(root_image, 0o644)
        rootfs.store_layers(directory, host.images.layer_directories(image), root_image=root_image)
        reserve_data_disk(f"{directory}/{rootfs.DATA_DISK}", offer.disk_bytes)
        machines.store_spec(host.paths, spec)
        machines.store_state(
            host.paths, spec.id, MachineState(phase=STARTING, restarts=offer.restarts, ports=spec.ports)
        )
    except BaseException as error:
        machines.discard(host.paths, spec.id, spec.name)
        lock.release()
        if isinstance(error, OSError):
            raise HostError.from_os(error, "cannot make the machine") from None
        raise
    return Machine(host.paths, spec, store=host), lock


def _start(machine: Machine, lock: FileLock, fds: tuple[int, int]) -> Received:
    """Have its supervisor take it from the stream; when this returns it runs here."""
    place = f"{machine.directory}/{migrations.INCOMING}"
    try:
        listener = unix.listen(place, migrations.SOCKET)
        try:
            fd = launch(machine.paths, machine.id, command=lock, attach=False, size=(0, 0), saved=place)
            connection = Connection(fd)
            try:
                hand_over_fds(listener, fd, fds)
                answer = connection.answer()
            finally:
                connection.close()
        finally:
            os.close(listener)
    except BaseException as error:
        if migrations.is_incoming(machine.directory) and not machines.is_alive(machine.paths, machine.id):
            machines.discard(machine.paths, machine.id, machine.name)
        if isinstance(error, OSError):
            raise HostError.from_os(error, "cannot receive the machine") from None
        raise
    finally:
        lock.release()
    warnings = answer.get("warnings")
    return Received(machine, tuple(str(one) for one in warnings) if isinstance(warnings, list) else ())
