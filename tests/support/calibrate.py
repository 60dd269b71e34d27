"""Bring a fresh network into a state where its outputs depend on its inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tests.support.nets.base import BATCH_NORMS, CONVS, AnyModule

_GATES = ("skipinit_gain", "gain", "gamma", "layer_scale")
_SMALLEST_VARIANCE = 1e-2
_COMFORTABLE = (0.2, 5.0)


def calibrate(model: nn.Module, inputs: tuple[Any, ...]) -> nn.Module:
    """Set batch norm statistics and weight scales from one forward pass on `inputs`; in place, ends in eval.

    An untrained network in eval mode returns nearly constant outputs, on which every comparison succeeds.
    Here norm weights and gains that start at zero become one (they switch residual branches off); batch norms
    take the statistics of this batch; a convolution or linear layer whose outputs have a standard deviation
    outside 0.2 to 5 is scaled to 1, in the order of execution (as LSUV does, Mishkin and Matas 2016).
    Do this before masking, on a batch of at least 2.
    """
    model.eval()
    with torch.no_grad():
        _open_gates(model)
        norms = [m for m in model.modules() if isinstance(m, BATCH_NORMS) and m.track_running_stats]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        seen: set[int] = set()
        hooks = [m.register_forward_hook(_scaler(seen)) for m in model.modules() if isinstance(m, (*CONVS, nn.Linear))]
        model(*inputs)
        for hook in hooks:
            hook.remove()
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            assert norm.running_var is not None
            # A channel that is constant over this batch must not be blown up on the next one.
            norm.running_var.clamp_(min=_SMALLEST_VARIANCE)
    return model.eval()


def _open_gates(model: nn.Module) -> None:
    for module in model.modules():
        weight: Tensor | None = getattr(module, "weight", None)
        if isinstance(module, BATCH_NORMS) and weight is not None and not weight.any():
            weight.fill_(1)
        for name in _GATES:
            gate = dict(module.named_parameters(recurse=False)).get(name)
            if gate is not None and gate.abs().max() < 1e-3:
                gate.fill_(1)


def _scaler(seen: set[int]) -> Any:
    """A forward hook that scales a layer's weights once, also if several layers share the parameter."""

    def hook(layer: AnyModule, arguments: Any, output: Tensor) -> Tensor | None:
        weight = layer.weight
        if parametrize.is_parametrized(layer, "weight") or id(weight) in seen:
            return None
        seen.add(id(weight))
        scale = output.std().item()
        if not 0 < scale < float("inf") or _COMFORTABLE[0] <= scale <= _COMFORTABLE[1]:
            return None
        weight.div_(scale)
        if layer.bias is None:
            return output / scale
        bias = layer.bias.reshape(-1, *[1] * (output.ndim - 2)) if isinstance(layer, CONVS) else layer.bias
        return (output - bias) / scale + bias

    return hook
