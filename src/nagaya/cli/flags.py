"""Commands as data, and the small parser that reads a command line by that data.

Not argparse: importing it and building one parser costs 8 ms of a 40 ms `run`, it has no clean way to stop at IMAGE,
and its messages are its own. The rules here are those of Docker's users (pflag):

- `--name=value` and `--name value`; `-n value`, `-nvalue`, `-n=value`; switches cluster: `-itd`, `-ite A=1`
- a switch takes a value only with `=`: `--init=false`
- a flag that needs a value takes the next word whatever it looks like: `--pids-limit -1`
- `--` ends the flags; a command that starts a program ends them at its first words: all after IMAGE is the program's
"""

from __future__ import annotations

from nagaya.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from nagaya.cli.context import Context

MANY = 1 << 30

_TRUE = ("true", "t", "1", "yes", "on")
_FALSE = ("false", "f", "0", "no", "off")


class Flag:
    """One flag. `names` is "-e --env" or "--env"; `value` names what it takes, "" makes it a switch.

    `many` collects every use, else the last one wins. `default` is a switch's value when it is not given.
    """

    __slots__ = ("default", "help", "key", "many", "names", "value")

    def __init__(self, names: str, help: str, *, value: str = "", many: bool = False, default: bool = False) -> None:
        self.names = tuple(names.split())
        self.key = self.names[-1].lstrip("-")
        self.help = help
        self.value = value
        self.many = many
        self.default = default


class Command:
    """One command: what its line looks like, what `--help` shows of it, and the function that carries it out."""

    __slots__ = ("about", "examples", "flags", "instead", "program_after", "run", "runs_program", "usage", "words")

    def __init__(
        self,
        run: Callable[[Context, Parsed], int],
        *,
        usage: str = "",
        words: tuple[int, int] = (0, 0),
        flags: tuple[Flag, ...] = (),
        program_after: int = 0,
        runs_program: bool = False,
        about: str = "",
        examples: tuple[tuple[str, str], ...] = (),
        instead: Callable[[list[str]], Command | None] | None = None,
    ) -> None:
        """`usage` shows the words after the flags, `words` is their least and greatest number.

        `program_after`: after so many words the rest of the line is a program's and is not looked at (0 = never).
        `runs_program`: the exit status is a program's, so that our own failures are 125. `examples`: (line, meaning).
        `instead` looks at the words and flags before they are read: they may be meant for another command.
        """
        self.run = run
        self.usage = usage
        self.words = words
        self.flags = flags
        self.program_after = program_after
        self.runs_program = runs_program
        self.about = about
        self.examples = examples
        self.instead = instead


class Parsed:
    """A command line that has been read. Asking for a flag that the command does not have is a `KeyError`."""

    def __init__(self, flags: tuple[Flag, ...]) -> None:
        self.words: tuple[str, ...] = ()
        self.help = False
        self._switches: dict[str, bool] = {}
        self._texts: dict[str, list[str]] = {}
        for flag in flags:
            if flag.value:
                self._texts[flag.key] = []
            else:
                self._switches[flag.key] = flag.default

    def switch(self, key: str) -> bool:
        return self._switches[key]

    def text(self, key: str, default: str = "") -> str:
        """The last value given, or `default`."""
        values = self._texts[key]
        return values[-1] if values else default

    def texts(self, key: str) -> list[str]:
        """Every value given, in order."""
        return self._texts[key]

    def given(self, key: str) -> bool:
        """Whether a flag that takes a value was given, be it with an empty one."""
        return bool(self._texts[key])

    def put(self, flag: Flag, value: str | bool) -> None:
        if isinstance(value, bool):
            self._switches[flag.key] = value
        else:
            self._texts[flag.key].append(value)


def parse(name: str, command: Command, argv: list[str]) -> Parsed:
    """Read `argv` (after the command's name). Raises `UsageError`; asks nothing of `argv` once `--help` was seen."""
    parsed = Parsed(command.flags)
    known = {spelling: flag for flag in command.flags for spelling in flag.names}
    words: list[str] = []
    at = 0
    while at < len(argv):
        word = argv[at]
        at += 1
        if word == "--":
            words += argv[at:]
            break
        if len(word) < 2 or word[0] != "-":
            words.append(word)
            if len(words) == command.program_after:
                words += argv[at:]
                break
        elif word == "--help" or (word == "-h" and "-h" not in known):
            parsed.help = True
            return parsed
        elif word[1].isdigit() and word[-1].isalpha() and word[:2] not in known:
            words.append(word)  # a size that is to be less: -10g
        elif word[1] == "-":
            at = _long(name, known, parsed, argv, at)
        else:
            at = _cluster(name, known, parsed, argv, at)
    parsed.words = tuple(words)
    _check_words(name, command, parsed.words)
    return parsed


def _long(name: str, known: dict[str, Flag], parsed: Parsed, argv: list[str], at: int) -> int:
    spelling, equals, value = argv[at - 1].partition("=")
    flag = known.get(spelling)
    if flag is None:
        raise unknown_flag(name, spelling, known)
    if flag.value:
        if not equals:
            value, at = _next(name, flag, spelling, argv, at), at + 1
        parsed.put(flag, value)
    else:
        parsed.put(flag, _truth(name, spelling, value) if equals else True)
    return at


def _cluster(name: str, known: dict[str, Flag], parsed: Parsed, argv: list[str], at: int) -> int:
    """`-itd`, `-e A=1`, `-eA=1`, `-e=A=1`, `-ite A=1`."""
    letters = argv[at - 1][1:]
    while letters:
        spelling, letters = "-" + letters[0], letters[1:]
        flag = known.get(spelling)
        if flag is None:
            raise unknown_flag(name, spelling, known, inside=argv[at - 1])
        if flag.value:
            if letters:
                parsed.put(flag, letters.removeprefix("="))
            else:
                parsed.put(flag, _next(name, flag, spelling, argv, at))
                at += 1
            return at
        if letters.startswith("="):
            parsed.put(flag, _truth(name, spelling, letters[1:]))
            return at
        parsed.put(flag, True)
    return at


def _next(name: str, flag: Flag, spelling: str, argv: list[str], at: int) -> str:
    if at == len(argv):
        raise UsageError(
            f"flag {spelling} of 'nagaya {name}' needs a value", hint=f"write it as {spelling} {flag.value}"
        )
    return argv[at]


def _truth(name: str, spelling: str, value: str) -> bool:
    if value.lower() in _TRUE:
        return True
    if value.lower() in _FALSE:
        return False
    raise UsageError(
        f"flag {spelling} of 'nagaya {name}' is true or false, not '{value}'", hint=f"{spelling} or {spelling}=false"
    )


def _check_words(name: str, command: Command, words: tuple[str, ...]) -> None:
    least, most = command.words
    hint = f"usage: nagaya {name} {command.usage}".rstrip()
    if len(words) < least:
        needed = f"at least {least}" if most > least else str(least)
        missing = "an argument" if least == 1 else f"{needed} arguments"
        raise UsageError(f"'nagaya {name}' needs {missing}: {command.usage}", hint=f"'nagaya {name} --help' explains")
    if len(words) > most:
        if not most:
            raise UsageError(f"'nagaya {name}' takes no arguments, but got '{words[0]}'", hint=hint)
        raise UsageError(f"'nagaya {name}' takes no further argument '{words[most]}'", hint=hint)


def unknown_flag(name: str, spelling: str, known: dict[str, Flag], *, inside: str = "") -> UsageError:
    """The error for a flag that `known` does not have, with the best guess at what was meant."""
    from nagaya.cli.guess import guess_flag  # lazy: difflib costs 10 ms, and a right command line needs none

    where = f" in '{inside}'" if inside and len(inside) > 2 else ""
    hint = guess_flag(spelling, known) or (
        f"'nagaya {name} --help' lists them" if name else "'nagaya --help' lists them"
    )
    return UsageError(f"unknown flag {spelling}{where} for 'nagaya{' ' + name if name else ''}'", hint=hint)
