"""The grammar in docs/ir.md accepts what the IR prints, and not other things."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

import chanopt
from chanopt.ir import Access, Kind, Marker, Program
from chanopt.ir import verify as rules
from chanopt.passes import DEFAULT, Pipeline
from tests.support.micro import MICRO

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "ir.md").read_text(encoding="utf-8")
NETS = sorted(MICRO)[::12]

Match = Callable[[str, int], "int | None"]
"""(text, where) -> where the match ends, or None: a parsing expression (Ford, POPL 2004)."""

_SYMBOL = re.compile(r'\s*(?:("[^"]*")|(\w+)|([()|*+?]))')


class Grammar:
    """The page's grammar as parsing expressions: alternatives in order, repetition greedy."""

    def __init__(self, page: str) -> None:
        (listing,) = re.findall(r"^```ebnf\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
        self.rules: dict[str, str] = dict(re.findall(r"^(\w+)\s*::=((?:.*\n)(?:\s+.*\n)*)", listing, re.MULTILINE))
        rows = re.findall(r"^\| ([A-Z]+) \| `(.*)` \|$", page, re.MULTILINE)
        self.terminals = {name: re.compile(pattern.replace(r"\|", "|")) for name, pattern in rows}
        self.terminals["NL"] = re.compile(r"\n")
        self.made = {name: self._rule(body) for name, body in self.rules.items()}
        self.rule = cache(self._applied)

    def accepts(self, text: str) -> bool:
        """Whether all of a text is a program."""
        self.rule.cache_clear()
        return self.rule("program", text, 0) == len(text)

    def _applied(self, name: str, text: str, at: int) -> int | None:
        return self.made[name](text, at)

    def _rule(self, body: str) -> Match:
        symbols = [found.group(0).strip() for found in _SYMBOL.finditer(body)]
        match = self._choice(symbols)
        assert not symbols, f"left over: {symbols}"
        return match

    def _choice(self, symbols: list[str]) -> Match:
        options = [self._sequence(symbols)]
        while symbols and symbols[0] == "|":
            symbols.pop(0)
            options.append(self._sequence(symbols))
        return lambda text, at: next((end for option in options if (end := option(text, at)) is not None), None)

    def _sequence(self, symbols: list[str]) -> Match:
        parts: list[Match] = []
        while symbols and symbols[0] not in ("|", ")"):
            parts.append(self._repeated(symbols))

        def match(text: str, at: int) -> int | None:
            end: int | None = at
            for part in parts:
                end = None if end is None else part(text, end)
            return end

        return match

    def _repeated(self, symbols: list[str]) -> Match:
        one = self._single(symbols)
        sign = symbols.pop(0) if symbols and symbols[0] in ("*", "+", "?") else ""
        if not sign:
            return one

        def match(text: str, at: int) -> int | None:
            ends = [at]
            while (sign != "?" or len(ends) == 1) and (end := one(text, ends[-1])) is not None:
                ends.append(end)
            return None if sign == "+" and len(ends) == 1 else ends[-1]

        return match

    def _single(self, symbols: list[str]) -> Match:
        symbol = symbols.pop(0)
        if symbol == "(":
            inner = self._choice(symbols)
            assert symbols.pop(0) == ")"
            return inner
        if symbol[0] == '"':
            return self._word(re.compile(re.escape(symbol[1:-1])))
        if symbol in self.terminals:
            return self._word(self.terminals[symbol])
        assert symbol in self.rules, f"{symbol} has no rule"
        return lambda text, at: self.rule(symbol, text, at)

    @staticmethod
    def _word(pattern: re.Pattern[str]) -> Match:
        blanks = re.compile(r"[ \t]*")

        def match(text: str, at: int) -> int | None:
            skipped = blanks.match(text, at)
            assert skipped is not None  # the pattern accepts the empty string
            found = pattern.match(text, skipped.end())
            return None if found is None else found.end()

        return match


@pytest.fixture(scope="module")
def grammar() -> Grammar:
    return Grammar(PAGE)


def programs(name: str) -> list[Program]:
    """A micro net as lowered and after the default pipeline."""
    net = MICRO[name]
    before = chanopt.lower(net.build(), net.inputs(net.fixed_batch or 2, torch.float32, 0))
    return [before, Pipeline(DEFAULT)(before).program]


@pytest.mark.parametrize("name", NETS)
def test_the_grammar_accepts_what_is_printed(name: str, grammar: Grammar) -> None:
    for program in programs(name):
        text = str(program)
        assert grammar.accepts(text), text
        assert chanopt.parse(text) == program


@pytest.mark.parametrize(
    ("was", "becomes"),
    [
        ("program batch", "programme batch"),
        (" = mix ", " = mixed "),
        ("{0:3}", "{0:}"),
        ("<0,1>", "<0>"),
        (" layer ", " layers "),
        ("[1, 1]", "[1, 1"),
        ("sink output(", "sink output"),
        ("}\n", "\n"),
        ("256B", "256KB"),
    ],
)
def test_the_grammar_and_the_parser_refuse_what_is_none(was: str, becomes: str, grammar: Grammar) -> None:
    text = (
        "program batch=1 target=cpu {\n"
        '  interface ["", ""]\n'
        '  %x : float32[b, 3*, 8, 8] 256B = source input("x")\n'
        '  %y : float32[b, 4*, 8, 8] {0:2} 256B = mix conv(%x{0:3}, @w<0,1>, none, [1, 1], -0.5) layer "a"\n'
        "  sink output(%y!)\n"
        "}\n"
    )
    assert grammar.accepts(text)
    assert str(chanopt.parse(text)) == text
    broken = text.replace(was, becomes)
    assert broken != text
    assert not grammar.accepts(broken)
    with pytest.raises(chanopt.errors.ParseError, match=r"^line [1345]\b"):
        chanopt.parse(broken)


def test_the_page_has_every_kind_access_marker_and_rule() -> None:
    table = PAGE.partition("## The kinds")[2].partition("## How an op")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == [kind.value for kind in Kind]
    assert all(f"| {access.name} |" in PAGE for access in Access)
    assert all(f"`{marker.value}`" in PAGE for marker in Marker)
    listed = re.findall(r"^(\d\. .*)$", PAGE.partition("## The rules")[2], re.MULTILINE)
    documented = re.findall(r"^\s+(\d\. .*)$", (rules.verify.__doc__ or "").replace("``", "`"), re.MULTILINE)
    assert listed == documented
    assert len(listed) == 9
