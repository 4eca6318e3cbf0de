"""`--format`: the part of Go's text/template that people use with Docker, on plain data.

    {{.Names}}   {{json .}}   {{index .Labels "x"}}   {{.Names | upper}}   {{printf "%-10s %d" .ID .Size}}
    {{if .Running}}…{{else if eq .State "paused"}}…{{else}}…{{end}}   {{with .Error}}{{.}}{{end}}
    {{range .Mounts}}{{.Source}}{{end}}   {{range $key, $value := .Labels}}{{$key}}={{$value}} {{end}}   {{$x := .ID}}
    {{- trims blanks -}}   {{/* a comment */}}

A field is found by its exact name, else without regard to case and underscores: `.State.ExitCode` finds "exit_code".
Unlike in Go an unknown field is an error that lists the known ones, except in a map of the user's own keys (labels).
Source: https://pkg.go.dev/text/template
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from nagaya.cli.template_functions import FUNCTIONS, Row, show, truth
from nagaya.errors import UsageError
from nagaya.static import NamedTuple

_ACTION = re.compile(r"\{\{(- )?(.*?)( -)?\}\}", re.DOTALL)
_TOKEN = re.compile(
    r"""\s*(?:
        (?P<string>"(?:[^"\\\n]|\\.)*")
      | (?P<raw>`[^`]*`)
      | (?P<number>-?\d+(?:\.\d+)?)
      | (?P<field>\.[A-Za-z_][\w]*(?:\.[A-Za-z_][\w]*)*)
      | (?P<variable>\$\w*(?:\.[A-Za-z_]\w*)*)
      | (?P<dot>\.)
      | (?P<word>[A-Za-z_]\w*)
      | (?P<mark>:=|[=|(),])
    )""",
    re.VERBOSE,
)
_OWN_KEYS = ("labels", "sysctls", "attributes", "annotations")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", '"': '"', "\\": "\\"}


class Token(NamedTuple):
    kind: str
    text: str


class Operand(NamedTuple):
    """`kind`: field, variable, dot, value, word or pipeline; then the fields that follow a parenthesis."""

    kind: str
    text: str
    value: object = None
    path: tuple[str, ...] = ()


Pipeline = tuple[tuple[Operand, ...], ...]


class Node(NamedTuple):
    """`kind`: text, print, set, if, range or with."""

    kind: str
    text: str = ""
    pipeline: Pipeline = ()
    names: tuple[str, ...] = ()
    body: tuple[Node, ...] = ()
    otherwise: tuple[Node, ...] = ()


class Template:
    """A compiled template. Raises `UsageError` for one that is malformed."""

    def __init__(self, text: str) -> None:
        self._source = text
        self._nodes = _Parser(text).parse()

    def render(self, data: object) -> str:
        """The text for one object. Raises `UsageError` for an unknown field or a wrong argument."""
        out: list[str] = []
        try:
            _Run(out, {"$": data}).nodes(self._nodes, data)
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise UsageError(f"--format: '{self._source}' cannot be applied: {error}") from None
        return "".join(out)

    def mentions(self, field: str) -> bool:
        """Whether the text speaks of `.field` anywhere: for fields that are dear to compute."""
        return f".{field}" in self._source


def unescape(text: str) -> str:
    """`\\t` and `\\n` as users type them in a shell's single quotes, outside of {{actions}}."""
    parts = re.split(r"(\{\{.*?\}\})", text, flags=re.DOTALL)
    return "".join(part if part.startswith("{{") else part.replace("\\t", "\t").replace("\\n", "\n") for part in parts)


class _Parser:
    """Recursive descent over text and actions."""

    def __init__(self, text: str) -> None:
        self._pieces = list(_split(unescape(text)))
        self._at = 0

    def parse(self) -> tuple[Node, ...]:
        nodes, end = self._block()
        if end is not None:
            raise _malformed(f"'{end[0].text}' without a beginning")
        return nodes

    def _block(self) -> tuple[tuple[Node, ...], list[Token] | None]:
        """Nodes up to `end` or `else` (whose tokens are answered), or to the end of the text."""
        nodes: list[Node] = []
        while self._at < len(self._pieces):
            piece = self._pieces[self._at]
            self._at += 1
            if isinstance(piece, str):
                nodes.append(Node("text", piece))
                continue
            if not piece:
                continue
            if piece[0] in (Token("word", "end"), Token("word", "else")):
                return tuple(nodes), piece
            nodes.append(self._action(piece))
        return tuple(nodes), None

    def _action(self, tokens: list[Token]) -> Node:
        first = tokens[0]
        if first.kind == "word" and first.text in ("if", "range", "with"):
            return self._branch(first.text, tokens[1:])
        if len(tokens) > 1 and first.kind == "variable" and tokens[1] in (Token("mark", ":="), Token("mark", "=")):
            return Node("set", pipeline=_pipeline(tokens[2:]), names=(first.text,))
        return Node("print", pipeline=_pipeline(tokens))

    def _branch(self, kind: str, tokens: list[Token]) -> Node:
        names: tuple[str, ...] = ()
        if Token("mark", ":=") in tokens:
            at = tokens.index(Token("mark", ":="))
            names = tuple(token.text for token in tokens[:at] if token.kind == "variable")
            tokens = tokens[at + 1 :]
        pipeline = _pipeline(tokens)
        body, end = self._block()
        otherwise: tuple[Node, ...] = ()
        if end is not None and end[0].text == "else":
            if len(end) > 1:  # {{else if …}}: a branch of its own, closed by the same {{end}}
                return Node(kind, pipeline=pipeline, names=names, body=body, otherwise=(self._action(end[1:]),))
            otherwise, end = self._block()
        if end is None or end[0].text != "end":
            raise _malformed(f"'{kind}' without 'end'")
        return Node(kind, pipeline=pipeline, names=names, body=body, otherwise=otherwise)


def _split(text: str) -> list[str | list[Token]]:
    pieces: list[str | list[Token]] = []
    at, trim = 0, False
    for found in _ACTION.finditer(text):
        before = text[at : found.start()]
        before = before.lstrip() if trim else before
        pieces.append(before.rstrip() if found[1] else before)
        body = found[2].strip()
        pieces.append([] if body.startswith("/*") and body.endswith("*/") else _tokens(body))
        at, trim = found.end(), bool(found[3])
    rest = text[at:]
    if "{{" in rest:
        raise _malformed("'{{' without '}}'")
    pieces.append(rest.lstrip() if trim else rest)
    return [piece for piece in pieces if piece != ""]


def _tokens(body: str) -> list[Token]:
    tokens, at = [], 0
    while at < len(body):
        found = _TOKEN.match(body, at)
        if found is None:
            raise _malformed(f"'{body[at:].strip()}' is not understood")
        if found.lastgroup is not None:
            tokens.append(Token(found.lastgroup, found[found.lastgroup]))
        at = found.end()
        # `(index .A 0).B`: a field right behind a parenthesis belongs to it, one behind a blank is an argument
        if tokens[-1] == Token("mark", ")") and at < len(body) and body[at] == "." and (f := _TOKEN.match(body, at)):
            tokens.append(Token("tail", f["field"] or ""))
            at = f.end()
    if not tokens:
        raise _malformed("an empty '{{}}'")
    return tokens


def _pipeline(tokens: list[Token]) -> Pipeline:
    commands, rest = _commands(tokens)
    if rest:
        raise _malformed("')' without '('")
    return commands


def _commands(tokens: list[Token]) -> tuple[Pipeline, list[Token]]:
    """Commands separated by |, up to a closing parenthesis; what follows that."""
    commands: list[tuple[Operand, ...]] = []
    current: list[Operand] = []
    while tokens:
        token, tokens = tokens[0], tokens[1:]
        if token == Token("mark", ")"):
            tokens = [token, *tokens]
            break
        if token == Token("mark", "|"):
            commands.append(_command(current))
            current = []
        elif token == Token("mark", "("):
            inner, tokens = _commands(tokens)
            if not tokens:
                raise _malformed("'(' without ')'")
            tokens = tokens[1:]
            path: tuple[str, ...] = ()
            if tokens and tokens[0].kind == "tail":
                path, tokens = tuple(tokens[0].text.split(".")[1:]), tokens[1:]
            current.append(Operand("pipeline", "", inner, path))
        else:
            current.append(_operand(token))
    commands.append(_command(current))
    return tuple(commands), tokens


def _command(operands: list[Operand]) -> tuple[Operand, ...]:
    if not operands:
        raise _malformed("a missing value")
    first = operands[0]
    if first.kind == "word" and first.text not in FUNCTIONS:
        raise UsageError(
            f"--format: there is no function '{first.text}'", hint=f"one of: {', '.join(sorted(FUNCTIONS))}"
        )
    return tuple(operands)


def _operand(token: Token) -> Operand:
    kind, text = token
    if kind == "string":
        value = re.sub(r"\\(.)", lambda found: _ESCAPES.get(found[1], found[0]), text[1:-1])
        return Operand("value", text, value)
    if kind == "raw":
        return Operand("value", text, text[1:-1])
    if kind == "number":
        return Operand("value", text, float(text) if "." in text else int(text))
    if kind == "word" and text in ("true", "false", "nil"):
        return Operand("value", text, {"true": True, "false": False, "nil": None}[text])
    if kind in ("field", "variable"):
        name, *path = text.split(".") if kind == "variable" else ("", *text.split(".")[1:])
        return Operand(kind, name, None, tuple(path))
    if kind in ("dot", "word"):
        return Operand(kind, text)
    raise _malformed(f"'{text}' in a wrong place")


class _Run:
    """One rendering: output so far and variables."""

    def __init__(self, out: list[str], variables: dict[str, object]) -> None:
        self._out = out
        self._variables = variables

    def nodes(self, nodes: tuple[Node, ...], dot: object) -> None:
        for node in nodes:
            if node.kind == "text":
                self._out.append(node.text)
            elif node.kind == "print":
                self._out.append(show(self._pipe(node.pipeline, dot)))
            elif node.kind == "set":
                self._variables[node.names[0]] = self._pipe(node.pipeline, dot)
            elif node.kind == "range":
                self._range(node, dot)
            else:
                self._condition(node, dot)

    def _condition(self, node: Node, dot: object) -> None:
        value = self._pipe(node.pipeline, dot)
        if node.names:
            self._variables[node.names[0]] = value
        if truth(value):
            self.nodes(node.body, value if node.kind == "with" else dot)
        else:
            self.nodes(node.otherwise, dot)

    def _range(self, node: Node, dot: object) -> None:
        value = self._pipe(node.pipeline, dot)
        if isinstance(value, Mapping):
            items: list[tuple[object, object]] = sorted(value.items(), key=lambda item: str(item[0]))
        elif isinstance(value, (list, tuple)):
            items = list(enumerate(value))
        elif value is None:
            items = []
        else:
            raise UsageError(f"--format: 'range' needs a list or a map, not {show(value)!r}")
        for key, item in items:
            if len(node.names) == 2:
                self._variables[node.names[0]], self._variables[node.names[1]] = key, item
            elif node.names:
                self._variables[node.names[0]] = item
            self.nodes(node.body, item)
        if not items:
            self.nodes(node.otherwise, dot)

    def _pipe(self, pipeline: Pipeline, dot: object) -> object:
        value, first = None, True
        for command in pipeline:
            value = self._call(command, dot, () if first else (value,))
            first = False
        return value

    def _call(self, command: tuple[Operand, ...], dot: object, piped: tuple[object, ...]) -> object:
        head, arguments = command[0], command[1:]
        if head.kind == "word":
            values = [self._value(operand, dot) for operand in arguments]
            return FUNCTIONS[head.text](*values, *piped)
        value = self._value(head, dot)
        if callable(value):
            method: Callable[..., object] = value
            return method(*(self._value(operand, dot) for operand in arguments), *piped)
        if arguments or piped:
            raise UsageError(
                f"--format: '{head.text or '.' + '.'.join(head.path)}' is no function and takes no argument"
            )
        return value

    def _value(self, operand: Operand, dot: object) -> object:
        if operand.kind == "value":
            return operand.value
        if operand.kind == "dot":
            return dot
        if operand.kind == "field":
            return _walk(dot, operand.path)
        if operand.kind == "variable":
            if operand.text not in self._variables:
                raise UsageError(f"--format: there is no variable '{operand.text}'")
            return _walk(self._variables[operand.text], operand.path)
        if operand.kind == "pipeline":
            pipeline: Pipeline = operand.value  # type: ignore[assignment]
            return _walk(self._pipe(pipeline, dot), operand.path)
        return FUNCTIONS[operand.text]() if operand.text in FUNCTIONS else _no_function(operand.text)


def _no_function(name: str) -> object:
    raise UsageError(f"--format: there is no function '{name}'", hint=f"one of: {', '.join(sorted(FUNCTIONS))}")


def _walk(value: object, path: tuple[str, ...]) -> object:
    own_keys = False
    for name in path:
        value = _field(value, name, own_keys)
        own_keys = name.lower() in _OWN_KEYS
    return value


def _field(value: object, name: str, own_keys: bool) -> object:
    if isinstance(value, Row) and name == "Label":
        return lambda key: value.labels.get(str(key), "")
    if not isinstance(value, Mapping):
        raise UsageError(f"--format: there is no field '{name}' in {show(value)!r}")
    if name in value or own_keys:
        return value.get(name)
    wanted = _plain(name)
    for key in value:
        if _plain(str(key)) == wanted:
            return value[key]
    raise UsageError(f"--format: unknown field '.{name}'", hint=f"one of: {', '.join('.' + str(key) for key in value)}")


def _plain(name: str) -> str:
    return name.lower().replace("_", "")


def _malformed(what: str) -> UsageError:
    return UsageError(f"--format: malformed template: {what}", hint="for example '{{.ID}}\\t{{.Names}}', or json")
