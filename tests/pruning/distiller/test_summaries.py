"""Tables, sensitivity analysis (D17), greedy pruning (D18)."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from torch import nn

from chanopt.errors import ScheduleError
from chanopt.pruning.distiller import CompressionScheduler
from chanopt.pruning.distiller.greedy import greedy_prune
from chanopt.pruning.distiller.sensitivity import (
    perform_sensitivity_analysis,
    sensitivities_to_csv,
    sensitivities_to_png,
)
from chanopt.pruning.distiller.summaries import (
    layer_costs,
    masks_sparsity,
    table,
    total_macs,
    total_weights,
    weights_sparsity,
    write_csv,
)
from tests.pruning.distiller.networks import Example4, conv


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Flatten(),
        nn.Linear(128, 6),
    )


def image() -> tuple[torch.Tensor]:
    return (torch.randn(1, 4, 8, 8),)


def test_d17_costs() -> None:
    model = net().train()
    rows = layer_costs(model, image())
    assert [(row.name, row.macs, row.weights) for row in rows] == [
        ("0", 8 * 16 * 4 * 9, 288),
        ("2", 8 * 16 * 1 * 9, 72),
        ("4", 6 * 128, 768),
    ]
    assert (rows[0].inputs, rows[0].outputs, rows[0].kernel) == ((1, 4, 8, 8), (1, 8, 4, 4), (3, 3))
    assert total_macs(model, image()) == 4608 + 1152 + 768
    assert model.training
    assert all(not module._forward_hooks for module in model.modules())


def test_d17_sparsity_by_structure() -> None:
    model = net()
    with torch.no_grad():
        model[0].weight[:2] = 0
        model[0].weight[:, 3] = 0
        model[4].weight[:, :32] = 0
        model[4].weight[0] = 0
    first, _, last = weights_sparsity(model)
    assert (first.filters, first.channels) == (25.0, 25.0)
    assert first.kernels == pytest.approx(100 * (2 * 4 + 6) / 32)
    assert first.fine == pytest.approx(100 * (2 * 4 + 6) / 32)
    assert (first.cols, first.rows) == (0, 0)
    assert (last.cols, last.rows) == (25.0, pytest.approx(100 / 6))
    assert first.nonzero == 6 * 3 * 9
    assert total_weights(model) == (288 + 72 + 768, 162 + 72 + 5 * 96)
    assert first.abs_mean == pytest.approx(float(model[0].weight.detach().abs().mean()))


def test_d17_sparsity_of_masks() -> None:
    scheduler = CompressionScheduler(net())
    scheduler.masks["4.weight"].mask = torch.tensor([1.0, 0.0]).repeat(6, 64)
    assert masks_sparsity(scheduler) == {"0.weight": 0.0, "2.weight": 0.0, "4.weight": 50.0}


def test_d17_tables(tmp_path: Path) -> None:
    rows = layer_costs(net(), image())
    lines = table(rows).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split() == ["0", "Conv2d", "3x3", "1x4x8x8", "1x8x4x4", "288", "4608"]
    write_csv(rows, tmp_path / "costs.csv")
    read = list(csv.DictReader((tmp_path / "costs.csv").read_text().splitlines()))
    assert [int(row["macs"]) for row in read] == [row.macs for row in rows]
    with pytest.raises(ScheduleError, match="expected rows to print"):
        table([])


@pytest.mark.parametrize(
    ("group", "names"), [("element", ["0", "2", "4"]), ("filter", ["0", "2"]), ("channel", ["0", "2"])]
)
def test_d17_sensitivity(group: str, names: list[str], tmp_path: Path) -> None:
    model = net()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    seen: list[int] = []

    def evaluate(trial: nn.Module) -> tuple[float, float, float]:
        alive = sum(int(torch.count_nonzero(p)) for p in trial.parameters())
        seen.append(alive)
        return float(alive), 2.0 * alive, 0.5

    parameters = [name for name, _ in model.named_parameters()]
    found = perform_sensitivity_analysis(model, parameters, [0.0, 0.5, 0.75], evaluate, group, progress=False)  # type: ignore[arg-type]
    assert list(found) == [f"{name}.weight" for name in names]
    total = sum(p.numel() for p in model.parameters())
    assert found["0.weight"] == {
        level: (total - int(level * 288), 2.0 * (total - int(level * 288)), 0.5) for level in (0.0, 0.5, 0.75)
    }
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    sensitivities_to_csv(found, tmp_path / "s.csv")
    lines = list(csv.reader((tmp_path / "s.csv").read_text().splitlines()))
    assert lines[0] == ["parameter", "sparsity", "top1", "top5", "loss"]
    assert len(lines) == 1 + 3 * len(names)
    sensitivities_to_png(found, tmp_path / "s.png")
    assert (tmp_path / "s.png").read_bytes()[:4] == b"\x89PNG"


def test_d17_sensitivity_of_what_does_not_exist() -> None:
    with pytest.raises(ScheduleError, match="element, filter or channel, found 'kernel'"):
        perform_sensitivity_analysis(net(), [], [], lambda _: (0, 0, 0), "kernel")  # type: ignore[arg-type]
    with pytest.raises(ScheduleError, match="found '9.weight'"):
        perform_sensitivity_analysis(net(), ["9.weight"], [], lambda _: (0, 0, 0))


def test_d18_greedy_takes_what_does_not_matter() -> None:
    """The second conv hardly matters to the score, so it shrinks first; layers at a join shrink alike."""
    torch.manual_seed(0)
    model, inputs = Example4(), (torch.randn(1, 3, 6, 6),)
    tuned: list[int] = []

    def evaluate(trial: nn.Module) -> float:
        return float(trial.conv1.weight.detach().abs().sum())

    dense = total_macs(model, inputs)
    found = greedy_prune(model, inputs, evaluate, 0.6, step=0.25, tune=lambda trial: tuned.append(1))
    assert [step.weights for step in found.steps] == [("conv1.weight", "conv2.weight")] * len(found.steps)
    assert found.steps[-1].density <= 0.6 < ([1.0] + [step.density for step in found.steps])[-2]
    assert total_macs(found.model, inputs) == found.steps[-1].macs == round(found.steps[-1].density * dense)
    assert len(tuned) == len(found.steps)
    assert total_macs(model, inputs) == dense


def test_d18_greedy_prefers_the_robust_layer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), conv(8, 4))
    found = greedy_prune(model, (torch.randn(1, 3, 6, 6),), lambda trial: -float(trial[2].in_channels != 8), 0.8, 0.25)
    assert {step.weights for step in found.steps} == {("2.weight",)}
    assert found.model[0].out_channels == 8


def test_d18_greedy_that_cannot_reach_its_target() -> None:
    model = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 4))
    with pytest.raises(ScheduleError, match="found nothing to cut at"):
        greedy_prune(model, (torch.randn(1, 3, 6, 6),), lambda _: 0.0, 0.01, 0.4)
    with pytest.raises(ScheduleError, match="fractions for target_density and step, found 0 and 0.1"):
        greedy_prune(model, (torch.randn(1, 3, 6, 6),), lambda _: 0.0, 0)
