"""Masks that live in the model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

import chanopt
from chanopt import Mask
from chanopt.errors import MaskError
from chanopt.pruning import apply, bake, masks, read
from chanopt.pruning.masks import Hard, Permanent, Rescale, Scale, Soft, WeightMask, attach, set_mask
from chanopt.pruning.slices import by_channel, element_mask, pairs
from tests.pruning.nets import Residual, randomised

IMAGE = (torch.randn(2, 3, 8, 8),)
KINDS = [Hard, Permanent, Soft]
MASKS = {"stem": Mask(outputs=[0, 2, 3, 7]), "one.0": Mask(inputs=[0, 2, 7]), "fc": Mask(inputs=range(4, 32))}


def half(layer: nn.Module) -> Tensor:
    """A mask of every second entry."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return (torch.arange(weight.numel()) % 2 == 0).reshape(weight.shape)


def gradient(layer: nn.Linear) -> Tensor:
    """The gradient of the stored weight for a loss that is linear in what the layer computes with."""
    loss = (layer(torch.ones(1, layer.in_features)) * torch.arange(1.0, layer.out_features + 1)).sum()
    loss.backward()
    stored = masks.original(layer)
    assert stored.grad is not None
    return stored.grad


def test_s1_soft_masks_keep_learning() -> None:
    layer = nn.Linear(4, 3)
    dense = gradient(copy.deepcopy(layer))
    attach(layer, Soft)
    set_mask(layer, half(layer))
    stored = masks.original(layer)
    assert torch.equal(layer.weight, torch.where(half(layer), stored, 0))
    assert torch.equal(gradient(layer), dense)
    assert (dense[~half(layer)] != 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_s1_a_masked_entry_is_zero_whatever_is_stored(kind: type[WeightMask]) -> None:
    layer = nn.Linear(4, 3)
    attach(layer, kind)
    set_mask(layer, half(layer))
    stored = masks.original(layer)
    with torch.no_grad():
        stored[~half(layer)] = torch.inf
    layer(torch.ones(1, 4)).sum().backward()
    assert (layer.weight[~half(layer)] == 0).all()
    with torch.no_grad():
        assert torch.equal(layer.weight != 0, half(layer))
    assert stored.grad is not None
    assert torch.equal(stored.grad != 0, torch.ones(3, 4, dtype=torch.bool) if kind is Soft else half(layer))


@pytest.mark.parametrize("how", ["zeros", "hard", "permanent", "soft"])
def test_masks_add_up(how: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)).eval()
    apply(model, {"1": Mask(inputs=range(4))}, how)
    apply(model, {"1": Mask(outputs=range(2))}, how)
    assert read(model) == {"1": Mask(inputs=(0, 1, 2, 3), outputs=(0, 1))}
    torch_prune.ln_structured(model[0], "weight", 0.5, n=1, dim=0)
    zero = (model[0].weight == 0).flatten(1).all(1)
    apply(model, {"0": Mask(inputs=[0, 1])}, how)
    model(torch.randn(1, 3, 2, 2))  # torch.nn.utils.prune masks when the module is called
    assert (model[0].weight[zero] == 0).all()
    assert (model[0].weight[:, 2] == 0).all()


def test_s1_a_mask_starts_as_what_is_not_zero() -> None:
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        layer.weight[1] = 0
    mask = attach(layer, Soft).mask
    assert mask.dtype == torch.bool
    assert torch.equal(mask, masks.original(layer) != 0)
    assert not mask[1].any()


@pytest.mark.parametrize("kind", [Hard, Permanent])
def test_s2_hard_masks_get_no_gradient(kind: type[WeightMask]) -> None:
    layer = nn.Linear(4, 3)
    dense = gradient(copy.deepcopy(layer))
    attach(layer, kind)
    set_mask(layer, half(layer))
    assert torch.equal(gradient(layer), dense * half(layer))


def test_s2_what_is_unmasked_comes_back_but_not_from_a_permanent_mask() -> None:
    for kind in KINDS:
        layer = nn.Linear(4, 3)
        before = layer.weight.detach().clone()
        attach(layer, kind)
        set_mask(layer, half(layer))
        set_mask(layer, torch.ones(()))
        expected = before * half(layer) if kind is Permanent else before
        assert torch.equal(layer.weight, expected), kind


def test_s3_masks_of_any_expandable_shape() -> None:
    conv = nn.Conv2d(4, 6, 3)
    attach(conv)
    set_mask(conv, torch.tensor([1, 0, 1, 1]).reshape(1, 4, 1, 1))
    assert (conv.weight[:, 1] == 0).all()
    assert (conv.weight[:, [0, 2, 3]] != 0).all()
    with pytest.raises(MaskError, match=r"expected a mask that expands to \(6, 4, 3, 3\), found \(5,\)"):
        set_mask(conv, torch.ones(5))


def test_s3_a_layer_without_a_mask_takes_only_one_that_keeps_all() -> None:
    conv = nn.Conv2d(4, 6, 3)
    set_mask(conv, torch.ones(1))
    assert masks.masked(conv) is None
    with pytest.raises(MaskError, match="expected Conv2d.weight to have a live mask, found none"):
        set_mask(conv, torch.zeros(1))


@pytest.mark.parametrize("kind", ["hard", "permanent", "soft"])
def test_s3_state_dict_round_trip_and_baking(kind: str) -> None:
    model = apply(randomised(Residual()), MASKS, kind)
    masks.rescale(model.get_submodule("one.1"), Rescale.PRUNE_FRACTION, torch.tensor([True, False]))
    expected = model(*IMAGE)
    again = masks.load_state_dict(randomised(Residual(), seed=1), model.state_dict())
    assert torch.equal(again(*IMAGE), expected)
    assert type(masks.masked(again.get_submodule("fc"))) is type(masks.masked(model.get_submodule("fc")))
    parameters = {id(parameter) for parameter in model.parameters()}
    assert bake(model) is model
    assert {id(parameter) for parameter in model.parameters()} == parameters
    assert set(model.state_dict()) == set(Residual().state_dict())
    assert torch.equal(model(*IMAGE), expected)
    assert (model.get_parameter("one.0.weight")[:, 1] == 0).all()


def test_s3_a_state_of_another_model_is_refused() -> None:
    state = apply(randomised(Residual()), MASKS, "soft").state_dict()
    with pytest.raises(MaskError, match="expected a module 'stem' for a mask, found none"):
        masks.load_state_dict(nn.Sequential(nn.Conv2d(3, 4, 1)), state)


def test_s4_pruned_weights_decay() -> None:
    layer = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[2.0, 3.0]]))
    attach(layer, Soft)
    set_mask(layer, torch.tensor([1, 0]))
    stored = masks.original(layer)
    stored.grad = torch.zeros(1, 2)
    masks.decay(layer, 0.1)
    torch.testing.assert_close(stored.grad, torch.tensor([[0.0, 0.3]]))


def test_s4_as_a_hook_of_the_optimizer() -> None:
    layer = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[2.0, 3.0]]))
    attach(layer, Soft)
    set_mask(layer, torch.tensor([1, 0]))
    stored = masks.original(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    optimizer.register_step_pre_hook(masks.decay_hook(layer, 0.1))
    stored.grad = torch.zeros(1, 2)
    optimizer.step()
    torch.testing.assert_close(stored.detach(), torch.tensor([[2.0, 2.7]]))
    assert masks.DECAY == 2e-4


@pytest.mark.parametrize(("scale", "expected"), [(0.5, 2.0), (1.0, 1.0), (0.0, 0.0)])
def test_s5_a_scaled_norm_takes_the_step_it_would_take_unscaled(scale: float, expected: float) -> None:
    part = Scale()
    part.scale.fill_(scale)
    gamma = torch.tensor([3.0, -1.0], requires_grad=True)
    made = part(gamma)
    torch.testing.assert_close(made.detach(), scale * gamma.detach())
    made.backward(torch.ones(2))
    torch.testing.assert_close(gamma.grad, torch.full((2,), expected))


KEPT, IMPORTANCE = torch.tensor([True, False, True, False]), torch.tensor([4.0, 1.0, 2.0, 1.0])


@pytest.mark.parametrize(
    ("kind", "kept", "importance", "expected"),
    [
        (Rescale.SKIP, KEPT, None, None),
        (Rescale.BINARY, KEPT, None, 1.0),
        (Rescale.PRUNE_FRACTION, KEPT, None, 0.5),
        (Rescale.IMPORTANCE_FRACTION, KEPT, IMPORTANCE, 0.75),
        (Rescale.IMPORTANCE_FRACTION, KEPT, torch.zeros(4), 0.0),
        *((kind, torch.zeros(4).bool(), IMPORTANCE, 0.0) for kind in list(Rescale)[1:]),
        (Rescale.SKIP, torch.zeros(4).bool(), IMPORTANCE, None),
    ],
)
def test_s6_how_norms_are_scaled(
    kind: Rescale, kept: Tensor, importance: Tensor | None, expected: float | None
) -> None:
    assert masks.norm_scale(kind, kept, importance) == expected
    norm = nn.BatchNorm2d(3)
    masks.rescale(norm, kind, kept, importance)
    scale = 1.0 if expected is None else expected
    assert torch.equal(norm.weight, torch.full((3,), scale))


def test_s6_only_norms_whose_convs_changed() -> None:
    norm = nn.BatchNorm2d(3)
    masks.rescale(norm, Rescale.PRUNE_FRACTION, KEPT, changed=False)
    assert torch.equal(norm.weight, torch.ones(3))
    with pytest.raises(MaskError, match="expected a batch norm with a weight to scale, found a Conv2d"):
        masks.rescale(nn.Conv2d(1, 1, 1), Rescale.BINARY, KEPT)
    with pytest.raises(MaskError, match="expected an importance for each of 4 input channels"):
        masks.norm_scale(Rescale.IMPORTANCE_FRACTION, KEPT, torch.ones(3))


@pytest.mark.parametrize("how", ["zeros", "hard", "permanent", "soft"])
def test_the_compiler_takes_live_masks(how: str) -> None:
    model = apply(randomised(Residual()), MASKS, how).double()
    inputs = (IMAGE[0].double(),)
    fast = chanopt.optimize(model, inputs)
    chanopt.verify(model, fast, inputs)
    assert tuple(fast.get_parameter("one.0.weight").shape) == (6, 3, 3, 3)


def test_live_masks_are_what_masks_by_name_are() -> None:
    torch.manual_seed(3)
    model = randomised(Residual())
    twin = copy.deepcopy(model)
    assert read(apply(twin, MASKS)) == {
        "stem": Mask(outputs=(0, 2, 3, 7)),
        "one.0": Mask(inputs=(0, 2, 7)),
        "fc": Mask(inputs=tuple(range(4, 32))),
    }
    fast = chanopt.optimize(model, IMAGE, masks=MASKS)
    chanopt.verify(twin, fast, IMAGE)


def test_a_zero_filter_with_a_bias_is_no_dropped_output() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    with torch.no_grad():
        model[0].weight[1] = 0
    assert read(model) == {}


def test_torch_prune_masks_are_understood() -> None:
    model = randomised(Residual())
    torch_prune.ln_structured(model.one[0], "weight", 0.5, n=2, dim=1)
    kept = read(model)["one.0"].inputs
    assert kept is not None
    assert len(kept) == 4
    expected = model(*IMAGE)
    layer = model.one[0]
    attach(layer, Soft)
    assert not hasattr(layer, "weight_orig")
    assert not layer._forward_pre_hooks
    assert torch.equal(model(*IMAGE), expected)
    assert read(model)["one.0"].inputs == kept
    assert (masks.original(layer) != 0).all()


def test_a_copy_of_a_masked_model_stands_alone() -> None:
    model = apply(randomised(Residual()), MASKS, "soft")
    twin = copy.deepcopy(model)
    expected = model(*IMAGE)
    bake(twin)
    attach(twin.stem, Hard)
    assert torch.equal(model(*IMAGE), expected)
    other = copy.deepcopy(model)
    attach(other.fc, Hard, "bias")
    set_mask(other.fc, torch.zeros(5), "bias")
    assert torch.equal(model(*IMAGE), expected)
    assert not torch.equal(other(*IMAGE), expected)


def test_another_kind_is_refused() -> None:
    layer = nn.Linear(2, 2)
    attach(layer, Hard)
    assert attach(layer, Hard) is masks.masked(layer)
    with pytest.raises(MaskError, match="expected a Soft mask on .*Linear.weight, found a Hard one"):
        attach(layer, Soft)


def test_names_and_channels_that_do_not_exist() -> None:
    model = Residual()
    with pytest.raises(MaskError, match="found 'two.9'; there are stem, one.0"):
        apply(model, {"two.9": Mask(inputs=[0])})
    with pytest.raises(MaskError, match="expected 'norm' to be a conv or linear layer, found a BatchNorm2d"):
        apply(model, {"norm": Mask(inputs=[0])})
    with pytest.raises(MaskError, match=r"expected kept input channels within 0..7, found \[8\]"):
        apply(model, {"one.0": Mask(inputs=[8])})
    with pytest.raises(MaskError, match="expected one of zeros, hard, permanent, soft, found 'firm'"):
        apply(model, {}, "firm")


LAYERS = [
    nn.Linear(6, 4),
    nn.Conv1d(6, 4, 3),
    nn.Conv2d(6, 4, 3, groups=2),
    nn.Conv2d(6, 12, 3, groups=6),
    nn.ConvTranspose2d(6, 4, 3),
    nn.ConvTranspose2d(6, 4, 3, groups=2),
    nn.Conv3d(6, 4, 2),
]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_entries_of_channels_are_those_that_matter(layer: nn.Module) -> None:
    assert isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d)
    layer = copy.deepcopy(layer).double()
    dims = {nn.Linear: 0, nn.Conv1d: 1, nn.Conv3d: 3}.get(type(layer), 2)
    x = torch.randn(2, 6, *[5] * dims, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.mul_(element_mask(layer, inputs=[0, 2, 3, 5]))
    changed = x.clone()
    changed[:, [1, 4]] += 1
    assert torch.equal(layer(changed), layer(x))
    assert by_channel(layer.weight, layer, "input").shape[0] == 6
    assert (by_channel(layer.weight, layer, "input")[[1, 4]] == 0).all()
    assert (by_channel(layer.weight, layer, "input")[[0, 2, 3, 5]] != 0).all()
    with torch.no_grad():
        layer.weight.mul_(element_mask(layer, outputs=[1, 3]))
    assert layer.bias is not None
    shape = (-1, *[1] * dims)
    assert torch.equal(layer(x)[:, [0, 2]], layer.bias[[0, 2]].reshape(shape).expand_as(layer(x)[:, [0, 2]]))
    assert (by_channel(layer.weight, layer, "output")[[0, 2]] == 0).all()
    assert pairs(layer.weight, layer).numel() == layer.weight.numel()
