"""float32 trainables over half-precision bases: everything runs, probes survive rounding, names stay clean."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call, jvp, vmap
from torch.utils.checkpoint import checkpoint

from fs_fwdllm.core.trainables import public_name
from fs_fwdllm.errors import ConfigError
from fs_fwdllm.model import load_model, load_tokenizer
from fs_fwdllm.model.half_precision import CastTo, make_float32_masters
from tests.model.test_trainable_parts import cases, impossible
from tests.model.tiny import save_tiny_model, tiny_batch, tiny_config

HALVES = ["bfloat16", "float16"]


def load(folder, method, dtype, classifier=True, **changes):
    config = tiny_config(folder, method, classifier=classifier, **{"fwdllm.base.compute_dtype": dtype}, **changes)
    return load_model(config, load_tokenizer(config), 3).model


def score(model, batch):
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.float().square().mean()


def trainables(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("dtype", ["float32", *HALVES])
@pytest.mark.parametrize(
    ("architecture", "method", "classifier"),
    [case for case in cases() if case[0] in ("llama", "gpt2", "bert", "albert") and not impossible(*case)],
)
def test_forward_and_backward_run(tmp_path, architecture, classifier, method, dtype):
    folder = save_tiny_model(tmp_path / "m", architecture)
    batch = tiny_batch(classifier=classifier)
    model = load(folder, method, dtype, classifier)
    trained = trainables(model)
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert frozen == (set() if method == "full" else {getattr(torch, dtype)})
    loss = score(model, batch)
    loss.backward()
    reference = score(load(folder, method, "float32", classifier), batch)
    assert loss.item() == pytest.approx(reference.item(), rel=0.1)
    assert all(torch.isfinite(p.grad).all() for p in trained.values() if p.grad is not None)
    assert any(p.grad.abs().max() > 0 for p in trained.values() if p.grad is not None)
    assert not any("parametrizations" in public_name(name) for name in trained)


def slope(model, batch, radius):
    """Central difference along fixed signs; the head of a classifier is held still unless it is all there is."""
    named = {name: parameter.detach() for name, parameter in trainables(model).items()}
    body = {name: value for name, value in named.items() if "classifier" not in name} or named
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    ends = []
    for signed in (radius, -radius):
        moved = {}
        for name, value in body.items():
            sign = torch.randn(value.shape, generator=torch.Generator().manual_seed(2)).sign()
            moved[name] = value + signed * sign
        with torch.no_grad():
            ends.append(functional_call(model, moved, (), inputs).logits.double().square().mean().item())
    return (ends[0] - ends[1]) / (2 * radius)


@pytest.mark.parametrize(
    ("method", "dtype", "radius"),
    [(method, "float16", 1e-3) for method in ("lora", "ia3", "layernorm", "bitfit", "bottleneck", "head")]
    + [(method, "bfloat16", 1e-2) for method in ("ia3", "layernorm", "bitfit", "bottleneck", "head")]
    + [(method, "bfloat16", 1e-3) for method in ("layernorm", "head")],
)
def test_a_probe_survives_the_rounding_of_the_base(tmp_path, method, dtype, radius):
    folder = save_tiny_model(tmp_path / "m", "bert", initializer_range=0.3)
    batch = tiny_batch()
    exact = slope(load(folder, method, "float32"), batch, radius)
    assert slope(load(folder, method, dtype), batch, radius) == pytest.approx(exact, rel=0.4)


def test_a_radius_that_rounding_undoes_is_refused(tmp_path):
    folder = save_tiny_model(tmp_path / "m", "bert")
    settings = {"federate.method": "fedmezo", "fwdllm.radius": 1e-3}
    with pytest.raises(ConfigError, match=r"fwdllm.radius: is 0.001.*ia3 over a bfloat16 base"):
        load(folder, "ia3", "bfloat16", **settings)
    assert slope(load(folder, "ia3", "bfloat16"), tiny_batch(), 1e-3) == 0.0  # what the error prevents
    for unharmed in ({"fwdllm.radius": 1e-2}, {"fwdllm.estimator": "forward_mode"}, {"federate.method": "FedAvg"}):
        load(folder, "ia3", "bfloat16", **(settings | unharmed))
    load(folder, "ia3", "float16", **settings)


def test_a_cast_weight_would_lose_the_probe():
    """Why norms compute in float32: the neighbours of 1.0 in bfloat16 are further away than the radius."""
    weight = torch.ones(4)
    cast = CastTo(torch.bfloat16)
    assert torch.equal(cast(weight + 1e-3), cast(weight - 1e-3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_partly_trained_layer_sees_the_rounded_master(dtype):
    torch.manual_seed(0)
    layer = nn.Linear(4, 3).to(dtype).requires_grad_(False)
    layer.bias.requires_grad_(True)
    master = layer.bias
    make_float32_masters(layer)
    named = dict(layer.named_parameters())
    assert [public_name(name) for name in named] == ["weight", "bias"]
    assert dict(layer.named_parameters())["parametrizations.bias.original"] is master
    assert (master.dtype, layer.weight.dtype, layer.bias.dtype) == (torch.float32, dtype, dtype)
    x = torch.randn(2, 4, dtype=dtype)
    expected = nn.functional.linear(x, layer.weight, master.to(dtype))
    assert torch.equal(layer(x), expected)
    checkpoint(layer, x, use_reentrant=False).float().sum().backward()
    torch.testing.assert_close(master.grad, torch.full((3,), 2.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("whole", [True, False])
def test_masters_work_under_vmap_and_forward_mode(dtype, whole):
    torch.manual_seed(0)
    layer = nn.LayerNorm(4).to(dtype).requires_grad_(whole)
    layer.bias.requires_grad_(True)
    make_float32_masters(layer)
    name = next(key for key in dict(layer.named_parameters()) if public_name(key) == "bias")
    x = torch.randn(2, 4, dtype=dtype)

    def run(bias):
        return functional_call(layer, {name: bias}, (x,)).float()

    stack = torch.randn(3, 4)
    one_by_one = torch.stack([run(bias) for bias in stack])  # vmap runs other kernels, so equal up to rounding
    torch.testing.assert_close(vmap(run)(stack), one_by_one, rtol=2e-2, atol=2e-2)
    _, tangent = jvp(run, (stack[0],), (torch.ones(4),))
    torch.testing.assert_close(tangent, torch.ones(2, 4))


def test_whole_layer_computes_in_float32_and_returns_the_dtype_it_was_given():
    torch.manual_seed(0)
    body, head = nn.LayerNorm(4).to(torch.bfloat16), nn.Linear(4, 2).to(torch.bfloat16)
    model = nn.ModuleDict({"body": body, "head": head})
    make_float32_masters(model, heads=["head"])
    assert list(dict(model.named_parameters())) == ["body.weight", "body.bias", "head.weight", "head.bias"]
    x = torch.randn(3, 4, dtype=torch.bfloat16)
    assert torch.equal(body(x), nn.functional.layer_norm(x.float(), (4,), body.weight, body.bias).to(torch.bfloat16))
    assert torch.equal(head(x), nn.functional.linear(x.float(), head.weight, head.bias))


def test_tied_masters_stay_tied_and_float32_is_left_alone():
    left, right = nn.Linear(2, 2).half().requires_grad_(False), nn.Linear(2, 2).half().requires_grad_(False)
    right.bias = left.bias.requires_grad_(True)
    model = nn.ModuleList([left, right])
    make_float32_masters(model)
    assert len([p for p in model.parameters() if p.requires_grad]) == 1
    with torch.no_grad():
        left.parametrizations.bias.original.fill_(3.0)
    assert torch.equal(right.bias, torch.full((2,), 3.0, dtype=torch.float16))
    assert left.bias.dtype == right.bias.dtype == torch.float16
    single = nn.Linear(2, 2)
    make_float32_masters(single)
    assert not single._forward_pre_hooks


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.dense.parametrizations.bias.original", "a.dense.bias"),
        ("parametrizations.weight.original", "weight"),
        ("a.original.weight", "a.original.weight"),
        ("a.lora_A.default.weight", "a.lora_A.default.weight"),
    ],
)
def test_public_name(name, expected):
    assert public_name(name) == expected
