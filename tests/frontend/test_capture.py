"""Capture: what comes in, what is refused, and that the user's model stays as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export
from torch.nn.utils import parametrizations, parametrize, prune

import chanopt
from chanopt.errors import CaptureError
from chanopt.frontend import RULES, capture, lower_captured
from chanopt.ir import Kind
from tests.support.equal import assert_same_function, outputs
from tests.support.micro import MICRO
from tests.support.nets.base import Net, conv, image, randomise
from tests.support.passes import kill


def two_convs() -> Any:
    return randomise(nn.Sequential(conv(3, 8, 3), nn.ReLU(), conv(8, 6))).eval()


def batch(size: int = 2) -> tuple[Any, ...]:
    return image()(size, torch.float32, 0)


# -- batch ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_batch_is_dynamic_where_the_model_allows_it(size: int) -> None:
    captured = capture(two_convs(), batch(size))
    assert captured.dynamic
    assert captured.batch == size
    assert captured.graph(*batch(7)).shape[0] == 7
    program = lower_captured(captured, RULES, strict=True)
    assert program.batch == size
    assert {value.shape[0] for value in program.values.values() if value.shape} == {"b"}


def test_the_batch_is_fixed_where_the_model_fixes_it() -> None:
    micro = MICRO["reshape_fixed_batch"]
    captured = capture(micro.build(), micro.inputs(2, torch.float32, 0))
    assert not captured.dynamic
    program = lower_captured(captured, RULES, strict=False)
    assert all(isinstance(size, int) for value in program.values.values() for size in value.shape)


def test_channel_bytes_are_those_of_the_example_batch() -> None:
    small, large = (chanopt.lower(two_convs(), batch(size)) for size in (1, 4))
    for name, value in small.values.items():
        assert large.values[name].channel_bytes == 4 * value.channel_bytes
    conv_result = next(op.result for op in small.ops if op.linear)
    assert small.values[conv_result].channel_bytes == 8 * 8 * 4


def test_inputs_without_the_batch_stay_as_they_are() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = conv(3, 8, 3)

        def forward(self, x: Tensor, scale: Tensor, power: int) -> Tensor:
            return self.a(x) * scale**power

    (x,) = batch()
    captured = capture(randomise(Scaled()).eval(), (x, torch.ones(8, 1, 1), 2))
    assert captured.dynamic
    assert captured.graph(*batch(3), torch.ones(8, 1, 1), 2).shape == (3, 8, 8, 8)


# -- structure of inputs and outputs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "dict_input",
        "list_input",
        "two_inputs_added",
        "unused_input",
        "dict_output",
        "nested_output",
        "named_tuple_output",
        "output_twice",
    ],
)
def test_pytrees_go_in_and_out(name: str) -> None:
    micro = MICRO[name]
    model = micro.build()
    program = chanopt.lower(model, micro.inputs(2, torch.float32, 0))
    module = program.to_module()
    inputs = micro.inputs(3, torch.float32, 1)
    assert type(module(*inputs)) is type(model(*inputs))
    assert_same_function(model, module, inputs, tol=1e-10)


def test_keyword_inputs_keep_their_names() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = conv(3, 8, 3)

        def forward(self, x: Tensor, *, gate: Tensor) -> Tensor:
            return self.a(x) * gate

    model = randomise(Keyword()).eval()
    (x,) = batch()
    gate = torch.rand(2, 1, 8, 8)
    module = chanopt.lower(model, (x,), {"gate": gate}).to_module()
    assert torch.allclose(module(x, gate=gate), model(x, gate=gate), atol=1e-6)


def test_channels_last_examples_are_noticed() -> None:
    (x,) = batch()
    assert not capture(two_convs(), (x,)).channels_last
    assert capture(two_convs(), (x.to(memory_format=torch.channels_last),)).channels_last
    assert not capture(
        nn.Sequential(conv(1, 4)).eval(), (torch.randn(2, 1, 8, 8).to(memory_format=torch.channels_last),)
    ).channels_last


# -- what is refused --------------------------------------------------------------------------------------------------


def test_train_mode_is_refused_with_the_modules_and_the_remedy() -> None:
    model = nn.Sequential(conv(3, 8), nn.Sequential(nn.BatchNorm2d(8), nn.Dropout()))
    with pytest.raises(CaptureError) as caught:
        capture(model, batch())
    assert str(caught.value) == (
        "expected a model in eval mode, found 5 modules in train mode (first: Sequential); "
        "call model.eval() first: batch statistics and dropout change what channels mean"
    )
    model.eval()[1][0].train()
    with pytest.raises(CaptureError, match=r"found 1 modules in train mode \(first: 1\.0\)"):
        capture(model, batch())


def test_a_failing_forward_is_refused_with_the_model_and_the_reason() -> None:
    with pytest.raises(CaptureError, match=r"expected torch.export to capture Sequential, found .*expected input"):
        capture(two_convs(), (torch.randn(2, 4, 8, 8),))


def test_a_forward_that_writes_state_is_refused_by_name() -> None:
    class Counter(nn.Module):
        seen: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.a = conv(3, 8)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen.add_(1)
            return self.a(x)

    with pytest.raises(
        CaptureError, match=r"expected a model that changes no state in its forward, found that it writes \['seen'\]"
    ):
        capture(Counter().eval(), batch())


# -- exported programs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True])
def test_an_exported_program_is_taken_as_it_is(dynamic: bool) -> None:
    model = two_convs()
    shapes: Any = ({0: Dim("n", min=1, max=64)},) if dynamic else None
    with torch.no_grad():
        exported = export(model, batch(), dynamic_shapes=shapes, strict=False)
    captured = capture(exported, batch())
    assert captured.dynamic == dynamic
    program = lower_captured(captured, RULES, strict=True)
    assert sorted(program.weights) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    assert_same_function(model, program.to_module(), batch(5 if dynamic else 2), tol=1e-10)


# -- the user's model -------------------------------------------------------------------------------------------------


def state(model: nn.Module) -> list[tuple[str, int, Any]]:
    """Names and identities of all tensors a model holds, plain attributes too."""
    return [
        (f"{path}.{name}", id(value), value.detach().clone())
        for path, module in model.named_modules()
        for name, value in (*module._parameters.items(), *module._buffers.items(), *vars(module).items())
        if isinstance(value, Tensor)
    ]


def assert_same_state(before: list[tuple[str, int, Any]], model: nn.Module) -> None:
    after = state(model)
    assert [entry[:2] for entry in before] == [entry[:2] for entry in after]
    assert all(torch.equal(a[2], b[2]) for a, b in zip(before, after, strict=True))


def test_prune_hooks_stay_and_their_tensors_too() -> None:
    model = two_convs()
    prune.ln_structured(model[0], "weight", amount=3, n=2, dim=0)
    prune.random_structured(model[2], "weight", amount=2, dim=1)
    model(*batch())
    before, hooks = state(model), len(model[0]._forward_pre_hooks)
    program = chanopt.lower(model, batch())
    assert_same_state(before, model)
    assert len(model[0]._forward_pre_hooks) == hooks == 1
    assert {"0.weight", "2.weight"} <= program.weights.keys()
    assert torch.equal(program.weights["0.weight"], model[0].weight_orig * model[0].weight_mask)
    assert outputs(model, batch())[0].shape == (2, 6, 8, 8)


def test_parametrizations_stay_and_are_folded() -> None:
    model = two_convs()
    parametrizations.weight_norm(model[2])
    model.eval()  # what was registered just now is in train mode
    before = state(model)
    program = chanopt.lower(model, batch())
    assert_same_state(before, model)
    assert parametrize.is_parametrized(model[2], "weight")
    assert program.weights["2.weight"].shape == (6, 8, 1, 1)
    assert_same_function(model, program.to_module(), batch(3), tol=1e-6)


def test_hooks_of_the_user_run_and_stay() -> None:
    model = two_convs()
    model[0].register_forward_hook(lambda _, __, y: y * 2)
    program = chanopt.lower(model, batch())
    assert len(model[0]._forward_hooks) == 1
    assert_same_function(model, program.to_module(), batch(3), tol=1e-10)


def test_modes_of_autograd_and_training_stay() -> None:
    model = two_convs()
    model[0].weight.requires_grad_(False)
    assert torch.is_grad_enabled()
    capture(model, batch())
    assert torch.is_grad_enabled()
    assert not model.training
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]


# -- parameters -------------------------------------------------------------------------------------------------------


def test_parameters_keep_their_names_buffers_are_marked() -> None:
    model = MICRO["batch_norm"].build()
    program = chanopt.lower(model, batch())
    names = {name for name, _ in (*model.named_parameters(), *model.named_buffers())} - {"1.num_batches_tracked"}
    assert set(program.weights) == names
    buffers = {param.name for op in program.ops for param in op.params if param.buffer}
    assert buffers == {"1.running_mean", "1.running_var"}


def test_tied_weights_are_one_parameter() -> None:
    model = MICRO["tied_weights"].build()
    program = chanopt.lower(model, batch())
    used = [param.name for op in program.ops if op.linear for param in op.params if param.inn is not None]
    assert len(used) == len(set(used)) + 1


def test_a_module_used_twice_is_two_ops_of_one_parameter() -> None:
    program = chanopt.lower(MICRO["conv_two_branches"].build(), MICRO["conv_two_branches"].inputs(2, torch.float32, 0))
    counts: dict[str, int] = {}
    for op in program.ops:
        if op.linear:
            counts[op.layer] = counts.get(op.layer, 0) + 1
    assert max(counts.values()) == 2
    shared = [op for op in program.ops if op.linear and counts[op.layer] == 2]
    assert shared[0].params == shared[1].params


def test_a_bare_parameter_is_a_parameter_under_its_name() -> None:
    program = chanopt.lower(MICRO["conv_bare_weight"].build(), batch())
    assert "weight" in program.weights
    (op,) = [op for op in program.ops if op.linear and op.params[0].name == "weight"]
    assert op.kind is Kind.MIX


def test_what_is_computed_from_parameters_alone_is_folded() -> None:
    for name in ("weight_standardisation", "frozen_norm", "weight_norm"):
        program = chanopt.lower(MICRO[name].build(), batch())
        assert not any(op.target.startswith(("aten.rsqrt", "aten.var", "aten.std")) for op in program.ops), name
        assert not program.refusals


def test_layers_and_source_lines_are_the_users() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv(3, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) * 2

    program = chanopt.lower(randomise(nn.Sequential(Inner(), conv(8, 4))).eval(), batch())
    layers = [op.layer for op in program.ops if op.linear]
    assert layers == ["0.conv", "1"]
    first = next(op for op in program.ops if op.linear)
    assert first.source.startswith(f"{__file__}:")
    assert first.source.endswith("in forward: return self.conv(x) * 2")


def test_dead_code_is_not_lowered() -> None:
    program = chanopt.lower(MICRO["dead_branch"].build(), batch())
    read = {r.value for op in program.ops for r in op.reads}
    assert all(op.result in read for op in program.ops if op.kind not in (Kind.SOURCE, Kind.SINK))


# -- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["grouped_2", "depthwise_2", "transposed", "mlp", "conv1d"])
def test_masks_by_name_zero_what_a_user_would_zero(name: str) -> None:
    micro = MICRO[name]
    model = micro.build()
    inputs = micro.inputs(2, torch.float32, 0)
    layers = [n for n, m in model.named_modules() if hasattr(m, "weight") and m.weight.ndim > 1]
    target: Any = model.get_submodule(layers[1])
    turned = getattr(target, "transposed", False)
    wide = target.weight.shape[1 if turned else 0]
    program = chanopt.lower(model, inputs, masks={layers[1]: chanopt.Mask(outputs=range(1, wide))})
    kill(target, outputs=[0])
    assert torch.equal(program.weights[f"{layers[1]}.weight"], target.weight)
    assert torch.equal(program.weights[f"{layers[1]}.bias"], target.bias)


def test_input_masks_of_a_grouped_conv_are_numbered_over_all_groups() -> None:
    model: Any = randomise(Net(lambda n, x: n.g(n.a(x)), a=conv(3, 8), g=conv(8, 8, groups=2))).eval()
    program = chanopt.lower(model, batch(), masks={"g": chanopt.Mask(inputs=[0, 1, 2, 3, 4, 7])})
    weight = program.weights["g.weight"]
    assert torch.equal(weight[:4], model.g.weight[:4])
    assert not weight[4:, 1:3].any()
    assert torch.equal(weight[4:, [0, 3]], model.g.weight[4:, [0, 3]])
    assert model.g.weight.all()
