"""Weights that are converted as they are loaded are read, others are mapped; the values are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import modeling_utils

from fs_fwdllm.model import load_model, load_tokenizer
from fs_fwdllm.model.converting import mapped_embedding, reading_what_is_converted
from tests.model.tiny import save_tiny_model, tiny_config

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def stored_in(folder: Path, dtype: torch.dtype) -> Path:
    """A tiny decoder whose file has this dtype."""
    save_tiny_model(folder, "llama")
    file = folder / "model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    return folder


def is_mapped(file: Path) -> bool:
    return str(file) in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("wanted", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
def test_the_values_are_those_of_the_file_in_the_wanted_dtype(
    tmp_path: Path, stored: torch.dtype, wanted: torch.dtype
) -> None:
    folder = stored_in(tmp_path / "model", stored)
    with reading_what_is_converted(wanted):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=wanted)
    found, expected = model.state_dict(), load_file(folder / "model.safetensors")
    assert expected.keys() <= found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor.to(wanted))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells what a process has mapped")
@pytest.mark.parametrize("wanted", DTYPES)
def test_a_file_is_mapped_only_where_its_pages_are_the_model(tmp_path: Path, wanted: torch.dtype) -> None:
    file = stored_in(tmp_path / "model", torch.bfloat16) / "model.safetensors"
    with reading_what_is_converted(wanted):
        opened: Any = modeling_utils.safe_open  # type: ignore[attr-defined]
        with opened(file, framework="pt") as tensors:
            one = tensors.get_slice("model.norm.weight")[...]
            assert is_mapped(file) == (wanted == torch.bfloat16)
    assert one.dtype == torch.bfloat16


def test_transformers_is_left_as_it_was(tmp_path: Path) -> None:
    """Also after an error; and a safetensors that can only map is let to."""
    file = stored_in(tmp_path / "model", torch.bfloat16) / "model.safetensors"
    stock: Any = modeling_utils.safe_open  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError), reading_what_is_converted(torch.float32):
        raise RuntimeError("a fault of the test")
    assert modeling_utils.safe_open is stock  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_utils, "safe_open", lambda file, framework: stock(file, framework=framework))
        with reading_what_is_converted(torch.float32):
            opened: Any = modeling_utils.safe_open  # type: ignore[attr-defined]
            with opened(file, framework="pt") as tensors:
                assert tensors.get_slice("model.norm.weight")[...].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("architecture", "method", "changes", "is_mapped_there"),
    [
        ("bert", "lora", {}, True),
        ("bert", "full", {}, False),  # it is trained
        ("bert", "lora", {"fwdllm.base.compute_dtype": "bfloat16", "fwdllm.radius": 0.01}, False),  # a copy
        ("gpt2", "lora", {}, False),  # it is the output layer, too
    ],
)
def test_whose_embeddings_are_pages_of_the_file(
    tmp_path: Path, architecture: str, method: str, changes: dict[str, Any], is_mapped_there: bool
) -> None:
    folder = save_tiny_model(tmp_path / "model", architecture)
    config = tiny_config(folder, method, classifier=architecture == "bert", **changes)
    loaded = load_model(config, load_tokenizer(config), 3)
    found = mapped_embedding(loaded.model, loaded.source)
    assert (found is not None) == is_mapped_there
    if found is not None:
        (table,) = (p for name, p in loaded.model.named_parameters() if "word_embeddings" in name)
        assert found is table
