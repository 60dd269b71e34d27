"""The pass contract: requirements, guarantees, pipelines, the default one, and a pass that a user writes."""

from __future__ import annotations

import itertools
from dataclasses import FrozenInstanceError, dataclass, fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

import chanopt
from chanopt.errors import ChanoptError, PassError
from chanopt.ir import Access, IndexMap, Kind, Layout, Op, Program, Read
from chanopt.pass_infra import Pass, PassResult, Pipeline, Property, checked
from chanopt.passes import (
    DEFAULT,
    AlignChannels,
    DropDead,
    FoldAffine,
    FoldConstants,
    OrderChannels,
    PoolChannelsLast,
    RealizeReads,
)
from tests.support.masks import mask_randomly
from tests.support.micro import MICRO
from tests.support.nets.base import conv, image, randomise
from tests.support.passes import assert_rewrites, kill, lowered, prepared


def masked(name: str = "bottleneck", **options: Any) -> nn.Module:
    net = MICRO[name].build()
    mask_randomly(net, 1, **options)
    return net


def dense() -> nn.Module:
    return MICRO["two_convs"].build()


# -- passes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pass_", DEFAULT, ids=lambda p: p.name)
def test_a_pass_is_a_frozen_dataclass_with_a_name(pass_: Pass) -> None:
    assert is_dataclass(pass_)
    assert pass_.name == "_".join(_words(type(pass_).__name__))
    assert pass_ == replace(pass_)
    for option in fields(pass_):
        with pytest.raises(FrozenInstanceError):
            setattr(pass_, option.name, None)


def _words(name: str) -> list[str]:
    starts = [i for i, letter in enumerate(name) if letter.isupper()]
    return [name[a:b].lower() for a, b in itertools.pairwise([*starts, len(name)])]


@dataclass(frozen=True)
class DropRelu(Pass):
    """A user's pass: ReLU of a ReLU goes."""

    name = "drop_relu"

    def apply(self, program: Program) -> Program:
        relus = {op.result: op for op in program.ops if op.target == "aten.relu.default"}
        gone = {op.result: op.reads[0].value for op in relus.values() if op.reads[0].value in relus}

        def rename(arg: Any) -> Any:
            return replace(arg, value=gone[arg.value]) if isinstance(arg, Read) and arg.value in gone else arg

        if not gone:
            return program
        return program.evolve(ops=[op.map_args(rename) for op in program.ops if op.result not in gone])


def test_a_users_pass_of_fifteen_lines() -> None:
    net = randomise(nn.Sequential(conv(3, 8, 3), nn.ReLU(), nn.ReLU(), conv(8, 6))).eval()
    assert_rewrites(DropRelu(), net, image(), targets={"aten.relu.default": 1})
    with checked():
        fast = chanopt.optimize(net, image()(2, torch.float32, 0), pipeline=(DropRelu(), *DEFAULT))
    assert sum("relu" in str(node.target) for node in fast.graph.nodes) == 1


# -- requirements and guarantees --------------------------------------------------------------------------------------


def _never(_: Program) -> str:
    return "that it is not"


NEVER = Property("the moon is made of cheese", _never, "BakeMoon")


@dataclass(frozen=True)
class Needy(Pass):
    name = "needy"
    requires = (NEVER,)

    def apply(self, program: Program) -> Program:
        raise AssertionError("a pass whose requirement does not hold must not run")


@dataclass(frozen=True)
class Boastful(Pass):
    name = "boastful"
    ensures = (NEVER,)

    def apply(self, program: Program) -> Program:
        return program


@dataclass(frozen=True)
class Vandal(Pass):
    """Cuts a channel that is read."""

    name = "vandal"

    def apply(self, program: Program) -> Program:
        (value, *_) = [v for v in program.values.values() if v.name == "relu"]
        short = replace(value, layout=Layout(value.live.channels, IndexMap.identity(value.live.channels - 1)))
        return program.evolve(values={value.name: short})


def test_a_requirement_that_does_not_hold_names_pass_requirement_finding_and_remedy() -> None:
    message = "pass needy required that the moon is made of cheese, found that it is not; run BakeMoon first"
    with pytest.raises(PassError) as caught:
        Needy()(lowered(dense(), image()))
    assert str(caught.value) == message


def test_a_broken_guarantee_is_found_in_checked_mode_alone() -> None:
    program = lowered(dense(), image())
    assert not Boastful()(program).modified
    with checked(), pytest.raises(PassError) as caught:
        Boastful()(program)
    assert str(caught.value) == "pass boastful guaranteed that the moon is made of cheese, found that it is not"
    assert not Boastful()(program).modified


def test_a_broken_rule_of_the_ir_is_found_in_checked_mode() -> None:
    program = lowered(MICRO["bottleneck"].build(), image())
    with checked(), pytest.raises(PassError, match=r"pass vandal broke a rule of the IR: rule [36]: expected"):
        Vandal()(program)


def test_checked_mode_ends_with_an_error_too() -> None:
    with pytest.raises(PassError), checked():
        Boastful()(lowered(dense(), image()))
    assert not Boastful()(lowered(dense(), image())).modified


# -- pipelines --------------------------------------------------------------------------------------------------------


def test_a_pipeline_is_a_pass_and_nests() -> None:
    net = masked()
    program = lowered(net, image())
    flat = Pipeline(DEFAULT)(program)
    nested = Pipeline((Pipeline(DEFAULT[:2]), Pipeline((Pipeline(DEFAULT[2:]),))))(program)
    assert flat.program == nested.program
    assert flat.figures == nested.figures
    assert isinstance(Pipeline(()), Pass)


def test_an_empty_pipeline_returns_the_very_program() -> None:
    program = lowered(dense(), image())
    result = Pipeline(())(program)
    assert result.program is program
    assert not result.modified
    assert result.figures == {}


def test_a_pipeline_of_passes_with_nothing_to_do_is_not_modified() -> None:
    program = lowered(dense(), image())
    result = Pipeline(DEFAULT)(program)
    assert result.program is program
    assert not result.modified


def test_a_pipeline_adds_up_seconds_and_figures_and_keeps_notes() -> None:
    program = lowered(masked(), image())
    result = Pipeline(DEFAULT)(program)
    assert set(result.seconds) == {pass_.name for pass_ in DEFAULT}
    assert all(spent > 0 for spent in result.seconds.values())
    assert set(result.notes) == {"segments", "reads"}
    before, after = result.figures["parameters"]
    assert before > after > 0
    steps = [pass_.name for pass_ in DEFAULT]
    assert steps.count("fold_affine") == 2


def test_the_default_pipeline_is_a_literal_tuple_in_its_order() -> None:
    assert [type(pass_) for pass_ in DEFAULT] == [
        FoldAffine,
        FoldConstants,
        FoldAffine,
        DropDead,
        OrderChannels,
        AlignChannels,
        RealizeReads,
        PoolChannelsLast,
    ]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_folds_commute_with_drops_as_far_as_the_function_goes(order: tuple[int, ...]) -> None:
    """Any order of the first passes is legal and exact; what differs is how much goes."""
    passes = [(FoldAffine(), FoldConstants(), DropDead())[i] for i in order]
    net = masked(side="input")
    assert_rewrites(
        DropDead(), net, image(), before=passes[:-1] if passes[-1].name == "drop_dead" else (), allow_constant=True
    )
    assert_rewrites(Pipeline((*passes, DropDead())), net, image(), allow_constant=True)


def test_an_impossible_order_is_refused_by_optimize() -> None:
    net = MICRO["fan_out"].build()
    mask_randomly(net, 0, side="input")
    with pytest.raises(
        PassError, match=r"pass order_channels required that every op reads only .*; run DropDead first"
    ):
        chanopt.optimize(net, image()(2, torch.float32, 0), pipeline=(OrderChannels(), DropDead()))
    assert issubclass(PassError, ChanoptError)


def test_optimize_takes_one_pass_or_none() -> None:
    net = dense()
    kill(net[1], inputs=[0, 1])
    inputs = image()(2, torch.float32, 0)
    one = chanopt.optimize(net, inputs, pipeline=DropDead())
    none = chanopt.optimize(net, inputs, pipeline=())
    assert one.get_parameter("0.weight").shape[0] == none.get_parameter("0.weight").shape[0] - 2
    chanopt.verify(net, none, inputs)


def test_a_result_may_carry_notes() -> None:
    @dataclass(frozen=True)
    class Talkative(Pass):
        name = "talkative"

        def apply(self, program: Program) -> PassResult:
            return PassResult(program, False, notes={"said": len(program.ops)})

    program = lowered(dense(), image())
    result = Pipeline((Talkative(), FoldAffine()))(program)
    assert result.notes == {"said": len(program.ops)}


def test_passes_leave_weights_of_the_program_they_were_given() -> None:
    program = prepared(masked("batch_norm"), image())
    copies = {name: tensor.clone() for name, tensor in program.weights.items()}
    Pipeline(DEFAULT)(program)
    assert copies.keys() == program.weights.keys()
    assert all(torch.equal(copies[name], program.weights[name]) for name in copies)


def test_ops_and_reads_are_values() -> None:
    read = Read("x", Access.SET, IndexMap([0, 2]))
    op = Op(Kind.MAP, "aten.relu.default", (read,), result="y")
    assert op == replace(op)
    assert op.map_args(lambda arg: arg) is op
    assert hash(read) == hash(Read("x", Access.SET, IndexMap((0, 2))))
