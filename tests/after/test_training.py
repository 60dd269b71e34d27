"""Fine-tuning after the compiler: the slim module learns what the masked one would have learned (docs/finetuning.md)."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, fx, nn

import chanopt

ROOT = Path(__file__).resolve().parents[2]
Optimiser = Callable[..., torch.optim.Optimizer]


class Digits(nn.Module):
    """A small residual network for 8 x 8 digits; without batch norm, so that weights are cut and nothing is folded."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.body = nn.Conv2d(16, 16, 3, padding=1)
        self.left = nn.Conv2d(16, 12, 3, stride=2)
        self.right = nn.Conv2d(16, 12, 1, stride=2)
        self.head = nn.Linear(2 * 12 * 3 * 3, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).relu()
        y = (y + self.body(y)).relu()
        both = torch.cat([self.left(y), self.right(y)[:, :, :3, :3]], 1)
        return self.head(both.relu().flatten(1))


LOST = {"body": [1, 4, 9, 12], "left": [0, 1, 2, 3, 8, 9], "right": [0, 5, 6, 7, 8, 9, 15]}
"""Pruned input channels; 0, 8 and 9 are read by the residual alone, or by nobody."""


def masked() -> Digits:
    net = Digits().double().eval()
    with torch.no_grad():
        for name, lost in LOST.items():
            net.get_submodule(name).weight[:, lost] = 0  # type: ignore[index]
    return net


def hold_the_masks(net: Digits) -> None:
    """Zeros stay zeros, as pruners keep them while fine-tuning."""
    for name in LOST:
        weight = net.get_submodule(name).get_parameter("weight")
        pattern = weight.detach().ne(0)
        weight.register_hook(lambda gradient, pattern=pattern: gradient * pattern)


def data() -> tuple[Tensor, Tensor]:
    """Shape (1797, 1, 8, 8) in [0, 1], and the digits."""
    digits = load_digits()
    return torch.from_numpy(digits.images).double().unsqueeze(1) / 16, torch.from_numpy(digits.target)


def epoch(net: nn.Module, make: Optimiser, **options: float) -> list[float]:
    """One epoch over 1500 digits in batches of 50; the losses."""
    images, targets = data()
    optimiser = make(net.parameters(), **options)
    losses: list[float] = []
    for at in range(0, 1500, 50):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(net(images[at : at + 50]), targets[at : at + 50])
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


def pair() -> tuple[Digits, fx.GraphModule]:
    net = masked()
    fast = chanopt.optimize(net, (data()[0][:2],))
    assert isinstance(fast, fx.GraphModule)
    assert fast.get_parameter("left.weight").shape[1] == 10
    assert chanopt.explain(fast).gathers + chanopt.explain(fast).slices > 0
    hold_the_masks(net)
    return net, fast


def test_gradients_equal_the_masked_models() -> None:
    net, fast = pair()
    images, targets = (part[:64] for part in data())
    for model in (net, fast):
        nn.functional.cross_entropy(model(images), targets).backward()
    for name, parameter in fast.named_parameters():
        dense, sparse = net.get_parameter(name).grad, parameter.grad
        assert dense is not None
        assert sparse is not None
        # every gradient of the masked model that is not zero is there, in whatever order channels stand
        ours, theirs = (part[part.abs() > 1e-15].sort().values for part in (sparse.flatten(), dense.flatten()))
        assert len(ours)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (torch.optim.SGD, {"lr": 0.3}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}),
        (torch.optim.Adam, {"lr": 3e-3}),
    ],
)
def test_an_epoch_leads_where_it_leads_the_masked_model(make: Optimiser, options: dict[str, float]) -> None:
    net, fast = pair()
    dense, slim = epoch(net, make, **options), epoch(fast, make, **options)
    assert slim[-1] < 0.8 * slim[0]
    assert slim == pytest.approx(dense, rel=1e-6)
    images, targets = data()
    with torch.no_grad():
        outputs = fast(images[1500:])
        torch.testing.assert_close(outputs, net(images[1500:]), rtol=1e-5, atol=1e-6)
    assert float((outputs.argmax(1) == targets[1500:]).double().mean()) > 0.4  # by chance: 0.1


def test_a_module_with_folded_batch_norms_trains() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10)),
    ).double()
    epoch(net, torch.optim.Adam, lr=1e-2)  # a trained network: its batch norms have statistics
    with torch.no_grad():
        net[3].weight[:, ::2] = 0
    images, targets = data()
    fast = chanopt.optimize(net.eval(), (images[:2],))
    before = copy.deepcopy(fast)
    losses = epoch(fast, torch.optim.SGD, lr=0.05)
    assert sum(losses[-5:]) < sum(losses[:5])
    with torch.no_grad():
        loss, old = (nn.functional.cross_entropy(m(images[1500:]), targets[1500:]) for m in (fast, before))
    assert loss < old


@pytest.mark.slow
def test_distributed_data_parallel(tmp_path: Path) -> None:
    """Two gloo processes, half the batch each, against one process with the whole."""
    _, fast = pair()
    chanopt.save(fast, tmp_path / "slim.pt2")
    paths = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(Path(__file__).with_name("ddp_worker.py")), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    states = [torch.load(tmp_path / f"state{rank}.pt", weights_only=True) for rank in (0, 1)]

    alone = chanopt.load(tmp_path / "slim.pt2")
    images, targets = data()
    optimiser = torch.optim.SGD(alone.parameters(), lr=0.1)
    for at in range(0, 300, 60):
        optimiser.zero_grad()
        nn.functional.cross_entropy(alone(images[at : at + 60]), targets[at : at + 60]).backward()
        optimiser.step()
    start = fast.state_dict()
    for name, tensor in alone.state_dict().items():
        assert torch.equal(states[0][name], states[1][name])
        torch.testing.assert_close(states[0][name], tensor, rtol=1e-10, atol=1e-12)
        assert not tensor.is_floating_point() or not torch.equal(tensor, start[name])
