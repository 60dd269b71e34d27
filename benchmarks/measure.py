"""One row of the sweep: a network, masks, and what chanopt and UPSCALE make of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from benchmarks import peers, zoo
from benchmarks.masks import Setting, build_masked

# What every row has to meet. The errors are relative to the greatest magnitude of the output.
MAX_ERROR64 = 1e-10
MAX_ERROR32 = 1e-4

_FLOAT32_BYTES = 4
_REFUSALS_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Row:
    """Everything measured on one network under one setting.

    None means not measured, because something before it failed.

    Attributes:
        status: "ok", or "error" if anything but the peer raised; `exception` then says what.
        error64, error64_batch, error32: greatest relative difference to the masked network's outputs on fresh
            inputs, in float64, in float64 at another batch size, in float32.
        unexplained: layers of which the report does not say who reads the channels they keep.
        own_error32: the masked network's own difference between float32 and float64 on the same inputs.
        parameters_dense: all parameters of the network; `parameters` those of chanopt's result;
            `upscale_parameters` those of UPSCALE's result that take part (it leaves auxiliary heads in).
        copied_bytes, upscale_bytes: for one image in float32.
        violations: the bounds that the row breaks, in words; empty if it is right.
    """

    model: str
    side: str
    amount: float
    resolution: int
    status: str = "ok"
    exception: str = ""
    capture_seconds: float | None = None
    optimize_seconds: float | None = None
    error64: float | None = None
    error64_batch: float | None = None
    error32: float | None = None
    own_error32: float | None = None
    sensitivity: float | None = None
    parameters_dense: int | None = None
    parameters: int | None = None
    macs_dense: int | None = None
    macs: int | None = None
    copies: int | None = None
    gathered_channels: int | None = None
    copied_bytes: int | None = None
    segments: int | None = None
    segments_optimal: int | None = None
    refusals: int | None = None
    first_refusals: str = ""
    unexplained: int | None = None
    upscale_status: str = ""
    upscale_seconds: float | None = None
    upscale_parameters: int | None = None
    upscale_copies: int | None = None
    upscale_channels: int | None = None
    upscale_bytes: int | None = None
    violations: list[str] = field(default_factory=list)


def measure(name: str, setting: Setting, resolution: int | None = None) -> Row:
    """Measure one network of the zoo under one setting; never raises, an error becomes a row.

    The network is optimised once, in float64; its result is compared there and again after a cast to float32.
    Bytes are restated for float32.
    """
    size = resolution or zoo.entry(name).resolution
    known: dict[str, Any] = {
        "model": name,
        "side": setting.side,
        "amount": setting.amount,
        "resolution": size,
    }
    try:
        model = build_masked(name, setting, size)
        known["parameters_dense"] = sum(p.numel() for p in model.parameters())
        known |= _measure_upscale(model, zoo.example_inputs(name, 1, size))
        _measure_chanopt(name, size, model, known)
    # The sweep's question is whether anything raises, so everything that does is recorded.
    except Exception as error:  # noqa: BLE001
        known |= {"status": "error", "exception": describe(error)}
    row = Row(**known)
    return replace(row, violations=violations(row))


def one_by_one() -> Sequence[Any]:
    """The default passes, with all segments solved in this process: where others run beside it, or are timed apart."""
    from chanopt.passes import DEFAULT, OrderChannels

    return [replace(step, processes=1) if isinstance(step, OrderChannels) else step for step in DEFAULT]


def describe(error: BaseException, limit: int = 400) -> str:
    """The type and message of an error on one line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _measure_upscale(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Any]:
    try:
        exported = peers.export(model, inputs)
    except peers.PeerError as error:
        return {"upscale_status": describe(error, limit=160)}
    counts = exported.counts
    return {
        "upscale_status": "ok",
        "upscale_seconds": exported.seconds,
        "upscale_parameters": exported.parameters_used,
        "upscale_copies": counts.n_copies,
        "upscale_channels": counts.channels_copied,
        "upscale_bytes": counts.bytes_copied,
    }


def _measure_chanopt(name: str, resolution: int, model32: nn.Module, known: dict[str, Any]) -> None:
    """Fill in chanopt's part of a row, step by step, so that what was measured before an error is kept."""
    import chanopt

    def inputs(batch: int, dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
        return zoo.example_inputs(name, batch, resolution, dtype, seed)

    model = copy.deepcopy(model32).double()
    fast = _optimized(name, model, inputs(1, torch.float64, 0))
    known |= figures(chanopt.explain(fast), itemsize=torch.float64.itemsize)
    known["error64"] = relative_error(model, fast, inputs(1, torch.float64, 11))
    known["sensitivity"] = zoo.sensitivity(model, inputs(2, torch.float64, 12))
    known["error64_batch"] = relative_error(model, fast, inputs(2, torch.float64, 12))
    known["own_error32"] = _own_error32(model, model32, inputs(1, torch.float32, 13))
    del model
    known["error32"] = relative_error(model32, fast.float(), inputs(1, torch.float32, 13))


_CAPTURED: dict[tuple[str, int], Any] = {}


def _optimized(name: str, model: nn.Module, inputs: tuple[Any, ...]) -> nn.Module:
    """Optimise a network, capturing each only once a process: the captured graph shares its parameters."""
    import chanopt
    import chanopt.errors

    key = (name, len(zoo.flatten(inputs)))
    if key not in _CAPTURED:
        try:
            _CAPTURED[key] = (model, chanopt.capture(model, inputs))
        except chanopt.errors.CaptureError:
            return chanopt.optimize(model, inputs)
    skeleton, captured = _CAPTURED[key]
    skeleton.load_state_dict(model.state_dict())
    return chanopt.optimize(captured)


@torch.no_grad()
def _own_error32(model64: nn.Module, model32: nn.Module, inputs: tuple[Any, ...]) -> float:
    """How far the masked network itself is from its float64 outputs when it computes in float32."""
    wide = tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, inputs)
    return relative_error(lambda *_: model64(*wide), model32, inputs)


def figures(report: Any, *, itemsize: int) -> dict[str, Any]:
    """The sweep's columns out of a `chanopt.Report`, whose bytes are at `itemsize` an element."""
    seconds: Mapping[str, float] = report.seconds
    refusals = [" ".join(str(refusal).split()) for refusal in report.refusals]
    return {
        "capture_seconds": seconds.get("capture"),
        "optimize_seconds": seconds.get("optimize"),
        "parameters": report.parameters_after,
        "macs_dense": report.macs_before,
        "macs": report.macs_after,
        "copies": report.copies,
        "gathered_channels": report.gathered_channels,
        "copied_bytes": report.copied_bytes * _FLOAT32_BYTES // itemsize,
        "segments": len(report.segments),
        "segments_optimal": sum(bool(segment.optimal) for segment in report.segments),
        "refusals": len(refusals),
        "first_refusals": " | ".join(refusals[:_REFUSALS_SHOWN]),
        "unexplained": sum(not layer.kept for layer in report.layers),
    }


@torch.no_grad()
def relative_error(model: Callable[..., object], other: Callable[..., object], inputs: tuple[Any, ...]) -> float:
    """Greatest difference between two networks' outputs, each output relative to its own greatest magnitude.

    Returns:
        Infinity if the outputs differ in number or shape, if one holds NaN where the other does not, or if an
        integer output differs at all.
    """
    first, second = zoo.flatten(model(*inputs)), zoo.flatten(other(*inputs))
    if [t.shape for t in first] != [t.shape for t in second]:
        return float("inf")
    return max((_difference(a, b) for a, b in zip(first, second, strict=True)), default=0.0)


def _difference(reference: Tensor, other: Tensor) -> float:
    if not reference.is_floating_point():
        return 0.0 if torch.equal(reference, other) else float("inf")
    if reference.numel() == 0:
        return 0.0
    gap = (reference.double() - other.double()).abs().max() / reference.double().abs().max().clamp(min=1e-300)
    return float(gap.nan_to_num(nan=float("inf")))


def violations(row: Row) -> list[str]:
    """The bounds that a row breaks, in words."""
    if row.status != "ok":
        return [row.exception]
    found = [
        f"{name} {value:.1e} over {bound:.0e}"
        for name, value, bound in (
            ("error64", row.error64, MAX_ERROR64),
            ("error64_batch", row.error64_batch, MAX_ERROR64),
            ("error32", row.error32, MAX_ERROR32),
        )
        if value is None or not value <= bound
    ]
    if (row.segments_optimal or 0) < (row.segments or 0):
        found.append(f"only {row.segments_optimal} of {row.segments} segments proven optimal")
    if (row.parameters or 0) >= (row.parameters_dense or 0) and not row.refusals and row.unexplained != 0:
        found.append("not slimmed, and neither a refusal nor who reads the channels says why")
    return found + _against_upscale(row)


def _against_upscale(row: Row) -> list[str]:
    if row.upscale_status != "ok":
        return []
    found: list[str] = []
    ours, theirs = row.copied_bytes or 0, row.upscale_bytes or 0
    if ours > theirs:
        found.append(f"copies {ours:,} bytes, UPSCALE {theirs:,}")
    if ours == theirs and (row.gathered_channels or 0) > (row.upscale_channels or 0):
        found.append(f"gathers {row.gathered_channels} channels at equal bytes, UPSCALE {row.upscale_channels}")
    if (row.parameters or 0) > (row.upscale_parameters or 0):
        found.append(f"keeps {row.parameters:,} parameters, UPSCALE {row.upscale_parameters:,}")
    return found
