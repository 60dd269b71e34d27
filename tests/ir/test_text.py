"""The IR as a language: what is written reads back, by hand-written cases and as a property of programs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from chanopt.errors import IRError, ParseError
from chanopt.ir import Access, IndexMap, Kind, Layout, Marker, Param, Read, Refusal, parse
from chanopt.passes import DEFAULT
from tests.support.masks import MODES, mask_randomly
from tests.support.micro import MICRO
from tests.support.nets.base import image
from tests.support.passes import lowered
from tests.support.random_nets import random_net

SMALL = """\
program batch=2 channels_last {
  interface ["in", "out", "x", "y"]
  refused ["aten.sort.default", "a.b", "model.py:3 in forward: x.sort()", "no \\"rule\\""]
  %x : float32[b, 3*, 8, 8] 1024B = source input("x")
  %n : int[] = barrier aten.sym_size.int(%x!, 0)
  %a : f32[b, 8*, 8, 8] {4,0:3} 1024B = mix f.conv(%x{0:3}, @a.weight<0,1>, none, [1, -1], 1) linear border layer "a"
  %r : float32[b, 8*, 8, 8] {4,0:3} = map aten.relu.default(%a)
  %s : float32[b, 4*, 8, 8] = reindex alias(%r[4,0:3])
  %p : float32[b, 1*, 16, 16] = reindex aten.pixel_shuffle.default(%s[0:4]/4, 2)
  %g : f32[b, 1*] = map f.g(%p, &norm.mean<0,_>, @"odd name", $C, $G, 0.5, true, -inf, "x") groups=2 block=3 source "m:1"
  sink output(%g!, [%p!, none])
}
"""


def ops_of(text: str) -> list[str]:
    """The lines behind the first, whose flags have an order of their own."""
    return text.splitlines()[1:]


def test_a_program_by_hand() -> None:
    program = parse(SMALL)
    assert program.batch == 2
    assert program.channels_last
    assert program.interface.arguments == ("x", "y")
    assert program.refusals == (Refusal("aten.sort.default", "a.b", "model.py:3 in forward: x.sort()", 'no "rule"'),)
    ops = {op.result: op for op in program.ops}
    assert [op.kind for op in program.ops] == [
        Kind.SOURCE,
        Kind.BARRIER,
        Kind.MIX,
        Kind.MAP,
        Kind.REINDEX,
        Kind.REINDEX,
        Kind.MAP,
        Kind.SINK,
    ]
    assert program.values["a"].layout == Layout(8, IndexMap([4, 0, 1, 2]))
    assert program.values["a"].axis == 1
    assert program.values["a"].channel_bytes == 1024
    assert program.values["x"].shape == ("b", 3, 8, 8)
    assert program.values["n"].layout is None
    assert ops["a"].args == (
        Read("x", Access.SET, IndexMap([0, 1, 2])),
        Param("a.weight", 0, 1),
        None,
        (1, -1),
        1,
    )
    assert ops["a"].linear
    assert ops["a"].border
    assert ops["r"].reads == (Read("a", Access.FLOW, IndexMap.identity(8)),)
    assert ops["s"].reads == (Read("r", Access.FLOW, IndexMap([4, 0, 1, 2])),)
    assert ops["p"].reads == (Read("s", Access.FLOW, IndexMap([0, 1, 2, 3]), 4),)
    assert ops["n"].reads == (Read("x", Access.ALL),)
    assert ops["g"].args[1:] == (
        Param("norm.mean", 0, None, True),
        Param("odd name"),
        Marker.CHANNELS,
        Marker.GROUPS,
        0.5,
        True,
        -math.inf,
        "x",
    )
    assert (ops["g"].groups, ops["g"].block, ops["g"].source) == (2, 3, "m:1")
    assert ops[""].args == (Read("g", Access.ALL), (Read("p", Access.ALL), None))


def test_writing_is_canonical() -> None:
    program = parse(SMALL)
    assert parse(str(program)) == program
    assert str(parse(str(program))) == str(program)
    assert ops_of(str(program)) == ops_of(SMALL)


def test_blank_lines_and_indentation_do_not_matter() -> None:
    loose = SMALL.replace("\n", "\n\n").replace("  %", "        %")
    assert parse(loose) == parse(SMALL)


@pytest.mark.parametrize(
    "literal",
    [
        "1",
        "-3",
        "0.25",
        "-1e-05",
        "1e+20",
        "inf",
        "-inf",
        "true",
        "false",
        "none",
        '"a, b)"',
        "[]",
        "[[1], [2, 3]]",
        "torch.float64",
        "torch.channels_last",
    ],
)
def test_literals_read_back(literal: str) -> None:
    text = SMALL.replace("0.5, true", f"{literal}, true")
    program = parse(text)
    assert ops_of(str(program)) == ops_of(text)


def test_keyword_arguments_read_back() -> None:
    text = SMALL.replace("(%a)", '(%a, alpha=2, rounding_mode="floor", dtype=torch.float32, other=%x!)')
    program = parse(text)
    relu = next(op for op in program.ops if op.result == "r")
    assert [key for key, _ in relu.kwargs] == ["alpha", "rounding_mode", "dtype", "other"]
    assert relu.kwargs[2] == ("dtype", torch.float32)
    assert [read.value for read in relu.reads] == ["a", "x"]
    assert ops_of(str(program)) == ops_of(text)


# -- what is not a program --------------------------------------------------------------------------------------------

BAD: dict[str, tuple[str, str, str]] = {
    "a kind that does not exist": (
        "= map aten.relu",
        "= mop aten.relu",
        r"line 7, column \d+: expected a kind \(source, sink, mix, .*barrier\)",
    ),
    "a missing colon": ("%r : float32", "%r  float32", r"line 7, column 3: expected ':', found ' *float32"),
    "a missing equals sign": ("= source", "source", r"line 4, column \d+: expected '=', found"),
    "an unclosed argument list": ("(%a)", "(%a", r"line 7, column \d+: expected "),
    "a missing comma": ("none, [1, -1]", "none [1, -1]", r"line 6, column \d+: expected ',', found"),
    "an unknown note": (
        "linear border",
        "linear boarder",
        r"line 6, column \d+: expected groups, block, linear, border, how, layer or source",
    ),
    "an argument that is nothing": ("0.5, true", "maybe, true", r"line 10, column \d+: expected an argument"),
    "an unclosed index": ("%x{0:3}", "%x{0:3", r"line 6, column \d+: expected '}', found"),
    "an unclosed shape": ("[b, 3*, 8, 8]", "[b, 3*, 8, 8", r"line 4, column \d+: expected "),
    "an unclosed parameter": ("@a.weight<0,1>", "@a.weight<0,1", r"line 6, column \d+: expected '>', found"),
}


@pytest.mark.parametrize("name", BAD)
def test_refuses(name: str) -> None:
    old, new, message = BAD[name]
    assert old in SMALL
    with pytest.raises(ParseError, match=message):
        parse(SMALL.replace(old, new, 1))


MANGLED: dict[str, tuple[str, str]] = {
    "an index of letters": ("%x{0:3}", "%x{a:b}"),
    "an index of nothing": ("%x{0:3}", "%x{:}"),
    "a parameter axis of letters": ("<0,1>", "<q,1>"),
    "a number of groups of letters": ("groups=2", "groups=two"),
    "a marker that does not exist": ("$C", "$Q"),
    "a torch name that does not exist": ("0.5, true", "torch.nothing, true"),
    "an interface that is no list": ('["in", "out", "x", "y"]', "in out"),
    "a refusal of three words": (', "no \\"rule\\""]', "]"),
    "a layout of a channel twice": ("{4,0:3} 1024B", "{4,4} 1024B"),
    "a channel axis of symbolic size": ("[b, 3*, 8, 8]", "[b*, 3, 8, 8]"),
}


@pytest.mark.parametrize("name", MANGLED)
def test_refuses_with_a_line(name: str) -> None:
    """Whatever is wrong with a text is a ParseError that names its line, never another exception."""
    old, new = MANGLED[name]
    assert old in SMALL
    with pytest.raises(ParseError, match=r"^line \d+"):
        parse(SMALL.replace(old, new, 1))


@pytest.mark.parametrize(
    "text", ["", "\n", "nonsense", "program {\n}", "program batch=2 {\n", "program batch=x {\n}", "}"]
)
def test_refuses_what_has_no_frame(text: str) -> None:
    with pytest.raises(ParseError, match=r"line 1: expected 'program batch=N {'"):
        parse(text)


# -- as a property of programs ----------------------------------------------------------------------------------------


def assert_reads_back(program: Any) -> None:
    read = parse(str(program))
    assert read == program
    assert str(read) == str(program)


@pytest.mark.parametrize("seed", range(200, 208))
def test_programs_of_random_nets_read_back_at_every_stage(seed: int) -> None:
    net, inputs = random_net(seed)
    mask_randomly(net, seed, mode=MODES[seed % len(MODES)])
    program = lowered(net, inputs)
    assert_reads_back(program)
    for step in DEFAULT:
        program = step(program).program
        assert_reads_back(program)


def test_a_program_read_back_does_not_run_until_it_is_bound() -> None:
    net = MICRO["two_convs"].build()
    program = lowered(net, image())
    read = parse(str(program))
    with pytest.raises(
        IRError, match=r"expected a program with a dialect, found one parsed from text alone; see Program\.bind"
    ):
        read.to_module()
    x = image()(2, torch.float64, 1)
    assert torch.equal(read.bind(program).to_module()(*x), program.to_module()(*x))


def test_texts_name_layers_and_source_lines_not_identities() -> None:
    text = str(lowered(MICRO["bottleneck"].build(), image()))
    assert 'layer "expand.0"' in text
    assert "in forward: " in text
    assert " at 0x" not in text
