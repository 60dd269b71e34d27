"""FluxPrune's strategies, and what applies them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from chanopt.errors import ChanoptError, VerifyError
from chanopt.pruning.flux import (
    ChannelPrune,
    LevelPrune,
    ThresholdPrune,
    area_consumption,
    desaturate,
    iterativeprune,
    keepprune,
    merge_conv_bn,
    power_consumption,
    prune,
    prune_propagate,
    rebn,
    resize,
)
from chanopt.pruning.flux.power import dp_area, dp_power, lfsr_area, lfsr_power
from tests.pruning.nets import Dense, Residual, randomised


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 1))
    model = nn.Sequential(backbone, nn.Sequential(nn.Flatten(), nn.Linear(20, 4)))
    randomised(model)
    return model


def weight(model: nn.Module, name: str) -> Tensor:
    found = model.get_submodule(name).weight
    assert isinstance(found, Tensor)
    return found.detach()


X = torch.randn(2, 3, 4, 4)


def test_f04_one_strategy_for_all_layers() -> None:
    model = chain()
    pruned = prune(LevelPrune(0.5), model)
    assert [int((weight(pruned, n) == 0).sum()) for n in ("0.0", "0.3", "1.1")] == [108, 20, 40]
    assert (weight(model, "0.0") != 0).all()  # a copy
    for name in ("0.0", "0.3", "1.1"):  # neither biases nor batch norms
        assert torch.equal(pruned.get_parameter(f"{name}.bias"), model.get_parameter(f"{name}.bias"))
    assert torch.equal(pruned.get_parameter("0.1.weight"), model.get_parameter("0.1.weight"))


def test_f04_one_strategy_for_each_layer() -> None:
    pruned = prune([[LevelPrune(0.5), None, None, ThresholdPrune(1e9)], None], chain())
    assert (weight(pruned, "0.0") == 0).sum() == 108
    assert (weight(pruned, "0.3") == 0).all()
    assert (weight(pruned, "1.1") != 0).all()
    by_name = prune({"1": {"1": LevelPrune(0.25)}}, chain())
    assert (weight(by_name, "1.1") == 0).sum() == 20
    with pytest.raises(ChanoptError, match="expected 2 strategies for Sequential, one for each child, found 3"):
        prune([None, None, None], chain())
    with pytest.raises(ChanoptError, match=r"expected a child of Sequential.0 \(0, 1, 2, 3\), found 'conv'"):
        prune({"0": {"conv": None}}, chain())


@pytest.mark.parametrize("level", [0.0, 0.1, 0.2, 0.33, 0.5, 1.0])
@pytest.mark.parametrize("length", [1, 7, 10, 64])
@pytest.mark.parametrize("signed", [False, True])
def test_f05_level_prune_drops_exactly_so_many(level: float, length: int, signed: bool) -> None:
    layer = nn.Linear(length, 1)
    dead = ~LevelPrune(level, signed).keep(layer).flatten()
    assert int(dead.sum()) == length - math.ceil((1 - level) * length)
    values = layer.weight.detach().flatten()
    ranked = values if signed else values.abs()
    if dead.any() and not dead.all():
        assert ranked[dead].max() <= ranked[~dead].min()


def test_f05_magnitudes_by_default_signs_on_demand() -> None:
    layer = nn.Linear(4, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[-3.0, 0.1, 2.0, -0.2]]))
    assert LevelPrune(0.5).keep(layer).tolist() == [[True, False, True, False]]
    assert LevelPrune(0.5, signed=True).keep(layer).tolist() == [[False, True, True, False]]
    with pytest.raises(ChanoptError, match="expected a level between 0 and 1, found 1.5"):
        LevelPrune(1.5)


def test_f06_a_weight_at_the_threshold_stays() -> None:
    layer = nn.Linear(4, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[-0.5, 0.25, 0.5, -0.75]]))
    assert ThresholdPrune(0.5).keep(layer).tolist() == [[True, False, True, True]]


def test_f07_channel_prune_masks_filters_and_their_norm() -> None:
    model = chain()
    pruned = prune(ChannelPrune(0.3), model)
    alive = (weight(pruned, "0.0") != 0).flatten(1).any(1)
    assert int(alive.sum()) == math.ceil(0.7 * 8)
    scores = weight(model, "0.0").abs().sum((1, 2, 3))
    assert scores[alive].min() > scores[~alive].max()
    norm = pruned.get_submodule("0.1")
    assert torch.equal(norm.weight != 0, alive)
    assert torch.equal(norm.bias != 0, alive)
    assert torch.equal(norm.running_mean, model.get_buffer("0.1.running_mean"))
    assert (weight(pruned, "1.1") != 0).all()
    assert torch.equal(pruned.get_parameter("0.0.bias"), model.get_parameter("0.0.bias"))


def test_f07_norms_are_found_in_the_data_flow_too() -> None:
    model = randomised(Residual())
    x = (torch.randn(1, 3, 8, 8),)
    assert (prune(ChannelPrune(0.5), model).get_submodule("norm").weight != 0).all()  # nothing says what comes before
    alive = prune(ChannelPrune(0.5), model, x).get_submodule("norm").weight != 0
    assert int(alive.sum()) == 4


def test_f08_masks_are_live() -> None:
    pruned = prune(LevelPrune(0.5), chain()).train()
    dead = weight(pruned, "0.0") == 0
    before = weight(pruned, "0.0").clone()
    optimizer = torch.optim.SGD(pruned.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        pruned(X).square().sum().backward()
        optimizer.step()
    after = weight(pruned, "0.0")
    assert (after[dead] == 0).all()
    assert (after[~dead] != before[~dead]).any()


def test_f08_pruning_again_keeps_what_was_dead() -> None:
    once = prune(LevelPrune(0.5), chain())
    twice = prune(ChannelPrune(0.5), once)
    assert ((weight(once, "0.0") == 0) <= (weight(twice, "0.0") == 0)).all()
    assert (weight(twice, "0.0") == 0).flatten(1).all(1).sum() == 4
    assert (weight(once, "0.0") != 0).sum() == 108  # the first one is as it was


def test_f09_kept_zeros_change_unless_they_are_protected() -> None:
    pruned = prune(LevelPrune(0.5), chain())
    dead = weight(pruned, "0.0") == 0
    for protect in (False, True):
        model = keepprune(pruned, protect=protect)
        assert torch.equal(weight(model, "0.0"), weight(pruned, "0.0"))
        assert set(model.state_dict()) == set(chain().state_dict()) or protect
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(X).square().sum().backward()
        optimizer.step()
        assert bool((weight(model, "0.0")[dead] == 0).all()) == protect


class Tuner:
    """Counts its calls; good from the given ones on."""

    def __init__(self, good: set[int]) -> None:
        self.good, self.models = good, list[nn.Module]()

    def __call__(self, model: nn.Module) -> bool:
        self.models.append(model)
        return len(self.models) in self.good


def zeros(model: nn.Module) -> int:
    return int((weight(model, "0.0") == 0).sum())


def test_f10_stages_follow_one_another() -> None:
    tuner = Tuner({1, 4, 5})
    model = iterativeprune(tuner, [LevelPrune(level) for level in (0.25, 0.5, 0.75)], chain())
    assert [zeros(m) for m in tuner.models] == [54, 108, 108, 108, 162]
    assert zeros(model) == 162


def test_f10_it_gives_up_and_says_so() -> None:
    tuner = Tuner({1})
    with pytest.warns(UserWarning, match=r"stage 2 \(LevelPrune\(level=0.5.*did not reach its aim in 3 tries"):
        model = iterativeprune(tuner, [LevelPrune(0.25), LevelPrune(0.5), LevelPrune(0.75)], chain(), maxtries=3)
    assert len(tuner.models) == 4
    assert zeros(model) == 54


# -- propagation in other models --------------------------------------------------------------------------------------


def same(one: nn.Module, other: nn.Module, x: Tensor) -> None:
    torch.testing.assert_close(one.double()(x.double()), other.double()(x.double()), rtol=1e-9, atol=1e-9)


def test_f11_biases_are_not_forgotten() -> None:
    torch.manual_seed(0)
    model = (
        nn.Sequential(nn.Conv2d(3, 6, 1), nn.Hardtanh(), nn.Conv2d(6, 5, 1), nn.ReLU(), nn.Conv2d(5, 2, 1))
        .eval()
        .double()
    )
    with torch.no_grad():
        model[0].weight[[1, 4]] = 0  # constants, not zeros
        model[4].weight[:, 2] = 0
    spread = prune_propagate(model, (X.double(),))
    assert (weight(spread, "2")[:, [1, 4]] == 0).all()  # moved into the bias
    assert (weight(spread, "2")[2] == 0).all()
    assert (spread.get_parameter("0.bias")[[1, 4]] == 0).all()
    assert spread.get_parameter("2.bias")[2] == 0
    same(spread, model, X)


def test_f11_a_border_keeps_a_constant_where_it_is() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 3, padding=1)).eval()
    with torch.no_grad():
        model[0].weight[[1, 4]] = 0
        model[0].bias[4] = 0
    spread = prune_propagate(model, (X,))
    assert (weight(spread, "1")[:, 1] != 0).any()
    assert (weight(spread, "1")[:, 4] == 0).all()
    same(spread, model, X)


@pytest.mark.parametrize("net", [Residual, Dense])
def test_f11_models_that_are_no_chains(net: type[nn.Module]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    model = keepprune(prune(ChannelPrune(0.4), randomised(net()), (x,)))
    spread = prune_propagate(model, (x,))
    before = sum(int((parameter == 0).sum()) for parameter in model.parameters())
    assert sum(int((parameter == 0).sum()) for parameter in spread.parameters()) > before
    same(spread, model, x)


def test_f11_grouped_convs_by_their_groups() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 6, 3, groups=2), nn.Conv2d(6, 2, 1)).eval()
    with torch.no_grad():
        model[0].weight[[1, 5]] = 0
    spread = prune_propagate(model, (X,))
    gone = (weight(spread, "1") == 0).flatten(2).all(2)  # (outputs, inputs of the group)
    assert gone[:3].any(0).tolist() == [False, True, False, False]
    assert gone[3:].any(0).tolist() == [False, True, False, False]
    same(spread, model, X)


def test_f4_the_identity_skips() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
    for skip in (lambda layer: layer, nn.Identity(), None):
        pruned = prune([LevelPrune(0.5), skip], model)
        assert int((weight(pruned, "0") == 0).sum()) == 6
        assert (weight(pruned, "1") != 0).all()
    for wrong in (lambda layer: None, 3, "identity"):
        with pytest.raises(ChanoptError, match="expected a strategy for Sequential.1, strategies for its children"):
            prune([LevelPrune(0.5), wrong], model)  # type: ignore[list-item]


class Twice(nn.Module):
    """A conv that is called twice, and two convs that share a weight but not a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.shared = nn.Conv2d(8, 8, 1)
        self.one = nn.Conv2d(8, 4, 1)
        self.other = nn.Conv2d(8, 4, 1)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.shared(self.shared(self.stem(x)).relu())
        return self.one(y) + self.other(y.relu())


@pytest.mark.parametrize("seed", range(4))
def test_f11_a_weight_that_is_used_twice(seed: int) -> None:
    torch.manual_seed(seed)
    model = prune(ChannelPrune(0.5), Twice().eval().double())
    spread = prune_propagate(model, (X.double(),))
    same(spread, model, X)


def test_f11_a_constant_that_both_uses_read() -> None:
    torch.manual_seed(0)
    model = Twice().eval().double()
    with torch.no_grad():
        model.shared.weight[:4] = 0
        model.shared.bias[:2] = torch.tensor([1.0, 2.0])  # to both readers, so that both biases take it
        model.shared.bias[2:4] = torch.tensor([-3.0, 0.0])  # to one -3, to the other relu(-3) = 0; nothing to either
    spread = prune_propagate(model, (X.double(),))
    dead = [bool((weight(spread, "one")[:, channel] == 0).all()) for channel in range(4)]
    assert dead == [True, True, False, True]
    same(spread, model, X)


def test_f11_what_the_operators_do_not_tell_of_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)).eval()
    nothing = {"wanted": lambda op, param, wanted, tensor: torch.ones(tensor.shape, dtype=torch.bool)}
    monkeypatch.setattr("chanopt.pruning.flux.propagate._making", nothing["wanted"])
    with pytest.raises(VerifyError):
        prune_propagate(model, (X,))


def test_f12_only_the_tutorials_form_is_resized() -> None:
    with pytest.raises(ChanoptError, match="expected a Sequential whose first child is a Sequential, found a Residual"):
        resize(Residual())


def test_f12_a_filter_that_is_still_read_stays() -> None:
    trio = [nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)]
    torch.manual_seed(0)
    model = randomised(nn.Sequential(nn.Sequential(*trio)))
    with torch.no_grad():
        model.get_parameter("0.0.weight")[[0, 3]] = 0
        model.get_parameter("0.4.weight")[:, [3, 5]] = 0
    resized = resize(model)
    assert resized.get_submodule("0.0").out_channels == 5
    same(resized, model, X)


# -- the rest of the tutorial -----------------------------------------------------------------------------------------


def test_f13_desaturate() -> None:
    model = nn.Sequential(nn.Linear(3, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[-3.0, 0.5, 2.0]]))
    assert desaturate(model).get_parameter("0.weight").tolist() == [[-1.0, 0.5, 1.0]]
    assert model[0].weight.tolist() == [[-3.0, 0.5, 2.0]]


@pytest.mark.parametrize(
    "conv", [nn.Conv2d(3, 6, 3), nn.Conv2d(3, 6, 3, groups=3, bias=False), nn.ConvTranspose2d(3, 6, 3)], ids=str
)
def test_f13_merge_conv_bn(conv: nn.Module) -> None:
    model = randomised(nn.Sequential(conv, nn.BatchNorm2d(6), nn.ReLU())).double()
    merged = merge_conv_bn(model)
    assert [type(layer) for layer in merged.children()] == [type(conv), nn.ReLU]
    same(merged, model, X)
    model[1].eps = 0.3
    rough = merge_conv_bn(model, exact=False)  # as the tutorial, without the epsilon
    scale = model[1].weight / model[1].running_var.sqrt()
    bias = 0 if model[0].bias is None else model[0].bias
    torch.testing.assert_close(rough.get_parameter("0.bias"), (bias - model[1].running_mean) * scale + model[1].bias)


def test_f13_rebn() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Sequential(nn.Conv2d(4, 2, 1), nn.Flatten())).eval()
    made = rebn(model)
    assert [type(module).__name__ for module in made.modules()] == [
        "Sequential", "Conv2d", "BatchNorm2d", "ReLU", "Sequential", "Conv2d", "BatchNorm2d", "Flatten"
    ]  # fmt: skip
    torch.testing.assert_close(made(X), model(X), rtol=1e-4, atol=1e-4)


def test_f13_power_and_area() -> None:
    assert [dp_power(3), dp_area(3), lfsr_power(3), lfsr_area(3)] == pytest.approx(
        [0.2624 * 3 + 1.5944, 14.717 * 3 + 56.324, 32.67, 1062.93]
    )
    model = nn.Sequential(nn.Conv2d(1, 2, 2, bias=False), nn.Flatten(), nn.Linear(8, 1)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[[[1.0, 0.0], [2.0, 0.0]]], [[[1.0, 1.0], [1.0, 0.0]]]]))
        model[2].weight.fill_(1.0)
        model[2].bias.fill_(0.0)
    size = (1, 1, 3, 3)
    dots = 4 * (dp_power(2) + dp_power(3)) + dp_power(8)
    assert power_consumption(model, size) == pytest.approx(dots + lfsr_power(3) + lfsr_power(1))  # zeros, as there
    assert power_consumption(model, size, exact=True) == pytest.approx(dots + lfsr_power(5) + lfsr_power(8))
    area = 4 * (dp_area(2) + dp_area(3)) + dp_area(8)
    assert area_consumption(model, size, exact=True) == pytest.approx(area + lfsr_area(5) + lfsr_area(8))
