"""Whole networks as files, so that `benchmarks/gpu.py` runs where neither OR-Tools nor the peer is installed.

    python -m benchmarks.gpu_plans

masks the residual readers of each network, makes its variants (dense, naive gather, UPSCALE's order, chanopt) and
writes their graphs to benchmarks/plans/, one compressed JSON file each. A file holds operators, shapes and tables of
channels, and no weights: those are drawn from a seed wherever the file is read. Variants of a network therefore do not
compute the same numbers; each is compared with itself in float64.

Masks: each residual reader keeps a random half of its channels, in whole eights of them, but for the last reader of
every segment, which keeps all. So nothing in a segment is dead, and no variant gains by the number of channels of its
segments, only by how they are read.
"""

from __future__ import annotations

import argparse
import gzip
import json
import operator
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from chanopt.kernels import Call, Covered, coverage, pack

PLANS = Path(__file__).parent / "plans"
MODELS = {"resnet50": 224, "densenet121": 224, "efficientnet_v2_s": 384}
VARIANTS = ("dense", "naive", "upscale", "chanopt")
SEED = 0

aten = torch.ops.aten
_TYPES: tuple[type, ...] = (torch.dtype, torch.memory_format, torch.device, torch.layout)
_ACTS: dict[Any, str] = {
    aten.relu.default: "relu",
    aten.relu_.default: "relu",
    aten.silu.default: "silu",
    aten.silu_.default: "silu",
    aten.hardswish.default: "hardswish",
    aten.hardswish_.default: "hardswish",
    aten.sigmoid.default: "sigmoid",
}


def plan_path(model: str, variant: str, folder: Path = PLANS) -> Path:
    """Where a variant's graph is kept."""
    return folder / f"{model}-{variant}.json.gz"


def dump(module: fx.GraphModule, path: Path) -> None:
    """Write a module's graph: operators, shapes, integer tables; no weights."""
    nodes: list[dict[str, Any]] = []
    tensors: dict[str, dict[str, Any]] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            tensors.setdefault(str(node.target), _describe(module, node))
        target = _target(node.target) if node.op == "call_function" else str(node.target)
        nodes.append(
            {
                "op": node.op,
                "name": node.name,
                "target": target,
                "args": _encode(node.args),
                "kwargs": _encode(node.kwargs),
            }
        )
    text = json.dumps({"version": 1, "nodes": nodes, "tensors": tensors}, separators=(",", ":"))
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without a date in it, the same graph is the same file.
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def load(path: Path, seed: int = SEED) -> fx.GraphModule:
    """A module out of a file, in float32 on the CPU, its weights drawn from a seed.

    Raises:
        FileNotFoundError: no such plan; `python -m benchmarks.gpu_plans` makes them.
    """
    import chanopt.kernels  # noqa: F401  # pyright: ignore[reportUnusedImport]

    data = json.loads(gzip.decompress(path.read_bytes()))
    root, graph = nn.Module(), fx.Graph()
    for name, about in data["tensors"].items():
        root.register_buffer(_flat(name), _draw(name, about, seed))
    env: dict[str, fx.Node] = {}
    for node in data["nodes"]:
        target = _resolve(node["target"]) if node["op"] == "call_function" else _flat(node["target"])
        args, kwargs = _decode(node["args"], env), _decode(node["kwargs"], env)
        env[node["name"]] = graph.create_node(node["op"], target, tuple(args), kwargs, node["name"])
    return fx.GraphModule(root, graph, path.name.partition(".")[0].replace("-", "_"))


def fuse(module: fx.GraphModule) -> int:
    """Replace gathers, slices and batch norms before convs by `chanopt::gather_conv2d`, with what follows the conv.

    For channels-last memory and half precision; what no kernel covers there stays as it is.

    Returns:
        How many convs were replaced.
    """
    count = 0
    for node in list(module.graph.nodes):
        if node.target is aten.conv2d.default and _fuse_one(module, node):
            count += 1
    module.graph.eliminate_dead_code()
    module.recompile()
    return count


def _fuse_one(module: fx.GraphModule, conv: fx.Node) -> bool:
    weight, bias, stride, padding, dilation, groups = _conv_arguments(conv)
    taken = conv.args[0]
    assert isinstance(taken, fx.Node)
    affine = None
    act_before = "none"
    chain = taken
    if chain.target in _ACTS and len(chain.users) == 1 and isinstance(chain.args[0], fx.Node):
        chain, act_before = chain.args[0], _ACTS[chain.target]
    if chain.target is aten.batch_norm.default and len(chain.users) == 1:
        affine, chain = chain, chain.args[0]
    if affine is None:
        act_before, chain = "none", taken
    assert isinstance(chain, fx.Node)
    source = _source(module, chain)
    if source is None and affine is not None:
        # Nothing to gather, but the batch norm and its activation need not be written to memory.
        source = chain, list(range(chain.meta["val"].shape[1]))
    value = conv.meta.get("val")
    if source is None or groups != 1 or value is None or not isinstance(weight, fx.Node):
        return False
    x, index = source
    total = x.meta["val"].shape[1]
    old = _tensor(module, weight)
    if total % 8 or old.shape[0] % 8 or old.shape[1] != len(index):
        return False
    scale = shift = None
    if affine is not None:
        gamma, beta, mean, variance = (_tensor(module, n) for n in affine.args[1:5])
        scale = gamma / (variance + float(affine.args[7])) ** 0.5  # type: ignore[arg-type]
        shift = beta - mean * scale
    packed = pack(index, old, total, scale=scale, shift=shift)
    example = Call(
        torch.empty(1, total, *x.meta["val"].shape[2:], dtype=torch.half, device="meta").to(
            memory_format=torch.channels_last
        ),
        packed.weight.half().to("meta"), None, packed.groups.to("meta"), 8, tuple(stride), tuple(padding),
        tuple(dilation),
    )  # fmt: skip
    if not isinstance(coverage(example), Covered):
        return False
    last, residual, act = _epilogue(conv)
    name = str(weight.target).replace(".", "_")
    tables = {"weight": packed.weight, "groups": packed.groups, "scale": packed.scale, "shift": packed.shift}
    made: dict[str, fx.Node | None] = {}
    with module.graph.inserting_before(last):
        for kind, tensor in tables.items():
            if tensor is not None:
                module.register_buffer(f"{name}_fused_{kind}", tensor)
            made[kind] = None if tensor is None else module.graph.get_attr(f"{name}_fused_{kind}")
        new = module.graph.call_function(
            torch.ops.chanopt.gather_conv2d.default,
            (
                x, made["weight"], bias, made["groups"], 8, list(stride), list(padding), list(dilation),
                made["scale"], made["shift"], act_before, residual, act,
            ),
        )  # fmt: skip
    new.meta["val"] = last.meta.get("val")
    last.replace_all_uses_with(new)
    _erase(module.graph, last)
    return True


def _erase(graph: fx.Graph, last: fx.Node) -> None:
    """Drop what a fused conv stands for, from its last node back to the gather.

    Dead-code elimination would leave the operators that write in place.
    """
    chain = [last]
    while chain:
        node = chain.pop()
        if node.users or node.op != "call_function":
            continue
        before = node.all_input_nodes
        graph.erase_node(node)
        chain += before


def _epilogue(conv: fx.Node) -> tuple[fx.Node, fx.Node | None, str]:
    """(the last node of what can be fused after a conv, what it adds, its activation)."""
    last, residual, act = conv, None, "none"
    user = _only_user(last)
    if user is not None and user.target in (aten.add.Tensor, aten.add_.Tensor) and len(user.args) == 2:
        other = next((arg for arg in user.args if arg is not last), None)
        # The add stands where both operands are known, so the fused conv can stand there too.
        if isinstance(other, fx.Node) and other.meta["val"].shape == last.meta["val"].shape:
            last, residual = user, other
    user = _only_user(last)
    if user is not None and user.target in _ACTS:
        last, act = user, _ACTS[user.target]
    return last, residual, act


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _source(module: fx.GraphModule, taken: fx.Node) -> tuple[fx.Node, list[int]] | None:
    """(the whole value, the channels that are taken of it)."""
    if len(taken.users) != 1 or not isinstance(taken.args[0] if taken.args else None, fx.Node):
        return None
    x = taken.args[0]
    assert isinstance(x, fx.Node)
    if taken.target is aten.index_select.default and taken.args[1] == 1 and isinstance(taken.args[2], fx.Node):
        return x, _tensor(module, taken.args[2]).tolist()
    if taken.target is aten.slice.Tensor and taken.args[1] == 1:
        start, end = taken.args[2:4]
        return x, list(range(x.meta["val"].shape[1]))[start:end]  # type: ignore[misc]
    return None


def _conv_arguments(conv: fx.Node) -> tuple[Any, ...]:
    given = [*conv.args[1:], *[None, None, [1, 1], [0, 0], [1, 1], 1][len(conv.args) - 1 :]]
    return tuple(given)


def propagate(module: fx.GraphModule, inputs: tuple[Tensor, ...]) -> None:
    """Give every node its shape, under the name that torch.export uses."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    FakeTensorProp(module, FakeTensorMode(allow_non_fake_inputs=True)).propagate(*inputs)


def masked(name: str, fraction: float = 0.5) -> nn.Module:
    """A network with random weights whose residual readers keep a fraction of their channels."""
    from benchmarks import zoo

    model = zoo.build(name)
    generator = torch.Generator().manual_seed(SEED)
    convs = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    with torch.no_grad():
        for reader in readers(name, convs):
            channels = convs[reader].in_channels
            kept = max(8, round(channels * fraction / 8) * 8)
            dead = torch.randperm(channels, generator=generator)[kept:]
            convs[reader].weight[:, dead] = 0
    return model


def readers(name: str, convs: dict[str, nn.Conv2d]) -> list[str]:
    """The readers of residual segments, but the last of each."""
    rules: dict[str, Callable[[str], bool]] = {
        # Within a stage: the first conv of every block. `downsample` reads a stage's last value, and all of it.
        "resnet50": lambda n: n.startswith("layer") and n.endswith("conv1"),
        # The transitions read all.
        "densenet121": lambda n: "denselayer" in n and n.endswith("conv1") and not n.endswith("denselayer1.conv1"),
        # The first block of a stage reads all that the stage before has made.
        "efficientnet_v2_s": lambda n: n.count(".") == 5 and n.endswith(".block.0.0") and n.split(".")[2] != "0",
    }
    return [n for n in convs if rules[name](n)]


def laid_out() -> tuple[Any, ...]:
    """The default pipeline without the choice of how convs read: here every way is timed."""
    from chanopt.passes import DEFAULT, AlignChannels, RealizeReads

    return tuple(step for step in DEFAULT if not isinstance(step, AlignChannels | RealizeReads))


def variants(name: str, resolution: int) -> dict[str, fx.GraphModule]:
    """A network's variants as modules; one that the peer cannot make is left out."""
    import chanopt
    from benchmarks import peers, zoo
    from chanopt.errors import ChanoptError
    from chanopt.passes import FoldAffine, OrderChannels

    x = (torch.randn(2, 3, resolution, resolution),)
    model = masked(name)
    plain = tuple(step for step in laid_out() if not isinstance(step, OrderChannels))
    made: dict[str, Any] = {
        "dense": chanopt.optimize(zoo.build(name), x, pipeline=plain),
        "naive": chanopt.optimize(model, x, pipeline=plain),
    }
    try:
        exported = peers.export(model, (x[0][:1],)).module.eval()
        made["upscale"] = chanopt.optimize(exported, x, pipeline=(FoldAffine(),))
    except (peers.PeerError, ImportError, ChanoptError) as error:
        print(f"{name}: no UPSCALE variant: {error}", file=sys.stderr)
    ours: Any = chanopt.optimize(model, x, target="cuda", pipeline=laid_out())
    propagate(ours, x)
    print(f"{name}: {fuse(ours)} convs fused with their gather or prologue")
    return made | {"chanopt": ours}


def main(argv: Sequence[str] | None = None) -> int:
    """Make the files."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_plans", description=__doc__)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--out", type=Path, default=PLANS)
    options = parser.parse_args(argv)
    for name in options.models:
        for variant, module in variants(name, MODELS[name]).items():
            path = plan_path(name, variant, options.out)
            dump(module, path)
            print(f"{path}: {path.stat().st_size:,} bytes, {len(module.graph.nodes)} nodes", flush=True)
    return 0


def _tensor(module: fx.GraphModule, node: Any) -> Tensor:
    found: Any = module
    for part in str(node.target).split("."):
        found = getattr(found, part)
    return found.detach()


def _describe(module: fx.GraphModule, node: fx.Node) -> dict[str, Any]:
    tensor = _tensor(module, node)
    if not tensor.is_floating_point():
        return {"dtype": str(tensor.dtype), "shape": list(tensor.shape), "values": tensor.flatten().tolist()}
    order = sorted(range(tensor.dim()), key=lambda d: (-tensor.stride(d), d))
    about = {"dtype": str(tensor.dtype), "shape": list(tensor.shape), "order": order, "role": "weight"}
    for user in node.users:
        position = user.args.index(node) if node in user.args else -1
        if user.target is aten.batch_norm.default and position in (1, 4):
            about["role"] = "positive"
        if tensor.dim() <= 1 and about["role"] == "weight":
            about["role"] = "positive" if _is_scale(user, position) else "small"
    return about


def _is_scale(user: fx.Node, position: int) -> bool:
    return user.target is torch.ops.chanopt.gather_conv2d.default and position == 8


def _draw(name: str, about: dict[str, Any], seed: int) -> Tensor:
    dtype = getattr(torch, about["dtype"].removeprefix("torch."))
    if "values" in about:
        return torch.tensor(about["values"], dtype=dtype).reshape(about["shape"])
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
    if about["role"] == "positive":
        return torch.rand(about["shape"], generator=generator, dtype=torch.float32).add(0.5).to(dtype)
    if about["role"] == "small":
        return torch.randn(about["shape"], generator=generator).mul(0.1).to(dtype)
    fan = max(1, torch.Size(about["shape"][1:]).numel())
    drawn = torch.randn(about["shape"], generator=generator).div(fan**0.5).to(dtype)
    order = about["order"]
    return drawn.permute(order).contiguous().permute([order.index(d) for d in range(len(order))])


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _target(target: Any) -> str:
    if isinstance(target, OpOverload):
        return str(target)
    assert getattr(operator, target.__name__, None) is target, target
    return f"operator.{target.__name__}"


def _resolve(target: str) -> Callable[..., Any]:
    namespace, _, rest = target.partition(".")
    if namespace == "operator":
        return getattr(operator, rest)
    packet, _, overload = rest.rpartition(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload)


def _encode(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, _TYPES):
        return {"torch": str(value).removeprefix("torch."), "kind": type(value).__name__}
    if isinstance(value, tuple | list):
        return [_encode(v) for v in value]
    if isinstance(value, dict):
        return {"dict": {key: _encode(v) for key, v in value.items()}}
    assert value is None or isinstance(value, bool | int | float | str), value
    return value


def _decode(value: Any, env: dict[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode(v, env) for v in value]
    if not isinstance(value, dict):
        return value
    if "node" in value:
        return env[value["node"]]
    if "dict" in value:
        return {key: _decode(v, env) for key, v in value["dict"].items()}
    return torch.device(value["torch"]) if value["kind"] == "device" else getattr(torch, value["torch"])


if __name__ == "__main__":
    sys.exit(main())
