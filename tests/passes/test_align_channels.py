"""AlignChannels: counts the device is quick at, where they cost no gather, and the same function."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import chanopt
from chanopt.ir import Form, How, Kind, Program, physical_read, physical_reads
from chanopt.pass_infra import checked
from chanopt.passes import DEFAULT, AlignChannels
from chanopt.target import Target
from tests.support.equal import assert_same_function
from tests.support.nets.base import Net, conv, image, randomise
from tests.support.passes import at_odds, kill, passes_before, prepared

LAST, FIRST = torch.channels_last, torch.contiguous_format
UNROUNDED = tuple(step for step in DEFAULT if not isinstance(step, AlignChannels))


def run(net: nn.Module, x: torch.Tensor, target: Target, pipeline: Any = DEFAULT) -> tuple[nn.Module, Program]:
    with checked():
        fast = chanopt.optimize(net, (x,), target=target, pipeline=pipeline)
    return fast, chanopt.Plan.of(fast).program


def made(program: Program, layer: str) -> int:
    """The channels of what a conv makes."""
    return next(len(program.values[op.result].live) for op in program.ops if op.layer == layer)


def inverted() -> nn.Module:
    """1x1, depthwise, 1x1: of the 64 channels between, 61 are read."""
    net = randomise(
        Net(lambda n, x: n.c(n.b(n.a(x).relu()).relu()), a=conv(3, 64), b=conv(64, 64, 3, groups=64), c=conv(64, 8))
    ).eval()
    kill(net.c, inputs=(0, 7, 30))
    return net


def chain(front: bool, kernel: int = 1) -> nn.Module:
    """A residual stream of 80 channels, 75 of which the first block needs and fewer the last: 66 beside one another.

    `front`: what the last does not need comes first, whatever the order of channels.
    """
    net = randomise(
        Net(
            lambda n, x: _chained(n, n.stem(x).relu()),
            stem=conv(3, 80),
            a=conv(80, 8),
            b=conv(8, 80, kernel),
            c=conv(80, 8),
            d=conv(8, 80, kernel),
            e=conv(80, 8),
            f=conv(80, 8),
        )
    ).eval()
    kill(net.a, inputs=range(40) if front else range(40, 80))
    kill(net.c, inputs=[*range(9), *range(45, 80)] if front else [*range(71, 80), *range(35)])
    for reader in (net.e, net.f):
        kill(reader, inputs=range(14) if front else range(66, 80))
    kill(net.e, inputs=(20, 21))
    kill(net.f, inputs=(60, 61))
    return net


def _chained(n: Any, x: torch.Tensor) -> torch.Tensor:
    y = (x + n.b(n.a(x).relu())).relu()
    z = (y + n.d(n.c(y).relu())).relu()
    return torch.cat([n.e(z), n.f(z)], 1)


def partial_joins(program: Program) -> list[Form]:
    """How additions take what they do not take whole."""
    found = [physical_read(op, read, program).form for op in program.ops if "add" in op.target for read in op.reads]
    return [form for form in found if form is not Form.WHOLE]


# -- a GPU ---------------------------------------------------------------------------------------------------------------


def counts(program: Program) -> set[int]:
    return {len(v.layout) % 8 for v in program.values.values() if v.layout is not None and len(v.layout) > 3}


def test_counts_become_whole_groups_for_a_gpu_in_channels_last() -> None:
    net = Net(
        lambda n, x: n.d(n.b(n.a(x).relu()) + n.c(x)), a=conv(3, 24), b=conv(24, 24), c=conv(3, 24), d=conv(24, 8)
    )
    net = randomise(net).eval()
    kill(net.b, inputs=range(7))
    kill(net.d, inputs=range(5))
    x = torch.randn(2, 3, 9, 8)
    for memory_format, whole in ((LAST, True), (FIRST, False)):
        fast, program = run(net, x.contiguous(memory_format=memory_format), Target("cuda"))
        assert (counts(program) == {0}) == whole
        torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-4)


def test_channels_that_are_added_lie_behind_the_others() -> None:
    program = prepared(at_odds(), image(), passes_before(AlignChannels))
    program = replace(program, target="cuda", channels_last=True)
    with checked():
        after = AlignChannels()(program).program
    for name, value in program.values.items():
        if value.layout is not None:
            live = value.layout.live.tolist()
            assert after.values[name].live.live.tolist()[: len(live)] == live


def test_a_concat_that_lost_an_operand_is_not_asked_for_its_channels() -> None:
    net = Net(lambda n, x: n.d(torch.cat([n.a(x), n.b(x)], 1)), a=conv(3, 12), b=conv(3, 12), d=conv(24, 8))
    net = randomise(net).eval()
    kill(net.d, inputs=[*range(12), 13, 15])
    x = torch.randn(2, 3, 9, 8).contiguous(memory_format=LAST)
    fast, program = run(net, x, Target("cuda"))
    torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-4)
    assert {op.label() for op in program.ops if op.linear} == {"b", "d"}


def test_channels_that_must_stay_together_do() -> None:
    """A sum of a depthwise conv with two filters a channel and of what has an odd channel in front."""
    net = Net(
        lambda n, x: _odd(n, n.a(x), n.b(x)),
        a=conv(3, 16),
        b=conv(3, 8),
        w=conv(8, 16, groups=8),
        c=conv(16, 8),
        d=conv(16, 8),
    )
    net = randomise(net).eval()
    kill(net.c, inputs=[c for c in range(16) if c not in (10, 11, 14, 15)])
    kill(net.d, inputs=[c for c in range(16) if c not in (0, 10, 11, 14, 15)])
    x = torch.randn(2, 3, 9, 8).contiguous(memory_format=LAST)
    fast, program = run(net, x, Target("cuda"))
    assert made(program, "w") == 8
    torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-4)


def _odd(n: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.cat([n.c(x + n.w(y)), n.d(x)], 1)


LAYERS = 5


def dense(share: float, *, read_again: bool = False) -> nn.Module:
    """Concats of all that was made, for convs behind a batch norm; or for such as cannot gather while they load too."""
    net = Net(lambda n, x: _dense(n, n.a(x).relu(), read_again), a=conv(3, 16), b=conv(16, 16))
    for number in range(LAYERS):
        net.add_module(f"norm{number}", nn.BatchNorm2d(32 + 16 * number))
        net.add_module(f"conv{number}", conv(32 + 16 * number, 16))
        net.add_module(f"other{number}", nn.ConvTranspose2d(32 + 16 * number, 16, 1))
    net = randomise(net).eval()
    generator = torch.Generator().manual_seed(0)
    for number in range(LAYERS):
        channels = 32 + 16 * number
        dead = torch.randperm(channels, generator=generator)[: round(channels * (1 - share))]
        kill(net.get_submodule(f"conv{number}"), inputs=dead.tolist())
        kill(net.get_submodule(f"other{number}"), inputs=dead.tolist())
    return net


def _dense(n: Any, x: torch.Tensor, read_again: bool) -> torch.Tensor:
    made = [x, n.b(x)]
    for number in range(LAYERS):
        x = torch.cat(made, 1)
        made.append(getattr(n, f"conv{number}")(getattr(n, f"norm{number}")(x).relu()))
        made[-1] = made[-1] + getattr(n, f"other{number}")(x) if read_again else made[-1]
    return made[-1]


def concatenated(program: Program) -> set[Form]:
    """How concats take their operands."""
    found = [physical_reads(op, program) for op in program.ops if op.kind is Kind.CONCAT]
    return {physical.form for reads in found for _, physical in reads}


@pytest.mark.parametrize("read_again", [False, True])
def test_a_concat_for_convs_that_gather_takes_its_operands_as_they_lie(read_again: bool) -> None:
    net, x = dense(0.6, read_again=read_again), torch.randn(2, 3, 9, 8).contiguous(memory_format=LAST)
    assert Form.GATHER in concatenated(run(net, x, Target("cuda"), UNROUNDED)[1])
    fast, program = run(net, x, Target("cuda"))
    assert (Form.GATHER in concatenated(program)) == read_again
    norms = {op.how for op in program.ops if op.target == "aten.batch_norm.default"}
    assert norms == {How.INLINED}
    torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-4)


def test_a_concat_of_few_channels_still_gathers_them() -> None:
    net, x = dense(0.2), torch.randn(2, 3, 9, 8).contiguous(memory_format=LAST)
    _, program = run(net, x, Target("cuda"))
    assert Form.GATHER in concatenated(program)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("growing", [False, True])
def test_concats_that_share_an_operand_take_it_as_it_lies(growing: bool, nested: bool) -> None:
    """They can be one memory then; a concat on its own copies the channels it needs, wherever in a range they are."""

    def body(n: Any, x: torch.Tensor) -> torch.Tensor:
        y = n.stem(x).relu()
        z = n.a(y).relu()
        first = torch.cat([y, z], 1)
        if not growing:
            return n.head(first)
        last = n.b(first).relu()
        return n.last(torch.cat([first, last] if nested else [y, z, last], 1))

    parts = {"a": conv(64, 32), "b": conv(96, 32), "head": conv(96, 8), "last": conv(128, 8)}
    net = randomise(Net(body, stem=conv(3, 64), **parts)).eval()
    kill(net.a, inputs=range(0, 64, 2))
    for layer, dead in (("b", range(8, 50)), ("head", range(40, 64)), ("last", (*range(30, 44), *range(100, 110)))):
        kill(getattr(net, layer), inputs=dead)
    x = torch.randn(2, 3, 9, 8).contiguous(memory_format=LAST)
    fast, program = run(net, x, Target("cuda"))
    assert (concatenated(program) == {Form.WHOLE}) == growing
    assert_same_function(net, fast, (x,))


# -- a CPU ---------------------------------------------------------------------------------------------------------------


def test_a_depthwise_conv_gets_a_round_count_where_a_slice_is_free() -> None:
    net = inverted()
    for batch, memory_format, count in ((1, FIRST, 64), (2, FIRST, 61), (1, LAST, 61)):
        x = torch.randn(batch, 3, 9, 8).contiguous(memory_format=memory_format)
        fast, program = run(net, x, Target("cpu"))
        assert [made(program, "a"), made(program, "b")] == [count, count]
        assert chanopt.explain(fast).copies == 0
        reasons = {layer.name: list(layer.kept) for layer in chanopt.explain(fast).layers}
        assert reasons["b"] == ["read by c"] + (["makes a count that is quick here"] if count == 64 else [])
        assert_same_function(net, fast, (x,), allow_constant=batch == 1)


def test_channels_that_are_numbered_otherwise_below_are_all_kept() -> None:
    net = Net(
        lambda n, x: n.c(n.b(n.a(x).relu().roll(1, 1)).relu()),
        a=conv(3, 64),
        b=conv(64, 64, 3, groups=64),
        c=conv(64, 8),
    )
    net = randomise(net).eval()
    kill(net.c, inputs=(1, 7, 30))
    x = torch.randn(1, 3, 9, 8)
    fast, program = run(net, x, Target("cpu"))
    assert [made(program, "a"), made(program, "b")] == [64, 64]
    assert_same_function(net, fast, (x,), allow_constant=True)


def test_a_count_does_not_grow_by_much() -> None:
    net = inverted()
    kill(net.c, inputs=range(15))
    _, program = run(net, torch.randn(1, 3, 9, 8), Target("cpu"))
    assert made(program, "b") == 48
    kill(net.c, inputs=range(27))
    _, program = run(net, torch.randn(1, 3, 9, 8), Target("cpu"))
    assert made(program, "b") == 36


@pytest.mark.parametrize("target", [Target("cpu"), Target("cpu", "inductor")], ids=str)
@pytest.mark.parametrize("front", [False, True])
def test_a_residual_chain_gets_round_counts_and_no_more_gathers(front: bool, target: Target) -> None:
    net, x = chain(front), torch.randn(2, 3, 9, 8).contiguous(memory_format=LAST)
    plain, before = run(net, x, target, UNROUNDED)
    fast, after = run(net, x, target)
    assert made(before, "b") % 8
    assert [made(after, layer) % 8 for layer in ("stem", "b", "d")] == [0, 0, 0]
    assert chanopt.explain(fast).copies == chanopt.explain(plain).copies
    assert set(partial_joins(after)) <= {Form.RANGE}
    assert_same_function(net, fast, (x,))


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("front", [False, True])
def test_under_inductor_a_join_takes_all_of_its_operands(front: bool, kernel: int) -> None:
    net, x = chain(front, kernel), torch.randn(2, 3, 9, 8)
    fast, program = run(net, x, Target("cpu", "inductor"))
    assert partial_joins(program) == []
    assert_same_function(net, fast, (x,))
    _, eager = run(net, x, Target("cpu"))
    assert partial_joins(eager) == [Form.RANGE]


def test_what_a_conv_takes_as_it_lies_stays_so_in_channels_last() -> None:
    net = randomise(Net(lambda n, x: n.b(n.a(x).relu()), a=conv(3, 64), b=conv(64, 8))).eval()
    kill(net.b, inputs=(5,))
    x = torch.randn(2, 3, 9, 8).contiguous(memory_format=LAST)
    fast, program = run(net, x, Target("cpu"))
    assert made(program, "a") == 63
    assert_same_function(net, fast, (x,))
