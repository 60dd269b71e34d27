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

PLANS = Path(__file__).parent / "plans"
MODELS = {"resnet50": 224, "densenet121": 224, "efficientnet_v2_s": 384}
VARIANTS = ("dense", "naive", "upscale", "chanopt")
SEED = 0

aten = torch.ops.aten
_TYPES: tuple[type, ...] = (torch.dtype, torch.memory_format, torch.device, torch.layout)


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
    from chanopt.codegen.module import ChanoptModule

    data = json.loads(gzip.decompress(path.read_bytes()))
    root, graph = nn.Module(), fx.Graph()
    for name, about in data["tensors"].items():
        root.register_buffer(_flat(name), _draw(name, about, seed))
    env: dict[str, fx.Node] = {}
    for node in data["nodes"]:
        target = _resolve(node["target"]) if node["op"] == "call_function" else _flat(node["target"])
        args, kwargs = _decode(node["args"], env), _decode(node["kwargs"], env)
        env[node["name"]] = graph.create_node(node["op"], target, tuple(args), kwargs, node["name"])
    return ChanoptModule(root, graph, path.name.partition(".")[0].replace("-", "_"))


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


def variants(name: str, resolution: int) -> dict[str, fx.GraphModule]:
    """A network's variants as modules; one that the peer cannot make is left out."""
    import chanopt
    from benchmarks import arms, peers, zoo
    from chanopt.errors import ChanoptError
    from chanopt.passes import FoldAffine

    x = (torch.randn(2, 3, resolution, resolution).contiguous(memory_format=torch.channels_last),)
    model = masked(name)

    def folded(module: nn.Module) -> Any:
        """Batch norms into convs, and no other choice."""
        return chanopt.optimize(module, x, target="cuda", pipeline=(FoldAffine(),))

    naive = arms.build("naive", arms.Subject(model, x)).module
    made: dict[str, Any] = {"dense": folded(zoo.build(name)), "naive": folded(naive)}
    try:
        exported = peers.export(model, (x[0][:1],)).module.eval()
        made["upscale"] = folded(exported)
    except (peers.PeerError, ImportError, ChanoptError) as error:
        print(f"{name}: no UPSCALE variant: {error}", file=sys.stderr)
    made["chanopt"] = chanopt.optimize(model, x, target="cuda")
    return made


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
