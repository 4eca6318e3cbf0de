"""`nagaya version`."""

from __future__ import annotations

import os
import sys

from nagaya import __version__
from nagaya.cli.context import Context
from nagaya.cli.flags import Command, Parsed
from nagaya.cli.listing import FORMAT, JSON, print_json


def version(context: Context, parsed: Parsed) -> int:
    """Ours, and what we run on: what a bug report needs."""
    system = os.uname()
    record: dict[str, object] = {
        "version": __version__,
        "python": ".".join(map(str, sys.version_info[:3])),
        "kernel": system.release,
        "architecture": system.machine,
        "root": context.host.paths.root,
        "run_dir": context.host.paths.run,
    }
    format = parsed.text("format")
    if parsed.switch("json") or format == "json":
        print_json(record)
    elif format:
        from nagaya.cli.template import Template  # lazy: only --format

        print(Template(format).render(record))
    else:
        for key, value in record.items():
            print(f"{key.replace('_', ' ').capitalize() + ':':<14}{value}")
    return 0


VERSION = Command(version, flags=(FORMAT, JSON), examples=(("nagaya version --format '{{.Version}}'", ""),))
