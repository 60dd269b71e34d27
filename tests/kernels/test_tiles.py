"""Tiles are measured for every kernel of a module, pinned in its graph, and kept by its plan and its files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

import chanopt
from chanopt.errors import ChanoptError, LoadError
from chanopt.kernels import ACTIVATIONS, Call, Config, KernelError, Kind, Problem, Tuner, candidates, op, pack, tune
from chanopt.kernels.configs import Rival, tile_of
from chanopt.kernels.op import run_on_cuda
from chanopt.kernels.reference import reference
from chanopt.kernels.rivals import _eager, by_rival
from chanopt.kernels.tiles import pin, pinned
from chanopt.kernels.tuner import Work

KERNEL = torch.ops.chanopt.gather_conv2d.default
LAST = torch.channels_last


class Net(nn.Module):
    """Two readers of halves; one adds the other and a bias behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, padding=1)
        self.left, self.right = nn.Conv2d(64, 32, 1), nn.Conv2d(64, 32, 3, padding=1)

    def forward(self, x: Tensor, *, shift: float = 0.0) -> Tensor:
        y = self.stem(x).relu()
        return (self.left(y) + self.right(y)).relu() + shift


def net() -> nn.Module:
    torch.manual_seed(0)
    made = Net().eval().to(memory_format=torch.channels_last)
    with torch.no_grad():
        for layer in (made.left, made.right):
            layer.weight[:, torch.randperm(64)[:32]] = 0
    return made


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)


@pytest.fixture
def fast(x: Tensor) -> fx.GraphModule:
    made = chanopt.optimize(net(), (x,), target="cuda")
    assert isinstance(made, fx.GraphModule)
    assert len(kernels(made)) == 2
    return made


@pytest.fixture
def rivals_only(monkeypatch: pytest.MonkeyPatch) -> Tuner:
    """A tuner to which no tile runs; "zeros" is the faster of what is left."""
    times = iter([2.0, 1.0] * 9)

    def none(self: Work, config: Config) -> Any:
        def run(i: int) -> None:
            raise RuntimeError("out of resources")

        return run

    monkeypatch.setattr(Work, "triton", none)
    return Tuner(measure=lambda run, buffers: next(times), machine="a machine", tensors=torch.device("cpu"))


@pytest.fixture
def last_is_fastest(monkeypatch: pytest.MonkeyPatch) -> Tuner:
    """A tuner whose clock goes down by candidate; what none but a GPU can run, runs nothing."""
    monkeypatch.setattr(Work, "triton", lambda self, config: lambda i: None)
    monkeypatch.setattr(Work, "rivals", lambda self: {})
    times = iter(range(10**6, 0, -1))
    return Tuner(measure=lambda run, buffers: float(next(times)), machine="a machine", tensors=torch.device("cpu"))


def asked(tuner: Tuner, monkeypatch: pytest.MonkeyPatch) -> list[Problem]:
    """What the tuner will have been asked for, in sequence."""
    seen: list[Problem] = []
    choose = tuner.choose
    monkeypatch.setattr(tuner, "choose", lambda problem: (seen.append(problem), choose(problem))[1])
    return seen


def ran(module: nn.Module, *given: Any) -> list[Any]:
    """The tile of every kernel that a call runs, by the code itself."""
    found: list[Any] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is KERNEL:
                found.append(list(args[13]) if len(args) > 13 else None)
            return func(*args, **(kwargs or {}))

    with Watch():
        module(*given)
    return found


def kernels(module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in module.graph.nodes if node.target is KERNEL]


def test_every_kernel_gets_the_tile_that_was_fastest_for_it(
    fast: fx.GraphModule, x: Tensor, last_is_fastest: Tuner
) -> None:
    before = fast(x)
    choices = tune(fast, (x,), tuner=last_is_fastest)
    assert list(choices) == [node.name for node in kernels(fast)]
    assert pinned(fast) == {name: choice.tile for name, choice in choices.items()}
    assert len(last_is_fastest.freeze()) == 2
    assert torch.equal(fast(x), before)
    with torch.no_grad():
        assert torch.equal(fast(x), before)


def test_the_problem_is_that_of_the_call(
    fast: fx.GraphModule, x: Tensor, last_is_fastest: Tuner, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = asked(last_is_fastest, monkeypatch)
    choices = tune(fast, (x,), tuner=last_is_fastest)
    alive = fast.get_parameter("stem.weight").shape[0]
    assert {(p.kernel, p.batch, p.height, p.channels, p.dtype) for p in seen} == {
        ((1, 1), 2, 8, alive, "fp32"),
        ((3, 3), 2, 8, alive, "fp32"),
    }
    assert sorted(p.residual for p in seen) == ["add", "none"]
    assert all(choice.tile == candidates(p)[-1] for p, choice in zip(seen, choices.values(), strict=True))


def test_plan_and_files_keep_tiles(fast: fx.GraphModule, x: Tensor, last_is_fastest: Tuner, tmp_path: Path) -> None:
    tune(fast, x, tuner=last_is_fastest)  # one tensor will do, as it does for optimize
    tiles = pinned(fast)
    assert len(tiles) == 2
    assert ran(fast, x) == [config.to_list() for config in tiles.values()]
    plan = chanopt.Plan.of(fast)
    text = plan.to_json()
    assert dict(chanopt.Plan.from_json(text).tiles) == dict(plan.tiles) == tiles
    slim = chanopt.apply_plan(net(), text)
    slim.load_state_dict(fast.state_dict())
    assert pinned(slim) == tiles
    assert ran(slim, x) == ran(fast, x)
    assert torch.equal(slim(x), fast(x))
    chanopt.save(fast, tmp_path / "slim.pt2")
    loaded = chanopt.load(tmp_path / "slim.pt2")
    assert pinned(loaded) == tiles
    assert ran(loaded, x) == ran(fast, x)
    assert torch.equal(loaded(x), fast(x))
    exported = torch.export.export(fast, (x,)).module()
    assert [list(node.args[13]) for node in kernels(exported)] == [tiles[node.name].to_list() for node in kernels(fast)]


def test_where_cudnn_is_faster_it_is_pinned(
    fast: fx.GraphModule, x: Tensor, rivals_only: Tuner, tmp_path: Path
) -> None:
    choices = tune(fast, (x,), tuner=rivals_only)
    assert [choice.how for choice in choices.values()] == ["zeros", "zeros"]
    assert list(pinned(fast).values()) == [Rival.ZEROS, Rival.ZEROS]
    assert [node.args[13] for node in kernels(fast)] == [[2], [2]]
    assert chanopt.Plan.from_json(chanopt.Plan.of(fast).to_json()).tiles == pinned(fast)
    chanopt.save(fast, tmp_path / "slim.pt2")
    loaded = chanopt.load(tmp_path / "slim.pt2")
    assert pinned(loaded) == pinned(fast)
    assert torch.equal(loaded(x), fast(x))


@pytest.mark.parametrize("rival", Rival)
@pytest.mark.parametrize("memory", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("prologue", [False, True])
def test_rivals_compute_the_same(rival: Rival, memory: torch.memory_format, prologue: bool) -> None:
    """In float64; groups are filled up with channels that another group has too."""
    torch.manual_seed(0)
    x = torch.randn(2, 48, 7, 5, dtype=torch.float64).contiguous(memory_format=memory)
    weight = torch.randn(16, 5, 3, 3, dtype=torch.float64)
    parts = {name: torch.rand(5, dtype=torch.float64) for name in ("scale", "shift")} if prologue else {}
    packed = pack([3, 5, 17, 18, 40], weight, 48, group=8, **parts)
    residual = torch.randn(2, 16, 4, 3, dtype=torch.float64)
    call = Call(
        x, packed.weight, torch.randn(16), packed.groups, 8, (2, 2), (1, 1), scale=packed.scale, shift=packed.shift,
        pre_act="relu" if prologue else "none", residual=residual, act="silu",
    )  # fmt: skip
    expected = reference(call)
    made = run_on_cuda(call, rival)
    torch.testing.assert_close(made, expected, rtol=1e-12, atol=1e-12)
    assert made.stride() == expected.stride()
    out = torch.empty(2, 24, 4, 3, dtype=torch.float64).contiguous(memory_format=memory).fill_(7)
    out[:, 4:20] = residual
    run_on_cuda(replace(call, residual=None), rival, out[:, 4:20], accumulate=True)
    torch.testing.assert_close(out[:, 4:20], expected, rtol=1e-12, atol=1e-12)
    assert bool((out[:, :4] == 7).all() and (out[:, 20:] == 7).all())


@pytest.mark.parametrize("rival", Rival)
def test_what_a_rival_convolves(rival: Rival, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copied channels with the weight as it is, or all with a wide one; a prologue and an empty batch go another way."""
    seen: list[tuple[int, int]] = []

    def conv(call: Call, x: Tensor) -> Tensor:
        seen.append((x.shape[1], call.weight.shape[1]))
        return torch.conv2d(x, call.weight)

    monkeypatch.setattr("chanopt.kernels.rivals.fused_conv", conv)
    packed = pack([3, 20], torch.randn(16, 2, 1, 1), 48, group=8)
    call = Call(torch.randn(2, 48, 4, 4).to(memory_format=LAST), packed.weight, None, packed.groups, 8)
    made = by_rival(call, rival)
    assert made.is_contiguous(memory_format=LAST)
    torch.testing.assert_close(made, reference(call))
    width = packed.weight.shape[1]
    assert width < 48
    assert seen == [(width, width) if rival is Rival.GATHER else (48, 48)]
    by_rival(replace(call, x=call.x[:0]), rival)
    by_rival(replace(call, scale=torch.ones(width), shift=torch.ones(width)), rival)
    assert len(seen) == 1


def test_a_tile_that_nobody_would_choose_gives_way_to_the_heuristic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "_machine", lambda device: (90, 132))
    problem = Problem(Kind.CONV, "fp16", 1, 8, 8, gathered=64, outputs=64)
    device = torch.device("cpu")
    best = op._tile(problem, None, device)
    for config in candidates(problem):
        assert op._tile(problem, config, device) == config
    for odd in (Config(64, 64, 32, 64, 4), Config(1, 1, 32, 1, 1), Config(64, 64, 64, 4, 900)):
        assert op._tile(problem, odd, device) == best


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("with_residual", [False, True])
def test_what_a_gpu_runs_for_a_rival(act: str, with_residual: bool) -> None:
    """All but cuDNN's own fused convs, which take ReLU."""
    x, weight, bias = torch.randn(2, 8, 5, 5) * 5, torch.randn(16, 8, 3, 3), torch.randn(16)
    residual = torch.randn(2, 16, 5, 5) if with_residual else None
    call = Call(x, weight, bias, torch.arange(8), padding=(1, 1), residual=residual, act=act)
    torch.testing.assert_close(_eager(call, x, bias), reference(call))


def test_under_autocast_the_problem_is_that_of_the_narrow_call(
    fast: fx.GraphModule, x: Tensor, last_is_fastest: Tuner, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = asked(last_is_fastest, monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        tune(fast, (x,), tuner=last_is_fastest)
    assert [problem.dtype for problem in seen] == ["bf16", "bf16"]


def test_a_module_in_parts_is_tuned_by_its_parts(x: Tensor) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = fx.symbolic_trace(nn.Conv2d(3, 4, 1))

    with pytest.raises(ChanoptError, match="found a Outer, optimised in parts; tune these, one by one: inner"):
        tune(Outer(), (x,))


def test_tiles_and_ways_as_lists() -> None:
    for tile in (Rival.GATHER, Rival.ZEROS, Config(64, 64, 32, 4, 4)):
        assert tile_of(tile.to_list()) == tile
    wrong: Any
    for wrong in (
        [],
        [0],
        [3],
        [1.0],
        [True],
        [64, 64],
        [128, 128, 48, 4, 3],
        [64, 64, 32, 4, 4.0],
        [64, 64, 32, 4, 2**70],
    ):
        with pytest.raises(KernelError, match="expected a config"):
            tile_of(wrong)


def test_without_a_gpu_nothing_is_pinned(fast: fx.GraphModule, x: Tensor) -> None:
    choices = tune(fast, (x,))
    assert [choice.measured for choice in choices.values()] == [False, False]
    assert pinned(fast) == {}
    assert chanopt.Plan.of(fast).tiles == {}


def test_tiles_can_be_pinned_again_and_in_part(fast: fx.GraphModule, x: Tensor) -> None:
    first, second = (node.name for node in kernels(fast))
    pin(fast, {first: Config(64, 64, 32, 4, 4), second: Config(32, 32, 32, 4, 2)})
    pin(fast, {first: Config(128, 64, 32, 4, 3)})
    assert pinned(fast) == {first: Config(128, 64, 32, 4, 3), second: Config(32, 32, 32, 4, 2)}
    assert [len(node.args) for node in kernels(fast)] == [14, 14]


def test_keyword_inputs_and_modules_without_kernels(x: Tensor, last_is_fastest: Tuner) -> None:
    fast = chanopt.optimize(net(), (x,), {"shift": 0.5}, target="cuda")
    assert isinstance(fast, fx.GraphModule)
    assert len(tune(fast, (x,), {"shift": 0.5}, tuner=last_is_fastest)) == 2
    plain = chanopt.optimize(net(), (x,))
    assert isinstance(plain, fx.GraphModule)
    assert tune(plain, (x,)) == {}
    with pytest.raises(ChanoptError, match="expected a module made by chanopt.optimize, found a Net"):
        tune(net(), (x,))
    with pytest.raises(KernelError, match="expected the tile of one of the kernels"):
        pin(fast, {"stem": Config(64, 64, 32, 4, 4)})


def test_plans_from_before_tiles_could_be_pinned_are_read(fast: fx.GraphModule) -> None:
    data = json.loads(chanopt.Plan.of(fast).to_json())
    del data["tiles"]
    assert chanopt.Plan.from_json(json.dumps(data)).tiles == {}


WRONG: list[Callable[[str], Any]] = [
    lambda name: {"nothing": [64, 64, 32, 4, 4]},
    lambda name: {name: [64, 64, 33, 4, 4]},
    lambda name: {name: [64, 64]},
    lambda name: {name: [64, 64, 32, 4, 4.5]},
    lambda name: {name: [2**70, 64, 32, 4, 4]},
    lambda name: {name: [1.0]},
    lambda name: {name: "tile"},
    lambda name: [name],
]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_plan_with_a_tile_that_is_none(fast: fx.GraphModule, wrong: Callable[[str], Any]) -> None:
    data = json.loads(chanopt.Plan.of(fast).to_json())
    data["tiles"] = wrong(kernels(fast)[0].name)
    with pytest.raises(LoadError):
        chanopt.Plan.from_json(json.dumps(data)).module()
