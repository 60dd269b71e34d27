from __future__ import annotations

import argparse

import pytest
import torch
from torch import nn

import chanopt
from benchmarks import zoo
from benchmarks.masks import Setting, build_masked
from benchmarks.measure import relative_error
from chanopt import torchvision_shim


def test_the_lists_are_the_58_surveyed_networks_and_ten_of_timm() -> None:
    assert (len(zoo.WORKING38), len(zoo.RAISING20), len(zoo.TIMM10)) == (38, 20, 10)
    assert len(set(zoo.ALL)) == 68
    assert set(zoo.ENTRIES) == set(zoo.ALL)


def test_an_unknown_network_is_named_with_the_known_ones() -> None:
    with pytest.raises(KeyError, match=r"no network 'resnet19' in torchvision or timm; those of.*: alexnet.*resnet18"):
        zoo.build("resnet19")
    with pytest.raises(argparse.ArgumentTypeError, match="found 'resnet19'; did you mean resnet1"):
        zoo.network("resnet19")


@pytest.mark.parametrize(
    ("name", "library", "resolution"),
    [("regnet_x_800mf", "torchvision", 224), ("fcn_resnet101", "torchvision", 224), ("resnet10t", "timm", 176)],
)
def test_other_networks_of_the_libraries_are_found_by_name(name: str, library: str, resolution: int) -> None:
    found = zoo.entry(zoo.network(name))
    assert (found.name, found.library, found.resolution) == (name, library, resolution)


def test_a_network_that_is_not_in_the_zoo_is_built_and_optimised() -> None:
    model = build_masked("resnet10t", Setting("input", 0.5), 64)
    inputs = zoo.example_inputs("resnet10t", 2, 64)
    fast = chanopt.optimize(model, inputs)
    assert relative_error(model, fast, inputs) < 1e-4
    assert chanopt.explain(fast).macs_after < 0.6 * chanopt.explain(fast).macs_before


QUICK = (
    "squeezenet1_1",
    "resnet18",
    "mobilenet_v3_small",
    "shufflenet_v2_x0_5",
    "ghostnet_100",
    "convnextv2_atto",
)
# One network a family; the sweep records the sensitivity of all.
REST = (
    *("vgg11", "densenet121", "resnet50", "googlenet", "inception_v3", "mobilenet_v2", "mnasnet0_5", "efficientnet_b0"),
    *("regnet_y_400mf", "convnext_tiny", "swin_t", "vit_b_16", "maxvit_t", "hrnet_w18_small", "nfnet_f0", "fastvit_t8"),
    *("res2net50_26w_4s", "repvgg_a0", "lraspp_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn"),
)


@pytest.mark.parametrize("name", QUICK)
def test_networks_are_deterministic_and_sensitive(name: str) -> None:
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", REST)
def test_larger_networks_are_deterministic_and_sensitive(name: str) -> None:
    check(name)


def check(name: str) -> None:
    size = zoo.entry(name).small
    model, again = zoo.build(name, resolution=size), zoo.build(name, resolution=size)
    state = again.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    inputs = zoo.example_inputs(name, batch=3, resolution=size, seed=5)
    with torch.no_grad():
        outputs = zoo.flatten(model(*inputs))
    assert outputs
    assert all(bool(t.isfinite().all()) for t in outputs)
    assert zoo.sensitivity(model, inputs) > 0.03


def test_the_dtype_is_that_asked_for() -> None:
    model = zoo.build("squeezenet1_1", dtype=torch.float64)
    (images,) = zoo.example_inputs("squeezenet1_1", batch=2, resolution=64, dtype=torch.float64)
    assert images.shape == (2, 3, 64, 64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model(images).dtype == torch.float64


def test_detectors_take_a_list_of_images() -> None:
    (images,) = zoo.example_inputs("ssd300_vgg16", batch=2)
    assert [tuple(image.shape) for image in images] == [(3, 300, 300), (3, 300, 300)]


def test_building_leaves_the_global_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    zoo.build("squeezenet1_1")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_calibration_switches_on_branches_that_start_at_zero() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)).eval()
    nn.init.zeros_(model[1].weight)
    images = torch.randn(8, 3, 9, 9)
    assert zoo.sensitivity(model, (images,)) < 1e-6
    zoo.calibrate(model, (images,))
    assert zoo.sensitivity(model, (images,)) > 0.03
    assert bool((model[1].bias != 0).all())
    assert not model[1].training
    assert model[1].momentum == 0.1
    assert not model[0]._forward_hooks


def test_calibration_centres_layers_without_batch_norm() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 49, 5)).eval()
    images = 100 + torch.randn(64, 3, 9, 9)
    zoo.calibrate(model, (images,))
    with torch.no_grad():
        output = model(images)
    assert output.mean(dim=0).abs().max() < 1
    assert 0.5 < float(output.std(dim=0).mean()) < 2


def test_nms_keeps_the_best_of_each_cluster() -> None:
    boxes = torch.tensor([[0.0, 0, 4, 4], [1, 0, 5, 4], [0, 0, 4, 4.5], [9, 9, 10, 10]])
    scores = torch.tensor([0.5, 0.9, 0.6, 0.2])
    assert torchvision_shim.nms(boxes, scores, 0.5).tolist() == [1, 3]
    assert torchvision_shim.nms(boxes, scores, 0.99).tolist() == [1, 2, 0, 3]
    assert torchvision_shim.nms(boxes[:0], scores[:0], 0.5).tolist() == []
