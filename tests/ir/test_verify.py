"""One test for every rule of the IR, each with a program that breaks it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from chanopt.errors import IRError
from chanopt.ir import Access, IndexMap, Kind, Layout, Op, Param, Program, Read, Value, parse
from tests.support.masks import mask_randomly
from tests.support.micro import MICRO
from tests.support.passes import lowered
from tests.support.random_nets import random_net

LINES = (
    '%x : float32[2, 3*, 8, 8] = source input("x")',
    "%a : float32[2, 8*, 8, 8] = mix aten.conv2d.default(%x{0:3}, @a.weight<0,1>, none)"
    ' linear layer "a" source "model.py:7"',
    "%r : float32[2, 8*, 8, 8] = map aten.relu.default(%a)",
    "%g : float32[2, 8*, 8, 8] = grouped aten.conv2d.default(%r{0:8}, @g.weight<0,1>, none, $G)"
    ' groups=2 linear layer "g"',
    "%f : float32[2, 32*] = reindex aten.reshape.default(%g[0x4,1x4,2x4,3x4,4x4,5x4,6x4,7x4], [2, $C]) block=4",
    "sink output(%f!)",
)


def program(*changes: tuple[str, str], without: int | None = None) -> Program:
    """The program of LINES, without one line, with pieces of text replaced."""
    text = "\n".join(line for number, line in enumerate(LINES) if number != without)
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return parse('program batch=2 {\ninterface ["", ""]\n' + text + "\n}")


def with_weights(found: Program, **shapes: tuple[int, ...]) -> Program:
    return replace(found, weights={name.replace("_", "."): torch.ones(shape) for name, shape in shapes.items()})


def broken(found: Program, message: str) -> str:
    with pytest.raises(IRError, match=message) as caught:
        found.verify()
    return str(caught.value)


def test_a_program_that_keeps_all_rules() -> None:
    program().verify()
    with_weights(program(), a_weight=(8, 3, 1, 1), g_weight=(8, 4, 1, 1)).verify()
    cut = program(("%a : float32[2, 8*, 8, 8] =", "%a : float32[2, 8*, 8, 8] {7,0:7} ="))
    cut.verify()


def test_messages_name_op_layer_and_source_line() -> None:
    text = broken(program(("%x{0:3}", "%x{0:4}")), "rule 5")
    assert "in op: aten.conv2d.default -> %a (layer a)" in text
    assert "from: model.py:7" in text
    text = broken(program(("relu.default(%a)", "relu.default(%a[0:7])")), "rule 5")
    assert "(layer -)" in text
    assert "from: -" in text


# -- rule 1: SSA ------------------------------------------------------------------------------------------------------


def test_rule_1_a_value_is_made_before_it_is_read() -> None:
    broken(
        program(("relu.default(%a)", "relu.default(%g)")),
        "rule 1: expected %g to be made before it is read, found it made later or never",
    )
    broken(program(without=2), "rule 1: expected %r to be made before it is read")


def test_rule_1_a_value_is_made_once() -> None:
    found = program()
    twice = replace(found, ops=(*found.ops[:3], found.ops[2], *found.ops[3:]))
    broken(twice, "rule 1: expected %r to be made once, found it made twice")


def test_rule_1_a_result_is_among_the_values() -> None:
    found = program()
    values = {name: value for name, value in found.values.items() if name != "r"}
    broken(replace(found, values=values), "rule 1: expected %r among the values, found no such value")


# -- rule 2: one sink -------------------------------------------------------------------------------------------------


def test_rule_2_there_is_a_sink() -> None:
    broken(program(without=5), "rule 2: expected exactly one sink at the end, found 0")


def test_rule_2_there_is_one_sink() -> None:
    found = program()
    second = Op(Kind.SINK, "output", (Read("a", Access.ALL),))
    broken(replace(found, ops=(*found.ops, second)), "rule [12]: expected ")


def test_rule_2_the_sink_is_last() -> None:
    found = program()
    early = (*found.ops[:3], found.ops[-1].map_args(lambda _: Read("r", Access.ALL)), *found.ops[3:5])
    broken(replace(found, ops=early), "rule 2: expected exactly one sink at the end, found 1")


# -- rule 3: axis, layout and shape agree -----------------------------------------------------------------------------


def changed(name: str, **fields: Any) -> Program:
    found = program()
    return found.evolve(values={name: replace(found.values[name], **fields)})


def test_rule_3_an_axis_has_a_layout() -> None:
    broken(changed("r", layout=None), "rule 3: expected %r to have a channel axis and a layout or neither")
    broken(changed("r", axis=None), "rule 3: expected %r to have a channel axis and a layout or neither")


def test_rule_3_the_axis_is_one_of_the_shape() -> None:
    broken(changed("r", axis=4), "rule 3: expected the channel axis of %r within its 4 dimensions, found 4")


def test_rule_3_the_layout_is_as_long_as_the_shape_says() -> None:
    broken(changed("r", layout=Layout.identity(7)), "rule 3: expected 8 channels in %r, found a layout of 7")


# -- rule 4: sources and barriers -------------------------------------------------------------------------------------


def test_rule_4_a_source_has_all_channels() -> None:
    broken(changed("x", layout=Layout(3, IndexMap([0, 2]))), "rule 4: expected all channels of %x in order, found 0,2")


def test_rule_4_a_barrier_has_its_channels_in_order() -> None:
    found = program(("= map aten.relu.default(%a)", "= barrier aten.sort.default(%a!)"))
    found.verify()
    turned = found.evolve(values={"r": replace(found.values["r"], layout=Layout(8, IndexMap([*range(1, 8), 0])))})
    broken(turned, "rule 4: expected all channels of %r in order, found 1:8,0")


# -- rule 5: what a flow names ----------------------------------------------------------------------------------------


def test_rule_5_a_flow_has_an_entry_for_every_result_channel() -> None:
    broken(
        program(("relu.default(%a)", "relu.default(%a[0:7])")), "rule 5: expected 8 entries in the read of %a, found 7"
    )


def test_rule_5_a_fan_has_that_many() -> None:
    broken(
        program(("relu.default(%a)", "relu.default(%a[0:8]/4)")),
        "rule 5: expected 32 entries in the read of %a, found 8",
    )


def test_rule_5_a_read_names_channels_that_exist() -> None:
    broken(program(("%x{0:3}", "%x{0:2,5}")), "rule 5: expected channels of %x below 3, found 0:2,5")
    broken(
        program(("relu.default(%a)", "relu.default(%a[0:7,9])")), "rule 5: expected channels of %a below 8, found 0:7,9"
    )


def test_rule_5_only_values_with_channels_are_read_by_channel() -> None:
    found = program(("[2, 3*, 8, 8]", "[2, 3, 8, 8]"))
    broken(found, "rule 5: expected %x to have channels, found none")


# -- rule 6: only live channels are read ------------------------------------------------------------------------------


def test_rule_6_a_set_is_live() -> None:
    found = program(("%r : float32[2, 8*, 8, 8] =", "%r : float32[2, 8*, 8, 8] {0:7} ="))
    broken(found, r"rule 6: expected only live channels of %r to be read, found 0:8 in 0:7")


def test_rule_6_a_flow_is_live() -> None:
    found = program(("%a : float32[2, 8*, 8, 8] =", "%a : float32[2, 8*, 8, 8] {0:7} ="))
    broken(found, "rule 6: expected only live channels of %a to be read, found 0:8 in 0:7")


def test_rule_6_all_means_all() -> None:
    found = program(("%f : float32[2, 32*] =", "%f : float32[2, 32*] {0:28} ="))
    broken(found, "rule 6: expected all channels of %f to be live, found 0:28")


def test_rule_6_a_dead_result_channel_needs_no_operand() -> None:
    both = "float32[2, 8*, 8, 8] {0:4}"
    text = [("%a : float32[2, 8*, 8, 8]", f"%a : {both}"), ("%r : float32[2, 8*, 8, 8]", f"%r : {both}")]
    found = program(*text, ("%r{0:8}", "%r{0:4}"), ("%g : float32[2, 8*, 8, 8]", f"%g : {both}"), ("%f!", "%x!"))
    short = found.evolve(values={"f": replace(found.values["f"], layout=Layout(32, IndexMap.identity(16)))})
    short.verify()


# -- rule 7: whole blocks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("live", ["0:4,5:32", "0:30", "1,0,2:32"])
def test_rule_7_blocks_are_whole_and_in_order_inside(live: str) -> None:
    found = program(("%f : float32[2, 32*] =", f"%f : float32[2, 32*] {{{live}}} ="), ("%f!", "%x!"))
    broken(found, "rule 7: expected whole blocks of 4 channels in %f")


def test_rule_7_blocks_may_go_and_change_places() -> None:
    program(("%f : float32[2, 32*] =", "%f : float32[2, 32*] {8:12,0:4} ="), ("%f!", "%x!")).verify()


# -- rule 8: groups ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("live", "counts"), [("0:3,4:8", r"\[3, 4\]"), ("0,4:8", r"\[1, 4\]")])
def test_rule_8_groups_of_the_result_are_equal(live: str, counts: str) -> None:
    found = program(("%g : float32[2, 8*, 8, 8] =", f"%g : float32[2, 8*, 8, 8] {{{live}}} ="), without=4)
    found = replace(found, ops=(*found.ops[:-1], found.ops[-1].map_args(lambda _: Read("x", Access.ALL))))
    broken(found, f"rule 8: expected equal groups in order in the result of g, found {counts}")


def test_rule_8_groups_of_the_operand_are_equal() -> None:
    broken(
        program(("%r{0:8}", "%r{0:7}")), r"rule 8: expected equal groups in order in the operand of g, found \[4, 3\]"
    )


def test_rule_8_groups_stay_in_order() -> None:
    found = program(("%g : float32[2, 8*, 8, 8] =", "%g : float32[2, 8*, 8, 8] {4:8,0:4} ="))
    broken(found, r"rule 8: expected equal groups in order in the result of g, found \[4, 4\]")


def test_rule_8_a_group_may_go() -> None:
    found = program(
        ("%g : float32[2, 8*, 8, 8] =", "%g : float32[2, 8*, 8, 8] {4:8} ="), ("%r{0:8}", "%r{4:8}"), without=4
    )
    replace(found, ops=(*found.ops[:-1], found.ops[-1].map_args(lambda _: Read("x", Access.ALL)))).verify()


# -- rule 9: parameters -----------------------------------------------------------------------------------------------


def test_rule_9_every_parameter_has_a_tensor() -> None:
    broken(with_weights(program(), a_weight=(8, 3, 1, 1)), "rule 9: expected a tensor for @g.weight, found none")


def test_rule_9_with_an_entry_for_every_result_channel() -> None:
    found = with_weights(program(), a_weight=(7, 3, 1, 1), g_weight=(8, 4, 1, 1))
    broken(found, r"rule 9: expected 8 entries along dimension 0 of @a.weight, found \(7, 3, 1, 1\)")


def test_rule_9_with_an_entry_for_every_operand_channel() -> None:
    found = with_weights(program(), a_weight=(8, 4, 1, 1), g_weight=(8, 4, 1, 1))
    broken(found, r"rule 9: expected 3 entries along dimension 1 of @a.weight, found \(8, 4, 1, 1\)")


def test_rule_9_with_an_entry_for_every_operand_channel_of_a_group() -> None:
    found = with_weights(program(), a_weight=(8, 3, 1, 1), g_weight=(8, 8, 1, 1))
    broken(found, r"rule 9: expected 4 entries along dimension 1 of @g.weight, found \(8, 8, 1, 1\)")


# -- programs from models ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(220, 225))
def test_lowered_programs_keep_the_rules_and_lose_them_when_a_value_is_cut(seed: int) -> None:
    """Cutting the first channel of any value that is read through is found."""
    net, inputs = random_net(seed)
    mask_randomly(net, seed)
    found = lowered(net, inputs)
    found.verify()
    cut = 0
    for value in found.values.values():
        if value.layout is None or value.layout.channels < 2 or not found.uses()[value.name]:
            continue
        short = replace(value, layout=Layout(value.layout.channels, IndexMap(range(1, value.layout.channels))))
        taken = {c for _, read in found.uses()[value.name] for c in _taken(read, value.layout.channels)}
        if 0 not in taken:
            continue
        with pytest.raises(IRError, match=r"rule [3456789]"):
            found.evolve(values={value.name: short}).verify()
        cut += 1
    assert cut > 5


def _taken(read: Read, channels: int) -> range | IndexMap:
    return range(channels) if read.access is Access.ALL else read.index


def test_nouns_are_frozen() -> None:
    found = lowered(MICRO["two_convs"].build(), MICRO["two_convs"].inputs)
    for thing, field in (
        (found, "ops"),
        (found.ops[0], "kind"),
        (Value("v", "float32", ()), "name"),
        (Param("p"), "name"),
    ):
        with pytest.raises(AttributeError):
            setattr(thing, field, None)
    with pytest.raises(TypeError):
        found.values["x"] = None  # type: ignore[index]


def test_a_value_without_channels_says_so() -> None:
    with pytest.raises(IRError, match="expected %v to have a channel axis, found none"):
        Value("v", "float32", (2, 3)).live.is_identity  # noqa: B018
