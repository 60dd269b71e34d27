from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks import masks, zoo
from benchmarks.masks import Masked, Setting


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.last = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.grouped(self.norm(self.first(x))))


def zero_inputs(layer: nn.Conv2d) -> tuple[int, ...]:
    return tuple(torch.nonzero(layer.weight.abs().sum(dim=(0, 2, 3)) == 0).flatten().tolist())


def zero_outputs(layer: nn.Conv2d) -> tuple[int, ...]:
    return tuple(torch.nonzero(layer.weight.abs().sum(dim=(1, 2, 3)) == 0).flatten().tolist())


def test_input_masks_zero_the_least_columns_of_ungrouped_layers_behind_the_first() -> None:
    net = Net()
    least = net.last.weight.detach().pow(2).sum(dim=(0, 2, 3)).argsort()[:4]
    bias, first, grouped = net.last.bias.clone(), net.first.weight.clone(), net.grouped.weight.clone()
    masked = masks.mask(net, "input", 0.5)
    assert masked == {"last": Masked(inputs=tuple(sorted(least.tolist())))}
    assert zero_inputs(net.last) == masked["last"].inputs
    assert torch.equal(net.last.bias, bias)
    assert torch.equal(net.first.weight, first)
    assert torch.equal(net.grouped.weight, grouped)


def test_output_masks_zero_rows_and_biases_and_leave_the_norm() -> None:
    net = Net()
    nn.init.ones_(net.norm.bias)
    masked = masks.mask(net, "output", 0.3)
    assert {name: len(m.outputs) for name, m in masked.items()} == {"first": 2, "last": 1}
    assert not any(m.inputs for m in masked.values())
    assert zero_outputs(net.first) == masked["first"].outputs
    assert bool((net.first.bias[list(masked["first"].outputs)] == 0).all())
    assert int((net.first.bias == 0).sum()) == 2
    assert bool((net.norm.bias == 1).all())


def test_both_sides_choose_from_the_weights_as_they_came() -> None:
    torch.manual_seed(1)
    net, alone = Net(), Net()
    alone.load_state_dict(net.state_dict())
    both, inputs = masks.mask(net, "both", 0.5), masks.mask(alone, "input", 0.5)
    assert both["last"].inputs == inputs["last"].inputs
    assert zero_inputs(net.last) == both["last"].inputs
    assert zero_outputs(net.last) == both["last"].outputs


def test_random_masks_follow_the_seed() -> None:
    first, same, other = (masks.mask(Net(), "both", 0.5, criterion="random", seed=s) for s in (1, 1, 2))
    assert first == same
    assert first != other
    assert len(first["last"].inputs) == 4


@pytest.mark.parametrize("amount", [-0.1, 1.0, 1.5])
def test_an_amount_that_is_no_fraction_is_refused(amount: float) -> None:
    with pytest.raises(ValueError, match=r"fraction of the channels in \[0, 1\), got"):
        masks.mask(Net(), "input", amount)


@pytest.mark.parametrize("setting", [Setting("input", 0.7), Setting("output", 0.5), Setting("both", 0.5)], ids=str)
@pytest.mark.parametrize("name", ["squeezenet1_1", "resnet18", "mobilenet_v3_small"])
def test_masked_networks_stay_masked_and_sensitive(name: str, setting: Setting) -> None:
    model = masks.build_masked(name, setting, 64)
    chosen = masks.mask(zoo.build(name, resolution=64), setting.side, setting.amount)
    layers = dict(masks.maskable(model))
    for key, masked in chosen.items():
        assert set(masked.inputs) <= set(zero_inputs(layers[key]))
        assert set(masked.outputs) <= set(zero_outputs(layers[key]))
        if layers[key].bias is not None:
            assert bool((layers[key].bias[list(masked.outputs)] == 0).all())
    assert zoo.sensitivity(model, zoo.example_inputs(name, 3, 64, seed=9)) > 0.01
