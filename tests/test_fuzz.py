"""Every micro net and random nets by the dozen, masked in every way, through the whole pipeline.

Each pass keeps its contract, the text reads back, and what comes out computes what went in, in float64.

A net is captured once and masked several times, for capturing is nine tenths of the time. CHANOPT_FUZZ multiplies the
number of random nets: CHANOPT_FUZZ=20 runs thousands, and every micro net three times in every mode.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from chanopt.frontend import RULES, Captured, capture, lower_captured
from chanopt.ir import Program, parse
from chanopt.kernels import GROUP
from chanopt.pass_infra import checked
from chanopt.passes import DEFAULT
from chanopt.target import ConvRead, Gains, Grain, Realization, Target
from tests.support.equal import difference, named_outputs
from tests.support.masks import MODES, Mode, Side, mask_randomly
from tests.support.micro import MICRO
from tests.support.nets.base import Inputs
from tests.support.random_nets import random_net

TOLERANCE = 1e-10
FUZZ = float(os.environ.get("CHANOPT_FUZZ", "1"))
NETS = max(1, round(30 * FUZZ))
"""Random nets; each is masked in MASKS ways."""
MASKS = 4
SIDES: tuple[Side, ...] = ("both", "input", "output")
AMOUNTS = (0.5, 0.3, 0.7, 0.9)


def compiled(captured: Captured, **settings: Any) -> Program:
    """The default pipeline with everything checked on the way.

    Args:
        captured: the model.
        settings: fields of the program to set, such as its target.
    """
    program = replace(lower_captured(captured, RULES, strict=False), **settings)
    program.verify()
    assert parse(str(program)) == program
    with checked():
        for step in DEFAULT:
            program = step(program).program
            again = step(program)
            assert again.program is program, f"{step.name} changes its own result"
            assert parse(str(program)) == program
    return program


def assert_means(model: nn.Module, program: Program, inputs: Inputs, batches: Sequence[int]) -> None:
    module = program.to_module()
    for batch in batches:
        x = inputs(batch, torch.float64, 7 + batch)
        expected = named_outputs(model, x)
        untouched = pytree.tree_map_only(torch.Tensor, torch.clone, x)
        found = named_outputs(module, x)
        same = zip(pytree.tree_leaves(untouched), pytree.tree_leaves(x), strict=True)
        assert all(not isinstance(a, torch.Tensor) or torch.equal(a, b) for a, b in same), "it writes into its input"
        assert [path for path, _ in expected] == [path for path, _ in found]
        for (path, a), (_, b) in zip(expected, found, strict=True):
            assert difference(a, b) < TOLERANCE, f"output {path} at batch {batch}"


def run(
    model: nn.Module, inputs: Inputs, masks: Sequence[tuple[Mode, int]], batch: int | None = None, **settings: Any
) -> None:
    """Capture once; for every mask, restore the weights, mask, compile, compare."""
    model = model.double()
    captured = capture(model, inputs(batch or 2, torch.float64, 1))
    batches = (3, 1) if captured.dynamic else (batch or 2,)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for mode, seed in masks:
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                tensor.copy_(state[name])
        side, amount = SIDES[seed % len(SIDES)], AMOUNTS[seed % len(AMOUNTS)]
        mask_randomly(model, seed, mode=mode, side=side, amount=amount)
        try:
            assert_means(
                model, compiled(captured, **settings), inputs, batches[seed % 2 :][:1] if len(batches) > 1 else batches
            )
        except Exception as error:
            raise AssertionError(
                f"masked by mode={mode!r}, seed={seed}, side={side!r}, amount={amount}: {error}"
            ) from error


def gradients(model: nn.Module, inputs: tuple[Any, ...]) -> list[torch.Tensor]:
    """Of the sum of squares of all outputs, by the inputs; zero for an input that nothing depends on."""
    given = [x.clone().requires_grad_() for x in inputs]
    made = [out for out in pytree.tree_leaves(model(*given)) if out.requires_grad]
    if not made:
        return [torch.zeros_like(x) for x in given]
    total = torch.stack([out.square().sum() for out in made]).sum()
    found = torch.autograd.grad(total, given, allow_unused=True)
    return [torch.zeros_like(x) if grad is None else grad for x, grad in zip(given, found, strict=True)]


@pytest.mark.parametrize("seed", range(0, NETS, 4))
def test_random_net_has_the_same_gradients(seed: int) -> None:
    """What writes in place must not take from autograd what it needs."""
    net, inputs = random_net(1000 + seed)
    net = net.double()
    mask_randomly(net, seed, mode=MODES[seed % len(MODES)], side="input")
    module = compiled(capture(net, inputs(2, torch.float64, 1))).to_module()
    x = inputs(3, torch.float64, 5)
    for a, b in zip(gradients(net, x), gradients(module, x), strict=True):
        assert difference(a, b) < 1e-9


@pytest.mark.parametrize("seed", range(NETS))
def test_random_net(seed: int) -> None:
    net, inputs = random_net(seed)
    run(net, inputs, [(MODES[(seed + 2 * k) % len(MODES)], seed + k) for k in range(MASKS)])


@pytest.mark.parametrize("target", ["cpu", "cuda", "cpu:inductor"])
@pytest.mark.parametrize("seed", range(500, 500 + max(1, NETS // 8)))
def test_random_net_in_channels_last(seed: int, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products, sums of them, and fused gathers wherever a conv can be computed so, in float64."""
    monkeypatch.setattr(ConvRead, "has_kernel", property(lambda read: read.stored % GROUP == 0))
    net, inputs = random_net(seed)
    masks = [(MODES[(seed + 2 * k) % len(MODES)], seed + k) for k in range(MASKS)]
    ways = (Realization.GEMM, Realization.RUNS, Realization.FUSED)
    first: Any = {"costs": lambda _, way: float(way not in ways)} if seed % 2 else {}
    run(net, inputs, masks, channels_last=True, target=target, **first)


@pytest.mark.parametrize("gains", list(Gains), ids=lambda gains: gains.value)
@pytest.mark.parametrize("seed", range(600, 600 + max(1, NETS // 8)))
def test_random_net_with_rounded_counts(seed: int, gains: Gains, monkeypatch: pytest.MonkeyPatch) -> None:
    """These nets are too small to be rounded by what a device is quick at."""
    grain = Grain(4, 9.0, gains, slices=bool(seed % 2), whole_joins=bool(seed % 3))
    monkeypatch.setattr(Target, "grain", lambda self, **_: grain)
    net, inputs = random_net(seed)
    run(net, inputs, [(MODES[(seed + 2 * k) % len(MODES)], seed + k) for k in range(MASKS)])


def _micro(name: str, modes: Sequence[Mode], first: int) -> None:
    micro = MICRO[name]
    run(micro.build(), micro.inputs, [(mode, first + k) for k, mode in enumerate(modes)], micro.fixed_batch)


@pytest.mark.parametrize("name", list(MICRO)[::6])
def test_micro_net(name: str) -> None:
    """A quick sixth of what the slow test below does."""
    number = list(MICRO).index(name)
    _micro(name, [MODES[number % len(MODES)]], number)


@pytest.mark.slow
@pytest.mark.parametrize("name", MICRO)
def test_micro_net_in_every_mode(name: str) -> None:
    _micro(name, [mode for mode in MODES for _ in range(3 if FUZZ > 1 else 1)], 1)


@pytest.mark.parametrize("name", ["residual_post", "dense_block", "fan_out", "c2f"])
def test_the_captured_graph_follows_the_weights(name: str) -> None:
    """Or the masks above would be those of the first run: two different masks must give two different programs."""
    micro = MICRO[name]
    model = micro.build().double()
    captured = capture(model, micro.inputs(2, torch.float64, 1))
    dense: Any = compiled(captured)
    mask_randomly(model, 1, mode="uniform", side="input")
    assert compiled(captured) != dense
