"""`nagaya history`."""

from __future__ import annotations

import time

from nagaya.cli import listing
from nagaya.cli.context import Context
from nagaya.cli.failures import printable
from nagaya.cli.flags import Command, Parsed
from nagaya.cli.human import format_age, format_local_time, format_size, format_time
from nagaya.cli.template_functions import Row

_CELLS = 45
_LAYOUT = listing.Layout(
    columns=("Created", "CreatedBy", "Size", "Comment"),
    headings={
        "Created": "CREATED", "CreatedAt": "CREATED AT", "CreatedSince": "CREATED", "CreatedBy": "CREATED BY",
        "Size": "SIZE", "Comment": "COMMENT",
    },
    elastic=("CreatedBy", "Comment"),
)  # fmt: skip


def history(context: Context, parsed: Parsed) -> int:
    """A line for each step, the latest first."""
    steps = context.host.images.history(parsed.words[0])
    no_trunc, now_ns = parsed.switch("no-trunc"), time.time_ns()
    if parsed.switch("json"):
        listing.print_json(
            [
                {
                    **{k: v for k, v in step._asdict().items() if k != "created_ns"},
                    "created_at": format_time(step.created_ns),
                }
                for step in steps
            ]
        )
        return 0
    rows = []
    for step in steps:
        command = printable(step.created_by)
        age = format_age(step.created_ns, now_ns) if step.created_ns > 0 else "N/A"
        rows.append(
            Row(
                Created=age,
                CreatedSince=age,
                CreatedAt=format_local_time(step.created_ns),
                CreatedBy=command if no_trunc or len(command) <= _CELLS else command[: _CELLS - 1] + "…",
                Size=format_size(step.size_bytes),
                Comment=printable(step.comment),
            )
        )
    listing.print_rows(rows, _LAYOUT, format=parsed.text("format"), no_trunc=no_trunc)
    return 0


HISTORY = Command(
    history,
    usage="IMAGE",
    words=(1, 1),
    flags=(listing.FORMAT, listing.JSON, listing.NO_TRUNC),
    examples=(("nagaya history debian", ""),),
)
