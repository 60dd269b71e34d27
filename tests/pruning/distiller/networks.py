"""The networks that Distiller's example schedules are for, and the small ones of its tutorial."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from chanopt.pruning.distiller import CompressionScheduler

SCHEDULES = Path(__file__).parent / "schedules"


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, **options: object) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=bool(options.get("bias", False)))


class Block(nn.Module):
    """A residual block of the CIFAR networks (He et al., 2016, section 4.2), with a projecting shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(inputs, outputs, stride=stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = conv(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2((x if self.downsample is None else self.downsample(x)) + y)


class CifarResNet(nn.Module):
    """The ResNet of 6 n + 2 layers for 32 x 32 images, named as in Distiller's schedules."""

    def __init__(self, n: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = conv(3, 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = self._stage(n, 16, 16, 1)
        self.layer2 = self._stage(n, 16, 32, 2)
        self.layer3 = self._stage(n, 32, 64, 2)
        self.avgpool = nn.AvgPool2d(8, stride=1)
        self.fc = nn.Linear(64, classes)

    def _stage(self, n: int, inputs: int, outputs: int, stride: int) -> nn.Sequential:
        first = Block(inputs, outputs, stride)
        return nn.Sequential(first, *(Block(outputs, outputs, 1) for _ in range(n - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.avgpool(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.view(x.size(0), -1))


def resnet20_cifar() -> CifarResNet:
    return CifarResNet(3)


def resnet56_cifar() -> CifarResNet:
    return CifarResNet(9)


def cifar() -> tuple[Tensor]:
    return (torch.randn(1, 3, 32, 32),)


def play(scheduler: CompressionScheduler, epochs: int, optimizer: torch.optim.Optimizer | None = None) -> None:
    """All callbacks of a training loop of one minibatch an epoch in which nothing is learnt."""
    for epoch in range(epochs):
        scheduler.on_epoch_begin(epoch)
        scheduler.on_minibatch_begin(epoch, 0, 1, optimizer)
        scheduler.before_backward_pass(epoch, 0, 1, torch.zeros(()))
        scheduler.before_parameter_optimization(epoch, 0, 1)
        scheduler.on_minibatch_end(epoch, 0, 1, optimizer)
        scheduler.on_epoch_end(epoch, optimizer)


class Example1(nn.Module):
    """conv1 -> conv2."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv(3, 8, bias=True)
        self.conv2 = conv(8, 5, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x).relu())


class Example2(nn.Module):
    """conv1 -> batch norm -> conv2."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv(3, 8)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = conv(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.bn1(self.conv1(x)).relu())


class Example3(nn.Module):
    """conv2 and conv3 both read conv1."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv(3, 8)
        self.conv2 = conv(8, 5)
        self.conv3 = conv(8, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv1(x).relu()
        return self.conv2(y), self.conv3(y)


class Example4(nn.Module):
    """conv3 reads the sum of conv1 and conv2 (examples 4 and 5 of the tutorial)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv(3, 8)
        self.conv2 = conv(3, 8)
        self.conv3 = conv(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3((self.conv1(x) + self.conv2(x)).relu())
