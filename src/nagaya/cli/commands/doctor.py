"""`nagaya doctor`."""

from __future__ import annotations

from nagaya.cli.context import Context
from nagaya.cli.flags import Command, Parsed
from nagaya.cli.listing import JSON, print_json
from nagaya.manager.doctor import can_run, examine


def doctor(context: Context, parsed: Parsed) -> int:
    """What this host can do; 1 when it can run nothing."""
    findings = examine(context.root)
    if parsed.switch("json"):
        print_json([finding._asdict() for finding in findings])
    else:
        width = max(len(finding.topic) for finding in findings) + 2
        for topic, status, found, how, follows in findings:
            print(f"{topic + ':':<{width}}{status:<9}{found} ({how})")
            if follows:
                print(f"{'':<{width}}{follows}")
    return 0 if can_run(findings) else 1


DOCTOR = Command(doctor, flags=(JSON,), examples=(("nagaya doctor", ""),))
