"""The output residual: its arithmetic against a plain reference on every decoder, its folder, and what it becomes."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import fs_fwdllm
from fs_fwdllm.core.direction import DirectionKey, make_distribution
from fs_fwdllm.core.trainables import Trainables
from fs_fwdllm.errors import ConfigError, EstimatorError, ModelError
from fs_fwdllm.estimator.closed_form import ClosedForm
from fs_fwdllm.model import LoadedModel, load_model, load_saved, load_tokenizer, save_trained
from fs_fwdllm.model.basis_file import basis_fingerprint
from fs_fwdllm.model.objective import Objective
from fs_fwdllm.model.output_residual import OutputResidual, attach_output_residual, merge_output_residual
from fs_fwdllm.model.structure import output_layer
from tests.model.architectures import ARCHITECTURES, FAST, Architecture
from tests.model.test_bottleneck import logits, shake
from tests.model.test_prefix_cache import Twin
from tests.model.tiny import HIDDEN, VOCABULARY, save_tiny_model, tiny_batch, tiny_config

DECODERS = [
    pytest.param(name, marks=() if name in (*FAST, "cohere", "gemma2") else pytest.mark.slow)
    for name, row in ARCHITECTURES.items()
    if row.task == "causal_lm" and not row.refused
]

#: What scales or caps its logits after the output layer.
SCALED = ("cohere", "cohere2", "gemma2", "recurrent_gemma")


def load(folder: Path, **arguments: Any) -> LoadedModel:
    config = tiny_config(folder, "output_residual", classifier=False, **{"rank": 4, **arguments})
    return load_model(config, load_tokenizer(config))


def adapter_of(model: nn.Module) -> Any:
    return output_layer(model)[1].output_residual


def write_basis(file: Path, rows: int = 6, name: str = "output_residual.down", width: int = HIDDEN) -> Path:
    values = torch.randn(rows, width, generator=torch.Generator().manual_seed(8))
    save_file({name: values}, file)
    return file


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "m", "llama")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_arithmetic_is_float32_whatever_the_input(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    adapter = OutputResidual(torch.randn(3, 8, generator=generator))
    with torch.no_grad():
        adapter.up.copy_(torch.randn(8, 3, generator=generator))
    hidden = torch.randn(2, 5, 8, generator=generator).to(dtype)
    expected = hidden.float() + hidden.float() @ adapter.down.T @ adapter.up.T
    result = adapter(hidden)
    assert result.dtype == dtype
    torch.testing.assert_close(result, expected.to(dtype))


class Saved:
    """A tiny decoder of an architecture in a folder, with its adapter moved off its start."""

    def __init__(self, row: Architecture, folder: Path, **arguments: Any) -> None:
        self.row = row
        self.folder = row.save(folder)
        config = row.run_config(self.folder, "output_residual", attention="eager")
        config.llm.adapter.args[0].update(rank=4, **arguments)
        self.loaded = load_model(config, load_tokenizer(config))
        self.model = shake(self.loaded.model)

    def inputs(self) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.as_tensor(self.row.batch().input_ids[:1])}


@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder_computes_what_a_changed_output_layer_would(tmp_path: Path, name: str) -> None:
    """``E (I + U V)`` and ``b`` in the place of the output layer's own, whatever the architecture does around it."""
    saved = Saved(ARCHITECTURES[name], tmp_path / "m")
    adapter = adapter_of(saved.model)
    plain = AutoModelForCausalLM.from_pretrained(saved.folder, attn_implementation="eager").eval()
    with torch.no_grad():
        before = plain(**saved.inputs()).logits
        head = output_layer(plain)[1]
        own = torch.zeros(len(head.weight)) if head.bias is None else head.bias
        weight = head.weight @ (torch.eye(head.in_features) + adapter.up @ adapter.down)
        head.weight = nn.Parameter(weight)
        head.bias = nn.Parameter(own + adapter.bias)
        expected, found = plain(**saved.inputs()).logits, saved.model(**saved.inputs()).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert not torch.allclose(found, before, rtol=1e-2)


@pytest.mark.parametrize("name", DECODERS)
def test_a_merged_decoder_is_a_plain_one(tmp_path: Path, name: str) -> None:
    saved = Saved(ARCHITECTURES[name], tmp_path / "m", bias=False)
    written = save_trained(saved.loaded, tmp_path / "run")
    merged = fs_fwdllm.merge(written, tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(merged, attn_implementation="eager").eval()
    assert not plain.config.tie_word_embeddings
    assert not any("output_residual" in key for key in plain.state_dict())
    with torch.no_grad():
        expected, found = saved.model(**saved.inputs()).logits, plain(**saved.inputs()).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    before = AutoModelForCausalLM.from_pretrained(saved.folder).get_input_embeddings().weight
    assert torch.equal(plain.get_input_embeddings().weight, before), "the input embeddings are not changed"


def test_a_bias_is_merged_where_the_output_layer_has_one(tmp_path: Path) -> None:
    saved = Saved(ARCHITECTURES["phi"], tmp_path / "m")
    plain = AutoModelForCausalLM.from_pretrained(
        fs_fwdllm.merge(save_trained(saved.loaded, tmp_path / "run"), tmp_path / "merged")
    )
    with torch.no_grad():
        torch.testing.assert_close(plain(**saved.inputs()).logits, saved.model(**saved.inputs()).logits)


def test_a_bias_without_a_place_is_refused_with_the_way_out(base: Path, tmp_path: Path) -> None:
    written = save_trained(load(base), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"its output layer lm_head has no bias.*llm\.adapter\.args bias: false"):
        fs_fwdllm.merge(written, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_merging_unties_and_leaves_no_trace(tmp_path: Path, architecture: str, tied: bool) -> None:
    loaded = load(save_tiny_model(tmp_path / "m", architecture, tie_word_embeddings=tied), bias=False)
    model = shake(loaded.model)
    batch = tiny_batch(classifier=False)
    expected = logits(model, batch)
    table = model.get_input_embeddings().weight.clone()
    merge_output_residual(model)
    torch.testing.assert_close(logits(model, batch), expected)
    assert torch.equal(model.get_input_embeddings().weight, table)
    attach_output_residual(model, rank=4, bias=False)
    torch.testing.assert_close(logits(model, batch), expected)


@pytest.mark.parametrize("bias", [True, False])
def test_count_and_names(base: Path, bias: bool) -> None:
    trainables = Trainables.of_model(load(base, rank=5, bias=bias).model)
    shapes = {name.rpartition(".")[2]: tuple(tensor.shape) for name, tensor in _named(trainables)}
    assert shapes == {"up": (HIDDEN, 5)} | ({"bias": (VOCABULARY,)} if bias else {})


def _named(trainables: Trainables) -> list[tuple[str, Any]]:
    return list(zip(trainables.names, trainables.tensors, strict=True))


def test_drawn_rows_are_the_same_bytes_everywhere(base: Path) -> None:
    """Philox' bits, one multiplication, one rounding: these are the numbers of any machine."""
    down = adapter_of(load(base).model).down
    assert hashlib.blake2b(down.numpy().tobytes(), digest_size=8).hexdigest() == "01236e6d6ba462fd"
    assert down.norm(dim=1).mean().item() == pytest.approx(1.0, rel=0.1)
    other = AutoModelForCausalLM.from_pretrained(base)
    attach_output_residual(other, rank=4, seed=6)
    assert not torch.equal(adapter_of(other).down, down)


@pytest.mark.parametrize("estimator", ["central", "forward_mode"])
def test_the_objective_reads_labelled_positions_only(base: Path, estimator: str) -> None:
    """The adapter, too: whoever looks at what it is given finds a row for each label."""
    model = shake(load(base, **{"fwdllm.attention": "eager"}).model)
    seen: list[torch.Size] = []
    adapter_of(model).register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].shape))
    objective = Objective(model, Trainables.of_model(model), "causal_lm")
    batch = tiny_batch(classifier=False)
    loss = objective.on(batch)
    labels = int((np.asarray(batch.labels)[:, 1:] != -100).sum())
    whole = logits(model, batch)
    rows = whole[:, :-1][torch.as_tensor(batch.labels)[:, 1:] != -100]
    seen.clear()
    torch.testing.assert_close(loss.logits(), rows.float())
    assert seen == [(labels, HIDDEN)]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom"])
def test_only_the_head_runs_again(tmp_path: Path, architecture: str) -> None:
    """The prefix cache keeps what the head reads, and nothing below it runs for a second probe."""
    twin = Twin(tmp_path, architecture, "output_residual", {"rank": 4})
    ran: list[str] = []
    for name, module in twin.model.named_modules():
        if "lm_head" not in name and next(module.children(), None) is None:
            module.register_forward_pre_hook(lambda module, arguments, name=name: ran.append(name))
    loss = twin.cached.on(twin.batch("a"))
    ran.clear()
    estimator = twin.estimator(estimator="central", radius=0.01)
    with_cache = estimator.slopes(loss, [DirectionKey(5, 1)])
    assert not ran
    without = estimator.slopes(twin.plain.on(twin.batch("a")), [DirectionKey(5, 1)])
    assert ran
    assert (with_cache.values == without.values).all()
    assert with_cache.values.any()
    hidden_bytes = twin.batch("a").input_ids.numel() * HIDDEN * 4
    assert hidden_bytes <= twin.cache.used_bytes <= 3 * hidden_bytes


@pytest.mark.parametrize("name", [name for name, row in ARCHITECTURES.items() if row.task == "causal_lm"])
def test_closed_form_is_the_exact_gradient(tmp_path: Path, name: str) -> None:
    """What the adapter is for: one pass gives what backpropagation gives; a head that scales its logits is refused."""
    saved = Saved(ARCHITECTURES[name], tmp_path / "m")
    trainables = Trainables.of_model(saved.model)
    loss = Objective(saved.model, trainables, "causal_lm", conduct=saved.loaded.conduct).on(saved.row.batch())
    expected = torch.autograd.grad(loss.here(), trainables.tensors)
    try:
        found = ClosedForm(make_distribution("rademacher")).gradient(loss)
    except EstimatorError as error:
        assert name in SCALED, error
        assert "a scale, a cap or another head follows it" in str(error)
        return
    assert name not in SCALED
    assert found.passes.forward == 1
    for index, gradient in enumerate(expected):
        torch.testing.assert_close(found.tensors[index], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


def test_a_classifier_is_refused_by_name(tmp_path: Path) -> None:
    config = tiny_config(save_tiny_model(tmp_path / "m", "bert"), "output_residual")
    with pytest.raises(ConfigError, match=r"'output_residual' is for language models, and BertForSeq.* classification"):
        load_model(config, load_tokenizer(config), 3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"rank": 0}, r"rank: must be a whole number from 1 to the hidden size 32, but the value is 0"),
        ({"rank": 33}, r"rank: must be a whole number from 1 to the hidden size 32, but the value is 33"),
        ({"rank": True}, r"rank: must be a whole number"),
        ({"rank": "8"}, r"rank: must be a whole number"),
        ({"bias": "yes"}, r"bias: must be true or false, but the value is 'yes'"),
        ({"basis": 3}, r"basis: must be a file's path or random, but the value is 3"),
        ({"basis": "nowhere.safetensors"}, r"basis 'nowhere.safetensors': there is no such file; fs-fwdllm basis"),
        ({"reduction_factor": 3}, r"unknown output_residual argument 'reduction_factor'"),
    ],
)
def test_bad_arguments(base: Path, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load(base, **arguments)


def test_twice_is_refused(base: Path) -> None:
    with pytest.raises(ModelError, match="lm_head: has an output residual already"):
        attach_output_residual(load(base).model)


class TestBasis:
    def test_its_first_rows_are_taken(self, base: Path, tmp_path: Path) -> None:
        file = write_basis(tmp_path / "b.safetensors")
        down = adapter_of(load(base, basis=str(file)).model).down
        assert torch.equal(down, load_file(file)["output_residual.down"][:4])

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"rows": 3}, r"output_residual\.down is \(3, 32\) float32, but .* at least 4 rows of 32"),
            ({"width": 31}, r"is \(6, 31\) float32, but"),
            ({"name": "bottleneck.down"}, r"must hold one tensor output_residual\.down, but holds bottleneck\.down"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, base: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
        file = write_basis(tmp_path / "b.safetensors", **changes)
        with pytest.raises(ConfigError, match=said):
            load(base, basis=str(file))

    @pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 40])
    def test_a_damaged_file_is_refused(self, base: Path, tmp_path: Path, content: bytes) -> None:
        (file := tmp_path / "b.safetensors").write_bytes(content)
        with pytest.raises(ConfigError, match=r"b\.safetensors': cannot be read .*fs-fwdllm basis"):
            load(base, basis=str(file))

    def test_values_that_are_not_finite_are_refused(self, base: Path, tmp_path: Path) -> None:
        file = tmp_path / "b.safetensors"
        save_file({"output_residual.down": torch.full((4, HIDDEN), float("nan"))}, file)
        with pytest.raises(ConfigError, match="holds a value that is not finite"):
            load(base, basis=str(file))

    def test_another_file_than_the_configuration_means_is_refused(self, base: Path, tmp_path: Path) -> None:
        """Replicas that read other directions agree on every digest of what is trained, and learn nothing together."""
        file = write_basis(tmp_path / "b.safetensors")
        digest = basis_fingerprint(str(file))
        load(base, basis=str(file), basis_digest=digest)
        write_basis(file, rows=7)
        with pytest.raises(ConfigError, match=rf"basis_digest: is '{digest}', but .* the same file: copy it"):
            load(base, basis=str(file), basis_digest=digest)
        for none in ("", "random"):
            with pytest.raises(ConfigError, match="basis_digest: names the bytes of a file, so basis must name one"):
                load(base, basis=none, basis_digest=digest)
        with pytest.raises(ConfigError, match="there is no such file"):
            load(base, basis="nowhere", basis_digest=digest)

    def test_a_saved_adapter_is_a_basis(self, base: Path, tmp_path: Path) -> None:
        loaded = load(base)
        written = save_trained(loaded, tmp_path / "run")
        other = load(base, basis=str(written / "output_residual_model.safetensors"))
        assert torch.equal(adapter_of(other.model).down, adapter_of(loaded.model).down)


class TestFolder:
    @pytest.fixture
    def basis(self, tmp_path: Path) -> Path:
        return write_basis(tmp_path / "b.safetensors")

    @pytest.mark.parametrize("tied", [True, False])
    @pytest.mark.parametrize("bias", [True, False])
    def test_loaded_again_it_is_what_was_saved(self, tmp_path: Path, basis: Path, tied: bool, bias: bool) -> None:
        """The basis file is not needed any more: its bytes are in the folder."""
        loaded = load(save_tiny_model(tmp_path / "m", "llama", tie_word_embeddings=tied), basis=str(basis), bias=bias)
        shake(loaded.model)
        batch = tiny_batch(classifier=False)
        written = save_trained(loaded, tmp_path / "run")
        basis.unlink()
        tensors = load_file(written / "output_residual_model.safetensors")
        assert tensors.keys() == {f"lm_head.output_residual.{name}" for name in ("down", "up", *["bias"][: int(bias)])}
        again, _, _ = load_saved(written)
        assert torch.equal(logits(again.model, batch), logits(loaded.model, batch))
        twice = save_trained(again, tmp_path / "twice")
        shutil.rmtree(written)
        assert torch.equal(logits(load_saved(twice)[0].model, batch), logits(loaded.model, batch))

    @pytest.mark.parametrize("name", ["down", "up", "bias"])
    def test_a_missing_tensor(self, base: Path, tmp_path: Path, name: str) -> None:
        written = save_trained(load(base), tmp_path / "run")
        file = written / "output_residual_model.safetensors"
        tensors = load_file(file)
        tensors.pop(f"lm_head.output_residual.{name}")
        save_file(tensors, file)
        with pytest.raises(ModelError, match=rf"does not fit its base: lm_head\.output_residual\.{name} is missing"):
            load_saved(written)

    def test_it_is_no_model(self, base: Path, tmp_path: Path) -> None:
        written = save_trained(load(base), tmp_path / "run")
        with pytest.raises(ModelError, match=r"is an adapter, not a model \(output_residual_config\.json\)"):
            load(written)

    def test_training_goes_on_from_it_with_the_same_basis_only(self, base: Path, tmp_path: Path, basis: Path) -> None:
        loaded = load(base, basis=str(basis))
        shake(loaded.model)
        written = save_trained(loaded, tmp_path / "run")
        start = {"fwdllm.init_adapter": str(written)}
        again = load(base, basis=str(basis), **start)
        assert torch.equal(adapter_of(again.model).up, adapter_of(loaded.model).up)
        file = written / "output_residual_model.safetensors"
        assert torch.equal(adapter_of(load(base, basis=str(file), **start).model).down, adapter_of(loaded.model).down)
        with pytest.raises(ConfigError, match=rf"basis: gives another .*give basis its own, '{file}'"):
            load(base, **start)
        with pytest.raises(ConfigError, match="rank: is 3 here, but 4 in"):
            load(base, basis=str(basis), rank=3, **start)
        with pytest.raises(ConfigError, match="bias: is False here, but True in"):
            load(base, basis=str(basis), bias=False, **start)

    def test_settings_are_in_words(self, base: Path, tmp_path: Path) -> None:
        settings = json.loads((save_trained(load(base), tmp_path / "r") / "output_residual_config.json").read_text())
        assert settings == {
            "adapter_type": "output_residual", "format_version": 1, "base_model_name_or_path": str(base),
            "task": "causal_lm", "rank": 4, "bias": True,
        }  # fmt: skip


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_over_a_half_precision_base_it_reloads_exactly(base: Path, tmp_path: Path, dtype: str) -> None:
    loaded = load(base, **{"fwdllm.base.compute_dtype": dtype})
    shake(loaded.model)
    adapter = adapter_of(loaded.model)
    assert {adapter.down.dtype, adapter.up.dtype, adapter.bias.dtype} == {torch.float32}
    again, _, _ = load_saved(save_trained(loaded, tmp_path / "run"))
    batch = tiny_batch(classifier=False)
    assert torch.equal(logits(again.model, batch), logits(loaded.model, batch))
