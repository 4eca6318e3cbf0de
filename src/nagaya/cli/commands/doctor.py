"""`nagaya doctor`."""

from __future__ import annotations

from nagaya.cli.context import Context
from nagaya.cli.flags import Command, Parsed
from nagaya.cli.listing import JSON, print_json
from nagaya.manager.doctor import can_run, examine


def doctor(context: Context, parsed: Parsed) -> int:
    """What this host can do; 1 when it can run nothing."""
    findings = examine()
    if parsed.switch("json"):
        print_json([finding._asdict() for finding in findings])
    else:
        for topic, status, found, how, follows in findings:
            print(f"{topic + ':':<14}{status:<9}{found} ({how})")
            if follows:
                print(f"{'':<14}{follows}")
    return 0 if can_run(findings) else 1


DOCTOR = Command(doctor, flags=(JSON,), examples=(("nagaya doctor", ""),))
