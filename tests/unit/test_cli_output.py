"""Filters, tables, human words, lists and progress: everything that a command prints."""

from __future__ import annotations

import json
import os
import pty
import sys
from collections.abc import Callable

import pytest

from nagaya.cli import filters, human, listing, progress, table, views
from nagaya.cli.commands.inspect import docker_view
from nagaya.cli.failures import printable
from nagaya.cli.flags import Command, Parsed, parse
from nagaya.cli.template import Template
from nagaya.cli.template_functions import Row
from nagaya.errors import UsageError
from nagaya.images.image import Image, ImageConfig
from nagaya.model.spec import MachineSpec, Mount, Process
from nagaya.model.state import CREATED, EXITED, PAUSED, RESTARTING, RUNNING, STARTING, MachineState

SECOND = 1_000_000_000
NOW = 1_795_440_000 * SECOND

SPEC = MachineSpec(
    id="4f2a" + "0" * 28,
    name="web",
    type="container",
    image="debian:12",
    image_id="sha256:" + "ab" * 32,
    platform="linux/amd64",
    process=Process(argv=("sleep", "infinity", "--and-some-more")),
    hostname="web",
    created_ns=NOW - 60 * SECOND,
    labels=(("tier", "front"), ("x", "")),
    mounts=(Mount("volume", "data", "/data"), Mount("bind", "/srv", "/srv")),
)
STATE = MachineState(phase=EXITED, exit_code=137, started_ns=NOW - 50 * SECOND, finished_ns=NOW - 5 * SECOND)

# -- filters


@pytest.mark.parametrize(
    ("texts", "match"),
    [
        ([], True),
        (["name=we"], True),
        (["name=^web$"], True),
        (["name=/web"], True),
        (["name=db"], False),
        (["name=db", "name=web"], True),
        (["id=4f2a"], True),
        (["id=f2a"], False),
        (["label=tier"], True),
        (["label=tier=front"], True),
        (["label=tier=back"], False),
        (["label=tier", "label=none"], False),
        (["status=exited"], True),
        (["status=running", "status=exited"], True),
        (["status=running"], False),
        (["status=exited", "name=db"], False),
        (["exited=137"], True),
        (["exited=0"], False),
        (["ancestor=debian:12"], True),
        (["ancestor=debian"], True),
        (["ancestor=busybox"], False),
        (["ancestor=" + "ab" * 6], True),
        (["ancestor=sha256:" + "ab" * 32], True),
        (["network=bridge"], True),
        (["network=none"], False),
        (["volume=data"], True),
        (["volume=/srv"], True),
        (["volume=/data"], True),
        (["volume=dat"], False),
        (["type=container"], True),
        (["before=other"], True),
        (["since=other"], False),
    ],
)
def test_machine_filters(texts: list[str], match: bool) -> None:
    wanted = filters.parse_filters(texts, filters.MACHINE_KEYS)
    facts = views.machine_facts(SPEC, STATE)
    assert filters.matches_machine(wanted, facts, created_ns_of=lambda name: NOW) is match


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name", "is not KEY=VALUE"),
        ("nmae=x", "unknown key 'nmae'"),
        ("status=dead", "unknown status 'dead'"),
        ("exited=x", "no exit status"),
    ],
)
def test_wrong_filters(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        filters.parse_filters([text], filters.MACHINE_KEYS)


def test_a_name_that_is_no_regular_expression() -> None:
    wanted = filters.parse_filters(["name=["], filters.MACHINE_KEYS)
    with pytest.raises(UsageError, match="not a regular expression"):
        filters.matches_machine(wanted, views.machine_facts(SPEC, STATE), created_ns_of=lambda name: 0)


@pytest.mark.parametrize(
    ("pattern", "name", "match"),
    [
        ("debian", "debian:12", True),
        ("debian", "docker.io/library/debian:12", True),
        ("library/debian", "docker.io/library/debian:12", True),
        ("debian:12", "debian:12", True),
        ("debian:1*", "debian:12", True),
        ("debian:11", "debian:12", False),
        ("deb*", "debian:12", True),
        ("*", "x.example:5000/app:1", True),
        ("x.example:5000/app:1", "x.example:5000/app:1", True),
        ("app", "x.example:5000/app:1", True),
        ("app", "x.example:5000/app", True),
        ("bian", "debian:12", False),
    ],
)
def test_references(pattern: str, name: str, match: bool) -> None:
    assert filters.matches_reference(pattern, name) is match


def test_an_image_without_a_tag_is_the_latest() -> None:
    facts = views.machine_facts(SPEC._replace(image="debian"), STATE)
    for text, match in (("debian:latest", True), ("debian", True), ("debian:12", False)):
        wanted = filters.parse_filters([f"ancestor={text}"], filters.MACHINE_KEYS)
        assert filters.matches_machine(wanted, facts, created_ns_of=lambda name: NOW) is match


def test_image_and_volume_filters() -> None:
    facts = filters.ImageFacts("sha256:ab", ("app:1",), {"a": "1"}, NOW)

    def image(text: str) -> bool:
        return filters.matches_image(
            filters.parse_filters([text], filters.IMAGE_KEYS), facts, created_ns_of=lambda name: NOW - 1
        )

    assert [image(text) for text in ("dangling=true", "dangling=false", "reference=app", "label=a=1", "since=x")] == [
        False, True, True, True, True,
    ]  # fmt: skip

    def volume(text: str) -> bool:
        wanted = filters.parse_filters([text], filters.VOLUME_KEYS)
        return filters.matches_volume(wanted, "data", {"a": "1"}, used=True)

    assert [volume(text) for text in ("name=at", "dangling=true", "dangling=0", "label=b")] == [
        True,
        False,
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("event=die", True), ("type=machine", True), ("type=container", True), ("machine=web", True),
        ("container=web", True), ("machine=4f2a", True), ("machine=db", False), ("image=debian", True),
        ("image=busybox", False), ("label=image=debian", True), ("action=start", False), ("volume=web", False),
    ],
)  # fmt: skip
def test_event_filters(text: str, match: bool) -> None:
    wanted = filters.parse_filters([text], filters.EVENT_KEYS)
    assert filters.matches_event(wanted, "machine", "die", "4f2a00", "web", {"image": "debian"}) is match


# -- words


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0B"), (999, "999B"), (1000, "1kB"), (12_345_678, "12.3MB"), (999_999, "1MB"), (117_000_000, "117MB")],
)
def test_sizes(count: int, text: str) -> None:
    assert human.format_size(count) == text


def test_binary_sizes() -> None:
    assert human.format_binary_size(1536) == "1.5KiB"
    assert human.format_binary_size(1024 * 1024 - 1) == "1MiB"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "Less than a second"), (1, "1 second"), (59, "59 seconds"), (60, "About a minute"), (300, "5 minutes"),
        (3600, "About an hour"), (7200, "2 hours"), (86400, "24 hours"), (3 * 86400, "3 days"), (21 * 86400, "3 weeks"),
        (90 * 86400, "3 months"), (800 * 86400, "2 years"),
    ],
)  # fmt: skip
def test_spans(seconds: float, text: str) -> None:
    assert human.format_span(seconds) == text


@pytest.mark.parametrize(
    ("state", "text"),
    [
        (MachineState(), "Created"),
        (MachineState(phase=CREATED, error="its start was cut off"), "Created (its start was cut off)"),
        (MachineState(phase=STARTING), "Starting"),
        (MachineState(phase=RUNNING, started_ns=NOW - 300 * SECOND), "Up 5 minutes"),
        (MachineState(phase=PAUSED, started_ns=NOW - 2 * SECOND), "Up 2 seconds (Paused)"),
        (MachineState(phase=RESTARTING, exit_code=1, finished_ns=NOW - 2 * SECOND), "Restarting (1) 2 seconds ago"),
        (STATE, "Exited (137) 5 seconds ago"),
    ],
)
def test_status(state: MachineState, text: str) -> None:
    assert views.status_text(state, NOW) == text


def test_control_characters_of_a_guest_stay_harmless() -> None:
    assert printable("a\x1b[2Jb\n") == "a\\x1b[2Jb\\n"
    assert "\x1b" not in views.command_text(("sh", "-c", "\x1b[2J"))


# -- tables and lists


def test_columns_are_aligned_by_cells() -> None:
    assert table.render([["NAME", "X"], ["長屋", "1"], ["ab", "2"]]) == ["NAME   X", "長屋   1", "ab     2"]


def test_elastic_columns_give_way_to_the_terminal() -> None:
    rows = [["ID", "COMMAND"], ["4f2a", "x" * 100]]
    lines = table.render(rows, width=40, elastic=(1,))
    assert [table.cells(line) for line in lines] == [14, 40]
    assert lines[1].endswith("x…")
    assert len(table.render(rows)[1]) == 107


def _listed(parsed: Parsed, rows: list[Row]) -> None:
    layout = listing.Layout(("ID", "Names"), {"ID": "MACHINE ID", "Names": "NAMES", "Status": "STATUS"})
    listing.print_list(
        parsed,
        layout,
        rows=lambda: rows,
        records=lambda: [{"id": "full"}],
        ids=lambda: [str(row["ID"]) for row in rows],
    )


LIST = Command(
    lambda context, parsed: 0, flags=(listing.FORMAT, listing.JSON, listing.QUIET, listing.NO_TRUNC, listing.FILTER)
)


@pytest.mark.parametrize(
    ("argv", "out"),
    [
        ([], "MACHINE ID   NAMES\n4f2a         web\n"),
        (["-q"], "4f2a\n"),
        (["--format", "{{.ID}}={{.Names}}"], "4f2a=web\n"),
        (["--format", r"table {{.Names}}\t{{.Status}}"], "NAMES   STATUS\nweb     Up\n"),
        (["--format", "table"], "MACHINE ID   NAMES\n4f2a         web\n"),
        (["--format", "json"], '{"ID":"4f2a","Names":"web","Status":"Up"}\n'),
        (["--format", "{{json .}}"], '{"ID":"4f2a","Names":"web","Status":"Up"}\n'),
        (["--format", 'table {{.Label "com.example.tier"}}'], "tier\nfront\n"),
        (["--json"], '[\n  {\n    "id": "full"\n  }\n]\n'),
    ],
)
def test_lists(argv: list[str], out: str, capsys: pytest.CaptureFixture[str]) -> None:
    row = Row(ID="4f2a", Names="web", Status="Up")
    row.labels = {"com.example.tier": "front"}
    _listed(parse("ps", LIST, argv), [row])
    assert capsys.readouterr().out == out


def test_an_empty_table_has_its_heading(capsys: pytest.CaptureFixture[str]) -> None:
    _listed(parse("ps", LIST, ["--format", "table {{.Names}}"]), [])
    assert capsys.readouterr().out == "NAMES\n"


def test_json_and_format_exclude_each_other() -> None:
    with pytest.raises(UsageError, match="excludes"):
        _listed(parse("ps", LIST, ["--json", "-q"]), [])


def test_a_row_has_every_heading_and_a_record_is_json() -> None:
    row = views.machine_row(SPEC, STATE, now_ns=NOW, no_trunc=False)
    assert set(views.MACHINES.headings) <= set(row)
    assert row["ID"] == SPEC.id[:12]
    assert len(str(row["Command"])) <= 20
    record = views.machine_record(SPEC, STATE, now_ns=NOW)
    assert json.loads(json.dumps(record))["labels"] == {"tier": "front", "x": ""}


@pytest.mark.parametrize(
    ("name", "repository", "tag"),
    [
        ("debian:12", "debian", "12"),
        ("docker.io/library/debian:12", "debian", "12"),
        ("docker.io/team/app:1", "team/app", "1"),
        ("x.example:5000/app", "x.example:5000/app", "<none>"),
        ("app@sha256:00", "app", "<none>"),
    ],
)
def test_image_names(name: str, repository: str, tag: str) -> None:
    assert views.split_name(name) == (repository, tag)


def test_an_image_has_a_row_for_each_name() -> None:
    image = Image("sha256:" + "ab" * 32, "sha256:cd", ("a:1", "b:2"), "linux/amd64", 0, 10, (), ImageConfig(), "oci")
    rows = views.image_rows(image, now_ns=NOW, no_trunc=False)
    assert [(row["Repository"], row["Tag"], row["ID"]) for row in rows] == [("a", "1", "ab" * 6), ("b", "2", "ab" * 6)]
    assert set(views.IMAGES.headings) <= set(rows[0])
    (nameless,) = views.image_rows(image._replace(names=()), now_ns=NOW, no_trunc=True)
    assert (nameless["Repository"], nameless["ID"]) == ("<none>", image.id)


def test_dockers_paths_in_inspect_templates() -> None:
    data = docker_view(
        {
            "name": "web", "image": "debian", "process": {"argv": ["sleep", "1"], "env": ["A=1"]},
            "state": {"phase": "running", "exit_code": -1, "address": "10.0.0.2", "pid": 5, "oom_killed": False},
            "limits": {"memory_bytes": 7, "cpus_milli": 1500}, "labels": {"a.b": "1"}, "restart": {"policy": "always"},
        }
    )  # fmt: skip
    text = (
        '{{.Name}} {{.State.Status}} {{.State.Running}} {{.State.Phase}} {{.Config.Env}} {{index .Config.Labels "a.b"}}'
        " {{.HostConfig.NanoCpus}} {{.HostConfig.RestartPolicy.Name}} {{.NetworkSettings.IPAddress}} {{.Path}} {{.Args}}"
    )
    assert Template(text).render(data) == "web running true running [A=1] 1 1500000000 always 10.0.0.2 sleep [1]"


# -- progress


def _work(shown: progress.Shown) -> None:
    shown.step("trying registry x.example")
    shown.start("a", "layer \x1b[2J", 1000)
    shown.advance("a", 500)
    shown.advance("unknown", 1)
    shown.finish("a", "already here")
    shown.step("unpacked")


def test_plain_lines_when_it_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.open_progress(quiet=False, eager=False) as shown:
        _work(shown)
    assert capsys.readouterr().err.splitlines() == [
        "trying registry x.example", "layer \\x1b[2J: 1kB, already here", "unpacked",
    ]  # fmt: skip


def test_quiet_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.open_progress(quiet=True, eager=True) as shown:
        _work(shown)
    assert capsys.readouterr().err == ""


def test_one_step_alone_is_told_only_by_those_who_want_it(capsys: pytest.CaptureFixture[str]) -> None:
    for eager, expected in ((False, ""), (True, "local image\n")):
        with progress.open_progress(quiet=False, eager=eager) as shown:
            shown.step("local image")
        assert capsys.readouterr().err == expected


def test_a_held_step_is_told_when_the_work_fails(capsys: pytest.CaptureFixture[str]) -> None:
    with (
        pytest.raises(UsageError),
        progress.open_progress(quiet=False, eager=False) as shown,
    ):
        shown.step("trying registry x.example")
        raise UsageError("no")
    assert capsys.readouterr().err == "trying registry x.example\n"


def _on_pty(work: Callable[[], None]) -> bytes:
    """What `work` writes to a terminal on descriptor 2."""
    master, slave = pty.openpty()
    saved, stream = os.dup(2), sys.stderr
    try:
        os.dup2(slave, 2)
        with open(2, "w", encoding="utf-8", closefd=False) as sys.stderr:
            work()
    finally:
        sys.stderr = stream
        os.dup2(saved, 2)
        os.close(saved)
        os.close(slave)
    written = b""
    try:
        while chunk := os.read(master, 65536):
            written += chunk
    except OSError:
        pass  # EIO: all slaves are closed, and everything is read
    os.close(master)
    return written


@pytest.mark.parametrize("no_color", [False, True])
def test_bars_on_a_terminal(monkeypatch: pytest.MonkeyPatch, no_color: bool) -> None:
    monkeypatch.setenv("TERM", "xterm")
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    else:
        monkeypatch.delenv("NO_COLOR", raising=False)

    def work() -> None:
        with progress.open_progress(quiet=False, eager=False) as shown:
            assert isinstance(shown, progress.Bars)
            _work(shown)

    out = _on_pty(work).decode()
    assert "trying registry x.example\r\n" in out
    assert "layer \\x1b[2J: 1kB, already here" in out
    assert "[2J\x1b" not in out
    assert "\x1b[1A\r\x1b[J" in out, "the bar is erased before the line that stays"
    assert ("\x1b[36m" in out) is not no_color


def test_a_bar_fits_its_terminal() -> None:
    bars = progress.Bars(eager=True)
    bars._color = False
    bar = progress._Bar("x" * 60, 10_000_000)
    bar.done = 5_000_000
    for columns in (20, 40, 80, 200):
        assert len(bars._render(bar, columns)) < columns
