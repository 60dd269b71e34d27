"""The pruning tutorial of the UW-PHARM bitstream hackathon, stage by stage, in PyTorch.

Run it with ``python examples/flux_tutorial.py``. It prints what the tutorial prints: multiplications and additions
after every stage. The first three lines are the same for any weights; the last two depend on them, in the tutorial as
here. Behind them stand the exact counts, and whether the stage computes the same as the one it came from.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

import chanopt
from chanopt.pruning.flux import (
    ChannelPrune,
    LevelPrune,
    MobileNet,
    SlopeHardtanh,
    compute_dot_prods,
    iterativeprune,
    keepprune,
    prune,
    prune_propagate,
    resize,
)

SIZE = (1, 3, 96, 96)  # one image of 96 x 96 pixels in three colours


def show(name: str, model: nn.Module) -> None:
    """Print the tutorial's line for one stage, and the exact count."""
    mults, adds, _ = compute_dot_prods(model, SIZE)
    exact, _, _ = compute_dot_prods(model, SIZE, exact=True)
    print(f"{name} Mults {mults} Adds {adds}  (exactly {exact} multiplications)")


def difference(one: nn.Module, other: nn.Module, images: Tensor) -> float:
    """The largest difference of two models' outputs on some images."""
    with torch.no_grad():
        return float((one(images) - other(images)).abs().max())


def finetune(model: nn.Module, steps: int) -> float:
    """Train on made-up images, whose label is whether their left half is the brighter one; returns the last loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    loss = torch.zeros(())
    model.train()
    for _ in range(steps):
        images = torch.randn(8, *SIZE[1:])
        labels = (images[..., :48].mean((1, 2, 3)) > images[..., 48:].mean((1, 2, 3))).float()
        loss = functional.binary_cross_entropy_with_logits(model(images).squeeze(1), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    return loss.item()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the tutorial."""
    parser = argparse.ArgumentParser(description="The stages of FluxPrune's tutorial, with their counts.")
    parser.add_argument("--steps", type=int, default=2, help="training steps of each fine-tuning")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the images")
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    images = torch.randn(2, *SIZE[1:])

    model = MobileNet(SlopeHardtanh, 0.25, fcsize=64, nclasses=1).eval()
    show("MobileNet", model)

    show("MobileNet", prune(LevelPrune(0.2), model))  # unstructured: the smallest weights of every layer

    pruned = prune(ChannelPrune(0.2), model)  # structured: the smallest filters of every conv
    show("MobileNet", pruned)

    kept = keepprune(pruned)
    propagated = prune_propagate(kept, (images[:1],))
    show("Propagated MobileNet", propagated)

    resized = resize(propagated)
    show("Resized MobileNet", resized)

    fast = chanopt.optimize(propagated, (images[:1],))  # what the tutorial's resize leaves in place goes too
    show("Optimised MobileNet", fast)
    for name, stage in (("propagated", propagated), ("resized", resized), ("optimised", fast)):
        print(f"{name}: differs from the pruned model by {difference(stage, pruned, images):.0e} at most")

    stages = [ChannelPrune(level) for level in (0.1, 0.2, 0.3)]
    tuned = iterativeprune(lambda stage: finetune(stage, options.steps) < 10, stages, model)
    show("Fine-tuned MobileNet", tuned)


if __name__ == "__main__":
    main()
