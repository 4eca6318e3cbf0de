"""`--format` templates: what people write, and what is said of a wrong one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nagaya.cli.template import Template
from nagaya.cli.template_functions import Row
from nagaya.errors import UsageError

DATA: dict[str, object] = {
    "ID": "4f2a",
    "Names": "web",
    "Running": True,
    "Empty": "",
    "None": None,
    "Size": 12,
    "Ratio": 0.5,
    "List": ["a", "b"],
    "state": {"exit_code": 3, "started_ns": 1},
    "Labels": {"tier": "front", "com.example.x": "1"},
    "Config": {"Env": ["A=1", "B=2"]},
    "Mounts": [{"Source": "/a", "Target": "/b"}, {"Source": "/c", "Target": "/d"}],
}


@pytest.mark.parametrize(
    ("text", "out"),
    [
        ("plain", "plain"),
        ("{{.ID}}\t{{.Names}}", "4f2a\tweb"),
        (r"{{.ID}}\t{{.Names}}\n", "4f2a\tweb\n"),
        ("{{ .ID }}", "4f2a"),
        ("{{json .Config}}", '{"Env":["A=1","B=2"]}'),
        ("{{json .Names}}", '"web"'),
        ("{{.Config.Env}}", "[A=1 B=2]"),
        ("{{.Running}} {{.None}} {{.Size}} {{.Ratio}}", "true <no value> 12 0.5"),
        ("{{.State.ExitCode}} {{.state.exit_code}}", "3 3"),
        ("{{.Labels}}", "map[com.example.x:1 tier:front]"),
        ('{{index .Labels "com.example.x"}}', "1"),
        ('{{index .Labels "missing"}}', ""),
        ("{{.Labels.tier}} {{.Labels.missing}}", "front <no value>"),
        ("{{index .Config.Env 1}}", "B=2"),
        ("{{(index .Mounts 0).Target}}", "/b"),
        ("{{upper .Names}} {{.Names | upper | lower}} {{title .Names}}", "WEB web Web"),
        ('{{join .List ", "}} {{.List | join ","}}', "a, b a,b"),
        ('{{range split "a-b" "-"}}<{{.}}>{{end}}', "<a><b>"),
        ("{{len .List}} {{len .Names}} {{len .Labels}}", "2 3 2"),
        ('{{printf "%-6s|%03d|%5.1f|%q|%v|%%" .Names .Size .Ratio .ID .Running}}', 'web   |012|  0.5|"4f2a"|true|%'),
        ("{{print .ID .Names}}{{println .Size .Ratio}}", "4f2aweb12 0.5\n"),
        ("{{slice .ID 1 3}} {{slice .ID 2}} {{truncate .ID 2}} [{{pad .ID 1 2}}]", "f2 2a 4f [ 4f2a  ]"),
        ("{{if .Running}}up{{else}}down{{end}}", "up"),
        ("{{if .Empty}}x{{else if eq .Names \"web\"}}y{{else}}z{{end}}", "y"),
        ("{{if .Empty}}x{{else if .None}}y{{else}}z{{end}}", "z"),
        ("{{if and .Running (gt .Size 10)}}big{{end}}", "big"),
        ("{{if or .Empty .None}}x{{end}}{{if not .Empty}}y{{end}}", "y"),
        ('{{if eq .Names "a" "b" "web"}}in{{end}}{{if ne .Size 12}}no{{end}}', "in"),
        ("{{le .Size 12}} {{lt .Size 12}} {{ge .Size 13}}", "true false false"),
        ("{{range .List}}[{{.}}]{{end}}", "[a][b]"),
        ("{{range $i, $e := .List}}{{$i}}={{$e}};{{end}}", "0=a;1=b;"),
        ("{{range $k, $v := .Labels}}{{$k}}={{$v}} {{end}}", "com.example.x=1 tier=front "),
        ("{{range .Empty2}}{{end}}", None),
        ("{{range .None}}x{{else}}none{{end}}", "none"),
        ("{{range .Mounts}}{{.Source}}:{{.Target}} {{$.ID}} {{end}}", "/a:/b 4f2a /c:/d 4f2a "),
        ("{{with .Names}}<{{.}}>{{end}}{{with .Empty}}x{{else}}-{{end}}", "<web>-"),
        ("{{with $x := .Names}}{{$x}}{{end}}", "web"),
        ("{{$x := .ID}}{{$x}}{{$x = 1}}{{$x}}", "4f2a1"),
        ("a  {{- .ID -}}  b", "a4f2ab"),
        ("{{/* nothing */}}x", "x"),
        ("{{`raw \\t`}} {{\"q\\\"\\n\"}}", 'raw \\t q"\n'),
        ("{{true}} {{nil}} {{-3}} {{1.5}}", "true <no value> -3 1.5"),
    ],
)  # fmt: skip
def test_templates(text: str, out: str | None) -> None:
    if out is None:
        with pytest.raises(UsageError):
            Template(text).render(DATA)
    else:
        assert Template(text).render(DATA) == out


def test_label_of_a_row() -> None:
    row = Row(Labels="a=1")
    row.labels = {"a": "1"}
    assert Template('{{.Label "a"}}|{{.Label "b"}}').render(row) == "1|"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{.Nope}}", "unknown field '.Nope'"),
        ("{{.State.Nope}}", "unknown field '.Nope'"),
        ("{{.ID.Nope}}", "there is no field 'Nope'"),
        ("{{$y}}", "there is no variable '$y'"),
        ("{{nope .ID}}", "there is no function 'nope'"),
        ("{{.ID", "'{{' without '}}'"),
        ("{{}}", "an empty"),
        ("{{if .ID}}x", "'if' without 'end'"),
        ("{{end}}", "'end' without a beginning"),
        ("{{else}}", "'else' without a beginning"),
        ("{{.ID}}{{if}}{{end}}", "a missing value"),
        ("{{.ID | }}", "a missing value"),
        ("{{(.ID}}", "'(' without ')'"),
        ("{{.ID)}}", "')' without '('"),
        ("{{.ID ?}}", "is not understood"),
        ("{{.ID 1}}", "is no function"),
        ("{{index .List 5}}", "out of range"),
        ("{{index .List \"x\"}}", "cannot be applied"),
        ("{{range .ID}}{{end}}", "'range' needs a list or a map"),
        ("{{len .Size}}", "has no length"),
        ("{{upper}}", "cannot be applied"),
        ("{{join .ID}}", "needs a list"),
        ("{{slice .ID 3 1}}", "out of range"),
    ],
)  # fmt: skip
def test_wrong_templates(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Template(text).render(DATA)
    assert message in caught.value.message


def test_an_unknown_field_lists_the_known_ones() -> None:
    with pytest.raises(UsageError) as caught:
        Template("{{.Nme}}").render({"ID": 1, "Name": 2})
    assert caught.value.hint == "one of: .ID, .Name"


@given(st.text(alphabet='{}.$|()"`-/*= \\tnaIDifrangeelsendwithx0123', max_size=40))
def test_any_text_is_a_template_or_a_usage_error(text: str) -> None:
    try:
        Template("{{" + text + "}}{{end}}").render(DATA)
    except UsageError as error:
        assert error.message
