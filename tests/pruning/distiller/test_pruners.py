"""Pruners: gradual rates (D2), ranking (D3-D7), entries (D8)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from chanopt.errors import ScheduleError
from chanopt.pruning.distiller import (
    CLASSES,
    AgpPruningRate,
    Moment,
    Pruner,
    Sight,
    collect_activations,
    collect_feature_maps,
)
from chanopt.pruning.distiller.components import Names

AGP = [0.1, 0.1797, 0.2481, 0.306, 0.3542, 0.3937, 0.4254, 0.45, 0.4685, 0.4818, 0.4907, 0.4961, 0.4988, 0.4999, 0.5]
RANGE = tuple(range(0, 30, 2))


def pruner(kind: str, **arguments: Any) -> Pruner:
    return CLASSES["pruners"][kind](name="p", **arguments)


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)
    )


def see(model: nn.Module, epoch: int = 0, epochs: tuple[int, ...] = RANGE, **more: Any) -> Sight:
    frequency = epochs[1] - epochs[0] if len(epochs) > 1 else None
    masks: Mapping[str, Tensor | None] = more.pop("masks", {})
    return Sight(model, dict(model.named_parameters()), masks, Moment(epoch, epochs, epochs[-1] + 1, frequency), **more)


def dropped(mask: Tensor, dim: int = 0) -> list[int]:
    """The structures along a dimension that a mask drops, all of whose entries must agree."""
    lines = mask.movedim(dim, 0).flatten(1)
    assert bool(((lines == lines[:, :1]).all(1)).all())
    return torch.nonzero(lines[:, 0] == 0).flatten().tolist()


# -- D2 -----------------------------------------------------------------------------------------------------------


def test_d02_agp_rate() -> None:
    rate = AgpPruningRate(0.1, 0.5)
    assert [round(rate.step(epoch, 0, 30, 2), 4) for epoch in RANGE] == AGP
    assert rate.step(28, 0, 30, 2) == 0.5
    assert [rate.at(Moment(e, RANGE, 30, 2)) for e in RANGE] == [rate.step(e, 0, 30, 2) for e in RANGE]


def test_d02_agp_rate_that_starts_late_and_steps_over_the_end() -> None:
    rate = AgpPruningRate(0.05, 0.7)
    assert rate.step(20, 20, 40, 3) == pytest.approx(0.05)
    assert rate.step(38, 20, 40, 3) == 0.7  # 20, 23, ..., 38
    assert rate.step(29, 20, 40, 3) == pytest.approx(0.7 - 0.65 * 0.5**3)


def test_d02_agp_with_listed_epochs() -> None:
    """Distiller ends in a TypeError there; the last epoch listed reaches the final sparsity."""
    moments = [Moment(epoch, (0, 3, 10), 11) for epoch in (0, 3, 10)]
    assert [round(AgpPruningRate(0.0, 0.5).at(moment), 4) for moment in moments] == [0, 0.3285, 0.5]


@pytest.mark.parametrize(("initial", "final"), [(0.5, 0.5), (0.6, 0.5), (-0.1, 0.5), (0.5, 1.1)])
def test_d02_agp_needs_sparsity_to_rise(initial: float, final: float) -> None:
    with pytest.raises(ScheduleError, match=r"0 <= initial_sparsity < final_sparsity <= 1, found"):
        AgpPruningRate(initial, final)


def test_d02_agp_in_one_epoch_says_what_is_wrong() -> None:
    """Distiller ends in an AssertionError without a word."""
    with pytest.raises(ScheduleError, match="at least two epochs, found only epoch 3.*desired_sparsity"):
        AgpPruningRate(0.1, 0.5).step(3, 3, 4, 1)


# -- D3, D4 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "order"), [("L1", 1), ("L2", 2)])
@pytest.mark.parametrize(("group", "dim"), [("Filters", 0), ("3D", 0), ("Channels", 1)])
@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.7])
def test_d03_d04_ranked_structures(kind: str, order: int, group: str, dim: int, fraction: float) -> None:
    model = net()
    made = pruner(
        f"{kind}RankedStructureParameterPruner", group_type=group, desired_sparsity=fraction, weights=["3.weight"]
    ).masks(see(model))
    weight = model.get_parameter("3.weight").detach().numpy()
    sizes = np.linalg.norm(np.moveaxis(weight, dim, 0).reshape(8, -1), ord=order, axis=1)
    count = math.floor(fraction * 8)
    if count == 0:
        assert made == {}
        return
    assert dropped(made["3.weight"], dim) == sorted(np.argsort(sizes)[:count].tolist())


def test_d03_rows_of_a_linear_layer_are_its_input_columns() -> None:
    model = net()
    made = pruner(
        "L1RankedStructureParameterPruner", group_type="Rows", desired_sparsity=0.5, weights=["6.weight"]
    ).masks(see(model))
    assert len(dropped(made["6.weight"], 1)) == 64


@pytest.mark.parametrize("epoch", RANGE)
def test_d03_gradual_counts_follow_agp(epoch: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 3))
    made = pruner(
        "L1RankedStructureParameterPruner_AGP",
        group_type="Filters",
        initial_sparsity=0.1,
        final_sparsity=0.5,
        weights=["0.weight"],
    ).masks(see(model, epoch))
    assert len(dropped(made["0.weight"])) == math.floor(AgpPruningRate(0.1, 0.5).step(epoch, 0, 30, 2) * 64)


def test_d03_equal_filters_lose_half_at_half() -> None:
    """Distiller drops all four (what is not greater than the threshold)."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    nn.init.ones_(model[0].weight)
    made = pruner(
        "L1RankedStructureParameterPruner", group_type="Filters", desired_sparsity=0.5, weights=["0.weight"]
    ).masks(see(model))
    assert dropped(made["0.weight"]) == [0, 1]


@pytest.mark.parametrize("group", ["Filters", "Channels"])
def test_d03_neighbours_go_together_in_groups(group: str) -> None:
    """group_size above 1 crashes in Distiller."""
    model = net()
    dim = 0 if group == "Filters" else 1
    made = pruner(
        "L1RankedStructureParameterPruner",
        group_type=group,
        desired_sparsity=0.6,
        group_size=2,
        weights=["3.weight"],
    ).masks(see(model))
    sizes = model.get_parameter("3.weight").detach().movedim(dim, 0).flatten(1).abs().sum(1).view(4, 2).sum(1)
    least = sorted(torch.argsort(sizes)[:2].tolist())
    assert dropped(made["3.weight"], dim) == [channel for pair in least for channel in (2 * pair, 2 * pair + 1)]


def test_d03_noise_disturbs_the_ranking() -> None:
    model = net()
    made = [
        dropped(
            pruner(
                "L1RankedStructureParameterPruner",
                group_type="Filters",
                desired_sparsity=0.5,
                noise=noise,
                weights=["3.weight"],
            ).masks(see(model))["3.weight"]
        )
        for noise in (0.0, 0.0, *[1.0] * 8)
    ]
    assert made[0] == made[1]
    assert len(set(map(tuple, made[2:]))) > 2
    assert {len(each) for each in made} == {4}


def test_d03_rounding() -> None:
    model = nn.Sequential(nn.Conv2d(3, 10, 3))
    counts = [
        len(
            dropped(
                pruner(
                    "L1RankedStructureParameterPruner",
                    group_type="Filters",
                    desired_sparsity=0.37,
                    rounding_fn=rounding,
                    weights="0.weight",
                ).masks(see(model))["0.weight"]
            )
        )
        for rounding in ("floor", "ceil", "round")
    ]
    assert counts == [3, 4, 4]


def test_d05_block_pruner() -> None:
    model = nn.Sequential(nn.Conv2d(16, 8, 3))
    made = pruner(
        "L1RankedStructureParameterPruner_AGP",
        initial_sparsity=0.05,
        final_sparsity=0.70,
        group_type="Blocks",
        kwargs={"block_shape": [1, 8, 1, 1]},
        weights=["0.weight"],
    ).masks(see(model, 28))
    mask, weight = made["0.weight"], model[0].weight.detach()
    sizes = weight.abs().view(8, 2, 8, 9).sum(2)
    assert bool((mask.view(8, 2, 8, 9) == mask.view(8, 2, 8, 9)[:, :, :1]).all())
    keep = mask.view(8, 2, 8, 9)[:, :, 0]
    assert int((keep == 0).sum()) == int(0.7 * 8 * 2 * 9)
    assert float(sizes[keep == 0].max()) <= float(sizes[keep == 1].min())


# -- D6 -----------------------------------------------------------------------------------------------------------


def two() -> nn.Module:
    return nn.ModuleDict({"conv1": nn.Conv2d(3, 8, 3), "conv2": nn.Conv2d(3, 8, 3)})


def led(dependency: str | None, **arguments: Any) -> Pruner:
    return pruner(
        "L1RankedStructureParameterPruner_AGP",
        **{
            "initial_sparsity": 0.1,
            "final_sparsity": 0.5,
            "group_type": "Filters",
            "group_dependency": dependency,
            "weights": ["conv1.weight", "conv2.weight"],
            **arguments,
        },
    )


def test_d06_leader_rules_all() -> None:
    model = two()
    alone = led(None).masks(see(model, 28))
    together = led("Leader").masks(see(model, 28))
    assert dropped(together["conv1.weight"]) == dropped(together["conv2.weight"]) == dropped(alone["conv1.weight"])
    assert dropped(alone["conv1.weight"]) != dropped(alone["conv2.weight"])


def test_d06_leader_is_asked_again_when_the_fraction_changes() -> None:
    model, ranking = two(), led("Leader")
    first = ranking.masks(see(model, 20))
    with torch.no_grad():
        model["conv1"].weight.copy_(model["conv1"].weight.flip(0))
    same, later = ranking.masks(see(model, 20)), ranking.masks(see(model, 28))
    assert dropped(same["conv1.weight"]) == dropped(first["conv1.weight"])
    sizes = model["conv1"].weight.detach().flatten(1).abs().sum(1)
    assert dropped(later["conv2.weight"]) == sorted(torch.argsort(sizes)[:4].tolist())


def test_d06_a_leader_with_less_than_one_filter_to_drop_prunes_nothing() -> None:
    """Distiller ends in an AssertionError without a word."""
    assert led("Leader").masks(see(two(), 0)) == {}


def test_d06_a_leader_of_another_size_is_refused() -> None:
    model = nn.ModuleDict({"conv1": nn.Conv2d(3, 8, 3), "conv2": nn.Conv2d(3, 6, 3)})
    with pytest.raises(ScheduleError, match=r"p: expected conv2.weight to have as many filters.*which has 8; found 6"):
        led("Leader").masks(see(model, 28))


# -- D7 -----------------------------------------------------------------------------------------------------------


def filters(kind: str, fraction: float = 0.5, weight: str = "3.weight", **more: Any) -> Pruner:
    return pruner(kind, group_type="Filters", desired_sparsity=fraction, weights=[weight], **more)


def test_d07_activation_zeros_and_means() -> None:
    model = net().eval()
    batches = [torch.randn(4, 3, 8, 8) for _ in range(3)]
    with collect_activations(model) as statistics, torch.no_grad():
        for batch in batches:
            model(batch)
    with torch.no_grad():
        seen = torch.cat([model[:5](batch) for batch in batches]).transpose(0, 1).flatten(1)
        first = torch.cat([model[:3](batch) for batch in batches]).transpose(0, 1).flatten(1)
    apoz = 100 * (seen == 0).double().mean(1)
    assert torch.allclose(statistics.apoz("3"), apoz)
    assert torch.allclose(statistics.mean("0"), first.double().mean(1))  # behind the batch norm and the ReLU
    sight = see(model, statistics=statistics)
    most_zeros = sorted(torch.argsort(apoz, descending=True)[:4].tolist())
    assert dropped(filters("ActivationAPoZRankedFilterPruner").masks(sight)["3.weight"]) == most_zeros
    least = sorted(torch.argsort(seen.double().mean(1))[:4].tolist())
    assert dropped(filters("ActivationMeanRankedFilterPruner").masks(sight)["3.weight"]) == least


def test_d07_activations_need_no_gpu_and_leave_no_hook() -> None:
    model = net()
    with collect_activations(model, ["3"]) as statistics:
        model(torch.randn(2, 3, 8, 8))
    assert list(statistics.samples) == ["3"]
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_d07_activations_that_were_not_collected() -> None:
    with pytest.raises(ScheduleError, match="p: expected statistics of activations for 3.weight.*collect_activations"):
        filters("ActivationAPoZRankedFilterPruner").masks(see(net()))
    with (
        pytest.raises(ScheduleError, match="conv or linear layers, found 'seven'"),
        collect_activations(net(), ["seven"]),
    ):
        pass


def test_d07_gradient_times_weight() -> None:
    model = net()
    assert filters("GradientRankedFilterPruner").masks(see(model)) == {}
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    weight = model.get_parameter("3.weight")
    assert weight.grad is not None
    scores = (weight.detach() * weight.grad).flatten(1).sum(1)
    made = filters("GradientRankedFilterPruner").masks(see(model))
    assert dropped(made["3.weight"]) == sorted(torch.argsort(scores)[:4].tolist())


def test_d07_random_filters() -> None:
    model = net()
    drawn = {tuple(dropped(filters("RandomRankedFilterPruner").masks(see(model))["3.weight"])) for _ in range(20)}
    assert {len(each) for each in drawn} == {4}
    assert len(drawn) > 5


def test_d07_bernoulli_keeps_the_expectation() -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 3))
    mask = filters("BernoulliFilterPruner", 0.25, "0.weight").masks(see(model))["0.weight"]
    kept = 64 - len(dropped(mask))
    assert 32 < kept < 64
    assert mask.unique().tolist() == pytest.approx([0.0, 64 / kept])
    assert float(mask.mean()) == pytest.approx(1)
    assert bool(filters("BernoulliFilterPruner", 1.0, "0.weight").masks(see(model))["0.weight"].any())


def test_d07_random_level() -> None:
    model = nn.Sequential(nn.Conv2d(3, 100, 3))
    made = pruner(
        "RandomLevelStructureParameterPruner", group_type="Filters", sparsity_range=[0.2, 0.6], weights=["0.weight"]
    )
    counts = [len(dropped(made.masks(see(model))["0.weight"])) for _ in range(20)]
    assert all(20 <= count <= 60 for count in counts)
    assert len(set(counts)) > 5


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("layer", "kernel"), [("conv", 3), ("conv", 1), ("linear", 0)])
def test_d07_feature_map_reconstruction(layer: str, kernel: int, bias: bool) -> None:
    """What the dropped channels did, the others take over: exactly, where the dropped ones are copies of others."""
    front: nn.Module = nn.Conv2d(8, 5, kernel, padding=1, bias=bias) if layer == "conv" else nn.Linear(8, 5, bias=bias)
    model = nn.Sequential(front)
    with torch.no_grad():
        front.weight[:, 4:] *= 0.1  # the least by norm
    kept = torch.randn(6, 4, 7, 7) if layer == "conv" else torch.randn(300, 4)
    batch = torch.cat([kept, kept.flip(1)], 1)  # channel 4 + i is channel 3 - i
    before = model(batch)
    with collect_feature_maps(model, ["0"], points=40) as samples:
        model(batch)
    ranking = pruner("FMReconstructionChannelPruner", group_type="Channels", desired_sparsity=0.5, weights=["0.weight"])
    with torch.no_grad():
        mask = ranking.masks(see(model, samples=samples))["0.weight"]
        front.weight.mul_(mask)
    assert dropped(mask, 1) == [4, 5, 6, 7]
    assert torch.allclose(model(batch), before, atol=1e-4)


def test_d07_reconstruction_needs_samples_and_no_leader() -> None:
    arguments = {"group_type": "Channels", "desired_sparsity": 0.5, "weights": ["3.weight"]}
    with pytest.raises(ScheduleError, match="samples of feature maps for 3.weight.*collect_feature_maps"):
        pruner("FMReconstructionChannelPruner", **arguments).masks(see(net()))
    with pytest.raises(ScheduleError, match="no group_dependency"):
        pruner("FMReconstructionChannelPruner", group_dependency="Leader", **arguments)


@pytest.mark.parametrize("kind", sorted(name for name in CLASSES["pruners"] if name.endswith("Pruner_AGP")))
def test_d07_every_gradual_class_reaches_its_final_sparsity(kind: str) -> None:
    model = net().eval()
    with collect_activations(model) as statistics:
        model(torch.randn(2, 3, 8, 8)).sum().backward()
    made = pruner(kind, group_type="Filters", initial_sparsity=0.2, final_sparsity=0.5, weights=["3.weight"])
    count = len(dropped(made.masks(see(model, 28, statistics=statistics))["3.weight"]))
    assert count == 4 if "Bernoulli" not in kind else count < 8


# -- D8 -----------------------------------------------------------------------------------------------------------


def test_d08_magnitude() -> None:
    model = net()
    made = pruner("MagnitudeParameterPruner", thresholds={"*": 0.01, "3.weight": 0.05}).masks(see(model))
    assert set(made) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        threshold = 0.05 if name == "3.weight" else 0.01
        assert torch.equal(made[name], (parameter.abs() > threshold).float())
    with pytest.raises(ScheduleError, match=r"p: expected a default threshold '\*'"):
        pruner("MagnitudeParameterPruner", thresholds={"3.weight": 0.05})


def test_d08_sparsity_level() -> None:
    model = net()
    made = pruner("SparsityLevelParameterPruner", levels={"0.weight": 0.5, "3.weight": 0.25}).masks(see(model))
    assert {name: int((mask == 0).sum()) for name, mask in made.items()} == {"0.weight": 108, "3.weight": 144}
    everywhere = pruner("SparsityLevelParameterPruner", levels={"*": 0.5}).masks(see(model))
    assert set(everywhere) == {name for name, _ in model.named_parameters()}


def test_d08_gradual_entries() -> None:
    model = net()
    made = pruner("AutomatedGradualPruner", initial_sparsity=0.05, final_sparsity=0.7, weights="3.weight")
    counts = [int((made.masks(see(model, epoch))["3.weight"] == 0).sum()) for epoch in RANGE]
    assert counts == [int(AgpPruningRate(0.05, 0.7).step(epoch, 0, 30, 2) * 576) for epoch in RANGE]


def test_d08_sensitivity_takes_the_deviation_once() -> None:
    model = net()
    made = pruner("SensitivityPruner", sensitivities={"3.weight": 1.0})
    weight = model.get_parameter("3.weight")
    deviation = float(weight.detach().std())
    made.masks(see(model))
    with torch.no_grad():
        weight.mul_(10)
    mask = made.masks(see(model))["3.weight"]
    assert torch.equal(mask, (weight.abs() > deviation).float())
    normal = nn.Sequential(nn.Conv2d(64, 64, 3))
    nn.init.normal_(normal[0].weight)
    share = pruner("SensitivityPruner", sensitivities={"*": 1.0}).masks(see(normal))["0.weight"]
    assert float((share == 0).float().mean()) == pytest.approx(0.6827, abs=0.01)


def test_d08_splicing_brings_back_what_has_grown() -> None:
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.1, 1.0, 2.0, 3.0]]))
    sizes = torch.tensor([0.1, 1.0, 2.0, 3.0])
    level = float(sizes.mean() + 0.5 * sizes.std())
    made = pruner("SplicingPruner", sensitivities={"*": 0.5}, low_thresh_mult=0.4, hi_thresh_mult=0.9)
    mask = made.masks(see(model))["0.weight"]
    assert mask.tolist() == [[0, float(level * 0.4 <= 1.0), 1, 1]]
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.9 * level, 0.5 * level, 0.1, 3.0]]))
    again = made.masks(see(model, masks={"0.weight": torch.tensor([[0.0, 0.0, 1.0, 1.0]])}))["0.weight"]
    assert again.tolist() == [[1, 0, 0, 1]]  # back; in between, as it was; gone; stays


def test_d08_splicing_may_grow_with_the_epochs() -> None:
    model = nn.Sequential(nn.Linear(100, 10, bias=False))
    made = pruner(
        "SplicingPruner",
        sensitivities={"0.weight": 0.1},
        low_thresh_mult=1.0,
        hi_thresh_mult=1.1,
        sensitivity_multiplier=2.0,
    )
    counts = [int((made.masks(see(model, epoch))["0.weight"] == 0).sum()) for epoch in (0, 2, 4)]
    assert counts[0] < counts[1] < counts[2]


def test_d08_baidu_ramp() -> None:
    """Equation 1 and algorithm 1 of the paper, at q = 0.5, 10 epochs of which 4 ramp slowly."""
    made = pruner("BaiduRNNPruner", q=0.5, ramp_epoch_offset=4, ramp_slope_mult=2.0, weights=["0.weight"])
    model = nn.Sequential(nn.Linear(100, 10))
    epochs = tuple(range(10))
    slope = 2 * 0.5 * 1 / (2 * 4 + 3 * 6)
    expected = [slope * (e + 1) if e < 4 else slope * 5 + 2 * slope * (e - 3) for e in epochs]
    for epoch, threshold in zip(epochs, expected, strict=True):
        mask = made.masks(see(model, epoch, epochs))["0.weight"]
        assert torch.equal(mask, (model[0].weight.abs() > threshold).float()), epoch
    with pytest.raises(ScheduleError, match="frequency, found a list of epochs"):
        made.masks(Sight(model, dict(model.named_parameters()), {}, Moment(0, (0, 1), 2)))


def test_d09_structures_by_threshold() -> None:
    model = net()
    made = pruner(
        "StructureParameterPruner", reg_regims={"3.weight": [0.058, "Channels"]}, threshold_criteria="Mean_Abs"
    ).masks(see(model))
    sizes = model.get_parameter("3.weight").detach().transpose(0, 1).flatten(1).abs().mean(1)
    assert dropped(made["3.weight"], 1) == torch.nonzero(sizes <= 0.058).flatten().tolist()
    with pytest.raises(ScheduleError, match="Max or Mean_Abs, found 'L7'"):
        pruner("StructureParameterPruner", reg_regims={}, threshold_criteria="L7")


# -- names --------------------------------------------------------------------------------------------------------


def test_names_with_and_without_the_prefix_of_data_parallel() -> None:
    names = Names(("conv1.weight", "fc.weight"))
    assert names.find("module.conv1.weight") == names.find("conv1.weight") == "conv1.weight"
    assert Names(("module.fc.weight",)).find("fc.weight") == "module.fc.weight"
    with pytest.raises(ScheduleError, match=r"found 'conv2.weight'; nearest names: conv1.weight"):
        names.find("conv2.weight")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"desired_sparsity": 1.5}, "desired_sparsity between 0 and 1, found 1.5"),
        ({"group_type": "Cubes"}, "group_type to be one of Filters, 3D, Channels, Rows, Blocks, found 'Cubes'"),
        ({"group_type": "Blocks"}, "block_shape"),
        ({"group_dependency": "Follower"}, "Leader or absent, found 'Follower'"),
        ({"weights": []}, "list of parameter names"),
        ({"rounding_fn": "up"}, "rounding_fn to be one of floor, ceil, round, found 'up'"),
        ({"group_size": 3}, "group_size to divide 8 structures, found 3"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], told: str) -> None:
    good = {"group_type": "Filters", "desired_sparsity": 0.5, "weights": ["3.weight"]}
    with pytest.raises(ScheduleError, match=told):
        pruner("L1RankedStructureParameterPruner", **{**good, **arguments}).masks(see(net()))
