"""Tiny random models and a tiny tokenizer, written as Hugging Face folders: every architecture in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from fs_fwdllm.config import Config, parse_config
from fs_fwdllm.data.types import Batch
from fs_fwdllm.model.quiet import quiet_transformers

__all__ = [
    "ARCHITECTURES",
    "DECODERS",
    "DISENTANGLED",
    "ENCODERS",
    "HIDDEN",
    "LAYERS",
    "VOCABULARY",
    "flip_a_bit",
    "save_tiny_model",
    "save_tiny_tokenizer",
    "tiny_batch",
    "tiny_config",
]

HIDDEN, LAYERS, HEADS, INTERMEDIATE, VOCABULARY, POSITIONS = 32, 2, 2, 48, 100, 64

_WIDE = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
_ENCODER = {**_WIDE, "intermediate_size": INTERMEDIATE, "max_position_embeddings": POSITIONS, "pad_token_id": 1}
_DECODER = {**_WIDE, "intermediate_size": INTERMEDIATE, "max_position_embeddings": POSITIONS}
_NARROW = {"n_layer": LAYERS, "n_head": HEADS}
_DISENTANGLED = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0}
_DISENTANGLED |= {"position_biased_input": False}

#: ``{name: (configuration class, model class, arguments)}``
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**_DECODER, "num_key_value_heads": 1}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {**_NARROW, "n_embd": HIDDEN, "n_positions": POSITIONS}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {**_DECODER, "num_key_value_heads": 2}),
    "bloom": ("BloomConfig", "BloomForCausalLM", {**_NARROW, "hidden_size": HIDDEN}),
    "bert": ("BertConfig", "BertModel", _ENCODER),
    "roberta": ("RobertaConfig", "RobertaModel", {**_ENCODER, "type_vocab_size": 1}),
    "distilbert": (
        "DistilBertConfig",
        "DistilBertModel",
        {"dim": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": INTERMEDIATE, "pad_token_id": 1}
        | {"max_position_embeddings": POSITIONS},
    ),
    "albert": ("AlbertConfig", "AlbertModel", {**_ENCODER, "embedding_size": 16}),
}
#: Encoders whose attention tells content from relative position; tests that list an architecture's names omit them.
DISENTANGLED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "deberta": ("DebertaConfig", "DebertaModel", {**_ENCODER, **_DISENTANGLED}),
    "deberta_v2": (
        "DebertaV2Config",
        "DebertaV2Model",
        {**_ENCODER, **_DISENTANGLED, "position_buckets": 8, "share_att_key": True, "norm_rel_ebd": "layer_norm"},
    ),
}
DECODERS = ("llama", "gpt2", "qwen2", "bloom")
ENCODERS = ("bert", "roberta", "distilbert", "albert")


def save_tiny_tokenizer(folder: Path, *, pad: bool = True, eos: bool = True) -> None:
    """A word-level tokenizer of ``VOCABULARY`` words: ``<unk>`` 0, ``<pad>`` 1, ``</s>`` 2, ``w3`` ... ``w99``."""
    words = ["<unk>", "<pad>", "</s>", *(f"w{index}" for index in range(3, VOCABULARY))]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>"} | ({"pad_token": "<pad>"} if pad else {}) | ({"eos_token": "</s>"} if eos else {})
    with quiet_transformers():
        transformers.PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(folder)


def save_tiny_model(
    folder: Path, architecture: str, *, model_class: str = "", pad: bool = True, eos: bool = True, **changes: Any
) -> Path:
    """Write a tiny model with seeded random weights, and its tokenizer, to ``folder``; return ``folder``."""
    config_class, default_class, arguments = {**ARCHITECTURES, **DISENTANGLED}[architecture]
    settings = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 2, **arguments, **changes}
    config = getattr(transformers, config_class)(**settings)
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(11)
        model = getattr(transformers, model_class or default_class)(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name.lower():
                parameter.data.add_(0.1 * torch.randn_like(parameter))  # defaults would hide mistakes
        model.save_pretrained(folder)
    save_tiny_tokenizer(folder, pad=pad, eos=eos)
    return folder


def flip_a_bit(folder: Path) -> Path:
    """Change one bit in the middle of a model's weights, which nothing but its bytes tells; return ``folder``."""
    file = next(folder.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    return folder


def tiny_config(folder: Path | str, method: str = "full", *, classifier: bool = True, **changes: Any) -> Config:
    """A configuration that loads ``folder``; ``changes`` are the adapter's arguments, except dotted keys."""
    suffix = "transformers" if classifier else "huggingface_llm"
    tree: dict[str, Any] = {
        "seed": 5,
        "model": {"type": f"{folder}@{suffix}", "task": "SequenceClassification" if classifier else ""},
        "llm": {"tok_len": 16, "adapter": {"use": method != "full"}},
    }
    for key in [key for key in changes if "." in key]:
        *sections, leaf = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = changes.pop(key)
    if method != "full":
        tree["llm"]["adapter"]["args"] = [{"adapter_method": method, **changes}]
    return parse_config(tree)


def tiny_batch(*, classifier: bool = True, labels: int = 3, rows: int = 3, tokens: int = 7) -> Batch:
    """A batch with right padding in every row but the first."""
    generator = torch.Generator().manual_seed(3)
    input_ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    for row in range(1, rows):
        attention_mask[row, tokens - row :] = 0
    input_ids = torch.where(attention_mask == 1, input_ids, 1)
    classes = torch.randint(0, labels, (rows,), generator=generator)
    return Batch(input_ids, attention_mask, classes if classifier else input_ids.masked_fill(attention_mask == 0, -100))
