"""The scheduler's callbacks (D13) and what policies can be told (D12)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from chanopt.errors import LoadError, ScheduleError
from chanopt.pruning.distiller import (
    CompressionScheduler,
    LRPolicy,
    Moment,
    Policy,
    Pruner,
    PruningPolicy,
    RegularizationPolicy,
    Sight,
)
from chanopt.pruning.distiller.elements import AutomatedGradualPruner, SparsityLevelParameterPruner
from chanopt.pruning.distiller.ranked import GradientRankedFilterPruner, L1RankedStructureParameterPruner
from chanopt.pruning.distiller.regularizers import GroupLassoRegularizer, L1Regularizer


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))


def half(name: str = "2.weight") -> SparsityLevelParameterPruner:
    return SparsityLevelParameterPruner(name="half", levels={name: 0.5})


@dataclass
class Loop:
    """A training loop of a few minibatches an epoch."""

    scheduler: CompressionScheduler
    optimizer: Optimizer
    minibatches: int = 3
    losses: list[float] = field(default_factory=list)

    def step(self, epoch: int, number: int) -> None:
        scheduler, optimizer = self.scheduler, self.optimizer
        scheduler.on_minibatch_begin(epoch, number, self.minibatches, optimizer)
        output = scheduler.model(torch.randn(4, 3, 8, 8))
        loss = scheduler.before_backward_pass(epoch, number, self.minibatches, output.square().mean())
        self.losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        scheduler.before_parameter_optimization(epoch, number, self.minibatches, optimizer)
        optimizer.step()
        scheduler.on_minibatch_end(epoch, number, self.minibatches, optimizer)

    def run(self, epochs: int, **metrics: float) -> None:
        for epoch in range(epochs):
            self.scheduler.on_epoch_begin(epoch)
            for number in range(self.minibatches):
                self.step(epoch, number)
            self.scheduler.on_epoch_end(epoch, self.optimizer, metrics=metrics)


def loop(model: nn.Module | None = None, policy: Policy | None = None, **when: Any) -> Loop:
    model = net() if model is None else model
    scheduler = CompressionScheduler(model)
    if policy is not None:
        scheduler.add_policy(policy, **(when or {"starting_epoch": 0, "ending_epoch": 2}))
    return Loop(scheduler, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))


def weight(loop: Loop, name: str = "2.weight") -> Tensor:
    return loop.scheduler.parameters[name].detach().clone()


# -- D13 ----------------------------------------------------------------------------------------------------------


class Recorder(Policy):
    """Writes down what is called."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name = name
        self.log = log

    def __getattribute__(self, key: str) -> Any:
        if key.startswith(("on_", "before_")):
            return lambda *args: self.log.append(f"{self.name}.{key}")
        return super().__getattribute__(key)


def test_d13_callbacks_reach_the_policies_of_an_epoch_in_order() -> None:
    log: list[str] = []
    running = loop(policy=Recorder("first", log), epochs=[1])
    running.scheduler.add_policy(Recorder("second", log), starting_epoch=0, ending_epoch=4, frequency=1)
    running.minibatches = 1
    running.run(2)
    order = [
        "on_epoch_begin",
        "on_minibatch_begin",
        "before_backward_pass",
        "before_parameter_optimization",
        "on_minibatch_end",
        "on_epoch_end",
    ]
    assert log[:6] == [f"second.{name}" for name in order]
    assert log[6:] == [f"{who}.{name}" for name in order for who in ("first", "second")]
    assert running.scheduler.epochs == 4


@pytest.mark.parametrize(
    ("when", "told"),
    [
        ({}, "either epochs, or starting_epoch"),
        ({"epochs": [1], "starting_epoch": 0}, "found both"),
        ({"epochs": []}, "list of ascending epochs"),
        ({"epochs": [3, 1]}, "list of ascending epochs"),
        ({"starting_epoch": 3, "ending_epoch": 3}, "starting_epoch < ending_epoch"),
        ({"starting_epoch": 0, "ending_epoch": 3, "frequency": 4}, "a frequency of 1 to their difference"),
    ],
)
def test_d13_epochs_that_make_no_sense(when: dict[str, Any], told: str) -> None:
    with pytest.raises(ScheduleError, match=told):
        CompressionScheduler(net()).add_policy(Policy(), **when)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_d13_momentum_does_not_bring_weights_back(kind: type[Optimizer]) -> None:
    model = net()
    running = loop(model, PruningPolicy(half()))
    options: dict[str, Any] = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    running.optimizer = kind(model.parameters(), lr=0.05, **options)
    before = weight(running)
    running.run(2)
    mask = running.scheduler.masks["2.weight"].mask
    assert mask is not None
    assert int((mask == 0).sum()) == 288
    assert bool((weight(running)[mask == 0] == 0).all())
    assert not torch.equal(weight(running)[mask == 1], before[mask == 1])


def test_d13_masks_hold_when_no_policy_runs_any_more() -> None:
    running = loop(policy=PruningPolicy(half()), epochs=[0])
    running.run(4)
    assert int((weight(running) == 0).sum()) == 288


def test_d13_state_dict() -> None:
    running = loop(policy=PruningPolicy(half()), epochs=[0])
    running.run(1)
    state = running.scheduler.state_dict()
    assert set(state["masks_dict"]) == set(running.scheduler.masks)
    fresh = CompressionScheduler(net())
    fresh.load_state_dict({"masks_dict": {f"module.{name}": mask for name, mask in state["masks_dict"].items()}})
    fresh.mask_all_weights()
    assert torch.equal(fresh.parameters["2.weight"] == 0, weight(running) == 0)
    with pytest.raises(LoadError, match="masks_dict, found"):
        fresh.load_state_dict({"masks": {}})
    with pytest.raises(LoadError, match=r"shape \(8, 8, 3, 3\) for 2.weight, found \(4, 8, 3, 3\)"):
        fresh.load_state_dict({"masks_dict": {"2.weight": torch.ones(4, 8, 3, 3)}})
    with pytest.raises(ScheduleError, match="found '9.weight'"):
        fresh.load_state_dict({"masks_dict": {"9.weight": None}})


# -- D12 ----------------------------------------------------------------------------------------------------------


class Wanders(Pruner):
    """Drops another entry at every call."""

    names = ("weights",)
    weights = ("2.weight",)
    calls = 0

    def masks(self, sight: Sight) -> dict[str, Tensor]:
        mask = torch.ones_like(sight.weights["2.weight"])
        mask.view(-1)[self.calls] = 0
        self.calls += 1
        return {"2.weight": mask}


@pytest.mark.parametrize(("frequency", "calls"), [(0, 2), (1, 8), (2, 4), (3, 4)])
def test_d12_mini_batch_pruning_frequency(frequency: int, calls: int) -> None:
    """Minibatches 0 and 4 begin epochs; of the others those whose number over all epochs the frequency divides."""
    pruner = Wanders(name="w")
    running = loop(policy=PruningPolicy(pruner, mini_batch_pruning_frequency=frequency))
    running.minibatches = 4
    running.run(2)
    assert pruner.calls == calls


def test_d12_mask_on_forward_only_lets_weights_move() -> None:
    running = loop(policy=PruningPolicy(half(), mask_on_forward_only=True))
    running.optimizer = torch.optim.SGD(running.scheduler.model.parameters(), lr=0.1, weight_decay=0.0, momentum=0.0)
    seen: list[int] = []
    running.scheduler.model[2].register_forward_hook(lambda m, a, o: seen.append(int((m.weight == 0).sum())))
    running.run(1)
    assert seen == [288] * 3
    assert int((weight(running) == 0).sum()) < 288  # after the last step


def test_d12_mask_gradients() -> None:
    running = loop(policy=PruningPolicy(half(), mask_on_forward_only=True, mask_gradients=True))
    running.run(2)
    mask = running.scheduler.masks["2.weight"].mask
    assert bool((weight(running)[mask == 0] == 0).all())
    gradient = running.scheduler.parameters["2.weight"].grad
    assert bool((gradient[mask == 0] == 0).all())
    assert not running.scheduler.parameters["2.weight"]._backward_hooks  # let go after the last epoch
    with pytest.raises(ScheduleError, match="half: expected mask_on_forward_only with mask_gradients"):
        PruningPolicy(half(), mask_gradients=True)


def test_d12_double_copies_update_what_is_masked() -> None:
    running = loop(policy=PruningPolicy(half(), use_double_copies=True, mask_on_forward_only=True))
    before = weight(running)
    seen: list[int] = []
    running.scheduler.model[2].register_forward_hook(lambda m, a, o: seen.append(int((m.weight == 0).sum())))
    running.minibatches = 1
    running.run(1)
    assert seen == [288]
    step = weight(running) - before
    assert int((weight(running) == 0).sum()) == 0
    assert torch.allclose(step, -0.1 * running.scheduler.parameters["2.weight"].grad, atol=1e-6)


@pytest.mark.parametrize("keep", [False, True])
def test_d12_keep_mask_makes_masks_permanent(keep: bool) -> None:
    policy = PruningPolicy(half(), keep_mask=keep, mask_on_forward_only=True)
    running = loop(policy=policy, starting_epoch=0, ending_epoch=4, frequency=2)
    running.run(5)
    zeros = int((weight(running) == 0).sum())
    assert zeros == 288 if keep else zeros < 288


def test_d12_discarded_masks() -> None:
    running = loop(policy=PruningPolicy(half(), discard_masks_at_minibatch_end=True, mini_batch_pruning_frequency=1))
    running.run(1)
    assert running.scheduler.masks["2.weight"].mask is None


def test_d12_first_minibatch_gives_the_gradients() -> None:
    pruner = GradientRankedFilterPruner(name="g", group_type="Filters", desired_sparsity=0.5, weights=["2.weight"])
    running = loop(policy=PruningPolicy(pruner, skip_first_minibatch=True), epochs=[0, 1])
    running.scheduler.on_epoch_begin(0)
    running.step(0, 0)
    assert running.scheduler.masks["2.weight"].mask is None
    running.step(0, 1)
    mask = running.scheduler.masks["2.weight"].mask
    assert mask is not None
    assert int((mask.flatten(1).amax(1) == 0).sum()) == 4


def test_d12_levels() -> None:
    running = loop(policy=PruningPolicy(half(), levels={"0.weight": 0.25}))
    running.run(1)
    assert int((weight(running) == 0).sum()) == 0
    assert int((weight(running, "0.weight") == 0).sum()) == 54
    other = AutomatedGradualPruner(name="a", initial_sparsity=0.1, final_sparsity=0.2, weights=["2.weight"])
    with pytest.raises(ScheduleError, match="a: expected a pruner with levels"):
        PruningPolicy(other, levels={"2.weight": 0.5})


def test_d12_batch_norms_are_folded_into_what_is_judged() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 3), nn.Flatten())
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([100.0, 1, 1, 1, 1, 1, 1, 0.0001]))
        model[1].running_var.copy_(torch.rand(8) + 0.5)
        model[0].weight[0] *= 0.001
    scheduler = CompressionScheduler(model, (torch.randn(2, 3, 8, 8),))
    pruner = L1RankedStructureParameterPruner(
        name="p", group_type="Filters", desired_sparsity=0.5, weights=["0.weight", "3.weight"]
    )
    scheduler.add_policy(PruningPolicy(pruner, fold_batchnorm=True), epochs=[0])
    scheduler.on_epoch_begin(0)
    scale = model[1].weight / (model[1].running_var + model[1].eps).sqrt()
    sizes = (model[0].weight * scale.view(-1, 1, 1, 1)).flatten(1).abs().sum(1)
    mask = scheduler.masks["0.weight"].mask
    assert mask is not None
    assert torch.nonzero(mask.flatten(1).amax(1) == 0).flatten().tolist() == sorted(torch.argsort(sizes)[:4].tolist())
    assert 7 in torch.nonzero(mask.flatten(1).amax(1) == 0)
    assert scheduler.masks["3.weight"].mask is not None  # no batch norm behind it: judged as it is
    assert model.training


def test_d12_folding_needs_inputs() -> None:
    running = loop(policy=PruningPolicy(half(), fold_batchnorm=True))
    with pytest.raises(ScheduleError, match="expected example inputs to run the network"):
        running.scheduler.on_epoch_begin(0)


def test_d12_regularizers_add_to_the_loss() -> None:
    model = net()
    regularizer = L1Regularizer(name="r", reg_regims={"2.weight": 0.5})
    running = loop(model, RegularizationPolicy(regularizer))
    losses = running.scheduler.losses(0, 0, 3, torch.tensor(1.0))
    term = 0.5 * float(model[2].weight.detach().abs().sum())
    assert float(losses.overall_loss.detach()) == pytest.approx(1 + term)
    assert [(c.name, float(c.value.detach())) for c in losses.loss_components] == [
        ("L1Regularizer_loss", pytest.approx(term))
    ]
    assert float(running.scheduler.before_backward_pass(5, 0, 3, torch.tensor(1.0))) == 1


@pytest.mark.parametrize("keep", [False, True])
def test_d12_regularization_masks_hold_once_or_for_good(keep: bool) -> None:
    regularizer = GroupLassoRegularizer(name="r", reg_regims={"2.weight": [0.06, "3D"]}, threshold_criteria="Mean_Abs")
    running = loop(policy=RegularizationPolicy(regularizer, keep_mask=keep))
    running.run(2)
    zero = weight(running).flatten(1).abs().amax(1) == 0
    assert bool(zero.any())  # soft thresholding after each minibatch
    assert (running.scheduler.masks["2.weight"].mask is not None) == keep


def test_d12_learning_rates_are_set_by_the_epoch() -> None:
    running = loop()
    rates = LRPolicy(StepLR(running.optimizer, step_size=2, gamma=0.1))
    running.scheduler.add_policy(rates, starting_epoch=0, ending_epoch=6, frequency=1)
    found = []
    for epoch in range(5):
        running.scheduler.on_epoch_begin(epoch)
        found.append(running.optimizer.param_groups[0]["lr"])
        running.scheduler.on_epoch_end(epoch, running.optimizer)
    assert found == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001])


def test_d12_plateaus_need_a_metric() -> None:
    running = loop()
    policy = LRPolicy(ReduceLROnPlateau(running.optimizer, patience=0))
    running.scheduler.add_policy(policy, starting_epoch=0, ending_epoch=6, frequency=1)
    for epoch, loss in enumerate((1.0, 2.0, 3.0)):
        running.scheduler.on_epoch_end(epoch, running.optimizer, metrics={"min": loss})
    assert running.optimizer.param_groups[0]["lr"] < 0.1
    with pytest.raises(ScheduleError, match="metrics={'min': value}"):
        running.scheduler.on_epoch_end(3, running.optimizer)


def test_a_moment_knows_its_last_epoch() -> None:
    """Distiller waits for the epoch before ``ending_epoch``, which a frequency of 2 steps over."""
    assert [Moment(e, (0, 2), 4, 2).is_last for e in (0, 2)] == [False, True]
