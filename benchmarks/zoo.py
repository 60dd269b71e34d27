"""The zoo: 68 networks of torchvision and timm, and others by name, built so that comparing outputs means something.

`build` gives an evaluation-mode network with seeded random weights. No pretrained weights are used: what is
compared is a model with itself. But a freshly initialised network in eval mode often computes a constant, or
1e-17, and two constants are easily equal. So `build` calibrates (`calibrate`): activations are of order one
at every layer and different inputs give visibly different outputs.

    model = build("resnet50", dtype=torch.float64)
    inputs = example_inputs("resnet50", batch=2, dtype=torch.float64, seed=1)
    outputs = flatten(model(*inputs))
"""

from __future__ import annotations

import argparse
import difflib
import functools
import importlib
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from chanopt.torchvision_shim import ensure_torchvision

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

# What keeps rounding from growing with depth, so that 1e-4 in float32 says something of the compiler and not of the
# weights. With shifts about zero, a batch norm and a ReLU together multiply small differences by 1.2 a layer (Yang et
# al., A mean field theory of batch normalization, ICLR 2019): a masked resnet152 was 3e-4 from its own float64.
# Shifted by one standard deviation the ReLU is nearly linear: 4e-6.
_SHIFT = 1.0
# And no layer may amplify a variation that is smaller than this part of the mean beside it: squeeze-and-excitation
# reads averages that hardly vary, and 30 of them in a row lost four digits.
_LEAST_VARIATION = 0.5
# Standard deviations of layers by name, other than 1: a detector exponentiates what these say of the size of a box.
_SPREAD = {"bbox_pred": 0.1}

Options = Callable[[int], Mapping[str, Any]]


def _no_options(_resolution: int) -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True, slots=True)
class Entry:
    """How one network of the zoo is built.

    Attributes:
        name: the name its library gives it.
        library: where it comes from.
        resolution: height and width of the square images it is measured on, in pixels.
        small: the same for quick checks; the least round number that the network accepts.
        detector: takes a list of (3, H, W) images instead of one (N, 3, H, W) batch and returns boxes.
        options: keyword arguments of its constructor, by resolution.
    """

    name: str
    library: Literal["torchvision", "timm"] = "torchvision"
    resolution: int = 224
    small: int = 64
    detector: bool = False
    options: Options = field(default=_no_options)


# Networks that UPSCALE's exporter runs with input masks (torch 2.13, torchvision 0.28).
WORKING38: tuple[str, ...] = (
    *("alexnet", "squeezenet1_0", "squeezenet1_1"),
    *("vgg11", "vgg11_bn", "vgg13", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn"),
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2"),
    *("mobilenet_v2", "mnasnet0_5", "mnasnet0_75", "mnasnet1_0", "mnasnet1_3"),
    *("googlenet", "inception_v3"),
    *("densenet121", "densenet161", "densenet169", "densenet201"),
    *("efficientnet_b0", "efficientnet_b1", "efficientnet_b2", "efficientnet_b3", "efficientnet_b4"),
    *("efficientnet_b5", "efficientnet_v2_s", "efficientnet_v2_m"),
    *("fcn_resnet50", "deeplabv3_resnet50"),
)

# Networks on which it raises: hardswish, chunk, grouped convolution, layer norm, detection.
RAISING20: tuple[str, ...] = (
    *("mobilenet_v3_small", "mobilenet_v3_large"),
    *("shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "shufflenet_v2_x1_5", "shufflenet_v2_x2_0"),
    *("regnet_x_400mf", "regnet_x_1_6gf", "regnet_y_400mf", "regnet_y_1_6gf", "resnext50_32x4d"),
    *("deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"),
    *("convnext_tiny", "vit_b_16", "swin_t", "maxvit_t"),
    *("fasterrcnn_resnet50_fpn", "fasterrcnn_mobilenet_v3_large_320_fpn", "ssd300_vgg16"),
)

TIMM10: tuple[str, ...] = (
    *("res2net50_26w_4s", "hrnet_w18_small", "dla34", "cspresnet50", "repvgg_a0"),
    *("ghostnet_100", "ese_vovnet19b_dw", "nfnet_f0", "convnextv2_atto", "fastvit_t8"),
)

ALL: tuple[str, ...] = WORKING38 + RAISING20 + TIMM10


def _without_backbone_weights(_resolution: int) -> Mapping[str, Any]:
    return {"weights_backbone": None}


def _faster_rcnn(resolution: int) -> Mapping[str, Any]:
    # Few boxes, all of them reported: torchvision's own limits suit trained scores, and at random ones they
    # would report no box at all, or take a minute in non-maximum suppression.
    return {
        **_without_backbone_weights(resolution),
        "min_size": resolution,
        "max_size": resolution,
        "rpn_pre_nms_top_n_test": 100,
        "rpn_post_nms_top_n_test": 40,
        "box_score_thresh": 0.0,
        "box_detections_per_img": 20,
    }


def _ssd(resolution: int) -> Mapping[str, Any]:
    return {
        **_without_backbone_weights(resolution),
        "score_thresh": 0.0,
        "topk_candidates": 5,
        "detections_per_img": 20,
    }


def _plain_initialisation(_resolution: int) -> Mapping[str, Any]:
    # Their own initialisation draws from a truncated normal for seconds; calibration rescales every layer
    # anyway.
    return {"init_weights": False}


_SPECIAL: tuple[Entry, ...] = (
    Entry("googlenet", options=_plain_initialisation),
    Entry("inception_v3", resolution=299, small=96, options=_plain_initialisation),
    Entry("fcn_resnet50", options=_without_backbone_weights),
    Entry("deeplabv3_resnet50", options=_without_backbone_weights),
    Entry("deeplabv3_mobilenet_v3_large", options=_without_backbone_weights),
    Entry("lraspp_mobilenet_v3_large", options=_without_backbone_weights),
    Entry("vit_b_16", options=lambda resolution: {"image_size": resolution}),
    # Its windows of 7x7 must divide a 32nd of the image.
    Entry("maxvit_t", small=224, options=lambda resolution: {"input_size": (resolution, resolution)}),
    Entry("fasterrcnn_resnet50_fpn", small=128, detector=True, options=_faster_rcnn),
    Entry("fasterrcnn_mobilenet_v3_large_320_fpn", small=128, detector=True, options=_faster_rcnn),
    # It resizes whatever comes to 300 pixels.
    Entry("ssd300_vgg16", resolution=300, small=300, detector=True, options=_ssd),
)

ENTRIES: Mapping[str, Entry] = {
    **{name: Entry(name) for name in WORKING38 + RAISING20},
    **{name: Entry(name, library="timm") for name in TIMM10},
    **{entry.name: entry for entry in _SPECIAL},
}


@functools.cache
def entry(name: str) -> Entry:
    """The entry of a network: of the zoo, or made for any other classifier of torchvision or timm.

    Raises:
        KeyError: there is no such network; the message lists those of the zoo.
    """
    found = ENTRIES.get(name) or _elsewhere(name)
    if found is None:
        raise KeyError(
            f"no network {name!r} in torchvision or timm; those of the zoo are: {', '.join(sorted(ENTRIES))}"
        )
    return found


def _elsewhere(name: str) -> Entry | None:
    """The entry of a network that is not in the zoo, at the one size that its library trained it for."""
    ensure_torchvision()
    models = importlib.import_module("torchvision.models")
    if name in models.list_models(module=models):
        return Entry(name, small=224)
    if name in models.list_models(module=models.segmentation):
        return Entry(name, small=224, options=_without_backbone_weights)
    try:
        timm = importlib.import_module("timm")
    except ImportError:
        return None
    if not timm.is_model(name):
        return None
    trained = timm.get_pretrained_cfg(name)
    size = trained.input_size[-1] if trained is not None else 224
    return Entry(name, library="timm", resolution=size, small=size)


def network(text: str) -> str:
    """Parse a network's name, for command lines.

    >>> network("resnet18")
    'resnet18'
    """
    with suppress(KeyError):
        return entry(text).name
    near = difflib.get_close_matches(text, ENTRIES, 3)
    said = f"; did you mean {', '.join(near)}?" if near else ""
    raise argparse.ArgumentTypeError(f"expected a classifier of torchvision or timm, found {text!r}{said}")


def build(name: str, *, resolution: int | None = None, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """A network with seeded random weights, calibrated, in eval mode, on the CPU.

    Args:
        name: as for :func:`entry`.
        resolution: image size in pixels that it will be given; only some networks (transformers, detectors)
            depend on it. None means the size of its entry.
        dtype: dtype of its parameters and buffers. The weights for two dtypes agree to the last bit of the
            narrower.
        seed: same seed, same weights.

    Raises:
        KeyError: there is no such network.
    """
    chosen = entry(name)
    size = resolution or chosen.resolution
    with seeded(seed):
        model = _construct(chosen, size).eval()
        calibrate(model, calibration_inputs(name, size, seed + 1), seed=seed + 2)
    return model.to(dtype)


def _construct(chosen: Entry, resolution: int) -> nn.Module:
    ensure_torchvision()
    options = chosen.options(resolution)
    if chosen.library == "timm":
        return importlib.import_module("timm").create_model(chosen.name, pretrained=False, **options)
    models = importlib.import_module("torchvision.models")
    return models.get_model(chosen.name, weights=None, **options)


def calibration_inputs(name: str, resolution: int, seed: int = 0) -> tuple[Any, ...]:
    """Many small images: quick, and batch norms get more independent samples than from few large ones.

    A network whose constructor was told a size gets that size.
    """
    chosen = entry(name)
    if chosen.detector or chosen.name in ("vit_b_16", "maxvit_t"):
        return example_inputs(chosen.name, 4, resolution, seed=seed)
    return example_inputs(chosen.name, 16, min(resolution, max(chosen.small, 96)), seed=seed)


def example_inputs(
    name: str,
    batch: int = 1,
    resolution: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Any, ...]:
    """Positional arguments for a network: normal random images.

    Returns:
        `(images,)` with images of shape (batch, 3, resolution, resolution), or for a detector `(list of
        `batch` images of shape (3, resolution, resolution),)`.

    Raises:
        KeyError: there is no such network.
    """
    chosen = entry(name)
    size = resolution or chosen.resolution
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, size, size, generator=generator).to(dtype)
    return (list(images.unbind()),) if chosen.detector else (images,)


def flatten(outputs: object) -> list[Tensor]:
    """The tensors in a network's outputs (a tensor, tuple, list, dict, or these nested), in a fixed order.

    >>> flatten({"out": torch.ones(2), "aux": [torch.zeros(1), None]})
    [tensor([1., 1.]), tensor([0.])]
    """
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def sensitivity(model: nn.Module, inputs: tuple[Any, ...]) -> float:
    """How much the first floating-point output differs between the samples of a batch.

    Returns:
        The standard deviation over samples, averaged, divided by the greatest magnitude. Of order 0.1 for a
        network worth comparing; 0 means that its output is a constant. For a detector, whose outputs for
        different images are different tensors: the same over the boxes of all images.
    """
    with torch.no_grad():
        first = next(t for t in flatten(model(*inputs)) if t.is_floating_point())
    return float(first.std(dim=0).mean() / first.abs().max().clamp(min=1e-300))


@contextmanager
def seeded(seed: int) -> Generator[None]:
    """Seed torch's global generator inside the block and put it back after."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def calibrate(model: nn.Module, inputs: tuple[Any, ...], seed: int = 0) -> None:
    """Give a freshly initialised network weights under which its outputs depend on its inputs; in place.

    Parameters initialised to one constant (gains, layer scales, biases, class tokens; many are zero) are
    drawn at random (gains about 1, biases about 0, of batch norms about 1), so that no branch is switched off and
    every bias matters; then the network is settled (`settle`).
    """
    generator = torch.Generator().manual_seed(seed)
    shifts = {id(module.bias) for module in model.modules() if isinstance(module, _BATCH_NORMS)}
    for name, parameter in model.named_parameters():
        bias = _SHIFT if id(parameter) in shifts else 0.0
        _fill_if_constant(name, parameter, bias, generator)
    settle(model, inputs, seed + 1)


@torch.no_grad()
def settle(model: nn.Module, inputs: tuple[Any, ...], seed: int = 0) -> None:
    """Bring the activations of every layer to order one on `inputs`; in place, zero weights stay zero.

    In one forward pass each plain convolution and linear layer is rescaled, and its bias shifted, such that
    its output has mean about 0 and standard deviation 1 (data-dependent initialisation: Kraehenbuehl et al.,
    ICLR 2016, section 3; LSUV: Mishkin and Matas, ICLR 2016), and each batch norm takes the statistics of
    that pass as its running ones. Neither brings out a variation below `_LEAST_VARIATION` of the mean it stands on.
    A bias of an output channel without weights is left alone.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = [module for module in model.modules() if isinstance(module, _BATCH_NORMS)]
    momenta = [norm.momentum for norm in norms]
    hook = functools.partial(_rescale, generator=generator, seen=set())
    handles = [
        module.register_forward_hook(functools.partial(hook, spread=_SPREAD.get(name.rpartition(".")[2], 1.0)))
        for name, module in model.named_modules()
        if type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    ]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # The running statistics are then the plain average over the passes: of this one.
        norm.train()
    try:
        model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()
    for norm in norms:
        _bound_gain(norm)


def _bound_gain(norm: nn.Module) -> None:
    """Keep a batch norm from amplifying a variation that is small beside the mean it subtracts, or none."""
    mean, variance = norm.running_mean, norm.running_var
    if not isinstance(mean, Tensor) or not isinstance(variance, Tensor):
        return
    torch.maximum(variance, (_LEAST_VARIATION * mean) ** 2, out=variance)
    variance[variance < 1e-12] = 1.0  # A dead channel: without variance its scale would be that of epsilon.


def _fill_if_constant(name: str, parameter: Tensor, bias: float, generator: torch.Generator) -> None:
    if parameter.min() != parameter.max():
        return
    if name.endswith("bias"):
        parameter.normal_(bias, 0.2, generator=generator)
    else:
        parameter.uniform_(0.5, 1.5, generator=generator)


def _rescale(
    module: nn.Module,
    _inputs: object,
    output: Tensor,
    *,
    generator: torch.Generator,
    seen: set[nn.Module],
    spread: float,
) -> Tensor:
    """Forward hook of `settle`: rescales the layer on its first call and its output to match."""
    if module in seen or output.numel() <= output.shape[1]:
        return output
    seen.add(module)
    axis = output.ndim - 1 if isinstance(module, nn.Linear) else 1
    others = [i for i in range(output.ndim) if i != axis]
    shape = [-1 if i == axis else 1 for i in range(output.ndim)]
    parameters = dict(module.named_parameters(recurse=False))
    weight, bias = parameters["weight"], parameters.get("bias")
    unbiased = output if bias is None else output - bias.view(shape)
    least = _LEAST_VARIATION * unbiased.square().mean().sqrt()
    scale = torch.maximum(output.std(dim=others).mean(), least).clamp(min=1e-6) / spread
    weight /= scale
    if bias is None:
        return output / scale
    offset = 0.2 * spread * torch.randn(bias.shape, generator=generator) - output.mean(dim=others) / scale
    offset *= weight.flatten(1).any(dim=1)
    bias.copy_(bias / scale + offset)
    return output / scale + offset.view(shape)
