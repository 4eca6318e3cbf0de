"""The command line parser: where flags end, what clusters mean, and what is said when something is wrong."""

from __future__ import annotations

import pytest

from nagaya.cli import catalog
from nagaya.cli.flags import MANY, Command, Flag, Parsed, parse
from nagaya.errors import UsageError

RUN = Command(
    lambda context, parsed: 0,
    usage="IMAGE [COMMAND [ARG...]]",
    words=(1, MANY),
    program_after=1,
    flags=(
        Flag("-i --interactive", "x"),
        Flag("-t --tty", "x"),
        Flag("-d --detach", "x"),
        Flag("-e --env", "x", value="NAME=VALUE", many=True),
        Flag("--init", "x", default=True),
        Flag("--name", "x", value="NAME"),
        Flag("--pids-limit", "x", value="NUMBER"),
        Flag("-h --hostname", "x", value="NAME"),
    ),
)
RM = Command(lambda context, parsed: 0, usage="MACHINE...", words=(1, MANY), flags=(Flag("-f --force", "x"),))
NONE = Command(lambda context, parsed: 0)


def read(*argv: str, command: Command = RUN) -> Parsed:
    return parse("run" if command is RUN else "rm", command, list(argv))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["debian"], ("debian",)),
        (["-it", "debian", "ls", "-l"], ("debian", "ls", "-l")),
        (["debian", "--help"], ("debian", "--help")),
        (["debian", "-it", "--name", "x"], ("debian", "-it", "--name", "x")),
        (["--", "debian", "ls"], ("debian", "ls")),
        (["--name", "--", "debian"], ("debian",)),  # a flag that needs a value takes the next word whatever it is
        (["debian", "--", "ls"], ("debian", "--", "ls")),
        (["debian", "sh", "-c", "echo --rm"], ("debian", "sh", "-c", "echo --rm")),
        (["-", "x"], ("-", "x")),
        (["debian", ""], ("debian", "")),
    ],
)
def test_flags_end_at_the_image(argv: list[str], words: tuple[str, ...]) -> None:
    assert read(*argv).words == words


def test_flags_before_the_image_are_ours_and_those_behind_it_are_not() -> None:
    parsed = read("-it", "debian", "-d")
    assert parsed.switch("interactive")
    assert parsed.switch("tty")
    assert not parsed.switch("detach")


@pytest.mark.parametrize(
    ("argv", "env"),
    [
        (["-e", "A=1"], ["A=1"]),
        (["-eA=1"], ["A=1"]),
        (["-e=A=1"], ["A=1"]),
        (["-ite", "A=1"], ["A=1"]),
        (["-iteA=1"], ["A=1"]),
        (["--env", "A=1", "--env=B=2"], ["A=1", "B=2"]),
        (["--env="], [""]),
        (["-e", "-it"], ["-it"]),
    ],
)
def test_values(argv: list[str], env: list[str]) -> None:
    assert read(*argv, "debian").texts("env") == env


def test_a_negative_number_is_a_value() -> None:
    assert read("--pids-limit", "-1", "debian").text("pids-limit") == "-1"


def test_a_size_that_is_to_be_less_is_no_flag() -> None:
    command = Command(lambda context, parsed: 0, words=(2, 2), flags=(Flag("-s --shrink", "Cut"),))
    parsed = parse("disk resize", command, ["web", "-10g", "-s"])
    assert parsed.words == ("web", "-10g") and parsed.switch("shrink")
    for other in ("-x1", "-9"):  # as in kill -9
        with pytest.raises(UsageError, match=f"unknown flag {other[:2]}"):
            parse("disk resize", command, ["web", other])


def test_the_last_value_wins() -> None:
    assert read("--name", "a", "--name", "b", "debian").text("name") == "b"


@pytest.mark.parametrize(
    ("argv", "init"),
    [([], True), (["--init"], True), (["--init=false"], False), (["--init=0"], False), (["--init=TRUE"], True)],
)
def test_a_switch_takes_a_value_only_with_an_equals_sign(argv: list[str], init: bool) -> None:
    assert read(*argv, "debian").switch("init") is init


def test_a_switch_in_a_cluster_can_be_turned_off() -> None:
    parsed = read("-ti=false", "debian")
    assert parsed.switch("tty")
    assert not parsed.switch("interactive")


def test_flags_may_follow_words_where_no_program_does() -> None:
    parsed = read("a", "-f", "b", "--", "-f", command=RM)
    assert parsed.words == ("a", "b", "-f")
    assert parsed.switch("force")


def test_help_wins_over_what_is_missing() -> None:
    assert read("--help").help
    assert read("-h", command=RM).help
    assert read("-h", "box", "debian").text("hostname") == "box"


@pytest.mark.parametrize(
    ("argv", "message", "hint"),
    [
        (["--nam", "x", "debian"], "unknown flag --nam for 'nagaya run'", "did you mean --name?"),
        (["--nmae", "x", "debian"], "unknown flag --nmae for 'nagaya run'", "did you mean --name?"),
        (["-itx", "debian"], "unknown flag -x in '-itx' for 'nagaya run'", "'nagaya run --help' lists them"),
        (["--privileged", "debian"], "unknown flag --privileged for 'nagaya run'", "--cap-add ALL"),
        (["--root", "/x", "debian"], "unknown flag --root for 'nagaya run'", "goes before the command"),
        (["--name"], "flag --name of 'nagaya run' needs a value", "--name NAME"),
        (["-e"], "flag -e of 'nagaya run' needs a value", "-e NAME=VALUE"),
        (["--init=maybe", "debian"], "flag --init of 'nagaya run' is true or false, not 'maybe'", "--init=false"),
        ([], "'nagaya run' needs an argument: IMAGE [COMMAND [ARG...]]", "--help"),
    ],
)
def test_errors_say_what_is_wrong_and_what_to_do(argv: list[str], message: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(*argv)
    assert caught.value.message == message
    assert hint in caught.value.hint


def test_too_many_words() -> None:
    with pytest.raises(UsageError, match="takes no arguments, but got 'x'"):
        parse("version", NONE, ["x"])
    two = Command(lambda context, parsed: 0, usage="A B", words=(2, 2))
    with pytest.raises(UsageError, match="takes no further argument 'c'"):
        parse("rename", two, ["a", "b", "c"])
    with pytest.raises(UsageError, match="needs 2 arguments: A B"):
        parse("rename", two, ["a"])


def test_asking_for_a_flag_that_was_not_declared_is_a_defect() -> None:
    with pytest.raises(KeyError):
        read("debian").switch("nonsense")


@pytest.mark.parametrize("name", catalog.every())
def test_every_command_can_be_loaded_and_explains_itself(name: str) -> None:
    from nagaya.cli.help import render_command

    found = catalog.find(name.split())
    assert found is not None
    full, place = found
    assert full == name
    command = catalog.load(place)
    text = render_command(name, command)
    assert text.startswith(f"Usage: nagaya {name}")
    assert max(map(len, text.splitlines())) <= 120
    spellings = [spelling for flag in command.flags for spelling in flag.names]
    assert len(spellings) == len(set(spellings))
    assert parse(name, command, ["--help"]).help


@pytest.mark.parametrize("name", catalog.every())
def test_examples_are_right_command_lines(name: str) -> None:
    """Every example parses: what the help shows must work."""
    import re
    import shlex

    found = catalog.find(name.split())
    assert found is not None
    for line, _ in catalog.load(found[1]).examples:
        line = line.partition(" | ")[0] if line.startswith("nagaya") else line
        words = shlex.split(re.sub(r"\$\(nagaya [^)]*-[^)]*\)", "NAME", line).replace('eval "$(', "").replace(')"', ""))
        words = words[words.index("nagaya") + 1 :]
        words = words[: words.index("<")] if "<" in words else words
        other = catalog.find(words)
        assert other is not None, line
        parse(other[0], catalog.load(other[1]), words[other[0].count(" ") + 1 :])


def test_the_reference_is_up_to_date() -> None:
    from pathlib import Path

    from nagaya.cli.help import render_reference

    path = Path(__file__).resolve().parents[2] / "docs" / "commands.md"
    assert path.read_text() == render_reference(), "see nagaya.cli.help.render_reference for how to make it again"


def test_only_the_invoked_command_is_imported() -> None:
    import subprocess
    import sys

    code = (
        "import sys\n"
        "from nagaya.cli import catalog\n"
        "catalog.load(catalog.find(['run'])[1])\n"
        "print(*[m for m in sys.modules if m.startswith('nagaya.cli.commands.') or m in ('argparse', 'dataclasses',"
        " 'subprocess', 'pathlib', 'socket', 'threading', 'nagaya.cli.help', 'nagaya.cli.template')])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["nagaya.cli.commands.run"]
