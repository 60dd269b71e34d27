"""Trains a model in Lightning with soft masks, then goes on from the checkpoint; run by test_pruner.py.

Arguments: a folder for checkpoints, and a file for the result.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from chanopt.torchvision_shim import ensure_torchvision

ensure_torchvision()  # Lightning's metrics import it
import pytorch_lightning as lightning  # noqa: E402

from chanopt.pruning.smcp import Schedule, SoftMaskCallback, SoftMaskPruner  # noqa: E402
from tests.pruning.smcp.nets import Residual  # noqa: E402


class SoftMasking(SoftMaskCallback, lightning.Callback):
    """As docs/smcp.md has it."""


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Residual()

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch), batch.mean((1, 2, 3)).mul(20).long().clamp(0, 4))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05)


def fit(folder: Path, epochs: int, checkpoint: Path | None = None) -> SoftMaskPruner:
    schedule = Schedule(0.5, epochs=epochs, warmup=1, ramp=1, cooldown=1, every=2)
    masking = SoftMasking(lambda module: SoftMaskPruner(module.net, (torch.randn(1, 3, 8, 8),), schedule))
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[masking], default_root_dir=folder,
    )  # fmt: skip
    data = torch.utils.data.DataLoader(torch.randn(16, 3, 8, 8), batch_size=4)
    trainer.fit(Module(), data, ckpt_path=checkpoint, weights_only=False)
    return masking.pruner


def main(folder: Path, result: Path) -> None:
    torch.manual_seed(0)
    first = fit(folder, 4)
    (checkpoint,) = folder.rglob("*.ckpt")
    again = fit(folder / "later", 6, checkpoint)
    told = {"events": first.events, "kept": list(first.kept), "cost": first.choice.cost, "target": first.choice.target}
    result.write_text(json.dumps({"first": told, "later": again.events}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
