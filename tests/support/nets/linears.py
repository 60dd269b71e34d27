"""Linear layers: after flatten, in MLPs, mixers, attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.nets.base import Net, conv, image, micro, parameter, tensors


@micro("flatten of 1x1 maps, then linear")
def flatten_one() -> nn.Module:
    return nn.Sequential(
        conv(3, 8, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
        nn.ReLU(),
        nn.Linear(10, 5),
    )


@micro("flatten of 4x4 maps, then linear: one channel is 16 columns", image(3, 8))
def flatten_many() -> nn.Module:
    return nn.Sequential(
        conv(3, 8, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
        nn.ReLU(),
        nn.Linear(10, 5),
    )


@micro("x.view(x.size(0), -1), then linear", image(3, 4))
def flatten_by_view() -> nn.Module:
    return Net(lambda n, x: n.b((t := n.a(x).relu()).view(t.size(0), -1)), a=conv(3, 8, 3), b=nn.Linear(8 * 16, 5))


@micro("channels last, flattened, then linear: the columns of a channel are strided", image(3, 4))
def flatten_channels_last() -> nn.Module:
    return Net(
        lambda n, x: n.b(n.a(x).relu().permute(0, 2, 3, 1).flatten(1)),
        a=conv(3, 8, 3),
        b=nn.Linear(16 * 8, 5),
    )


@micro("a linear layer made into a feature map again (generator stem)", tensors((6,)))
def linear_to_map() -> nn.Module:
    return Net(lambda n, x: n.b(n.a(x).relu().view(-1, 8, 3, 3)), a=nn.Linear(6, 72), b=conv(8, 6, 3))


@micro("mean over H and W, then linear")
def mean_linear() -> nn.Module:
    return Net(lambda n, x: n.b(n.a(x).relu().mean([2, 3])), a=conv(3, 8, 3), b=nn.Linear(8, 5))


@micro("adaptive pool with keepdim, squeezed twice, then linear")
def squeeze_linear() -> nn.Module:
    return Net(
        lambda n, x: n.b(F.adaptive_avg_pool2d(n.a(x).relu(), 1).squeeze(-1).squeeze(-1)),
        a=conv(3, 8, 3),
        b=nn.Linear(8, 5),
    )


@micro("maximum and mean pooled side by side, then linear")
def pool_cat_linear() -> nn.Module:
    return Net(
        lambda n, x: n.b(torch.cat([(t := n.a(x)).amax((2, 3)), t.mean((2, 3))], 1)),
        a=conv(3, 8, 3),
        b=nn.Linear(16, 5),
    )


@micro("MLP on (N, features)", tensors((6,)))
def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 10), nn.GELU(), nn.Linear(10, 5))


@micro("MLP on (N, tokens, features): the channel axis is the last", tensors((5, 6)))
def mlp_tokens() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 10, bias=False), nn.ReLU(), nn.Linear(10, 5))


@micro("residual MLP with layer norm (transformer feed-forward)", tensors((5, 8)))
def mlp_residual() -> nn.Module:
    return Net(
        lambda n, x: n.head(x + n.b(F.gelu(n.a(n.norm(x))))),
        norm=nn.LayerNorm(8),
        a=nn.Linear(8, 16),
        b=nn.Linear(16, 8),
        head=nn.Linear(8, 5),
    )


@micro("SwiGLU feed-forward", tensors((5, 8)))
def mlp_gated() -> nn.Module:
    return Net(
        lambda n, x: x + n.down(F.silu(n.gate(x)) * n.up(x)),
        gate=nn.Linear(8, 16),
        up=nn.Linear(8, 16),
        down=nn.Linear(16, 8),
    )


@micro("MLP-mixer: one linear over tokens, one over channels", tensors((6, 8)))
def mixer() -> nn.Module:
    def body(n: Net, x: Tensor) -> Tensor:
        t = x + n.token2(F.gelu(n.token1(n.norm1(x).transpose(1, 2)))).transpose(1, 2)
        t = t + n.channel2(F.gelu(n.channel1(n.norm2(t))))
        return n.head(t.mean(1))

    return Net(
        body,
        norm1=nn.LayerNorm(8),
        norm2=nn.LayerNorm(8),
        token1=nn.Linear(6, 10),
        token2=nn.Linear(10, 6),
        channel1=nn.Linear(8, 16),
        channel2=nn.Linear(16, 8),
        head=nn.Linear(8, 5),
    )


class Attention(nn.Module):
    """Self-attention over (N, tokens, width) with one joint qkv layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        scores = (query @ key.transpose(-2, -1)) * (width // self.heads) ** -0.5
        mixed = scores.softmax(-1) @ value
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))


@micro("self-attention with a joint qkv layer, two heads", tensors((5, 8)))
def attention() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), Attention(8, 2), nn.Linear(8, 5))


@micro("attention by scaled_dot_product_attention with separate q, k, v layers", tensors((5, 8)))
def attention_fused() -> nn.Module:
    def body(n: Net, x: Tensor) -> Tensor:
        split = [layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (n.q, n.k, n.v)]
        mixed = F.scaled_dot_product_attention(split[0], split[1], split[2])
        return n.out(mixed.transpose(1, 2).flatten(2))

    return Net(body, q=nn.Linear(8, 8), k=nn.Linear(8, 8), v=nn.Linear(8, 8), out=nn.Linear(8, 5))


@micro("one pre-norm transformer block on image patches, class token and position embedding")
def transformer() -> nn.Module:
    def body(n: Net, x: Tensor) -> Tensor:
        tokens = n.patch(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([n.token.expand(x.shape[0], -1, -1), tokens], 1) + n.position
        tokens = tokens + n.attention(n.norm1(tokens))
        tokens = tokens + n.b(F.gelu(n.a(n.norm2(tokens))))
        return n.head(tokens[:, 0])

    return Net(
        body,
        patch=nn.Conv2d(3, 8, 4, 4),
        token=parameter(1, 1, 8),
        position=parameter(1, 5, 8),
        norm1=nn.LayerNorm(8),
        attention=Attention(8, 2),
        norm2=nn.LayerNorm(8),
        a=nn.Linear(8, 16),
        b=nn.Linear(16, 8),
        head=nn.Linear(8, 5),
    )


@micro("nn.MultiheadAttention: its joint weight is a bare parameter", tensors((5, 8)))
def multihead_attention() -> nn.Module:
    return Net(
        lambda n, x: n.head(n.mha(t := n.a(x), t, t, need_weights=False)[0]),
        a=nn.Linear(8, 8),
        mha=nn.MultiheadAttention(8, 2, batch_first=True),
        head=nn.Linear(8, 5),
    )


@micro("non-local block: feature maps multiplied with each other", image(3, 5))
def non_local() -> nn.Module:
    def body(n: Net, x: Tensor) -> Tensor:
        t = n.stem(x)
        query, key, value = n.q(t).flatten(2), n.k(t).flatten(2), n.v(t).flatten(2)
        weights = (query.transpose(1, 2) @ key * 0.3).softmax(-1)
        return n.head(t + (value @ weights.transpose(1, 2)).reshape(t.shape))

    return Net(body, stem=conv(3, 8, 3), q=conv(8, 4), k=conv(8, 4), v=conv(8, 8), head=conv(8, 6))


@micro("Gram matrix of the channels (bilinear pooling), then linear", image(3, 5))
def gram() -> nn.Module:
    def body(n: Net, x: Tensor) -> Tensor:
        t = n.a(x).relu().flatten(2)
        return n.b((t @ t.transpose(1, 2) / 25).flatten(1))

    return Net(body, a=conv(3, 6, 3), b=nn.Linear(36, 5))


@micro("ConvNeXt block: depthwise 7x7, layer norm, linear layers on channels last, layer scale")
def convnext() -> nn.Module:
    def body(n: Net, x: Tensor) -> Tensor:
        t = n.stem(x)
        inner = n.b(F.gelu(n.a(n.norm(n.depthwise(t).permute(0, 2, 3, 1)))))
        return n.head(t + (n.gamma * inner).permute(0, 3, 1, 2))

    return Net(
        body,
        stem=conv(3, 8, 3),
        depthwise=conv(8, 8, 7, groups=8),
        norm=nn.LayerNorm(8),
        a=nn.Linear(8, 16),
        b=nn.Linear(16, 8),
        gamma=parameter(8),
        head=conv(8, 6),
    )


@micro("linear layer on the W axis of a feature map: columns are positions, channels a batch")
def linear_on_width() -> nn.Module:
    return Net(lambda n, x: n.b(n.w(n.a(x).relu())), a=conv(3, 8, 3), w=nn.Linear(8, 8), b=conv(8, 6))


@micro("linear layers shared over two inputs of one difference (siamese)", tensors((6,)))
def siamese() -> nn.Module:
    return Net(
        lambda n, x: n.head((n.tower(x) - n.tower(x.flip(1))).abs()),
        tower=nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8), nn.Tanh()),
        head=nn.Linear(8, 5),
    )


def _tokens(batch: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    return (torch.randint(0, 20, (batch, 12), generator=torch.Generator().manual_seed(seed)),)


@micro("integer tokens, embedding, 1-D convs: the embedding gives birth to channels", _tokens)
def embedding() -> nn.Module:
    return Net(
        lambda n, x: n.b(n.a(n.table(x).transpose(1, 2)).relu()),
        table=nn.Embedding(20, 8),
        a=nn.Conv1d(8, 10, 3, padding=1),
        b=nn.Conv1d(10, 6, 1),
    )


@micro(
    "a recurrence unrolled over four steps: one linear layer reads its own output again and again",
    tensors((4, 7)),
)
def recurrent() -> nn.Module:
    def body(n: Net, x: Tensor) -> Tensor:
        state = torch.zeros_like(x[:, 0, :1]).expand(-1, 8)
        for step in n.enter(x).unbind(1):
            state = torch.tanh(step + n.again(state))
        return n.b(state)

    return Net(body, enter=nn.Linear(7, 8), again=nn.Linear(8, 8), b=nn.Linear(8, 5))
