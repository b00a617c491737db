"""A bottleneck that moves in fixed subspaces: its arithmetic, its few parameters, its basis file and its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fs_fwdllm.errors import ConfigError, ModelError
from fs_fwdllm.model import LoadedModel, load_bottleneck, load_model, load_saved, load_tokenizer, save_trained
from fs_fwdllm.model.basis import make_basis
from fs_fwdllm.model.bottleneck import SubspaceBottleneck
from tests.model.test_basis import moments_of, write_text
from tests.model.test_bottleneck import logits, shake
from tests.model.tiny import HIDDEN, LAYERS, save_tiny_model, tiny_batch, tiny_config

RANKS = {"in_rank": 5, "out_rank": 3, "reduction_factor": 8}
WIDTH = HIDDEN // RANKS["reduction_factor"]


def config_of(folder: Path, **arguments: Any) -> Any:
    return tiny_config(folder, "bottleneck", classifier=folder.name != "llama", **arguments)


def load(folder: Path, basis: str = "random", **arguments: Any) -> LoadedModel:
    config = config_of(folder, basis=basis, **{**RANKS, **arguments})
    return load_model(config, load_tokenizer(config), 3)


def adapters(model: torch.nn.Module) -> dict[str, SubspaceBottleneck]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SubspaceBottleneck)}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "bert", "bert")


@pytest.fixture
def basis(base: Path, tmp_path: Path) -> Path:
    config = config_of(base, basis="random", **RANKS)
    made = make_basis(config, write_text(tmp_path / "a.txt"), tmp_path / "b.safetensors", torch.device("cpu"), 10_000)
    return made.path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_arithmetic_is_that_of_the_matrices_it_stands_for(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    start, down, up = (torch.randn(rows, 8, generator=generator) for rows in (3, 4, 2))
    adapter = shake(SubspaceBottleneck(start, down, up))
    hidden = torch.randn(2, 5, 8, generator=generator).to(dtype)
    narrow = (hidden.float() @ (start + adapter.down.weight @ down).T + adapter.down.bias).clamp(min=0)
    expected = hidden.float() + narrow @ (up.T @ adapter.up.weight).T + adapter.up.bias @ up
    torch.testing.assert_close(adapter(hidden), expected.to(dtype))


def test_it_has_few_parameters_and_starts_where_the_plain_one_does(base: Path) -> None:
    model = load(base).model
    found = sum(p.numel() for name, p in model.named_parameters() if ".bottleneck." in name and p.requires_grad)
    assert found == LAYERS * (WIDTH * (5 + 1) + 3 * (WIDTH + 1))
    config = config_of(base, reduction_factor=8)
    plain = load_model(config, load_tokenizer(config), 3).model
    assert torch.equal(logits(model, tiny_batch()), logits(plain, tiny_batch()))
    for name, adapter in adapters(model).items():
        assert torch.equal(adapter.start, plain.get_submodule(name).down.weight), "random numbers are the plain one's"


def test_the_basis_is_of_what_each_layer_gives(base: Path, basis: Path) -> None:
    """One text at a time through plain transformers."""
    config = config_of(base)
    tokenizer, model = load_tokenizer(config), AutoModelForSequenceClassification.from_pretrained(base).eval()
    seen: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if name.endswith("output.dense") and "attention" not in name:
            module.register_forward_hook(lambda m, i, output, name=name: seen.setdefault(name, []).append(output[0]))
    with torch.no_grad():
        for line in (basis.parent / "a.txt").read_text().split("\n\n"):
            model(**tokenizer(line, return_tensors="pt"))
    tensors = load_file(basis)
    assert len(tensors) == 2 * len(seen) == 2 * LAYERS
    for name, vectors in seen.items():
        moments = moments_of(torch.cat(vectors))
        for side, rank in (("down", 5), ("up", 3)):
            expected, _ = moments.principal_rows(rank, scaled=side == "down")
            found = tensors[f"{name}.bottleneck.{side}_basis"]
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found @ found.T, torch.eye(3), rtol=0, atol=1e-5)


def test_the_file_is_what_the_adapter_reads_through(base: Path, basis: Path) -> None:
    tensors = load_file(basis)
    for name, adapter in adapters(load(base, str(basis), in_rank=4).model).items():
        assert torch.equal(adapter.down_basis, tensors[f"{name}.down_basis"][:4])
        assert torch.equal(adapter.up_basis, tensors[f"{name}.up_basis"])


@pytest.mark.parametrize("kind", ["random", "file"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loaded_again_it_is_what_was_saved(base: Path, basis: Path, tmp_path: Path, kind: str, dtype: str) -> None:
    loaded = load(base, str(basis) if kind == "file" else kind, **{"fwdllm.base.compute_dtype": dtype})
    shake(loaded.model)
    written = save_trained(loaded, tmp_path / "run")
    basis.unlink()
    batch = tiny_batch()
    assert torch.equal(logits(load_saved(written)[0].model, batch), logits(loaded.model, batch))
    if dtype == "float32":
        plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
        assert torch.equal(logits(load_bottleneck(plain, written), batch), logits(loaded.model, batch))


def test_a_folder_without_a_basis_tensor(base: Path, tmp_path: Path) -> None:
    written = save_trained(load(base), tmp_path / "run")
    file = written / "bottleneck_config.json"
    assert {"in_rank": 5, "out_rank": 3}.items() <= json.loads(file.read_text()).items()
    file.write_text(json.dumps(json.loads(file.read_text()) | {"in_rank": 6}))
    with pytest.raises(ConfigError, match=r"down_basis is \(5, 32\) float32, but .* at least 6 rows"):
        load_bottleneck(AutoModelForSequenceClassification.from_pretrained(base, num_labels=3), written)


def test_training_goes_on_with_the_same_basis_only(base: Path, basis: Path, tmp_path: Path) -> None:
    loaded = load(base, str(basis))
    shake(loaded.model)
    start = {"fwdllm.init_adapter": str(save_trained(loaded, tmp_path / "run"))}
    again = load(base, str(basis), **start)
    assert torch.equal(logits(again.model, tiny_batch()), logits(loaded.model, tiny_batch()))
    with pytest.raises(ConfigError, match=r"basis: gives another .*_basis than .*give basis its own"):
        load(base, "random", **start)
    with pytest.raises(ConfigError, match="in_rank: is 4 here, but 5 in"):
        load(base, str(basis), in_rank=4, **start)
    config = config_of(base, reduction_factor=8, **start)
    with pytest.raises(ModelError, match="this run does not train, the tensor"):
        load_model(config, load_tokenizer(config), 3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"in_rank": 0}, r"in_rank: must be a whole number from 1 to the hidden size 32, but the value is 0"),
        ({"out_rank": 33}, r"out_rank: must be a whole number from 1 to the hidden size 32, but the value is 33"),
        ({"basis": ""}, r"in_rank, out_rank: are the numbers of fixed directions, so they need basis"),
        ({"basis": "randon"}, r"basis 'randon': there is no such file"),
        ({"basis": 3}, r"basis: must be a file's path or random, but the value is 3"),
    ],
)
def test_bad_arguments(base: Path, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load(base, **arguments)


def test_a_decoder_takes_one_too(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "llama", "llama")
    loaded = load(folder, layers=[1])
    shake(loaded.model)
    batch = tiny_batch(classifier=False)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert not torch.equal(logits(plain, batch), logits(loaded.model, batch))
    written = save_trained(loaded, tmp_path / "run")
    assert torch.equal(logits(load_bottleneck(plain, written), batch), logits(loaded.model, batch))
