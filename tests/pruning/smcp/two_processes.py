"""One of two processes that train one model on different data; run by test_pruner.py.

Arguments: rank, file of the meeting point, file for the result, and what to do.
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from chanopt.errors import AllocationError
from chanopt.pruning.smcp import Schedule, SoftMaskPruner
from tests.pruning.smcp.nets import Residual


def main(rank: int, meeting: str, result: Path, mode: str) -> None:
    distributed.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=2, timeout=timedelta(seconds=240))
    torch.manual_seed(0)
    model = Residual()
    ratio = 0.999 if mode == "infeasible" else 0.5
    schedule = Schedule(ratio, epochs=3, warmup=0, ramp=1, cooldown=1, every=2, curve="linear")
    pruner = SoftMaskPruner(model, (torch.randn(1, 3, 8, 8),), schedule)
    wrapped: nn.Module = DistributedDataParallel(model) if mode == "ddp" else model
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    found: dict[str, object] = {}
    try:
        found["kept"] = [train(pruner, wrapped, optimizer, epoch, rank, mode) for epoch in range(3)][-1]
    except AllocationError as error:
        found["error"] = str(error)
    found["local"] = {name: score.tolist() for name, score in local_scores(pruner).items()}
    result.write_text(json.dumps(found))
    # DDP's threads end before those of the group, and no process takes the group down while the other still uses it:
    # torch aborts a process, once in a while, whose threads are left running.
    del wrapped
    distributed.barrier()
    distributed.destroy_process_group()


def train(
    pruner: SoftMaskPruner, model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int, rank: int, mode: str
) -> object:
    pruner.start_epoch(epoch)
    for batch in range(4):
        torch.manual_seed(1000 * rank + 10 * epoch + batch)
        loss = model(torch.randn(4, 3, 8, 8)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        if mode == "skip" and rank == 1 and epoch == 0:
            next(p for p in pruner.model.parameters() if p.ndim == 4 and p.shape[1] == 16).grad = None
        if pruner.step():
            optimizer.step()
    return [list(pruner.kept), pruner.events]


def local_scores(pruner: SoftMaskPruner) -> dict[str, torch.Tensor]:
    """What this process alone would go by."""
    members = pruner._members
    sizes = {group.name: group.channels for group in pruner.groups.groups}
    return {name: pruner._importance.score(members[name], sizes[name]) for name in members}


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4])
