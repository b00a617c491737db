"""LoRA whose A is a basis: half of the parameters, the same wherever it is loaded, and plain PEFT's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import fs_fwdllm
from fs_fwdllm.errors import ConfigError
from fs_fwdllm.model import LoadedModel, load_model, load_saved, load_tokenizer, save_trained
from fs_fwdllm.model.basis import make_basis
from tests.model.test_basis import moments_of, write_text
from tests.model.test_bottleneck import logits, shake
from tests.model.tiny import HIDDEN, LAYERS, save_tiny_model, tiny_batch, tiny_config


def config_of(folder: Path, **arguments: Any) -> Any:
    return tiny_config(folder, "lora", classifier=False, **{"r": 4, "lora_alpha": 8, **arguments})


def load(folder: Path, basis: Any = "random", **arguments: Any) -> LoadedModel:
    config = config_of(folder, basis=basis, **arguments)
    return load_model(config, load_tokenizer(config))


def matrices(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name.replace(".default.", "."): p for name, p in model.named_parameters() if ".lora_A." in name}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "llama", "llama")


@pytest.fixture
def basis(base: Path, tmp_path: Path) -> Path:
    made = make_basis(
        config_of(base), write_text(tmp_path / "a.txt"), tmp_path / "b.safetensors", torch.device("cpu"), 10_000
    )
    return made.path


def test_only_b_is_trained(base: Path) -> None:
    model = load(base).model
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * LAYERS
    assert all(".lora_B." in name for name in trained)
    first, again = matrices(model), matrices(load(base).model)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(*list(first.values())[:2])
    assert torch.cat(list(first.values())).norm(dim=1).mean().item() == pytest.approx(1, rel=0.1)


def test_the_basis_is_of_what_each_layer_reads(base: Path, basis: Path) -> None:
    """One text at a time through plain transformers: query and value read the same, so their rows are the same."""
    config, model = config_of(base), AutoModelForCausalLM.from_pretrained(base).eval()
    tokenizer = load_tokenizer(config)
    seen: list[torch.Tensor] = []
    model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda m, arguments: seen.append(arguments[0][0]))
    with torch.no_grad():
        for line in (basis.parent / "a.txt").read_text().split("\n\n"):
            model(**tokenizer(line, return_tensors="pt"))
    expected, _ = moments_of(torch.cat(seen)).principal_rows(4)
    tensors = load_file(basis)
    assert len(tensors) == 2 * LAYERS
    for role in "qv":
        found = tensors[f"base_model.model.model.layers.1.self_attn.{role}_proj.lora_A.weight"]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    for name, matrix in matrices(load(base, str(basis)).model).items():
        assert torch.equal(matrix, tensors[name])


@pytest.mark.parametrize("kind", ["random", "file"])
def test_plain_peft_loads_what_was_saved(base: Path, basis: Path, tmp_path: Path, kind: str) -> None:
    loaded = load(base, str(basis) if kind == "file" else kind)
    shake(loaded.model)
    batch = tiny_batch(classifier=False)
    expected = logits(loaded.model, batch)
    written = save_trained(loaded, tmp_path / "run")
    basis.unlink()
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), written).eval()
    assert torch.equal(logits(theirs, batch), expected)
    automatic = AutoPeftModelForCausalLM.from_pretrained(written, low_cpu_mem_usage=False).eval()
    assert torch.equal(logits(automatic, batch), expected)
    assert torch.equal(logits(load_saved(written)[0].model, batch), expected)
    merged = AutoModelForCausalLM.from_pretrained(fs_fwdllm.merge(written, tmp_path / "merged"))
    torch.testing.assert_close(logits(merged, batch), expected)


def test_training_goes_on_with_the_same_basis_only(base: Path, basis: Path, tmp_path: Path) -> None:
    loaded = load(base, str(basis))
    shake(loaded.model)
    written = save_trained(loaded, tmp_path / "run")
    start = {"fwdllm.init_adapter": str(written)}
    batch = tiny_batch(classifier=False)
    for same in (basis, written / "adapter_model.safetensors"):
        assert torch.equal(logits(load(base, str(same), **start).model, batch), logits(loaded.model, batch))
    with pytest.raises(ConfigError, match=r"basis: gives another .*lora_A\.weight than .*give basis its own"):
        load(base, "random", **start)
    config = config_of(base, **start)  # without a basis both matrices are trained from there on
    assert torch.equal(logits(load_model(config, load_tokenizer(config)).model, batch), logits(loaded.model, batch))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"basis": 3}, r"basis: must be a file's path or random, but the value is 3"),
        ({"basis": "nowhere"}, r"basis 'nowhere': there is no such file"),
        ({"target_modules": ["embed_tokens"]}, r"basis: .*lora_embedding_A.* is not LoRA beside a linear layer"),
        ({"use_dora": True}, r"basis: .*lora_magnitude_vector.* is not LoRA beside a linear layer"),
        ({"r": HIDDEN + 1}, None),
    ],
)
def test_bad_arguments(base: Path, basis: Path, arguments: dict[str, Any], said: str | None) -> None:
    said = said or rf"lora_A\.weight is \(4, 32\) float32, but .* at least {HIDDEN + 1} rows of 32"
    with pytest.raises(ConfigError, match=said):
        load(base, **{"basis": str(basis), **arguments})


def test_over_a_half_precision_base_the_directions_stay_float32(base: Path, basis: Path, tmp_path: Path) -> None:
    loaded = load(base, str(basis), **{"fwdllm.base.compute_dtype": "bfloat16"})
    assert {matrix.dtype for matrix in matrices(loaded.model).values()} == {torch.float32}
    shake(loaded.model)
    again, _, _ = load_saved(save_trained(loaded, tmp_path / "run"))
    batch = tiny_batch(classifier=False)
    assert torch.equal(logits(again.model, batch), logits(loaded.model, batch))
