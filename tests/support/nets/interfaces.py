"""What goes in and comes out: several inputs, dicts, nested outputs, values both returned and read."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.support.nets.base import Net, Net2, conv, micro, tensors

PAIR = tensors((3, 8, 8), (3, 8, 8))


@micro("a hidden value is returned and read")
def returned_and_read() -> nn.Module:
    return Net(lambda n, x: (t := n.a(x).relu(), n.b(t)), a=conv(3, 8, 3), b=conv(8, 6))


@micro("an ordered dict with the key 'out' and an auxiliary head, as segmentation nets return it")
def dict_output() -> nn.Module:
    return Net(
        lambda n, x: OrderedDict(out=n.b(t := n.a(x).relu()), aux=n.c(t)),
        a=conv(3, 8, 3),
        b=conv(8, 6),
        c=conv(8, 4),
    )


@micro("a tuple of three outputs, one of them the input of another head")
def tuple_output() -> nn.Module:
    return Net(
        lambda n, x: (u := n.b(t := n.a(x).relu()), n.c(t), n.d(u)),
        a=conv(3, 8, 3),
        b=conv(8, 6),
        c=conv(8, 4, 3),
        d=conv(6, 5),
    )


@micro("lists and dicts inside each other, with a None")
def nested_output() -> nn.Module:
    def body(n: Net, x: Tensor) -> dict[str, Any]:
        t = n.a(x).relu()
        return {"levels": [n.b(t), (n.c(t), None)], "pooled": t.mean((2, 3))}

    return Net(body, a=conv(3, 8, 3), b=conv(8, 6), c=conv(8, 4))


class Heads(NamedTuple):
    """Two outputs with names."""

    first: Tensor
    second: Tensor


# Without a registered name torch.export.save refuses the class; torch has no public way to give it one.
pytree._register_namedtuple(  # pyright: ignore[reportPrivateUsage]
    Heads, serialized_type_name="tests.support.Heads"
)


@micro("a named tuple")
def named_tuple_output() -> nn.Module:
    return Net(lambda n, x: Heads(n.b(t := n.a(x).relu()), n.c(t)), a=conv(3, 8, 3), b=conv(8, 6), c=conv(8, 4))


@micro("the same value returned twice")
def output_twice() -> nn.Module:
    return Net(lambda n, x: (t := n.b(n.a(x).relu()), t), a=conv(3, 8, 3), b=conv(8, 6))


@micro("two inputs, one stem each, added", PAIR)
def two_inputs_added() -> nn.Module:
    return Net2(lambda n, x, y: n.c((n.a(x) + n.b(y)).relu()), a=conv(3, 8, 3), b=conv(3, 8), c=conv(8, 6))


@micro("two inputs added before the first conv", PAIR)
def inputs_added_first() -> nn.Module:
    return Net2(lambda n, x, y: n.b(n.a(x + y).relu()), a=conv(3, 8, 3), b=conv(8, 6))


@micro("an image and a vector that is broadcast onto the map", tensors((3, 8, 8), (5,)))
def image_and_vector() -> nn.Module:
    return Net2(
        lambda n, x, y: n.c((n.a(x) * n.b(y)[:, :, None, None]).relu()),
        a=conv(3, 8, 3),
        b=nn.Linear(5, 8),
        c=conv(8, 6),
    )


@micro(
    "the second input meets hidden channels directly: they are pinned through the add",
    tensors((3, 8, 8), (8, 8, 8)),
)
def input_pins_channels() -> nn.Module:
    return Net2(lambda n, x, y: n.b((n.a(x) + y).relu()), a=conv(3, 8, 3), b=conv(8, 6))


@micro("the second input is never read", PAIR)
def unused_input() -> nn.Module:
    return Net2(lambda n, x, y: n.b(n.a(x).relu()), a=conv(3, 8, 3), b=conv(8, 6))


@micro(
    "one argument that is a dict of two tensors",
    lambda b, d, s: (dict(zip(("left", "right"), PAIR(b, d, s), strict=True)),),
)
def dict_input() -> nn.Module:
    return Net(
        lambda n, x: n.c(torch.cat([n.a(x["left"]), n.b(x["right"])], 1).relu()),
        a=conv(3, 8, 3),
        b=conv(3, 4),
        c=conv(12, 6),
    )


@micro("one argument that is a list of two tensors", lambda b, d, s: (list(PAIR(b, d, s)),))
def list_input() -> nn.Module:
    return Net(lambda n, x: n.c(n.a(x[0]).relu() * n.b(x[1])), a=conv(3, 8, 3), b=conv(3, 8), c=conv(8, 6))


@micro("the module returns its input next to its result")
def returns_input() -> nn.Module:
    return Net(lambda n, x: (x, n.b(n.a(x).relu())), a=conv(3, 8, 3), b=conv(8, 6))


@micro("nothing but the identity")
def identity() -> nn.Module:
    return nn.Sequential(nn.Identity())


@micro("the image is normalised first: (x - mean) / std with buffers")
def normalised_input() -> nn.Module:
    return Net(
        lambda n, x: n.b(n.a((x - n.mean) / n.std).relu()),
        mean=torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1),
        std=torch.tensor([0.2, 0.3, 0.4]).view(1, 3, 1, 1),
        a=conv(3, 8, 3),
        b=conv(8, 6),
    )


@micro("input channels swapped and gray added before the first conv")
def preprocessed_input() -> nn.Module:
    return Net(
        lambda n, x: n.b(n.a(torch.cat([x.flip(1), x.mean(1, keepdim=True)], 1)).relu()),
        a=conv(4, 8, 3),
        b=conv(8, 6),
    )


@micro("outputs reordered by flip before they are returned")
def flipped_output() -> nn.Module:
    return Net(lambda n, x: n.b(n.a(x).relu()).flip(1), a=conv(3, 8, 3), b=conv(8, 6))


@micro("outputs in channels-last order")
def permuted_output() -> nn.Module:
    return Net(lambda n, x: n.b(n.a(x).relu()).permute(0, 2, 3, 1), a=conv(3, 8, 3), b=conv(8, 6))


@micro("detection head: boxes and scores reshaped to (N, anchors, 5) and split")
def detection_head() -> nn.Module:
    def body(n: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        t = n.b(n.a(x).relu())
        boxes, scores = t.view(t.shape[0], 3, 5, -1).permute(0, 1, 3, 2).split([4, 1], -1)
        return boxes, scores.sigmoid()

    return Net(body, a=conv(3, 8, 3), b=conv(8, 15))
