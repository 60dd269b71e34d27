"""From a name to an arm."""

from __future__ import annotations

import copy
import importlib
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import chanopt
from benchmarks import peers
from benchmarks.arms import plans
from benchmarks.arms.base import Arm, ArmError, Copies, Subject
from chanopt.analysis.figures import macs
from chanopt.ir import Program

_STEPS = 9
"""Halvings of the share of channels that the constrained arms keep: to within 1 / 512."""
_STEP = 2.0**-_STEPS


def build(name: str, subject: Subject) -> Arm:
    """Make an arm of a masked network; the network is not changed.

    Raises:
        ArmError: it cannot be made: the peer is not installed, the network cannot be captured, or whatever else its
            maker raises.
        KeyError: there is no such arm; the message lists them.
    """
    if name not in _MAKERS:
        raise KeyError(f"no arm {name!r}; there are: {', '.join(_MAKERS)}")
    try:
        return _MAKERS[name](subject)
    except ArmError:
        raise
    # One arm that breaks must not take the others with it, however it breaks.
    except Exception as error:
        raise ArmError(f"{type(error).__name__}: {' '.join(str(error).split())}") from error


def _dense(subject: Subject) -> Arm:
    return Arm("dense", subject.model, Copies())


def _naive(subject: Subject) -> Arm:
    program = subject.program
    started = time.perf_counter()
    module, planned = plans.naive(plans.Flow(program))
    return Arm("naive", module, planned, time.perf_counter() - started)


def _greedy(subject: Subject) -> Arm:
    program = subject.program
    started = time.perf_counter()
    module, planned = plans.greedy(plans.Flow(program))
    return Arm("greedy", module, planned, time.perf_counter() - started)


def _upscale(subject: Subject) -> Arm:
    """UPSCALE, copying by index (`x[:, indices]`)."""
    return _exported("upscale", subject, "index")


def _upscale_runs(subject: Subject) -> Arm:
    """UPSCALE, copying by concatenation of runs: its own default."""
    return _exported("upscale_runs", subject, "runs")


def _exported(name: str, subject: Subject, mode: peers.Mode) -> Arm:
    """UPSCALE traces one image, and counts in float32; its copies are restated for the batch and the element type."""
    batch = max(len(tensor) for tensor in subject.inputs)
    exported = peers.export(subject.model, tuple(tensor[: len(tensor) // batch] for tensor in subject.inputs), mode)
    counts = exported.counts
    size = next(subject.model.parameters()).element_size() * batch
    planned = Copies(counts.n_copies, counts.channels_copied, counts.bytes_copied * size // 4)
    return Arm(name, exported.module, planned, exported.seconds)


def _chanopt(subject: Subject) -> Arm:
    report = chanopt.explain(subject.fast)
    told: dict[str, Any] = {
        "objective": sum(segment.objective for segment in report.segments),
        "bound": sum(segment.bound for segment in report.segments),
        "segments": len(report.segments),
        "segments_optimal": sum(bool(segment.optimal) for segment in report.segments),
        "refusals": len(report.refusals),
    }
    planned = Copies(report.copies, report.gathered_channels, report.copied_bytes)
    return Arm("chanopt", subject.fast, planned, report.seconds.get("optimize"), figures=told)


def _unmasked(subject: Subject) -> Arm:
    """What `chanopt.optimize` does to any network, masked or not: batch norms folded, pools where they are fast."""
    module = chanopt.optimize(_original(subject), subject.inputs)
    report = chanopt.explain(module)
    planned = Copies(report.copies, report.gathered_channels, report.copied_bytes)
    return Arm("unmasked", module, planned, report.seconds.get("optimize"), same_function=False)


def _constrained(subject: Subject) -> Arm:
    """The largest share of channels, the same for all producers, that costs no more than chanopt's result."""
    model = copy.deepcopy(_original(subject))
    captured = chanopt.capture(model, subject.inputs)
    budget = chanopt.explain(subject.fast).macs_after
    started = time.perf_counter()
    flow = plans.Flow(chanopt.lower(captured))
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        fits = _macs(flow.laid_out(kept=plans.agreed(flow, middle))) <= budget
        low, high = (middle, high) if fits else (low, middle)
    while True:  # what is optimised may round counts up, so it can cost more than was laid out
        _zero_others(model, flow, plans.agreed(flow, low))
        module = chanopt.optimize(captured)
        report = chanopt.explain(module)
        if report.macs_after <= budget or low <= 0:
            break
        low = max(0.0, low - _STEP)
    planned = Copies(report.copies, report.gathered_channels, report.copied_bytes)
    seconds = time.perf_counter() - started
    return Arm("constrained", module, planned, seconds, same_function=False, figures={"ratio": low})


def _macs(program: Program) -> int:
    return sum(macs(op, program) for op in program.ops if op.linear)


def _original(subject: Subject) -> nn.Module:
    if subject.original is None:
        raise ArmError("channels are chosen by the weights before masking; give Subject(..., original=network)")
    return subject.original


@torch.no_grad()
def _zero_others(model: nn.Module, flow: plans.Flow, kept: Mapping[str, Any]) -> None:
    parameters = dict(model.named_parameters())
    for op in flow.program.ops:
        if op.result not in kept or op.params[0].name not in parameters:
            continue
        dropped = torch.ones(flow.program.values[op.reads[0].value].live.channels, dtype=torch.bool)
        dropped[torch.from_numpy(kept[op.result].array.copy())] = False
        axis = op.params[0].inn
        assert axis is not None
        parameters[op.params[0].name].movedim(axis, 0)[dropped] = 0.0


def _torch_pruning(subject: Subject) -> Arm:
    """Torch-Pruning's group pruner by norm, at the largest ratio that costs no more than chanopt's result."""
    library = importlib.import_module("torch_pruning")
    budget = chanopt.explain(subject.fast).macs_after
    started = time.perf_counter()
    low, high, best = 0.0, 1.0, None
    for _ in range(_STEPS):
        middle = (low + high) / 2
        module = _pruned(library, subject, middle)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(*subject.inputs)
        fits = counter.get_total_flops() // 2 <= budget
        low, high, best = (low, middle, module) if fits else (middle, high, best)
    if best is None:
        raise ArmError(f"Torch-Pruning stays over {budget:,} multiplications at every ratio")
    seconds = time.perf_counter() - started
    return Arm("torch_pruning", best, Copies(), seconds, same_function=False, figures={"ratio": high})


def _pruned(library: Any, subject: Subject, ratio: float) -> nn.Module:
    model = copy.deepcopy(_original(subject))
    # Classifiers keep their classes; where there is no linear layer, the last conv is the classifier.
    layers = list(model.modules())
    last = [m for m in layers if isinstance(m, nn.Linear)][-1:] or [m for m in layers if isinstance(m, nn.Conv2d)][-1:]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pruner = library.pruner.BasePruner(
                model,
                subject.inputs[0],
                importance=library.importance.MagnitudeImportance(p=2),
                pruning_ratio=ratio,
                ignored_layers=last,
            )
            pruner.step()
            model(*subject.inputs)
    except Exception as error:
        raise ArmError(f"Torch-Pruning raises {type(error).__name__}: {' '.join(str(error).split())}") from error
    return model


_MAKERS: Mapping[str, Callable[[Subject], Arm]] = {
    "dense": _dense,
    "naive": _naive,
    "greedy": _greedy,
    "upscale": _upscale,
    "upscale_runs": _upscale_runs,
    "unmasked": _unmasked,
    "constrained": _constrained,
    "torch_pruning": _torch_pruning,
    "chanopt": _chanopt,
}

ARMS: tuple[str, ...] = tuple(_MAKERS)
"""Every arm by name."""
SAME_MASKS: tuple[str, ...] = ("dense", "naive", "greedy", "upscale", "upscale_runs", "chanopt")
"""The arms that compute the masked network's own function."""
