"""One of two processes that fine-tune a slim module under torchrun; see test_training.py."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import chanopt


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    fast = chanopt.load(folder / "slim.pt2")
    if rank == 1:  # must not matter: the weights of process 0 are broadcast
        for parameter in fast.parameters():
            parameter.data.add_(1.0)
    model = DistributedDataParallel(fast)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    digits = load_digits()
    images, targets = torch.from_numpy(digits.images).unsqueeze(1) / 16, torch.from_numpy(digits.target)
    for at in range(0, 300, 60):
        mine = slice(at + 30 * rank, at + 30 * rank + 30)
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(images[mine]), targets[mine]).backward()
        optimiser.step()
    torch.save(fast.state_dict(), folder / f"state{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
