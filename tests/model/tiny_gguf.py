"""Small random models as GGUF files, written as llama.cpp writes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType, quants
from transformers.convert_slow_tokenizer import bytes_to_unicode

from fs_fwdllm.model.gguf_file import GGUF_FORMS
from fs_fwdllm.model.quiet import quiet_transformers

__all__ = ["ARCHITECTURES", "LAYERS", "VOCABULARY", "packed", "save_tiny_gguf"]

LAYERS, HEADS, KEY_HEADS, HIDDEN, INTERMEDIATE = 2, 4, 2, 256, 512
_ALPHABET = list(bytes_to_unicode().values())
_MERGES = ["t h", "th e", "i n", "a n", "an d", "Ġ t"]
_TOKENS = [*_ALPHABET, *(merge.replace(" ", "") for merge in _MERGES), "<|start|>", "<|end|>"]
VOCABULARY = len(_TOKENS)

_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "head_dim": HIDDEN // HEADS,
}  # fmt: skip
#: ``{llama.cpp's name: (configuration, model)}``
ARCHITECTURES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM),
    "gemma3": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}


def packed(matrix: np.ndarray, form: str) -> np.ndarray:
    """``[rows, columns]`` float32 as rows of bytes; blocks of the K forms, which the library does not write, random."""
    if form in ("F32", "F16", "BF16") or not form.endswith("_K"):
        return quants.quantize(matrix, GGMLQuantizationType[form])
    known = next(one for one in GGUF_FORMS.values() if one.name == form)
    generator = np.random.default_rng(int(np.abs(matrix[0, :4]).sum() * 1e6))
    blocks = generator.integers(0, 256, (matrix.size // known.numbers, known.bytes), dtype=np.uint8)
    # scales of 6 bits times numbers of 4 (of 8 bits with a sign times 6) times this: some 0.02 in the mean
    scale = np.full((len(blocks), 1), 1e-5 if form == "Q6_K" else 4e-5, dtype=np.float16).view(np.uint8)
    for place in (208,) if form == "Q6_K" else (0, 2):
        blocks[:, place : place + 2] = scale
    return blocks.reshape(len(matrix), -1)


def save_tiny_gguf(
    file: Path,
    form: str | Callable[[str], str] = "Q8_0",
    architecture: str = "llama",
    *,
    tied: bool = False,
    settings: Mapping[str, Any] | None = None,
    tokenizer: bool = True,
    extra: Mapping[str, np.ndarray] | None = None,
    endianness: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE,
) -> Path:
    """Write a file and return it.

    Args:
        form: of matrices, or what says it by the tensor's name in the file.
        settings: more numbers for the header.
        extra: more tensors.
    """
    config_class, model_class = ARCHITECTURES[architecture]
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(11)
        model = model_class(config_class(**_SIZES, tie_word_embeddings=tied))
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.data.add_(0.1 * torch.randn_like(parameter))  # defaults would hide mistakes
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), LAYERS)
    writer = gguf.GGUFWriter(file, architecture, endianess=endianness)
    _write_settings(writer, architecture, settings or {})
    if tokenizer:
        _write_tokenizer(writer)
    for name, value in model.state_dict().items():
        base, _, leaf = name.rpartition(".")
        if name == "lm_head.weight" and tied:
            continue
        own = f"{names.get_name(base)}.{leaf}"
        _write_tensor(writer, own, _as_written(own, value.numpy(), architecture), form)
    for name, value in (extra or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _as_written(name: str, value: np.ndarray, architecture: str) -> np.ndarray:
    """What llama.cpp's conversion does: pairs of a head's rows beside each other, and norms around one."""
    if architecture == "llama" and (".attn_q." in name or ".attn_k." in name):
        heads = HEADS if ".attn_q." in name else KEY_HEADS
        halves = value.reshape(heads, 2, -1, *value.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(value.shape))
    return value + 1 if architecture.startswith("gemma") and name.endswith("norm.weight") else value


def _write_tensor(writer: gguf.GGUFWriter, name: str, value: np.ndarray, form: str | Callable[[str], str]) -> None:
    if value.ndim == 1:
        writer.add_tensor(name, value)
        return
    chosen = form if isinstance(form, str) else form(name)
    writer.add_tensor(name, packed(value, chosen), raw_dtype=GGMLQuantizationType[chosen])


def _write_settings(writer: gguf.GGUFWriter, architecture: str, settings: Mapping[str, Any]) -> None:
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    if architecture == "llama":
        writer.add_rope_dimension_count(HIDDEN // HEADS)
    if architecture in ("gemma2", "gemma3", "qwen3"):
        writer.add_key_length(HIDDEN // HEADS)
        writer.add_value_length(HIDDEN // HEADS)
    for key, value in settings.items():
        writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(key, value)


def _write_tokenizer(writer: gguf.GGUFWriter) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(_TOKENS)
    control = gguf.TokenType.CONTROL
    writer.add_token_types([control if token.startswith("<|") else gguf.TokenType.NORMAL for token in _TOKENS])
    writer.add_token_merges(_MERGES)
    writer.add_bos_token_id(VOCABULARY - 2)
    writer.add_eos_token_id(VOCABULARY - 1)
