"""Machines, images and volumes as rows (Docker's field names, for people and templates) and records (for --json)."""

from __future__ import annotations

from collections.abc import Sequence

from nagaya.cli.filters import ImageFacts, MachineFacts
from nagaya.cli.human import format_age, format_local_time, format_size, format_span, format_time
from nagaya.cli.listing import Layout
from nagaya.cli.table import cut
from nagaya.cli.template_functions import Row
from nagaya.model.spec import MachineSpec
from nagaya.model.state import ALIVE, CREATED, EXITED, PAUSED, RESTARTING, STARTING, MachineState
from nagaya.static import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.images.image import Image
    from nagaya.storage.volumes import Volume

SHORT_ID = 12
COMMAND_CELLS = 20

MACHINES = Layout(
    columns=("ID", "Image", "Command", "Created", "Status", "Type", "Ports", "Names"),
    headings={
        "ID": "MACHINE ID", "Image": "IMAGE", "Command": "COMMAND", "Created": "CREATED", "CreatedAt": "CREATED AT",
        "RunningFor": "CREATED", "Status": "STATUS", "State": "STATE", "Type": "TYPE", "Names": "NAMES", "Name": "NAME",
        "Labels": "LABELS", "Mounts": "MOUNTS", "Networks": "NETWORKS", "Size": "SIZE", "Ports": "PORTS",
        "ExitCode": "EXIT CODE", "Pid": "PID", "Address": "ADDRESS", "Platform": "PLATFORM",
        "LocalVolumes": "LOCAL VOLUMES",
    },
    elastic=("Image", "Command", "Ports", "Names"),
)  # fmt: skip
IMAGES = Layout(
    columns=("Repository", "Tag", "ID", "Created", "Size"),
    headings={
        "Repository": "REPOSITORY", "Tag": "TAG", "Digest": "DIGEST", "ID": "IMAGE ID", "Created": "CREATED",
        "CreatedSince": "CREATED", "CreatedAt": "CREATED AT", "Size": "SIZE", "Platform": "PLATFORM", "Labels": "LABELS",
    },
    elastic=("Repository",),
)  # fmt: skip
VOLUMES = Layout(
    columns=("Driver", "Name"),
    headings={
        "Driver": "DRIVER", "Name": "VOLUME NAME", "Mountpoint": "MOUNTPOINT", "CreatedAt": "CREATED AT",
        "Labels": "LABELS", "Scope": "SCOPE",
    },
)  # fmt: skip


def short_id(id: str) -> str:
    """The twelve digits that people see, of "sha256:…" too."""
    return id.removeprefix("sha256:")[:SHORT_ID]


def label_text(labels: Sequence[tuple[str, str]]) -> str:
    return ",".join(f"{key}={value}" for key, value in labels)


# -- machines


def machine_facts(spec: MachineSpec, state: MachineState) -> MachineFacts:
    volumes = tuple(text for mount in spec.mounts for text in (mount.source, mount.target) if text)
    return MachineFacts(
        spec.id, spec.name, spec.type, spec.image, spec.image_id, state.phase, state.exit_code, dict(spec.labels),
        network_names(spec), volumes, spec.created_ns,
    )  # fmt: skip


def network_names(spec: MachineSpec) -> tuple[str, ...]:
    """The networks that a machine is on; a mode ("host", "none", "user", and "bridge" for the default one) where it has one."""
    return tuple(attachment.network for attachment in spec.attachments) or (spec.network,)


def status_text(state: MachineState, now_ns: int) -> str:
    """ "Up 5 minutes", "Exited (0) 3 hours ago", as Docker words it."""
    if state.phase == CREATED:
        return "Created" if not state.error else f"Created ({state.error})"
    if state.phase == STARTING:
        return "Starting"
    if state.phase == EXITED:
        return f"Exited ({state.exit_code}) {format_age(state.finished_ns, now_ns)}"
    if state.phase == RESTARTING:
        return f"Restarting ({state.exit_code}) {format_age(state.finished_ns, now_ns)}"
    up = f"Up {format_span(max(0, now_ns - state.started_ns) / 1e9)}"
    return up + (" (Installing)" if state.installing else "") + (" (Paused)" if state.phase == PAUSED else "")


def ports_text(state: MachineState) -> str:
    """ "127.0.0.1:8080->80/tcp", runs of ports as one: "0.0.0.0:8000-8010->8000-8010/tcp"; of a machine that runs."""
    if state.phase not in ALIVE:
        return ""
    texts: list[str] = []
    ports = list(state.ports)
    while ports:
        first = last = ports.pop(0)
        while ports and ports[0] == last._replace(host_port=last.host_port + 1, guest_port=last.guest_port + 1):
            last = ports.pop(0)
        host, guest = first.host_end, str(first.guest_port)
        if last != first:
            host, guest = f"{host}-{last.host_port}", f"{guest}-{last.guest_port}"
        texts.append(f"{host}->{guest}/{first.protocol}")
    return ", ".join(texts)


def command_text(argv: Sequence[str]) -> str:
    """The command as one printable line in quotes."""
    text = " ".join(argv)
    return '"' + "".join(letter if letter.isprintable() else "…" for letter in text) + '"'


def machine_row(spec: MachineSpec, state: MachineState, *, now_ns: int, no_trunc: bool, size_bytes: int = -1) -> Row:
    command = command_text(spec.process.argv)
    row = Row(
        ID=spec.id if no_trunc else spec.id[:SHORT_ID],
        Image=spec.image,
        Command=command if no_trunc else _shorten(command),
        Created=format_age(spec.created_ns, now_ns),
        CreatedAt=format_local_time(spec.created_ns),
        RunningFor=format_age(spec.created_ns, now_ns),
        Status=status_text(state, now_ns),
        State=state.phase,
        Type=spec.type,
        Names=spec.name,
        Name=spec.name,
        Labels=label_text(spec.labels),
        Mounts=",".join(mount.source for mount in spec.mounts if mount.source),
        Networks=",".join(network_names(spec)),
        Size=format_size(size_bytes) if size_bytes >= 0 else "N/A",
        Ports=ports_text(state),
        ExitCode=state.exit_code,
        Pid=state.pid,
        Address=state.address,
        Platform=spec.platform,
        LocalVolumes=str(sum(mount.kind == "volume" for mount in spec.mounts)),
    )
    row.labels = dict(spec.labels)
    return row


def _shorten(command: str) -> str:
    return command if len(command) <= COMMAND_CELLS else cut(command[:-1], COMMAND_CELLS - 1) + '"'


def machine_record(spec: MachineSpec, state: MachineState, *, now_ns: int, size_bytes: int = -1) -> dict[str, object]:
    record: dict[str, object] = {
        "id": spec.id,
        "name": spec.name,
        "type": spec.type,
        "image": spec.image,
        "image_id": spec.image_id,
        "command": list(spec.process.argv),
        "created_at": format_time(spec.created_ns),
        "state": state.phase,
        "status": status_text(state, now_ns),
        "exit_code": state.exit_code,
        "error": state.error,
        "started_at": format_time(state.started_ns),
        "finished_at": format_time(state.finished_ns),
        "pid": state.pid,
        "address": state.address,
        "network": spec.network,
        "ports": [port._asdict() for port in state.ports] if state.phase in ALIVE else [],
        "networks": list(network_names(spec)),
        "platform": spec.platform,
        "labels": dict(spec.labels),
        "mounts": [{"kind": mount.kind, "source": mount.source, "target": mount.target} for mount in spec.mounts],
    }
    if size_bytes >= 0:
        record["size_bytes"] = size_bytes
    return record


# -- images


class ImageName(NamedTuple):
    repository: str
    tag: str


def split_name(name: str) -> ImageName:
    """ "docker.io/library/debian:12" to repository and tag, without what Docker's users leave out."""
    name = name.partition("@")[0]
    repository, colon, tag = name.rpartition(":")
    if not colon or "/" in tag:
        repository, tag = name, "<none>"
    return ImageName(repository.removeprefix("docker.io/").removeprefix("library/"), tag)


def image_facts(image: Image) -> ImageFacts:
    return ImageFacts(image.id, image.names, dict(image.config.labels), image.created_ns)


def image_rows(image: Image, *, now_ns: int, no_trunc: bool) -> list[Row]:
    """A row for each name; one with <none> for an image that has no name left."""
    rows = []
    for name in image.names or ("<none>",):
        split = split_name(name) if image.names else ImageName("<none>", "<none>")
        row = Row(
            Repository=split.repository,
            Tag=split.tag,
            Digest=image.digest or "<none>",
            ID=image.id if no_trunc else short_id(image.id),
            Created=format_age(image.created_ns, now_ns) if image.created_ns > 0 else "N/A",
            CreatedSince=format_age(image.created_ns, now_ns) if image.created_ns > 0 else "N/A",
            CreatedAt=format_local_time(image.created_ns),
            Size=format_size(image.size_bytes),
            Platform=image.platform,
            Labels=label_text(image.config.labels),
        )
        row.labels = dict(image.config.labels)
        rows.append(row)
    return rows


def image_record(image: Image) -> dict[str, object]:
    return {
        "id": image.id,
        "digest": image.digest,
        "names": list(image.names),
        "platform": image.platform,
        "created_at": format_time(image.created_ns),
        "size_bytes": image.size_bytes,
        "source": image.source,
        "labels": dict(image.config.labels),
    }


# -- volumes


def volume_row(volume: Volume) -> Row:
    row = Row(
        Driver="local",
        Name=volume.name,
        Mountpoint=volume.path,
        CreatedAt=format_local_time(volume.created_ns),
        Labels=label_text(volume.labels),
        Scope="local",
    )
    row.labels = dict(volume.labels)
    return row


def volume_record(volume: Volume) -> dict[str, object]:
    return {
        "name": volume.name,
        "path": volume.path,
        "created_at": format_time(volume.created_ns),
        "labels": dict(volume.labels),
    }
