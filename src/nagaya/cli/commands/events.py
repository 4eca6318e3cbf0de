"""`nagaya events`."""

from __future__ import annotations

import json
import sys
import time

from nagaya.cli import filters, values
from nagaya.cli.context import Context
from nagaya.cli.flags import Command, Flag, Parsed
from nagaya.cli.human import format_time
from nagaya.cli.listing import FILTER, FORMAT
from nagaya.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.storage.events import Event


def events(context: Context, parsed: Parsed) -> int:
    """A line for each event. Without --until it goes on with what is to come."""
    wanted = filters.parse_filters(parsed.texts("filter"), filters.EVENT_KEYS)
    now_ns = time.time_ns()
    since_ns = values.parse_time(parsed.text("since"), "--since", now_ns=now_ns) if parsed.given("since") else now_ns
    until_ns = values.parse_time(parsed.text("until"), "--until", now_ns=now_ns) if parsed.given("until") else 0
    format = parsed.text("format")
    if parsed.switch("json") and format:
        raise UsageError("--json excludes --format", hint="use one of them")
    as_json = parsed.switch("json") or format == "json"
    template = None
    if format and not as_json:
        from nagaya.cli.template import Template  # lazy: only --format

        template = Template(format)
    follow = parsed.switch("follow") and not 0 < until_ns <= now_ns
    for event in context.host.events(since_ns=since_ns, until_ns=until_ns, follow=follow):
        if not filters.matches_event(wanted, event.kind, event.action, event.id, event.name, event.attributes):
            continue
        if template is not None:
            line = template.render(record(event))
        else:
            line = json.dumps(record(event), ensure_ascii=False) if as_json else text(event)
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
    return 0


def record(event: Event) -> dict[str, object]:
    """An event as data, with Docker's names in templates: .Type, .Action, .Actor.ID, .Actor.Attributes, .TimeNano."""
    return {
        "time": format_time(event.time_ns),
        "time_nano": event.time_ns,
        "type": event.kind,
        "action": event.action,
        "status": event.action,
        "id": event.id,
        "name": event.name,
        "attributes": event.attributes,
        "actor": {"id": event.id, "attributes": {"name": event.name, **event.attributes}},
    }


def text(event: Event) -> str:
    """`2026-11-23T13:37:50.123456789Z machine start 4f2a… (image=debian, name=web)`."""
    about = {"name": event.name, **event.attributes} if event.name else event.attributes
    pairs = ", ".join(f"{key}={value}" for key, value in sorted(about.items()))
    return f"{format_time(event.time_ns)} {event.kind} {event.action} {event.id}" + (f" ({pairs})" if pairs else "")


EVENTS = Command(
    events,
    flags=(
        Flag("--since", "Begin with events from this time on: RFC 3339, Unix time, or 10m ago", value="TIME"),
        Flag("--until", "End at this time", value="TIME"),
        Flag("--follow", "Go on with what is to come", default=True),
        Flag("--json", "A JSON object a line"),
        FILTER,
        FORMAT,
    ),
    about="Filters: " + ", ".join(filters.EVENT_KEYS) + ".",
    examples=(
        ("nagaya events --filter event=die", ""),
        ("nagaya events --since 1h --follow=false", "what happened in the last hour"),
    ),
)
