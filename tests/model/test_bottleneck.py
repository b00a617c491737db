"""The bottleneck: its arithmetic against a plain reference, its place, its count, and its folder."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from torch.func import functional_call, jvp, vmap
from transformers import AutoModelForSequenceClassification

from fs_fwdllm.errors import ConfigError, ModelError
from fs_fwdllm.model import load_bottleneck, load_model, load_tokenizer, save_trained
from fs_fwdllm.model.bottleneck import Bottleneck, attach_bottleneck
from tests.model.tiny import ARCHITECTURES, HIDDEN, INTERMEDIATE, LAYERS, save_tiny_model, tiny_batch, tiny_config


def load(folder, classifier=True, **changes):
    config = tiny_config(folder, "bottleneck", classifier=classifier, **changes)
    return load_model(config, load_tokenizer(config), 3)


def shake(model, seed=0):
    """Make every adapter do something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def logits(model, batch):
    with torch.no_grad():
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_arithmetic_is_float32_whatever_the_input(dtype):
    torch.manual_seed(0)
    adapter = Bottleneck(8, 3)
    x = torch.randn(2, 5, 8).to(dtype)
    narrow = (x.float() @ adapter.down.weight.T + adapter.down.bias).clamp(min=0)
    expected = x.float() + narrow @ adapter.up.weight.T + adapter.up.bias
    result = adapter(x)
    assert result.dtype == dtype
    torch.testing.assert_close(result, expected.to(dtype))


def test_initial_values():
    adapter = Bottleneck(64, 16)
    adapter.initialise(3, "a")
    assert adapter.down.weight.abs().max() <= 1 / 8
    assert adapter.down.weight.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.1)
    assert not any(tensor.any() for tensor in (adapter.down.bias, adapter.up.weight, adapter.up.bias))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("reduction_factor", [1, 5, 16, HIDDEN])
def test_count(tmp_path, architecture, reduction_factor):
    model = load(save_tiny_model(tmp_path / "m", architecture), reduction_factor=reduction_factor).model
    width = HIDDEN // reduction_factor
    layers = 1 if architecture == "albert" else LAYERS
    found = sum(p.numel() for name, p in model.named_parameters() if ".bottleneck." in name and p.requires_grad)
    assert found == layers * (2 * HIDDEN * width + width + HIDDEN)


def test_it_sits_on_the_feed_forward_output(tmp_path):
    """Llama's block, recomputed by hand: only what the feed-forward part adds is adapted."""
    model = shake(load(save_tiny_model(tmp_path / "m", "llama"), classifier=False).model)
    mlp = model.model.layers[0].mlp
    x = torch.randn(2, 3, HIDDEN, generator=torch.Generator().manual_seed(1))
    inner = nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
    assert inner.shape[-1] == INTERMEDIATE
    plain = inner @ mlp.down_proj.weight.T
    torch.testing.assert_close(mlp(x), mlp.down_proj.bottleneck(plain))
    assert not torch.allclose(mlp(x), plain)


@pytest.mark.parametrize("architecture", ["bert", "albert", "gpt2"])
def test_works_under_functional_call_vmap_and_forward_mode(tmp_path, architecture):
    folder = save_tiny_model(tmp_path / "m", architecture)
    model = shake(load(folder, **{"fwdllm.attention": "eager"}).model)
    batch = tiny_batch()
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    generator = torch.Generator().manual_seed(1)
    values = {name: model.get_parameter(name).detach() for name in names}
    stack = {name: torch.stack([v, v + 0.1 * torch.randn(v.shape, generator=generator)]) for name, v in values.items()}

    def run(moved):
        # ALBERT runs one shared block LAYERS times: the adapter's values must be exchanged in each
        return functional_call(model, moved, (), {"input_ids": batch.input_ids, "attention_mask": None}).logits

    batched = vmap(run)(stack)
    for index in range(2):
        torch.testing.assert_close(batched[index], run({name: v[index] for name, v in stack.items()}))
    assert not torch.allclose(batched[0], batched[1])
    tangents = {name: torch.randn(v.shape, generator=generator) for name, v in values.items()}
    _, slope = jvp(run, (values,), (tangents,))
    step = 1e-3
    ends = [run({name: v + sign * step * tangents[name] for name, v in values.items()}) for sign in (1, -1)]
    torch.testing.assert_close(slope, (ends[0] - ends[1]) / (2 * step), rtol=2e-2, atol=2e-2)


def test_a_deep_copy_is_independent(tmp_path):
    model = shake(load(save_tiny_model(tmp_path / "m", "bert")).model)
    batch = tiny_batch()
    before = logits(model, batch)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, batch), before)
    shake(twin, seed=1)
    assert torch.equal(logits(model, batch), before)
    assert not torch.equal(logits(twin, batch), before)


def test_layers_restrict(tmp_path):
    model = load(save_tiny_model(tmp_path / "m", "bert"), layers=[1]).model
    adapters = {name for name, module in model.named_modules() if isinstance(module, Bottleneck)}
    assert adapters == {"bert.encoder.layer.1.output.dense.bottleneck"}


@pytest.mark.parametrize("layers", [[2], [-1], [], ["0"], 1, [True]])
def test_bad_layers(tmp_path, layers):
    with pytest.raises(ConfigError, match=r"layers: must be a list of indices from 0 to 1"):
        load(save_tiny_model(tmp_path / "m", "bert"), layers=layers)


@pytest.mark.parametrize("reduction_factor", [0, 33, 2.0, "16", True])
def test_bad_reduction_factor(tmp_path, reduction_factor):
    with pytest.raises(ConfigError, match=r"reduction_factor: must be a whole number from 1 to the hidden size 32"):
        load(save_tiny_model(tmp_path / "m", "bert"), reduction_factor=reduction_factor)


def test_twice_is_refused(tmp_path):
    model = load(save_tiny_model(tmp_path / "m", "bert")).model
    with pytest.raises(ModelError, match="has a bottleneck adapter already"):
        attach_bottleneck(model)


def test_mixture_of_experts_is_refused():
    block = nn.ModuleDict({"attention": nn.Linear(4, 4), "experts": nn.ModuleList([nn.Linear(4, 4)])})
    with pytest.raises(ModelError, match="mixture of experts"):
        attach_bottleneck(nn.ModuleDict({"layers": nn.ModuleList([block])}))


class TestLoading:
    @pytest.fixture
    def saved(self, tmp_path):
        base = save_tiny_model(tmp_path / "m", "bert")
        loaded = load(base)
        shake(loaded.model)
        return base, save_trained(loaded, tmp_path / "run"), loaded

    @staticmethod
    def plain(base, labels=3):
        return AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels)

    def test_round_trip(self, saved):
        base, folder, loaded = saved
        batch = tiny_batch()
        assert torch.equal(logits(load_bottleneck(self.plain(base), folder), batch), logits(loaded.model, batch))

    def test_another_model(self, saved):
        base, folder, _ = saved
        with pytest.raises(ModelError, match=r"classifier.bias.*missing or has another shape"):
            load_bottleneck(self.plain(base, labels=4), folder)

    def test_missing_adapter_tensor(self, saved):
        base, folder, _ = saved
        file = folder / "bottleneck_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"layers": [0]}))
        with pytest.raises(ModelError, match=r"does not fit this model: .*layer.1"):
            load_bottleneck(self.plain(base), folder)

    @pytest.mark.parametrize("name", ["bottleneck_config.json", "bottleneck_model.safetensors"])
    @pytest.mark.parametrize("content", [None, b"", b"[1]", b"\xff\xfe"])
    def test_damaged_file(self, saved, name, content):
        base, folder, _ = saved
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)
        with pytest.raises(ModelError, match=name):
            load_bottleneck(self.plain(base), folder)
