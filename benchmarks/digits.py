"""Small networks on real data that a package carries: scikit-learn's digits, 1797 images of 8 x 8 pixels.

The test set of the UCI data "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998). A third of the
images, drawn once, is kept for testing; a seed chooses the weights a network begins with and the order of its batches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

BATCH = 64
"""Images in a training step; the last ones of an epoch that do not fill a batch are left out."""


@dataclass(frozen=True, slots=True)
class Data:
    """Images of shape (n, 1, 8, 8), each pixel less the training images' mean, over their deviation; and digits."""

    train: Tensor
    train_digits: Tensor
    test: Tensor
    test_digits: Tensor

    @property
    def steps(self) -> int:
        """Batches of an epoch."""
        return len(self.train) // BATCH


@functools.cache
def data() -> Data:
    """The images, always split alike: 1198 to train with, 599 to test with, every digit as often in both."""
    images, digits = load_digits(return_X_y=True)
    parts = train_test_split(images, digits, test_size=1 / 3, random_state=0, stratify=digits)
    train, test = (torch.as_tensor(part, dtype=torch.float32).reshape(-1, 1, 8, 8) for part in parts[:2])
    told = [torch.as_tensor(part, dtype=torch.int64) for part in parts[2:]]
    mean, deviation = train.mean(), train.std()
    return Data((train - mean) / deviation, told[0], (test - mean) / deviation, told[1])


# -- networks ---------------------------------------------------------------------------------------------------------


def _conv(inside: int, outside: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inside, outside, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outside))


class _Residual(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(inside, outside, stride=stride)
        self.conv2 = _conv(outside, outside)
        self.project = _conv(inside, outside, 1, stride) if inside != outside else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv2(self.conv1(x).relu()) + self.project(x)).relu()


class _Dense(nn.Module):
    """A layer of a dense block (Huang et al. 2017): what it reads, with `growth` more channels behind."""

    def __init__(self, inside: int, growth: int, between: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inside)
        self.conv1 = _conv(inside, between, 1)
        self.conv2 = nn.Conv2d(between, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv2(self.conv1(self.norm(x).relu()).relu())], 1)


class _Transition(nn.Module):
    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inside)
        self.conv = nn.Conv2d(inside, outside, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.avg_pool2d(self.conv(self.norm(x).relu()), 2)


class _Inverted(nn.Module):
    """An inverted residual (Sandler et al. 2018)."""

    def __init__(self, inside: int, outside: int, stride: int, expand: int) -> None:
        super().__init__()
        self.expand = _conv(inside, expand * inside, 1)
        self.depthwise = _conv(expand * inside, expand * inside, 3, stride, groups=expand * inside)
        self.project = _conv(expand * inside, outside, 1)
        self.adds = stride == 1 and inside == outside

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(functional.relu6(self.depthwise(functional.relu6(self.expand(x)))))
        return x + y if self.adds else y


class _Pooled(nn.Module):
    """Features, averaged over the pixels, and a classifier."""

    def __init__(self, features: nn.Sequential, channels: int) -> None:
        super().__init__()
        self.features = features
        self.classifier = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def resnet() -> nn.Module:
    """A ResNet: two stages of two blocks, 24 channels on 8 x 8 pixels and 48 on 4 x 4."""
    parts: list[nn.Module] = [_conv(1, 24), nn.ReLU()]
    parts += [_Residual(24, 24, 1), _Residual(24, 24, 1), _Residual(24, 48, 2), _Residual(48, 48, 1)]
    return _Pooled(nn.Sequential(*parts), 48)


def densenet() -> nn.Module:
    """A DenseNet with bottlenecks: two blocks of four layers, growth 12, and a transition that halves."""
    parts: list[nn.Module] = [nn.Conv2d(1, 24, 3, padding=1, bias=False)]
    parts += [_Dense(24 + 12 * layer, 12, 32) for layer in range(4)]
    parts += [_Transition(72, 36)]
    parts += [_Dense(36 + 12 * layer, 12, 32) for layer in range(4)]
    return _Pooled(nn.Sequential(*parts, nn.BatchNorm2d(84), nn.ReLU()), 84)


def mobilenet() -> nn.Module:
    """A MobileNetV2: two stages of three inverted residuals, 16 channels on 8 x 8 pixels and 24 on 4 x 4."""
    parts: list[nn.Module] = [_conv(1, 16), nn.ReLU6()]
    parts += [_Inverted(16, 16, 1, 3), _Inverted(16, 16, 1, 3), _Inverted(16, 16, 1, 3)]
    parts += [_Inverted(16, 24, 2, 4), _Inverted(24, 24, 1, 4), _Inverted(24, 24, 1, 4)]
    return _Pooled(nn.Sequential(*parts, _conv(24, 64, 1), nn.ReLU6()), 64)


NETS: Mapping[str, Callable[[], nn.Module]] = {net.__name__: net for net in (resnet, densenet, mobilenet)}


# -- training ---------------------------------------------------------------------------------------------------------

Hook = Callable[[], None]


def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The training images of one epoch, shuffled: pairs of shape (64, 1, 8, 8) and (64,)."""
    order = torch.randperm(len(data().train), generator=torch.Generator().manual_seed(seed))
    for step in range(data().steps):
        rows = order[step * BATCH : (step + 1) * BATCH]
        yield data().train[rows], data().train_digits[rows]


def train(
    net: nn.Module,
    epochs: int,
    *,
    seed: int,
    rate: float = 0.1,
    at_epoch: Callable[[int], None] = lambda epoch: None,
    at_step: Hook = lambda: None,
) -> nn.Module:
    """Train a network in place, by SGD with momentum and a rate that falls to zero along a cosine.

    Args:
        net: the network, with the masks it is to begin with; returned in eval mode.
        epochs: times that every image is seen; none leaves the network as it is.
        seed: of the order of the batches.
        rate: the learning rate to begin with.
        at_epoch: called with the number of every epoch before it begins.
        at_step: called between the backward pass and the optimiser's step.
    """
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, epochs * data().steps))
    for epoch in range(epochs):
        at_epoch(epoch)
        for images, digits in batches(1000 * seed + epoch):
            optimizer.zero_grad()
            functional.cross_entropy(net(images), digits, label_smoothing=0.1).backward()
            at_step()
            optimizer.step()
            falling.step()
    return net.eval()


def trained(name: str, seed: int, epochs: int) -> nn.Module:
    """A network of `NETS`, trained from scratch, in eval mode.

    Raises:
        KeyError: there is no such network.
    """
    torch.manual_seed(seed)
    return train(NETS[name](), epochs, seed=seed)


@torch.no_grad()
def outputs(net: nn.Module) -> Tensor:
    """What a network makes of the test images: shape (599, 10)."""
    return net(data().test)


def accuracy(logits: Tensor) -> float:
    """The share of the test images that outputs of shape (599, 10) tell rightly."""
    return float((logits.argmax(1) == data().test_digits).double().mean())
