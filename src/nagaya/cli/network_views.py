"""Networks as rows of a table and as records for scripts."""

from __future__ import annotations

from nagaya.cli.human import format_local_time, format_time
from nagaya.cli.listing import Layout
from nagaya.cli.template_functions import Row
from nagaya.cli.views import label_text
from nagaya.net.networks import NetworkRecord

NETWORKS = Layout(
    columns=("ID", "Name", "Driver", "Subnet", "Subnet6", "Internal"),
    headings={
        "ID": "NETWORK ID", "Name": "NAME", "Driver": "DRIVER", "Subnet": "SUBNET", "Subnet6": "SUBNET6",
        "Internal": "INTERNAL", "CreatedAt": "CREATED AT", "Labels": "LABELS", "Scope": "SCOPE", "IPv6": "IPV6",
        "Gateway": "GATEWAY", "Gateway6": "GATEWAY6", "MTU": "MTU",
    },
)  # fmt: skip


def network_row(record: NetworkRecord, *, no_trunc: bool) -> Row:
    row = Row(
        ID=record.id if no_trunc else record.id[:12],
        Name=record.name,
        Driver=record.driver,
        Subnet=record.subnet,
        Subnet6=record.subnet6,
        Gateway=record.gateway,
        Gateway6=record.gateway6,
        Internal=str(record.internal).lower(),
        IPv6=str(bool(record.subnet6)).lower(),
        MTU=record.mtu or "auto",
        CreatedAt=format_local_time(record.created_ns),
        Labels=label_text(record.labels),
        Scope="local",
    )
    row.labels = dict(record.labels)
    return row


def network_record(record: NetworkRecord) -> dict[str, object]:
    return {
        "id": record.id,
        "name": record.name,
        "driver": record.driver,
        "subnet": record.subnet,
        "gateway": record.gateway,
        "subnet6": record.subnet6,
        "gateway6": record.gateway6,
        "internal": record.internal,
        "mtu": record.mtu,
        "parent": record.parent,
        "created_at": format_time(record.created_ns),
        "labels": dict(record.labels),
    }
