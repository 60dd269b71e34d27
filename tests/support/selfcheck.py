"""Check the test support itself: `python -m tests.support.selfcheck [--random N] [--no-export]`.

Builds every micro net and N random nets, runs them in float64 at batch 1, 2 and 3, masks them in every mode,
and exports them with a symbolic batch; prints what fails and exits with 1 if anything does.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, export
from torch.utils import _pytree as pytree

from tests.support.equal import assert_same_function, assert_sensitive, outputs, spread
from tests.support.masks import MODES, KeepSet, keep_set, mask_randomly
from tests.support.micro import MICRO, Inputs, Micro
from tests.support.nets.base import BATCH_NORMS, AnyModule
from tests.support.random_nets import random_net_counted


def check_forward(build: Any, inputs: Inputs, fixed_batch: int | None, batch_first: bool) -> None:
    """Forward at batch 1, 2, 3; one sample alone gives what it gives in a batch; same seed, same module."""
    net, twin = build().double(), build().double()
    batches = [fixed_batch] if fixed_batch else [1, 2, 3]
    found: list[Tensor] = []
    for batch in batches:
        found = outputs(net, inputs(batch, torch.float64, 0))
        assert all(bool(torch.isfinite(tensor).all()) for tensor in found), f"not finite at batch {batch}"
        again = outputs(twin, inputs(batch, torch.float64, 0))
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True)), "two builds differ"
    others = outputs(net, inputs(batches[-1], torch.float64, 9))
    assert all(not torch.equal(a, b) for a, b in zip(found, others, strict=True)), (
        "an output does not depend on the input"
    )
    if batch_first:
        assert_sensitive(found)


def check_export(net: nn.Module, inputs: Inputs, fixed_batch: int | None) -> None:
    """Export with a symbolic batch (if the net takes one), decompose, and compare at another batch."""
    net = net.double()
    example = inputs(fixed_batch or 2, torch.float64, 0)
    shapes: Any = None
    if fixed_batch is None:
        batch = Dim("b", min=1, max=65535)
        shapes = pytree.tree_map_only(Tensor, lambda _: {0: batch}, example)
    with torch.no_grad():
        program = export(net, example, dynamic_shapes=shapes, strict=False).run_decompositions({})
    for size in (1, 3) if fixed_batch is None else (fixed_batch,):
        assert_same_function(
            net,
            program.module(),
            inputs(size, torch.float64, 5),
            tol=1e-12,
            allow_constant=True,
            double=False,
        )


def check_masks(build: Any, inputs: Inputs, fixed_batch: int | None) -> Counter[str]:
    """Every mode leaves finite outputs and reports what the weights show; counts the nets that still vary."""
    counts: Counter[str] = Counter()
    for seed, mode in enumerate(MODES):
        net = build().double()
        kept = mask_randomly(net, seed, amount=0.5, mode=mode)
        for name, found in kept.items():
            _check_keep_set(net.get_submodule(name), found)
        results = outputs(net, inputs(fixed_batch or 3, torch.float64, 0))
        assert all(bool(torch.isfinite(tensor).all()) for tensor in results), f"not finite after {mode}"
        counts[f"{mode}: some output varies"] += max(map(spread, results)) > 1e-3
        counts[f"{mode}: nets"] += 1
    return counts


def _check_keep_set(module: AnyModule, found: KeepSet) -> None:
    if isinstance(module, BATCH_NORMS):
        return
    assert found == keep_set(module)
    weight = module.weight.detach()
    if getattr(module, "groups", 1) != 1 or getattr(module, "transposed", False):
        return
    lost = [channel for channel in range(weight.shape[1]) if channel not in found.inputs]
    assert not weight[:, lost].any(), "a lost input still has weights"
    dead = [channel for channel in range(weight.shape[0]) if channel not in found.outputs]
    assert not weight[dead].any(), "a lost output still has weights"


def _attempt(label: str, failures: list[str], check: Any, *arguments: Any) -> Any:
    try:
        return check(*arguments)
    except Exception as error:  # noqa: BLE001  Whatever goes wrong is what this program reports.
        lines = str(error).strip().splitlines() or [""]
        failures.append(f"{label}: {type(error).__name__}: {lines[0][:300]}")
        return None


def check_micro(micro: Micro, failures: list[str], counts: Counter[str], with_export: bool) -> None:
    """All checks of one micro net."""
    common = (micro.inputs, micro.fixed_batch)
    _attempt(f"{micro.name} forward", failures, check_forward, micro.build, *common, micro.batch_first)
    counts += _attempt(f"{micro.name} masks", failures, check_masks, micro.build, *common) or Counter()
    if with_export:
        _attempt(f"{micro.name} export", failures, check_export, micro.build(), *common)


def check_random(seed: int, failures: list[str], counts: Counter[str], with_export: bool) -> int:
    """All checks of one random net; the number of graphs it took."""
    built = _attempt(f"random {seed} build", failures, random_net_counted, seed)
    if built is None:
        return 0
    net, inputs, attempts = built
    _attempt(
        f"random {seed} forward",
        failures,
        check_forward,
        lambda: random_net_counted(seed)[0],
        inputs,
        None,
        True,
    )
    found = _attempt(f"random {seed} masks", failures, check_masks, lambda: random_net_counted(seed)[0], inputs, None)
    counts += found or Counter()
    if with_export:
        _attempt(f"random {seed} export", failures, check_export, net, inputs, None)
    return attempts


def main() -> int:
    """Run everything; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--random", type=int, default=200, help="how many random nets")
    parser.add_argument("--only", default="", help="micro nets whose name contains this")
    parser.add_argument("--no-export", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", module=r"torch\..*", category=DeprecationWarning)
    warnings.filterwarnings("ignore", module=r"torch\..*", category=FutureWarning)
    # Raised by copy.deepcopy inside torch.export, so it carries the name of copyreg, not of torch.
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated", category=FutureWarning)
    failures: list[str] = []
    micro_counts: Counter[str] = Counter()
    random_counts: Counter[str] = Counter()
    attempts: Counter[int] = Counter()
    start = time.perf_counter()
    chosen = [micro for micro in MICRO.values() if options.only in micro.name]
    for micro in chosen:
        check_micro(micro, failures, micro_counts, not options.no_export)
    middle = time.perf_counter()
    for seed in range(options.random):
        attempts[check_random(seed, failures, random_counts, not options.no_export)] += 1
    print(f"{len(chosen)} micro nets in {middle - start:.0f} s: {dict(micro_counts)}")
    print(f"{options.random} random nets in {time.perf_counter() - middle:.0f} s: {dict(random_counts)}")
    print(f"graphs drawn per random net: {dict(sorted(attempts.items()))}")
    print(f"{len(failures)} failures", *failures, sep="\n  ")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
