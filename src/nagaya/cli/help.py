"""`--help`: made from the same tables that the parser reads."""

from __future__ import annotations

from nagaya.cli import catalog

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.cli.flags import Command, Flag

WIDTH = 100
GLOBAL_FLAGS = (
    ("--root DIR", "Where machines, images and volumes are kept (NAGAYA_ROOT)"),
    ("--run-dir DIR", "Where sockets of running machines are (NAGAYA_RUN_DIR)"),
    ("--debug", "Show tracebacks of failures (NAGAYA_DEBUG=1)"),
    ("--version", "Show the version"),
    ("--help", "Show this text; 'nagaya help COMMAND' explains one command"),
)


def render_overview() -> str:
    """All commands in their sections."""
    lines = ["Usage: nagaya [FLAGS] COMMAND …", "", "Isolated Linux machines from one image, behind the wall you pick."]
    for title, section in catalog.SECTIONS:
        lines += ["", f"{title}:"]
        lines += [f"  {name:<12}{about}" for name, (_, about) in section.items()]
    lines += ["", "Groups:"]
    lines += [f"  {name:<12}{about}" for name, (about, _) in catalog.GROUPS.items()]
    lines += ["", "Flags, before the command:"]
    lines += [f"  {names:<16}{about}" for names, about in GLOBAL_FLAGS]
    lines += ["", "Try:", "  nagaya run --rm debian echo hello", "  nagaya run --rm -it debian bash"]
    return "\n".join(lines)


def render_group(group: str) -> str:
    """The commands of one group."""
    about, words = catalog.GROUPS[group]
    lines = [f"Usage: nagaya {group} COMMAND …", "", about + ".", "", "Commands:"]
    lines += [f"  {word:<12}{catalog.summary(f'{group} {word}')}" for word in words]
    return "\n".join(lines)


def render_command(name: str, command: Command) -> str:
    """One command: usage, what it does, its flags, examples."""
    usage = f"Usage: nagaya {name}{' [FLAGS]' if command.flags else ''} {command.usage}".rstrip()
    lines = [usage, "", catalog.summary(name) + "."]
    if command.about:
        lines += ["", *_wrap(command.about, "")]
    if command.flags:
        lines += ["", "Flags:", *render_flags(command.flags)]
    if command.examples:
        lines += ["", "Examples:"]
        for line, meaning in command.examples:
            lines.append(f"  {line}" + (f"{'':<{max(2, 48 - len(line))}}# {meaning}" if meaning else ""))
    return "\n".join(lines)


def render_reference() -> str:
    """docs/commands.md: `python -c 'from nagaya.cli import help; print(help.render_reference(), end="")'`."""
    lines = [_REFERENCE_HEAD]
    for title, section in catalog.SECTIONS:
        lines += [f"## {title}", "", "| command | what it does |", "|---|---|"]
        for name, (place, about) in section.items():
            usage = catalog.load(place).usage.replace("|", "\\|")
            lines.append(f"| `{f'nagaya {name} {usage}'.rstrip()}` | {about} |")
        lines.append("")
    lines += [
        "## Groups",
        "",
        "The same commands under one word, as Docker's users also write them, and what volumes and kernels have:",
        "",
    ]
    for group, (_, words) in catalog.GROUPS.items():
        lines.append(f"- `nagaya {group}` " + " ".join(words))
    command = catalog.load(catalog.MACHINES["run"][0])
    lines += ["", "## Flags of `run` and `create`", "", "```", *render_flags(command.flags), "```", ""]
    return "\n".join(lines)


_REFERENCE_HEAD = """\
# Commands

Made from the tables that the command line itself reads; `nagaya help COMMAND` shows all flags of a command, with examples.

- Flags before the command: `--root DIR` (`NAGAYA_ROOT`), `--run-dir DIR` (`NAGAYA_RUN_DIR`), `--debug` (`NAGAYA_DEBUG=1`).
- `--name value` and `--name=value`, `-itd` clusters, `--init=false` turns a switch off, `--` ends the flags. Of `run`,
  `create` and `exec`, everything after IMAGE or MACHINE belongs to the program.
- A machine is named by its name, its id, or the beginning of its id.
- Exit status: 0; 1 failed; 2 malformed command line; 130 interrupted. `run`, `exec`, `attach` and `start -a` end with the
  program's own status: 128+n for signal n, 127 not found, 126 not executable, 125 when nagaya itself failed.
- A failure is one sentence on standard error, and a hint where there is something to do about it.
- `--json` prints our own records (snake_case, sizes in bytes, times in RFC 3339); `--format` takes Go templates with
  Docker's field names (`{{.Names}}`, `{{json .}}`, `table …`, also `{{range}}`, `{{if}}`, `{{index}}`, `{{printf}}` …).
  `inspect` templates find fields of the JSON in any case (`.State.ExitCode` is `exit_code`) and Docker's common paths.
- In a terminal `ctrl-p ctrl-q` leaves a program running; without one, signals to nagaya are the program's. A reader that
  goes away (`nagaya run … | head`) is SIGPIPE for the program.
"""


def render_flags(flags: tuple[Flag, ...]) -> list[str]:
    """Two columns, sorted by the long name."""
    lefts = {flag.key: _left(flag) for flag in flags}
    width = min(max(len(left) for left in lefts.values()), 34)
    lines: list[str] = []
    for flag in sorted(flags, key=lambda flag: flag.key):
        left = lefts[flag.key]
        text = flag.help + (" (default; turn off with =false)" if flag.default else "")
        text += " (repeatable)" if flag.many else ""
        first, *more = _wrap(text, " " * (width + 4))
        if len(left) > width:
            lines += [f"  {left}", first, *more]
        else:
            lines += [f"  {left:<{width}}  {first.lstrip()}", *more]
    return lines


def _left(flag: Flag) -> str:
    shorts = [name for name in flag.names if not name.startswith("--")]
    longs = [name for name in flag.names if name.startswith("--")]
    text = (shorts[0] + ", " if shorts else "    ") + ", ".join(longs)
    return f"{text} {flag.value}".rstrip()


def _wrap(text: str, indent: str) -> list[str]:
    import textwrap

    lines: list[str] = []
    for paragraph in text.split("\n"):
        lines += textwrap.wrap(paragraph, WIDTH, initial_indent=indent, subsequent_indent=indent) or [""]
    return lines
