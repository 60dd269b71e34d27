"""Regularizers (D10): values in closed form, thresholds, dropped filters; learning rates (D18)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chanopt.errors import ScheduleError
from chanopt.pruning.distiller import CLASSES
from chanopt.pruning.distiller.learning_rates import MultiStepMultiGammaLR, PolynomialLR
from chanopt.pruning.distiller.regularizers import DropFilterRegularizer, Regularizer


def regularizer(kind: str, **arguments: Any) -> Regularizer:
    return CLASSES["regularizers"][kind](name="r", **arguments)


def weights() -> dict[str, Tensor]:
    torch.manual_seed(3)
    return {
        "conv": torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True),
        "fc": torch.randn(4, 3, dtype=torch.float64, requires_grad=True),
    }


def by_hand(weight: Tensor, group: str) -> float:
    """The sum of the norms of all structures, structure by structure."""
    w = weight.detach()
    pieces = {
        "2D": [w[f, c] for f in range(len(w)) for c in range(w.shape[1])] if w.dim() == 4 else [],
        "3D": list(w),
        "4D": [w],
        "Rows": list(w),
        "Cols": [w[:, c] for c in range(w.shape[1])],
    }
    if group == "Channels":
        return sum((float(w[:, c].detach().pow(2).sum()) + 1e-8) ** 0.5 for c in range(w.shape[1]))
    return sum(float(piece.detach().pow(2).sum()) ** 0.5 for piece in pieces[group])


@pytest.mark.parametrize(
    ("name", "group", "parts"),
    [
        ("conv", "2D", ["2D"]),
        ("conv", "3D", ["3D"]),
        ("conv", "Filters", ["3D"]),
        ("conv", "4D", ["4D"]),
        ("conv", "Channels", ["Channels"]),
        ("conv", "Channels+4D", ["Channels", "4D"]),
        ("conv", "4D+Channels", ["Channels", "4D"]),
        ("fc", "Rows", ["Rows"]),
        ("fc", "Cols", ["Cols"]),
        ("fc", "Rows+Cols", ["Rows", "Cols"]),
        ("fc", "Cols+Rows", ["Rows", "Cols"]),
    ],
)
def test_d10_group_lasso(name: str, group: str, parts: list[str]) -> None:
    given = weights()
    loss = regularizer("GroupLassoRegularizer", reg_regims={name: [0.3, group]}).loss(given)
    assert float(loss.detach()) == pytest.approx(0.3 * sum(by_hand(given[name], part) for part in parts), rel=1e-12)
    loss.backward()
    assert bool((given[name].grad != 0).all())  # type: ignore[operator]


def test_d10_l1_and_several_weights() -> None:
    given = weights()
    loss = regularizer("L1Regularizer", reg_regims={"conv": 0.1, "fc": 0.2}).loss(given)
    assert float(loss.detach()) == pytest.approx(
        0.1 * float(given["conv"].detach().abs().sum()) + 0.2 * float(given["fc"].detach().abs().sum())
    )


def test_d10_group_variance() -> None:
    given = weights()
    norms = torch.tensor([(float(given["conv"][:, c].detach().pow(2).sum()) + 1e-8) ** 0.5 for c in range(2)])
    loss = regularizer("GroupVarianceRegularizer", reg_regims={"conv": [0.5, "Channels"]}).loss(given)
    assert float(loss.detach()) == pytest.approx(0.5 / float(norms.double().var()), rel=1e-5)
    with pytest.raises(ScheduleError, match="r: expected the structure Channels for conv, found '3D'"):
        regularizer("GroupVarianceRegularizer", reg_regims={"conv": [0.5, "3D"]})


def test_d10_channels_that_are_zero_have_a_gradient() -> None:
    """The root of a channel's norm has 1e-8 under it."""
    weight = torch.zeros(3, 2, 2, 2, requires_grad=True)
    regularizer("GroupLassoRegularizer", reg_regims={"w": [1.0, "Channels"]}).loss({"w": weight}).backward()
    assert weight.grad is not None
    assert bool(torch.isfinite(weight.grad).all())


def test_d10_thresholds_follow_the_strength() -> None:
    given = weights()
    lasso = regularizer(
        "GroupLassoRegularizer", reg_regims={"conv": [0.8, "3D"]}, threshold_criteria="Mean_Abs"
    ).threshold(given)
    means = given["conv"].detach().flatten(1).abs().mean(1)
    assert lasso["conv"].flatten(1).amax(1).tolist() == (means > 0.8).double().tolist()
    assert 0 < int((means > 0.8).sum()) < 3
    entries = regularizer("L1Regularizer", reg_regims={"fc": 0.7}, threshold_criteria="L1").threshold(given)
    assert torch.equal(entries["fc"], (given["fc"].abs() > 0.7).double())
    assert regularizer("L1Regularizer", reg_regims={"fc": 0.7}).threshold(given) == {}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"reg_regims": {"conv": 0.1}}, r"expected \[strength, structure\] for conv, found 0.1"),
        ({"reg_regims": {}, "threshold_criteria": "L9"}, "threshold_criteria Max or Mean_Abs"),
        ({"reg_regims": {"conv": [0.1, "Cubes"]}}, "structures .* found 'Cubes'"),
    ],
)
def test_d10_wrong_regimes_are_named(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(ScheduleError, match=told):
        regularizer("GroupLassoRegularizer", **arguments).loss(weights())


def test_d10_dropped_filters() -> None:
    """Every fourth training forward runs without some filters; the parameters are left alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False))
    dropping = DropFilterRegularizer(name="r", reg_regims={"0.weight": 0.5}, frequency=4)
    dropping.start(model)
    x, before = torch.randn(1, 3, 6, 6), model[0].weight.detach().clone()
    plain = torch.nn.functional.conv2d(x, before)
    outputs = [model(x) for _ in range(8)]
    changed = [not torch.equal(output, plain) for output in outputs]
    assert changed == [False, False, False, True] * 2
    assert torch.equal(model[0].weight, before)
    assert [name for name, _ in model.named_parameters()] == ["0.weight"]
    silent = (outputs[3].flatten(2).abs().amax(2) == 0)[0]
    share = max(0.2, float(before[~silent].detach().abs().sum() / before.detach().abs().sum()))
    assert 0 < int(silent.sum()) < 16
    assert torch.allclose(outputs[3][0, ~silent], plain[0, ~silent] / share, rtol=1e-4, atol=1e-5)
    outputs[3].sum().backward()
    assert model[0].weight.grad is not None
    model.eval()
    assert all(torch.equal(model(x), plain) for _ in range(8))
    model.train()
    dropping.stop()
    assert all(torch.equal(model(x), plain) for _ in range(8))


def test_d10_a_forward_that_fails_leaves_no_dropped_weight_behind() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3))
    dropping = DropFilterRegularizer(name="r", reg_regims={"0.weight": 0.5}, frequency=1)
    dropping.start(model)
    with pytest.raises(RuntimeError):
        model(torch.randn(1, 4, 6, 6))
    assert "weight" not in vars(model[0])


# -- learning rates -------------------------------------------------------------------------------------------------


def rates(make: Any, epochs: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.8)
    schedule = make(optimizer)
    found = []
    for _ in range(epochs):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_d18_polynomial_rate() -> None:
    found = rates(lambda optimizer: PolynomialLR(optimizer, T_max=4, power=2), 5)
    assert found == pytest.approx([0.8, 0.45, 0.2, 0.05, 0.0])


def test_d18_several_gammas() -> None:
    found = rates(lambda optimizer: MultiStepMultiGammaLR(optimizer, [1, 3], [0.5, 0.1]), 5)
    assert found == pytest.approx([0.8, 0.4, 0.4, 0.04, 0.04])
    with pytest.raises(ScheduleError, match=r"ascending milestones and as many gammas, found \[3, 1\]"):
        rates(lambda optimizer: MultiStepMultiGammaLR(optimizer, [3, 1], [0.5, 0.1]), 1)
