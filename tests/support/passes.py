"""What every pass test asserts: what a pass makes of a program, that it means the same, and that twice is once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from chanopt.frontend import RULES, capture, lower_captured
from chanopt.ir import Form, Kind, Op, Program, Read, parse, physical_read
from chanopt.pass_infra import Pass, PassResult, checked
from chanopt.passes import DEFAULT
from tests.support.equal import assert_same_function, double_copy, to_double
from tests.support.nets.base import Inputs, Net, conv, randomise

TOLERANCE = 1e-10
"""Relative error allowed in float64."""


def kill(layer: Any, *, outputs: Sequence[int] = (), inputs: Sequence[int] = (), bias: float | None = 0.0) -> None:
    """Zero output rows and input columns of a conv or linear layer; a dead row's bias becomes `bias` (None: stays)."""
    with torch.no_grad():
        rows, columns = (1, 0) if getattr(layer, "transposed", False) else (0, 1)
        layer.weight.index_fill_(rows, torch.tensor(list(outputs), dtype=torch.long), 0)
        layer.weight.index_fill_(columns, torch.tensor(list(inputs), dtype=torch.long), 0)
        if layer.bias is not None and bias is not None and outputs:
            layer.bias[list(outputs)] = bias


def at_odds(kernel: int = 1, padding: int | str | None = None) -> nn.Module:
    """A stream of 24 channels with three readers, of which no order serves all."""
    padding = kernel // 2 if padding is None else padding
    net = Net(
        lambda n, x: all_of(n.a(x).relu(), n.b, n.c, n.d),
        a=conv(3, 24, 3),
        **{name: nn.Conv2d(24, 8, kernel, padding=padding) for name in ("b", "c", "d")},
    )
    net = randomise(net).eval()
    for number, reader in enumerate((net.b, net.c, net.d)):
        kill(reader, inputs=[c for c in range(24) if (c // (number + 1)) % 2])
    return net


def all_of(y: Tensor, *branches: nn.Module) -> Tensor:
    """What several branches make of a tensor, in one."""
    return torch.cat([branch(y) for branch in branches], 1)


def passes_before(kind: type[Pass]) -> tuple[Pass, ...]:
    """The default pipeline up to the first pass of a kind."""
    return DEFAULT[: next(number for number, step in enumerate(DEFAULT) if isinstance(step, kind))]


def lowered(model: nn.Module, inputs: Inputs, batch: int = 2, *, strict: bool = False) -> Program:
    """The program of a float64 copy of the model."""
    return lower_captured(capture(double_copy(model), inputs(batch, torch.float64, 0)), RULES, strict=strict)


def prepared(model: nn.Module, inputs: Inputs, before: Sequence[Pass] = (), batch: int = 2) -> Program:
    """The program as a pass under test finds it: lowered, then through the passes that run before it."""
    program = lowered(model, inputs, batch)
    for step in before:
        program = step(program).program
    return program


def assert_rewrites(
    pass_: Pass,
    model: nn.Module,
    inputs: Inputs,
    *,
    before: Sequence[Pass] = (),
    widths: Mapping[str, tuple[int, int]] | None = None,
    forms: Mapping[str, Form] | None = None,
    targets: Mapping[str, int] | None = None,
    expect: Callable[[Program], object] | None = None,
    batch: int = 2,
    batches: Sequence[int] = (3,),
    allow_constant: bool = False,
) -> PassResult:
    """Run a pass on a model's program and fail unless it fires, holds its contract and means the same.

    Checked always: the result is reported as modified and differs; the rules of the IR and the pass's guarantees
    hold (checked mode); the text of the result parses back; a second run returns the very same program; the
    module computes what the model does, in float64, on fresh inputs of every size in `batches`.

    Args:
        pass_: the pass.
        model: the model, already masked; not modified.
        inputs: its inputs.
        before: passes that run before.
        widths: expected (channels read, channels made) of layers after the pass.
        forms: how layers read after the pass.
        targets: how many ops of an operator are left, e.g. {"aten.batch_norm.default": 0}.
        expect: anything else about the resulting program; what it returns must be true, or None.
        batch: example batch.
        batches: batches to compare on.
        allow_constant: whether the outputs may be the same for every sample.
    """
    program = prepared(model, inputs, before, batch)
    with checked():
        result = pass_(program)
        again = pass_(result.program)
    assert result.modified, f"{pass_.name} changed nothing in\n{program}"
    assert result.program is not program
    assert not again.modified, f"{pass_.name} changed its own result\n{result.program}\ninto\n{again.program}"
    assert again.program is result.program
    assert again.figures == {}
    assert parse(str(result.program)) == result.program
    assert_structure(result.program, widths or {}, forms or {}, targets or {})
    if expect is not None:
        assert expect(result.program) in (None, True), f"unexpected result of {pass_.name}:\n{result.program}"
    module = result.program.to_module()
    for size in batches:
        assert_same_function(
            model, module, inputs(size, torch.float64, 11 + size), TOLERANCE, allow_constant=allow_constant
        )
    return result


def assert_leaves(pass_: Pass, model: nn.Module, inputs: Inputs, *, before: Sequence[Pass] = ()) -> Program:
    """Fail unless a pass returns the very program it was given; returns that program."""
    program = prepared(model, inputs, before)
    with checked():
        result = pass_(program)
    assert result.program is program, f"{pass_.name} was to leave this alone:\n{program}\nmade of it:\n{result.program}"
    assert not result.modified
    assert result.figures == {}
    return program


def assert_structure(
    program: Program, widths: Mapping[str, tuple[int, int]], forms: Mapping[str, Form], targets: Mapping[str, int]
) -> None:
    """Fail unless layers have these widths and reads, and operators stand this often."""
    found = {layer: width(program, layer) for layer in widths}
    assert found == dict(widths), f"expected widths {dict(widths)}, found {found} in\n{program}"
    reads = {layer: form(program, layer) for layer in forms}
    assert reads == dict(forms), f"expected reads {dict(forms)}, found {reads} in\n{program}"
    counted = Counter(op.target for op in program.ops)
    counts = {target: counted[target] for target in targets}
    assert counts == dict(targets), f"expected {dict(targets)}, found {counts} in\n{program}"


def layer(program: Program, name: str) -> Op:
    """The linear op of a layer; the layer must be used once."""
    found = [op for op in program.ops if op.linear and op.layer == name]
    assert len(found) == 1, f"expected one linear op of layer {name}, found {len(found)} in\n{program}"
    return found[0]


def width(program: Program, name: str) -> tuple[int, int]:
    """How many channels a layer reads and makes; (0, 0) if it is gone."""
    if not any(op.linear and op.layer == name for op in program.ops):
        return 0, 0
    op = layer(program, name)
    return len(physical_read(op, op.reads[0], program).channels), len(program.values[op.result].live)


def form(program: Program, name: str) -> Form:
    """How a layer reads its operand."""
    op = layer(program, name)
    return physical_read(op, op.reads[0], program).form


def of_kind(program: Program, kind: Kind) -> list[Op]:
    """The ops of a kind, in order."""
    return [op for op in program.ops if op.kind is kind]


def run_program(program: Program, inputs: tuple[Any, ...]) -> dict[str, Tensor]:
    """Every value of a program, op by op with all logical channels: an interpreter that never cuts anything.

    Sources take the leaves of `inputs` in order.
    """
    return run_from(program, dict(zip(_sources(program), _leaves(inputs), strict=True)))


def run_from(program: Program, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with some values given instead of computed."""
    assert program.dialect is not None
    made: dict[str, Any] = dict(given)
    with torch.no_grad():
        for op in program.ops:
            if op.kind not in (Kind.SOURCE, Kind.SINK) and op.result not in made:
                made[op.result] = program.dialect.evaluate(op, program, made)
    return made


def sink_values(program: Program) -> list[str]:
    """The names of the values the model returns."""
    return [arg.value for arg in program.ops[-1].args if isinstance(arg, Read)]


def _sources(program: Program) -> list[str]:
    return [op.result for op in program.ops if op.kind is Kind.SOURCE]


def _leaves(inputs: tuple[Any, ...]) -> list[Any]:
    return list(torch.utils._pytree.tree_leaves(to_double(inputs)))
