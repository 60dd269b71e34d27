"""Terminology (D1), recipes (D14), what depends on a channel (D15), guards (D16)."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import chanopt
from chanopt.errors import LoadError, ScheduleError
from chanopt.pruning.distiller import (
    CompressionScheduler,
    DisagreementError,
    Recipe,
    Thinning,
    apply_recipe,
    load_checkpoint,
    recipes_of,
    save_checkpoint,
    thin,
)
from tests.pruning.distiller.networks import (
    Example1,
    Example2,
    Example3,
    Example4,
    conv,
    resnet20_cifar,
)

DEAD = [1, 4, 6]
LEFT = [0, 2, 3, 5, 7]


def image(size: int = 8) -> tuple[Tensor]:
    return (torch.randn(1, 3, size, size),)


def drop_filters(module: nn.Module, channels: list[int] = DEAD) -> None:
    with torch.no_grad():
        module.get_parameter("weight")[channels] = 0
        if getattr(module, "bias", None) is not None:
            module.get_parameter("bias")[channels] = 0


def drop_channels(module: nn.Module, channels: list[int] = DEAD) -> None:
    with torch.no_grad():
        module.get_parameter("weight")[:, channels] = 0


def lively(model: nn.Module) -> nn.Module:
    """Batch norms that do something."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                tensor.data.copy_(torch.rand_like(tensor) + 0.5)
    return model


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def example(number: int) -> tuple[nn.Module, dict[str, Any]]:
    """A network of the tutorial with filters zero, and the recipe that thins it."""
    row = [[0, LEFT]]
    column = [[1, LEFT]]
    out, inn = {"out_channels": 5}, {"in_channels": 5}
    if number == 1:
        model: nn.Module = Example1()
        drop_filters(model.conv1)
        return model, {
            "modules": {"conv1": out, "conv2": inn},
            "parameters": {"conv1.weight": row, "conv1.bias": row, "conv2.weight": column},
        }
    if number == 2:
        model = lively(Example2())
        drop_filters(model.conv1)
        norm = {"num_features": 5, "running_mean": [0, LEFT], "running_var": [0, LEFT]}
        return model, {
            "modules": {"conv1": out, "bn1": norm, "conv2": inn},
            "parameters": {"conv1.weight": row, "bn1.weight": row, "bn1.bias": row, "conv2.weight": column},
        }
    if number == 3:
        model = Example3()
        drop_filters(model.conv1)
        return model, {
            "modules": {"conv1": out, "conv2": inn, "conv3": inn},
            "parameters": {"conv1.weight": row, "conv2.weight": column, "conv3.weight": column},
        }
    model = Example4()
    drop_filters(model.conv1)
    drop_filters(model.conv2)
    return model, {
        "modules": {"conv1": out, "conv2": out, "conv3": inn},
        "parameters": {"conv1.weight": row, "conv2.weight": row, "conv3.weight": column},
    }


# -- D1, D14 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_d01_d14_the_tutorials_examples(number: int) -> None:
    """Filters go from their conv, from the batch norm behind, and from all that read them (examples 1 to 3, 5)."""
    model, expected = example(number)
    inputs = image()
    done = thin(model, inputs)
    found = json.loads(done.recipe.to_json())
    assert {key: found[key] for key in ("modules", "parameters")} == expected
    assert Recipe.from_json(done.recipe.to_json()) == done.recipe
    assert done.removed == {"conv1": tuple(DEAD)}
    assert model.conv1.weight.shape[0] == model.conv1.out_channels == 5
    model(*inputs)


def test_d01_example_4_disagreeing_filters_are_refused() -> None:
    model = Example4()
    drop_filters(model.conv1, [0, 1])
    drop_filters(model.conv2, [1, 2])
    before = shapes(model)
    with pytest.raises(DisagreementError) as caught:
        thin(model, image())
    (conflict,) = caught.value.conflicts
    assert [(kept.layer, kept.keep) for kept in conflict.layers] == [
        ("conv1", (2, 3, 4, 5, 6, 7)),
        ("conv2", (0, 3, 4, 5, 6, 7)),
    ]
    assert "group_dependency: Leader\n    weights: [conv1.weight, conv2.weight]" in str(caught.value)
    assert shapes(model) == before
    assert recipes_of(model) == []
    reference = copy.deepcopy(model)
    done = thin(model, inputs := image(), on_conflict="unconstrained")
    assert done.removed == {"conv1": (1,)}
    chanopt.verify(reference.eval(), model.eval(), inputs)


def test_d01_channel_pruning_is_the_mirror_image() -> None:
    """Channels of conv2 go, and with them the filters of conv1."""
    model = Example1()
    drop_channels(model.conv2)
    reference = copy.deepcopy(model).eval()
    done = thin(model, inputs := image(), "channels")
    assert shapes(model) == {
        "conv1.weight": (5, 3, 3, 3),
        "conv1.bias": (5,),
        "conv2.weight": (5, 5, 3, 3),
        "conv2.bias": (5,),
    }
    assert done.constants == {}
    chanopt.verify(reference, model.eval(), inputs)


def test_d14_the_function_is_kept() -> None:
    model = lively(resnet20_cifar()).train()
    for name in ("layer1.0.conv1", "layer2.1.conv1", "layer3.2.conv1"):
        drop_filters(model.get_submodule(name), [0, 3, 5])
        norm = model.get_submodule(name.replace("conv1", "bn1"))
        drop_filters(norm, [])
        with torch.no_grad():
            norm.bias[[0, 3, 5]] = 0
            norm.running_mean[[0, 3, 5]] = 0
    reference = copy.deepcopy(model).eval()
    inputs = image(32)
    done = thin(model, inputs)
    assert model.training
    assert done.constants == {}
    assert sorted(done.removed) == ["layer1.0.conv1", "layer2.1.conv1", "layer3.2.conv1"]
    assert model.layer2[1].conv1.weight.shape == (29, 32, 3, 3)
    chanopt.verify(reference, model.eval(), inputs)
    fast = chanopt.optimize(reference, inputs)
    for layer in ("layer1.0.conv1", "layer1.0.conv2", "layer2.1.conv1", "layer3.2.conv2"):
        assert fast.get_parameter(f"{layer}.weight").shape == model.get_parameter(f"{layer}.weight").shape


def test_d14_columns_behind_pixels() -> None:
    """Between a conv and a linear layer: one channel is h x w columns, cut in the four-dimensional view."""
    model = nn.Sequential(conv(3, 8), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(32, 6))
    drop_filters(model[0])
    reference = copy.deepcopy(model).eval()
    done = thin(model, inputs := image())
    assert json.loads(done.recipe.to_json())["parameters"]["4.weight"] == [[1, LEFT, [6, 8, 2, 2], [6, 20]]]
    assert model[4].in_features == 20
    chanopt.verify(reference, model.eval(), inputs)


def test_d14_columns_behind_pixels_that_are_no_square() -> None:
    model = nn.Sequential(conv(3, 8), nn.ReLU(), nn.AvgPool2d((4, 2)), nn.Flatten(), nn.Linear(48, 6))
    drop_filters(model[0])
    reference = copy.deepcopy(model).eval()
    inputs = (torch.randn(1, 3, 8, 6),)
    done = thin(model, inputs)
    assert done.recipe.parameters["4.weight"][0].view == (6, 8, 6, 1)
    chanopt.verify(reference, model.eval(), inputs)


def test_d14_rows_and_columns_of_one_linear_layer() -> None:
    model = nn.Sequential(
        conv(3, 8), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(32, 6), nn.ReLU(), nn.Linear(6, 2)
    )
    drop_channels(model[6], [2, 3])
    with torch.no_grad():
        model[4].weight.view(6, 8, 4)[:, DEAD] = 0
    reference = copy.deepcopy(model).eval()
    thin(model, inputs := image(), "channels")
    assert shapes(model)["4.weight"] == (4, 20)
    chanopt.verify(reference, model.eval(), inputs)


def test_d14_both_sides() -> None:
    model = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), conv(8, 4))
    drop_filters(model[0], [0, 1])
    drop_channels(model[4], [5])
    reference = copy.deepcopy(model).eval()
    thin(model, inputs := image(), "both")
    assert [model[i].weight.shape[:2] for i in (0, 2, 4)] == [(6, 3), (7, 6), (4, 7)]
    assert len(recipes_of(model)) == 2
    chanopt.verify(reference, model.eval(), inputs)


def thinned(number: int = 2) -> tuple[nn.Module, nn.Module, tuple[Tensor]]:
    model, _ = example(number)
    dense = copy.deepcopy(model)
    inputs = image()
    thin(model, inputs)
    return dense, model, inputs


@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_d14_checkpoints_bring_the_thin_network_back(number: int, tmp_path: Path) -> None:
    """Of the peers only Distiller can load what it has thinned."""
    dense, model, inputs = thinned(number)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = CompressionScheduler(model)
    scheduler.masks["conv1.weight"].mask = torch.ones_like(model.conv1.weight)
    output = model(*inputs)
    sum(o.square().sum() for o in (output if isinstance(output, tuple) else (output,))).backward()
    optimizer.step()
    save_checkpoint(tmp_path / "thin.pt", model, scheduler, optimizer, epoch=7)

    fresh = copy.deepcopy(dense)
    again = torch.optim.SGD(fresh.parameters(), lr=0.5, momentum=0.9)
    watching = CompressionScheduler(fresh)
    assert load_checkpoint(tmp_path / "thin.pt", fresh, watching, again) == 7
    assert shapes(fresh) == shapes(model)
    for one, other in zip(_outputs(fresh.eval(), inputs), _outputs(model.eval(), inputs), strict=True):
        assert torch.equal(one, other)
    assert again.param_groups[0]["lr"] == 0.1
    buffers = [s["momentum_buffer"] for s in optimizer.state.values()]
    assert all(torch.equal(a["momentum_buffer"], b) for a, b in zip(again.state.values(), buffers, strict=True))
    assert torch.equal(watching.masks["conv1.weight"].mask, torch.ones(5, 3, 3, 3))  # type: ignore[arg-type]
    assert recipes_of(fresh) == recipes_of(model)


def _outputs(model: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor, ...]:
    output = model(*inputs)
    return output if isinstance(output, tuple) else (output,)


def test_d14_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(b"no")
    with pytest.raises(LoadError, match=r"expected a checkpoint in .*x.pt"):
        load_checkpoint(path, Example1())
    torch.save({"state_dict": {}}, path)
    with pytest.raises(LoadError, match="expected a chanopt thinned checkpoint, found 'dict'"):
        load_checkpoint(path, Example1())
    torch.save({"format": "chanopt thinned checkpoint", "version": 99}, path)
    with pytest.raises(LoadError, match="version 1 or older, found 99; update chanopt"):
        load_checkpoint(path, Example1())
    torch.save(Example1(), path)  # a pickled network is code: refused
    with pytest.raises(LoadError, match="UnpicklingError"):
        load_checkpoint(path, Example1())


def test_d14_recipes_for_another_network() -> None:
    _, model, _ = thinned(2)
    (recipe,) = recipes_of(model)
    with pytest.raises(LoadError, match="a module 'bn1'"):
        apply_recipe(Example1(), recipe)
    again = shapes(model)
    with pytest.raises(LoadError, match="can be cut as the recipe says"):
        apply_recipe(model, recipe)  # it is thin already
    assert shapes(model) == again
    with pytest.raises(LoadError, match="expected a chanopt thinning recipe, found 'list'"):
        Recipe.from_json("[]")
    with pytest.raises(LoadError, match="JSON text of a thinning recipe"):
        Recipe.from_json("{")


# -- D15 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["SGD", "Adam"])
def test_d15_momentum_is_cut_along(kind: str) -> None:
    """SGD's momentum buffer, as in Distiller, and Adam's two moments, where Distiller gives up."""
    torch.manual_seed(0)
    model = lively(Example2())
    options: dict[str, Any] = {"momentum": 0.9} if kind == "SGD" else {}
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.01, **options)
    for _ in range(2):
        optimizer.zero_grad()
        model(*image()).square().sum().backward()
        optimizer.step()
    drop_filters(model.conv1)
    before = {name: copy.deepcopy(optimizer.state[p]) for name, p in model.named_parameters()}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    parameters = dict(model.named_parameters())
    thin(model, inputs := image(), optimizer=optimizer)
    kept = {"conv1.weight": (0, LEFT), "bn1.weight": (0, LEFT), "bn1.bias": (0, LEFT), "conv2.weight": (1, LEFT)}
    for name, (dim, index) in kept.items():
        parameter = model.get_parameter(name)
        assert parameter is parameters[name]
        assert torch.equal(parameter.grad, gradients[name].index_select(dim, torch.tensor(index)))
        for key, old in before[name].items():
            new = optimizer.state[parameter][key]
            if not isinstance(old, Tensor) or not old.dim():
                assert new == old
                continue
            assert torch.equal(new, old.index_select(dim, torch.tensor(index))), (name, key)
    optimizer.zero_grad()
    model(*inputs).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_d15_a_loss_that_is_still_alive_does_not_matter(dtype: torch.dtype) -> None:
    """In a training loop the last loss, and with it the old shapes, lives until the next one is computed."""
    model, inputs = Example1().to(dtype), (image()[0].to(dtype),)
    drop_filters(model.conv1)
    loss = model(*inputs).square().sum()
    loss.backward()
    thin(model, inputs)
    model(*inputs).square().sum().backward()
    assert model.conv1.weight.dtype == dtype
    assert model.conv1.weight.grad.shape == (5, 3, 3, 3)
    assert loss.grad_fn is not None


def test_d15_the_next_step_is_the_one_the_masked_network_takes() -> None:
    torch.manual_seed(0)
    model, inputs = Example1(), image()
    drop_filters(model.conv1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    scheduler = CompressionScheduler(model)
    mask = torch.ones(8, 3, 3, 3)
    mask[DEAD] = 0
    scheduler.masks["conv1.weight"].mask = mask
    scheduler.masks["conv1.bias"].mask = mask[:, 0, 0, 0].clone()

    def step(network: nn.Module, stepping: torch.optim.Optimizer, masks: CompressionScheduler) -> None:
        stepping.zero_grad()
        network(*inputs).square().sum().backward()
        stepping.step()
        masks.mask_all_weights()

    step(model, optimizer, scheduler)
    masked = copy.deepcopy(model)
    twin = torch.optim.SGD(masked.parameters(), lr=0.01, momentum=0.9)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    watching = CompressionScheduler(masked)
    watching.load_state_dict(scheduler.state_dict())
    thin(model, inputs, optimizer=optimizer, masks=scheduler.masks)
    assert scheduler.masks["conv1.weight"].mask.shape == (5, 3, 3, 3)  # type: ignore[union-attr]
    for _ in range(3):
        step(model, optimizer, scheduler)
        step(masked, twin, watching)
    assert torch.allclose(model.conv1.weight, masked.conv1.weight[LEFT], atol=1e-6)
    assert torch.allclose(model.conv2.weight, masked.conv2.weight[:, LEFT], atol=1e-6)
    assert torch.allclose(model(*inputs), masked(*inputs), atol=1e-5)


class Branches(nn.Module):
    """A depthwise conv, a concat, a module used twice, a PReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.act = nn.PReLU(8)
        self.side = conv(3, 4)
        self.twice = conv(12, 12)
        self.head = conv(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.act(self.depth(self.stem(x))), self.side(x)], 1)
        return self.head(self.twice(self.twice(y).relu()).relu())


def test_d15_depthwise_concat_and_activations_with_parameters() -> None:
    model = Branches()
    drop_filters(model.stem)
    with torch.no_grad():
        model.depth.bias.zero_()
    drop_filters(model.side, [3])
    drop_filters(model.twice, [11, 1, 4, 6])
    reference = copy.deepcopy(model).eval()
    thin(model, inputs := image())
    assert shapes(model) == {
        "stem.weight": (5, 3, 3, 3),
        "depth.weight": (5, 1, 3, 3),
        "depth.bias": (5,),
        "act.weight": (5,),
        "side.weight": (3, 3, 3, 3),
        "twice.weight": (8, 8, 3, 3),
        "head.weight": (2, 8, 3, 3),
    }
    assert (model.depth.groups, model.depth.in_channels, model.depth.out_channels) == (5, 5, 5)
    chanopt.verify(reference, model.eval(), inputs)


def test_d15_transposed_convs() -> None:
    model = nn.Sequential(conv(3, 8), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2), nn.ReLU(), conv(6, 4))
    drop_filters(model[0])
    with torch.no_grad():
        model[2].weight[:, [0, 5]] = 0
        model[2].bias[[0, 5]] = 0
    reference = copy.deepcopy(model).eval()
    thin(model, inputs := image())
    assert shapes(model)["2.weight"] == (5, 4, 2, 2)
    chanopt.verify(reference, model.eval(), inputs)


def test_d15_what_cannot_be_cut_is_left_and_named() -> None:
    model = nn.Sequential(conv(3, 8), nn.ReLU(), nn.Conv2d(8, 8, 1, groups=2), nn.GroupNorm(2, 8), conv(8, 4))
    drop_filters(model[0])
    drop_filters(model[2], [1])
    drop_filters(model[4], [0])
    done = thin(model, image())
    assert isinstance(done, Thinning)
    assert not done.recipe
    assert done.left["0"] == "2 has 2 groups"
    assert "counts its channels" in done.left["2"]
    assert done.left["4"] == "an output of the network"
    assert recipes_of(model) == []


@pytest.mark.parametrize("constants", ["drop", "keep"])
def test_constants_of_dropped_filters(constants: Any) -> None:
    """A batch norm gives a zero filter a value all the same: it is dropped knowingly, or the channel is kept."""
    model = lively(Example2())
    drop_filters(model.conv1)
    with torch.no_grad():
        model.bn1.bias[6] = model.bn1.running_mean[6] = 0
    reference = copy.deepcopy(model).eval()
    norm = reference.bn1
    values = (norm.bias - norm.running_mean * norm.weight / (norm.running_var + norm.eps).sqrt()).detach()
    done = thin(model, inputs := image(), constants=constants)
    if constants == "keep":
        assert done.removed == {"conv1": (6,)}
        assert done.left == {"conv1": "2 channels are constants other than zero"}
        chanopt.verify(reference, model.eval(), inputs)
        return
    assert done.removed == {"conv1": tuple(DEAD)}
    assert done.constants == {"conv1": pytest.approx(float(values[[1, 4]].abs().max()))}
    with torch.no_grad():
        reference.bn1.bias[DEAD] = reference.bn1.running_mean[DEAD] = 0
    chanopt.verify(reference, model.eval(), inputs)


# -- D16 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "drop"), [("filters", drop_filters), ("channels", drop_channels)])
def test_d16_removing_all_is_refused(side: Any, drop: Any) -> None:
    model = Example1()
    drop(model.conv2, list(range(8 if side == "channels" else 5)))
    before = shapes(model)
    with pytest.raises(ValueError, match=f"conv2 to keep at least one of its . {side}, found all of them zero"):
        thin(model, image(), side)
    assert shapes(model) == before


class Hard(nn.Module):
    """A view with a size in its code."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(3, 8)
        self.fc = nn.Linear(512, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).sigmoid().view(-1, 512))


def test_a_network_that_cannot_run_thinner_is_put_back() -> None:
    model, inputs = Hard(), image()
    drop_filters(model.conv)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ScheduleError, match="the network is as it was.*chanopt.optimize"):
        thin(model, inputs)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert recipes_of(model) == []
    chanopt.verify(model.eval(), fast := chanopt.optimize(model.eval(), inputs), inputs)
    assert fast.get_parameter("conv.weight").shape[0] == 5


def test_an_activation_that_makes_something_of_zero_is_found_out() -> None:
    model = nn.Sequential(conv(3, 8), nn.Sigmoid(), conv(8, 4))
    drop_filters(model[0])
    with pytest.raises(ScheduleError, match="an activation does not map 0 to 0"):
        thin(model, image())
    assert shapes(model)["0.weight"] == (8, 3, 3, 3)
