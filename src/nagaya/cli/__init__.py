"""The command line: argv to one manager call to text and an exit status; nothing else.

`main` reads the global flags, finds the command in `catalog`, and turns every way of failing into a sentence and a
status. Each command is one module below `commands/`, imported only when it is the one that runs.
"""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper

from nagaya.errors import EXIT_FAILURE, EXIT_TOOL, NagayaError, UsageError, exit_status

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.cli.flags import Command, Flag

EXIT_INTERRUPTED = 128 + 2
EXIT_BROKEN_PIPE = 128 + 13
EXIT_DEFECT = 70  # EX_SOFTWARE of sysexits(3)


def main(argv: list[str] | None = None) -> int:
    """Carry out one command line; answers the exit status and raises nothing.

    Without `argv` it is this process's own line, and the process ends right here: taking the interpreter apart would
    cost 3 ms of a 40 ms `run`.
    """
    if argv is not None:
        return _carry_out(argv)
    import gc

    gc.set_threshold(50_000)  # collections while modules load find nothing and cost 1 ms
    status = _carry_out(sys.argv[1:])
    os._exit(status)


def _carry_out(argv: list[str]) -> int:
    state = _Invocation(debug=os.environ.get("NAGAYA_DEBUG", "") not in ("", "0"))
    _open_standard_streams()
    try:
        status = _dispatch(argv, state)
        sys.stdout.flush()
    except NagayaError as error:
        from nagaya.cli.failures import report  # lazy: most commands succeed

        report(error, debug=state.debug)
        status = exit_status(error, runs_program=state.runs_program)
    except KeyboardInterrupt:
        status = EXIT_INTERRUPTED
    except BrokenPipeError:
        status = EXIT_BROKEN_PIPE
    except OSError as error:
        from nagaya.cli.failures import report_os_error

        report_os_error(error, debug=state.debug)
        status = EXIT_TOOL if state.runs_program else EXIT_FAILURE
    except Exception as error:
        from nagaya.cli.failures import report_defect

        report_defect(error, argv, debug=state.debug)
        status = EXIT_TOOL if state.runs_program else EXIT_DEFECT
    _silence_output()
    return status


def _open_standard_streams() -> None:
    """Descriptors 0 to 2 exist from here on: started with one closed, the next file opened would get our output."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, so this one
    if sys.stdout is None or sys.stderr is None or sys.stdin is None:  # what Python makes of a closed one
        sys.stdin = sys.stdin or open(0, encoding="utf-8", closefd=False)
        sys.stdout = sys.stdout or open(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = sys.stderr or open(2, "w", encoding="utf-8", closefd=False)
    # Names may be anything: a byte that is no UTF-8, or a letter that this locale lacks, is no reason to fail.
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


class _Invocation:
    """What is known of a command line while it runs, for the day that it fails."""

    def __init__(self, debug: bool) -> None:
        self.debug = debug
        self.runs_program = False


def _dispatch(argv: list[str], state: _Invocation) -> int:
    from nagaya.cli import catalog
    from nagaya.cli.context import Context
    from nagaya.cli.flags import parse

    root, run_dir, rest = _read_globals(argv, state)
    if not rest or rest[0] in ("--help", "-h", "help"):
        return _help(rest[1:] if rest and rest[0] == "help" else [])
    if rest[0] in ("--version", "-v"):
        from nagaya import __version__

        print(f"nagaya {__version__}")
        return 0
    found = catalog.find(rest)
    if found is None:
        return _unknown(rest)
    name, place = found
    command: Command = catalog.load(place)
    if command.instead is not None:
        command = command.instead(rest[name.count(" ") + 1 :]) or command
    state.runs_program = command.runs_program
    parsed = parse(name, command, rest[name.count(" ") + 1 :])
    if parsed.help:
        from nagaya.cli.help import render_command  # lazy: only --help renders

        print(render_command(name, command))
        return 0
    return command.run(Context(root=root, run_dir=run_dir, debug=state.debug), parsed)


def _read_globals(argv: list[str], state: _Invocation) -> tuple[str, str, list[str]]:
    """The flags before the command: (root, run directory, the rest of the line)."""
    values = {"--root": "", "--run-dir": ""}
    at = 0
    while at < len(argv) and argv[at].startswith("-") and argv[at] not in ("--help", "-h", "--version", "-v"):
        name, equals, value = argv[at].partition("=")
        at += 1
        if name == "--debug" and not equals:
            state.debug = True
            continue
        if name not in values:
            from nagaya.cli.flags import unknown_flag

            known: dict[str, Flag] = dict.fromkeys(("--root", "--run-dir", "--debug", "--version", "--help"))  # type: ignore[assignment]
            raise unknown_flag("", name, known)
        if not equals:
            if at == len(argv):
                raise UsageError(f"flag {name} needs a value", hint=f"for example nagaya {name} /srv/nagaya ps")
            value, at = argv[at], at + 1
        if not value:
            raise UsageError(f"flag {name} needs a directory, not an empty text")
        values[name] = value
    return values["--root"], values["--run-dir"], argv[at:]


def _help(words: list[str]) -> int:
    from nagaya.cli import catalog, help

    if not words:
        print(help.render_overview())
        return 0
    if words[0] in catalog.GROUPS and len(words) == 1:
        print(help.render_group(words[0]))
        return 0
    found = catalog.find(words)
    if found is None:
        return _unknown(words)
    print(help.render_command(found[0], catalog.load(found[1])))
    return 0


def _unknown(words: list[str]) -> int:
    """No such command: a group without a word shows its help, everything else is an error."""
    from nagaya.cli import catalog, help
    from nagaya.cli.guess import guess_word

    if words[0] in catalog.GROUPS:
        known = list(catalog.GROUPS[words[0]][1])
        if len(words) == 1 or words[1] in ("--help", "-h", "help"):
            print(help.render_group(words[0]))
            return 0
        hint = guess_word(words[1], known) or f"one of: {', '.join(sorted(known))}"
        raise UsageError(f"unknown command 'nagaya {words[0]} {words[1]}'", hint=hint)
    if words[0] == "container":
        raise UsageError(
            "unknown command 'nagaya container'", hint="it is 'nagaya machine …', or the command alone: nagaya ps"
        )
    known = [name for _, section in catalog.SECTIONS for name in section] + list(catalog.GROUPS)
    hint = guess_word(words[0], known) or "'nagaya --help' lists the commands"
    raise UsageError(f"unknown command 'nagaya {words[0]}'", hint=hint)


def _silence_output() -> None:
    """Flush; when the reader has gone, keep the interpreter from complaining about it at its end."""
    for stream, fd in ((sys.stdout, 1), (sys.stderr, 2)):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, fd)
            os.close(null)
