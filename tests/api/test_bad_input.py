"""One test for every line of the table of bad input, and the texts of verify and masks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import chanopt
from chanopt.errors import CaptureError, ChanoptError, LoweringError, MaskError, PassError, VerifyError
from chanopt.passes import DEFAULT, DropDead, OrderChannels
from tests.support.masks import mask_randomly
from tests.support.micro import MICRO
from tests.support.nets.base import Net, conv, image, randomise
from tests.support.passes import kill


def batch(size: int = 2, seed: int = 0) -> tuple[Any, ...]:
    return image()(size, torch.float32, seed)


def net() -> Any:
    return randomise(Net(lambda n, x: n.head(n.stem(x).relu()), stem=conv(3, 8, 3), head=conv(8, 6))).eval()


# -- an unknown op ----------------------------------------------------------------------------------------------------


class CumulativeSum(nn.Module):
    """An operator without a rule, between two convs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv(3, 8, 3), conv(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        t = self.stem(x).cumsum(1)
        return self.head(t)


def unknown_op() -> Any:
    return randomise(CumulativeSum()).eval()


def test_an_unknown_op_is_a_barrier_listed_in_the_refusals() -> None:
    model = unknown_op()
    kill(model.head, inputs=[0, 1])
    fast = chanopt.optimize(model, batch())
    (refusal,) = chanopt.explain(fast).refusals
    assert refusal.op == "aten.cumsum.default"
    assert refusal.reason == "no channel rule for this operator"
    assert f"{__file__}:" in refusal.source
    assert "cumsum" in refusal.source
    assert fast.get_parameter("stem.weight").shape[0] == 8
    chanopt.verify(model, fast, batch())


@pytest.mark.parametrize("call", [chanopt.optimize, chanopt.lower], ids=["optimize", "lower"])
def test_an_unknown_op_raises_in_strict_mode_with_op_source_line_and_remedy(call: Any) -> None:
    with pytest.raises(LoweringError) as caught:
        call(unknown_op(), batch(), strict=True)
    text = str(caught.value)
    assert "expected an operator with a channel rule, found aten.cumsum.default in layer -: no channel rule" in text
    assert f"from: {__file__}:" in text
    assert "in forward: t = self.stem(x).cumsum(1)" in text
    assert "lower with strict=False" in text


# -- masks ------------------------------------------------------------------------------------------------------------

WRONG_MASKS: dict[str, tuple[dict[str, chanopt.Mask], str]] = {
    "a misspelt layer": (
        {"steem": chanopt.Mask(outputs=[0])},
        r"expected the name of a layer for a mask, found 'steem'; nearest names: 'stem'",
    ),
    "no such layer at all": (
        {"qqq": chanopt.Mask(outputs=[0])},
        r"found 'qqq'; nearest names: 'head', 'stem'",
    ),
    "a module that is no layer": (
        {"": chanopt.Mask(outputs=[0])},
        r"expected a conv or linear layer for a mask, found '', which is neither or is not used in forward",
    ),
    "a channel that does not exist": (
        {"stem": chanopt.Mask(outputs=[0, 8, 9])},
        r"expected kept output channels of stem within 0\.\.7, found \[8, 9\]",
    ),
    "a negative channel": (
        {"head": chanopt.Mask(inputs=[-1, 3])},
        r"expected kept input channels of head within 0\.\.7, found \[-1\]",
    ),
}


@pytest.mark.parametrize("name", WRONG_MASKS)
def test_a_mask_for(name: str) -> None:
    masks, text = WRONG_MASKS[name]
    with pytest.raises(MaskError, match=text):
        chanopt.optimize(net(), batch(), masks=masks)


# -- train mode -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [chanopt.optimize, chanopt.lower], ids=["optimize", "lower"])
def test_train_mode_is_refused_with_the_remedy(call: Any) -> None:
    model = net()
    model.head.train()
    with pytest.raises(
        CaptureError,
        match=r"in eval mode, found 1 modules in train mode \(first: head\); call model\.eval\(\) first",
    ):
        call(model, batch())
    assert model.head.training


# -- NaN and infinity -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", ["stem.weight", "head.bias"])
def test_weights_that_are_not_finite_are_refused_by_name(value: float, place: str) -> None:
    model = net()
    with torch.no_grad():
        model.get_parameter(place).view(-1)[1] = value
    with pytest.raises(ChanoptError, match=rf"expected finite weights, found 1 NaN or infinite entries in {place}; "):
        chanopt.optimize(model, batch())


def test_an_infinite_buffer_that_is_no_weight_is_fine() -> None:
    """Attention masks are full of minus infinity."""
    model: Any = randomise(
        Net(
            lambda n, x: n.head(torch.softmax(n.stem(x) + n.mask, -1)),
            stem=conv(3, 8, 3),
            mask=torch.triu(torch.full((8, 8), float("-inf")), 1),
            head=conv(8, 6),
        )
    ).eval()
    kill(model.head, inputs=[2])
    fast = chanopt.optimize(model, batch())
    chanopt.verify(model, fast, batch())


# -- pipelines, targets, time limits ----------------------------------------------------------------------------------


def test_a_pipeline_in_an_impossible_order_names_pass_and_requirement() -> None:
    model = MICRO["fan_out"].build()
    mask_randomly(model, 0, side="input")
    with pytest.raises(
        PassError,
        match=r"pass order_channels required that every op reads only .*, found .*; run DropDead first",
    ):
        chanopt.optimize(model, MICRO["fan_out"].inputs(2, torch.float32, 0), pipeline=(OrderChannels(), DropDead()))


def test_a_target_that_does_not_exist() -> None:
    with pytest.raises(ChanoptError, match="expected target 'auto', 'cpu', 'cuda' or 'other', found 'tpu'"):
        chanopt.optimize(net(), batch(), target="tpu")  # type: ignore[arg-type]


def test_a_solver_time_limit_gives_the_best_order_found_and_its_gap() -> None:
    readers = 20

    def body(n: Net, x: Tensor) -> tuple[Tensor, ...]:
        t = n.a(x).relu()
        return tuple(n.get_submodule(f"b{i}")(t) for i in range(readers))

    model: Any = randomise(Net(body, a=conv(3, 24), **{f"b{i}": conv(24, 2) for i in range(readers)})).eval()
    for i in range(readers):
        drawn = torch.randperm(24, generator=torch.Generator().manual_seed(i))
        kill(model.get_submodule(f"b{i}"), inputs=drawn[4:].tolist())
    hasty = chanopt.optimize(model, batch(), pipeline=(*DEFAULT[:-1], OrderChannels(time_limit=0.0)))
    patient = chanopt.optimize(model, batch())
    (short,) = [s for s in chanopt.explain(hasty).segments if s.name == "a"]
    (full,) = [s for s in chanopt.explain(patient).segments if s.name == "a"]
    assert full.optimal
    assert full.bound == full.objective
    assert not short.optimal
    assert short.bound < short.objective
    assert short.bound <= full.objective <= short.objective
    chanopt.verify(model, hasty, batch())


# -- models that cannot be captured -----------------------------------------------------------------------------------


class Hopeless(nn.Module):
    """Nothing of it can be exported."""

    def forward(self, x: Tensor) -> Tensor:
        return x * float(x.sum().item() > 0)


class DataDependent(nn.Module):
    """Its middle looks at numbers; its ends are ordinary."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(conv(3, 8, 3), nn.ReLU(), conv(8, 8, 3))
        self.second = nn.Sequential(nn.ReLU(), conv(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        t = self.first(x)
        if t.mean().item() > 1e6:
            t = -t
        return self.second(t)


def test_a_model_that_cannot_be_captured_is_refused_in_strict_mode() -> None:
    model = randomise(DataDependent()).eval()
    with pytest.raises(CaptureError, match=r"expected torch.export to capture DataDependent, found "):
        chanopt.optimize(model, batch(), strict=True)
    with pytest.raises(CaptureError, match=r"expected torch.export to capture DataDependent, found "):
        chanopt.lower(model, batch())


def test_of_a_model_that_cannot_be_captured_the_parts_are_optimised() -> None:
    model: Any = randomise(DataDependent()).eval()
    kill(model.first[2], inputs=[0, 3, 4])
    fast: Any = chanopt.optimize(model, batch())
    report = chanopt.explain(fast)
    assert [refusal.op for refusal in report.refusals] == ["DataDependent"]
    assert fast.first.get_parameter("0.weight").shape[0] == 5
    assert model.first[0].weight.shape[0] == 8
    chanopt.verify(model, fast, batch())


def test_a_model_that_does_not_run() -> None:
    with pytest.raises(CaptureError, match="Net"):
        chanopt.optimize(net(), (torch.randn(2, 5, 8, 8),))


# -- verify -----------------------------------------------------------------------------------------------------------


def test_verify_returns_the_error() -> None:
    model = net()
    fast = chanopt.optimize(model, batch())
    assert 0 <= chanopt.verify(model, fast, batch()) < 1e-5
    assert chanopt.verify(model, model, batch()) == 0


def test_verify_leaves_both_modules_alone() -> None:
    model = net()
    fast = chanopt.optimize(model, batch())
    before = copy.deepcopy(model.state_dict()), copy.deepcopy(fast.state_dict())
    chanopt.verify(model, fast, batch())
    for old, module in zip(before, (model, fast), strict=True):
        assert all(torch.equal(old[name], tensor) for name, tensor in module.state_dict().items())


def test_verify_raises_on_another_function_with_output_error_and_tolerance() -> None:
    model, other = net(), net()
    with torch.no_grad():
        other.head.bias[2] += 1.0
    other.load_state_dict({**model.state_dict(), "head.bias": other.head.bias})
    with pytest.raises(
        VerifyError, match=r"expected output 0 within a relative error of 0\.0001 on the example inputs, found 0\.\d+"
    ):
        chanopt.verify(model, other, batch())


def test_verify_raises_past_a_tolerance_that_is_given() -> None:
    model, other = net(), net()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other.head.bias[0] += 1e-5
    chanopt.verify(model, other, batch(), tolerance=1e-3)
    with pytest.raises(VerifyError, match="within a relative error of 1e-08"):
        chanopt.verify(model, other, batch(), tolerance=1e-8)


def test_verify_raises_on_another_shape_and_another_structure() -> None:
    model = net()
    wider = nn.Sequential(conv(3, 7))
    with pytest.raises(VerifyError, match=r"expected output 0 of shape \(2, 6, 8, 8\), found \(2, 7, 8, 8\)"):
        chanopt.verify(model, wider, batch())
    twice = Net(lambda n, x: (n.a(x), n.a(x)), a=conv(3, 6))
    with pytest.raises(VerifyError, match="expected outputs of structure"):
        chanopt.verify(model, twice, batch())


def test_verify_raises_on_nan_where_the_reference_is_finite() -> None:
    model, other = net(), net()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other.head.bias[0] = float("nan")
    with pytest.raises(VerifyError, match="found nan"):
        chanopt.verify(model, other, batch())


def test_verify_tries_inputs_that_are_not_the_example() -> None:
    """A module that is right on the example alone."""
    (x,) = batch()

    class Cheat(nn.Module):
        def forward(self, y: Tensor) -> Tensor:
            return model(y.float()).double() if torch.equal(y.float(), x) else torch.zeros(2, 6, 8, 8).double()

    model = net()
    with pytest.raises(VerifyError, match="on fresh inputs 1"):
        chanopt.verify(model, Cheat(), (x,), tolerance=1e-4)
    assert chanopt.verify(model, Cheat(), (x,), tolerance=1e-4, trials=0) < 1e-4
