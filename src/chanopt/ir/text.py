"""The IR as a language: ``write`` and ``parse`` (docs/ir.md has the grammar)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

import torch

from chanopt.errors import ParseError
from chanopt.ir.index_map import IndexMap, Layout
from chanopt.ir.program import Access, Arg, How, Interface, Kind, Marker, Op, Param, Program, Read, Refusal, Value

_HEAD = re.compile(r"program batch=(\d+)(?: target=([\w:]+))?( channels_last)? \{$")
_TOKEN = re.compile(
    r"\s*(?P<token>%[\w.]+|[@&](?:[\w.\-]+|\"(?:[^\"\\]|\\.)*\")|\$[CG]|\"(?:[^\"\\]|\\.)*\"|torch\.\w+|[A-Za-z_][\w.]*"
    r"|-?(?:inf|nan|\d+\.?\d*(?:[eE][-+]?\d+)?)|.)"
)
_INDEX = re.compile(r"[-\d:,x ]*")
_WORDS: dict[str, Any] = {"true": True, "false": False, "none": None}
_NUMBERS: dict[str, float] = {"inf": math.inf, "nan": math.nan}


def write(program: Program) -> str:
    """The text of a program; ``parse`` reads it back."""
    flag = " channels_last" if program.channels_last else ""
    lines = [f"program batch={program.batch} target={program.target}{flag} {{"]
    lines.append(
        f"  interface {json.dumps([program.interface.inputs, program.interface.outputs, *program.interface.arguments])}"
    )
    lines += [f"  refused {json.dumps([r.op, r.layer, r.source, r.reason])}" for r in program.refusals]
    lines += [f"  {_write_op(op, program)}" for op in program.ops]
    return "\n".join([*lines, "}"]) + "\n"


def _write_op(op: Op, program: Program) -> str:
    head = f"%{op.result} : {_write_value(program.values[op.result])} = " if op.result else ""
    args = [_write_arg(arg, op, program) for arg in op.args]
    args += [f"{key}={_write_arg(arg, op, program)}" for key, arg in op.kwargs]
    notes = [f"groups={op.groups}"] * (op.groups != 1) + [f"block={op.block}"] * (op.block != 1)
    notes += ["linear"] * op.linear + ["border"] * op.border + [f"how={op.how.value}"] * (op.how is not How.OWN)
    notes += [f"layer {json.dumps(op.layer)}"] * bool(op.layer) + [f"source {json.dumps(op.source)}"] * bool(op.source)
    return " ".join([f"{head}{op.kind.value} {op.target}({', '.join(args)})", *notes])


def _write_value(value: Value) -> str:
    sizes = [f"{size}*" if axis == value.axis else str(size) for axis, size in enumerate(value.shape)]
    text = f"{value.dtype}[{', '.join(sizes)}]"
    if value.layout is not None and not value.layout.is_identity:
        text += f" {{{value.layout.live}}}"
    return f"{text} {value.channel_bytes}B" if value.channel_bytes else text


def _write_arg(arg: Arg, op: Op, program: Program) -> str:
    if isinstance(arg, tuple):
        return f"[{', '.join(_write_arg(item, op, program) for item in arg)}]"
    if isinstance(arg, Read):
        return _write_read(arg, op, program)
    if isinstance(arg, Param):
        axes = ",".join("_" if axis is None else str(axis) for axis in (arg.out, arg.inn))
        plain = re.fullmatch(r"[\w.\-]+", arg.name)
        name = ("&" if arg.buffer else "@") + (arg.name if plain else json.dumps(arg.name))
        return name if axes == "_,_" else f"{name}<{axes}>"
    if isinstance(arg, Marker):
        return arg.value
    if isinstance(arg, torch.device):
        return f"torch.device({json.dumps(str(arg))})"
    if arg is None or isinstance(arg, bool):
        return str(arg).lower()
    return json.dumps(arg) if isinstance(arg, str) else str(arg)


def _write_read(read: Read, op: Op, program: Program) -> str:
    if read.access is Access.ALL:
        return f"%{read.value}!"
    if read.access is Access.SET:
        return f"%{read.value}{{{read.index}}}"
    if read.fan == 1 and read.index.is_identity(program.values[op.result].live.channels):
        return f"%{read.value}"
    return f"%{read.value}[{read.index}]" + (f"/{read.fan}" if read.fan > 1 else "")


def parse(text: str) -> Program:
    """Read the text form of a program.

    The result has no weights and no dialect: :meth:`Program.bind` gives it those of another program.

    Raises:
        ParseError: the text is not a program; names the line and the column.
    """
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    head = _HEAD.match(lines[0][1]) if lines else None
    if head is None or lines[-1][1] != "}":
        raise ParseError("line 1: expected 'program batch=N {' ... '}', found something else")
    interface, refusals = Interface("", ""), []
    ops: list[Op] = []
    values: dict[str, Value] = {}
    for number, line in lines[1:-1]:
        at = _Line(line, number)
        try:
            found = at.statement()
        except ParseError:
            raise
        except (ValueError, TypeError, AttributeError) as error:  # a word that is none, a layout that is no bijection
            raise at.fail(f"a statement of the grammar ({error})") from error
        if isinstance(found, Interface):
            interface = found
        elif isinstance(found, Refusal):
            refusals.append(found)
        else:
            op, value = found
            ops.append(op)
            values |= {value.name: value} if value is not None else {}
    return Program(tuple(ops), values, {}, interface, int(head[1]), tuple(refusals), bool(head[3]), head[2] or "cpu")


class _Line:
    """One op being read: a cursor over the text of its line."""

    def __init__(self, text: str, number: int) -> None:
        self.text, self.number, self.at = text, number, 0
        self.channels = 0

    def fail(self, expected: str) -> ParseError:
        found = self.text[self.at : self.at + 12]
        return ParseError(f"line {self.number}, column {self.at + 1}: expected {expected}, found {found!r}")

    def peek(self) -> str:
        match = _TOKEN.match(self.text, self.at)
        return match["token"] if match else ""

    def take(self, expected: str = "") -> str:
        match = _TOKEN.match(self.text, self.at)
        if match is None or (expected and match["token"] != expected):
            raise self.fail(repr(expected) if expected else "a word")
        self.at = match.end()
        return match["token"]

    def optional(self, token: str) -> bool:
        if self.peek() != token:
            return False
        self.take()
        return True

    def statement(self) -> Interface | Refusal | tuple[Op, Value | None]:
        word, _, rest = self.text.partition(" ")
        if word == "interface":
            inputs, outputs, *arguments = json.loads(rest)
            return Interface(inputs, outputs, tuple(arguments))
        return Refusal(*json.loads(rest)) if word == "refused" else self.op()

    def index(self, close: str) -> IndexMap:
        match = _INDEX.match(self.text, self.at)
        assert match is not None  # the pattern accepts the empty string
        try:
            index = IndexMap.parse(match[0])
        except ValueError:
            raise self.fail("an index") from None
        self.at += len(match[0])
        self.take(close)
        return index

    def op(self) -> tuple[Op, Value | None]:
        value = self.value() if self.peek().startswith("%") else None
        kind = self.kind()
        target = self.take()
        self.take("(")
        args: list[Arg] = []
        kwargs: list[tuple[str, Arg]] = []
        while not self.optional(")"):
            self.argument(args, kwargs)
            if self.peek() != ")":
                self.take(",")
        return Op(kind, target, tuple(args), tuple(kwargs), value.name if value else "", **self.notes()), value

    def kind(self) -> Kind:
        word = self.take()
        try:
            return Kind(word)
        except ValueError:
            raise self.fail("a kind (" + ", ".join(kind.value for kind in Kind) + ")") from None

    def value(self) -> Value:
        name = self.take()[1:]
        self.take(":")
        dtype = self.take()
        self.take("[")
        shape: list[int | str] = []
        axis = None
        while not self.optional("]"):
            size, star = self.size()
            axis = len(shape) if star else axis
            shape.append(size)
            self.optional(",")
        self.channels = int(shape[axis]) if axis is not None else 0
        layout = Layout.identity(self.channels) if axis is not None else None
        if self.optional("{"):
            layout = Layout(self.channels, self.index("}"))
        size_text = re.match(r"\s*(\d+)B", self.text[self.at :])
        self.at += size_text.end() if size_text else 0
        self.take("=")
        return Value(name, dtype, tuple(shape), axis, layout, int(size_text[1]) if size_text else 0)

    def size(self) -> tuple[int | str, bool]:
        match = re.match(r"\s*([^,*\]]+|[^,\]]*[^,*\]])(\*?)(?=[,\]])", self.text[self.at :])
        if match is None:
            raise self.fail("a size")
        self.at += match.end()
        word = match[1].strip()
        return (int(word) if word.isdigit() else word), bool(match[2])

    def notes(self) -> dict[str, Any]:
        notes: dict[str, Any] = {}
        while self.at < len(self.text):
            word = self.take()
            if word in ("groups", "block"):
                self.take("=")
                notes[word] = int(self.take())
            elif word == "how":
                self.take("=")
                notes[word] = How(self.take())
            elif word in ("linear", "border"):
                notes[word] = True
            elif word in ("layer", "source"):
                notes[word] = json.loads(self.take())
            else:
                raise self.fail("groups, block, linear, border, how, layer or source")
        return notes

    def argument(self, args: list[Arg], kwargs: list[tuple[str, Arg]]) -> None:
        keyword = re.match(r"\s*(\w+)=", self.text[self.at :])
        if keyword is None:
            args.append(self.arg())
            return
        self.at += keyword.end()
        kwargs.append((keyword[1], self.arg()))

    def arg(self) -> Arg:
        token = self.take()
        readers: dict[str, Callable[[str], Arg]] = {
            "%": self.read,
            "@": self.param,
            "&": self.param,
            "[": self.items,
            '"': json.loads,
        }
        if token[0] in readers:
            return readers[token[0]](token)
        if token in _WORDS:
            return _WORDS[token]
        if token[0] == "$":
            return Marker(token)
        if token == "torch.device":
            self.take("(")
            device = torch.device(json.loads(self.take()))
            self.take(")")
            return device
        if token.startswith("torch."):
            return getattr(torch, token[6:])
        return self.number_of(token)

    def number_of(self, token: str) -> int | float:
        sign, word = (-1, token[1:]) if token.startswith("-") else (1, token)
        if word in _NUMBERS:
            return sign * _NUMBERS[word]
        try:
            return int(token) if re.fullmatch(r"-?\d+", token) else float(token)
        except ValueError:
            raise self.fail("an argument") from None

    def items(self, _: str) -> Arg:
        items: list[Arg] = []
        while not self.optional("]"):
            items.append(self.arg())
            if self.peek() != "]":
                self.take(",")
        return tuple(items)

    def read(self, token: str) -> Read:
        name = token[1:]
        if self.optional("!"):
            return Read(name, Access.ALL)
        if self.optional("{"):
            return Read(name, Access.SET, self.index("}"))
        if not self.optional("["):
            return Read(name, Access.FLOW, IndexMap.identity(self.channels))
        index = self.index("]")
        return Read(name, Access.FLOW, index, int(self.take()) if self.optional("/") else 1)

    def param(self, token: str) -> Param:
        buffer, name = token[0] == "&", json.loads(token[1:]) if token[1] == '"' else token[1:]
        if not self.optional("<"):
            return Param(name, buffer=buffer)
        out = self.take()
        self.take(",")
        inn = self.take()
        self.take(">")
        axes = (None if axis == "_" else int(axis) for axis in (out, inn))
        return Param(name, *axes, buffer=buffer)
