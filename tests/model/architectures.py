"""The matrix of architectures: one tiny random model of each, from its configuration alone, in milliseconds.

A row is what Hugging Face calls it, the task it is loaded for, its configuration class, the sizes that make it tiny,
and what it cannot do. Rows of classes that the installed transformers does not have are skipped by name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from fs_fwdllm.config import Config, parse_config
from fs_fwdllm.data.types import IGNORED_LABEL, Batch, Task
from fs_fwdllm.model.quiet import quiet_transformers
from tests.model.tiny import VOCABULARY, save_tiny_tokenizer

__all__ = ["ARCHITECTURES", "AUTO_CLASSES", "FAST", "Architecture", "described", "row_of"]

_SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
_SIZES |= {"max_position_embeddings": 64}
_GROUPED = {**_SIZES, "num_key_value_heads": 1}
_WIDE_HEADS = {**_GROUPED, "head_dim": 8}
_OLD = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_BETWEEN = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2}
_BETWEEN |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 64}
_T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 1}
AUTO_CLASSES = {
    "causal_lm": "AutoModelForCausalLM",
    "classification": "AutoModelForSequenceClassification",
    "question_answering": "AutoModelForQuestionAnswering",
}


@dataclass(frozen=True)
class Architecture:
    """A row of the matrix.

    Attributes:
        batches: whether several probes can share a pass.
        forward_mode: whether all its operations have a forward-mode derivative.
        padding: how it takes samples of different lengths.
        refused: what loading it with LoRA says, where that is impossible.
        reason: why that is so, for the documentation.
    """

    name: str
    task: Task
    config: str
    sizes: dict[str, Any] = field(default_factory=dict)
    batches: bool = True
    forward_mode: bool = True
    padding: str = "right"
    refused: str = ""
    reason: str = ""

    @property
    def needs_end(self) -> bool:
        """Whether a text is classified by its end-of-text token."""
        return self.task == "classification" and self.config.startswith(("T5", "MT5", "UMT5", "Bart", "MBart"))

    def save(self, folder: Path, **changes: Any) -> Path:
        """Write a tiny model of it with seeded random weights, and a tokenizer; skips where there is no such class."""
        if not hasattr(transformers, self.config):
            pytest.skip(f"transformers {transformers.__version__} has no {self.config}")
        tokens = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
        labels = {"num_labels": 3} if self.task == "classification" else {}
        settings = getattr(transformers, self.config)(**{**tokens, **labels, **self.sizes, **changes})
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(11)
            model = getattr(transformers, AUTO_CLASSES[self.task]).from_config(settings)
            for parameter in model.parameters():
                parameter.data.add_(0.1 * torch.randn_like(parameter))  # zeros and ones would hide mistakes
            model.save_pretrained(folder)
        save_tiny_tokenizer(folder)
        return folder

    def run_config(self, folder: Path, method: str, **own: Any) -> Config:
        """A run's configuration for the model in ``folder``; ``own`` are keys of ``fwdllm``."""
        suffix = "huggingface_llm" if self.task == "causal_lm" else "transformers"
        task = {"classification": "SequenceClassification", "question_answering": "QuestionAnswering"}
        adapter = {"use": method != "full", "args": [{"adapter_method": method}] if method != "full" else []}
        return parse_config(
            {
                "seed": 5,
                "model": {"type": f"{folder}@{suffix}", "task": task.get(self.task, "")},
                "llm": {"tok_len": 16, "adapter": adapter},
                "federate": {"method": "fedmezo"},
                "fwdllm": own,
            }
        )

    def batch(self) -> Batch:
        """Three rows of 8, 6 and 4 tokens, padded on the right."""
        generator = np.random.default_rng(3)
        input_ids, mask = generator.integers(4, VOCABULARY, (3, 8)), np.ones((3, 8), dtype=np.int64)
        for row, length in enumerate((8, 6, 4)):
            mask[row, length:] = 0
            if self.needs_end:
                input_ids[row, length - 1] = 2
        input_ids[mask == 0] = 1
        if self.task == "causal_lm":
            labels = np.where(mask == 1, input_ids, IGNORED_LABEL)
            labels[:, 0] = IGNORED_LABEL  # Hugging Face never counts it
        else:
            labels = np.array([[0, 1], [2, 2], [1, 3]]) if self.task == "question_answering" else np.array([0, 2, 1])
        return Batch(input_ids, mask, labels)


def row_of(batch: Batch, row: int) -> Batch:
    """One sample of a batch, without padding."""
    length = int(batch.attention_mask[row].sum())
    labels = batch.labels[row : row + 1]
    one = slice(row, row + 1)
    per_token = labels.shape == batch.input_ids[one].shape
    return Batch(
        batch.input_ids[one, :length], batch.attention_mask[one, :length], labels[:, :length] if per_token else labels
    )


def _rows(
    task: Task, rows: dict[str, tuple[str, dict[str, Any]]], exceptions: dict[str, dict[str, Any]]
) -> dict[str, Architecture]:
    short = {"causal_lm": "", "classification": "/classes", "question_answering": "/spans"}[task]
    return {
        f"{name}{short}": Architecture(name, task, config, sizes, **exceptions.get(f"{name}{short}", {}))
        for name, (config, sizes) in rows.items()
    }


_DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "arcee": ("ArceeConfig", _WIDE_HEADS),
    "biogpt": ("BioGptConfig", _SIZES),
    "bloom": ("BloomConfig", {"hidden_size": 16, "n_layer": 2, "n_head": 2}),
    "codegen": ("CodeGenConfig", {**_OLD, "n_head": 4, "rotary_dim": 4}),
    "cohere": ("CohereConfig", _GROUPED),
    "cohere2": ("Cohere2Config", _WIDE_HEADS),
    "ctrl": ("CTRLConfig", {**_OLD, "dff": 24}),
    "deepseek_v3": (
        "DeepseekV3Config",
        {**_SIZES, "num_key_value_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2}
        | {"topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "q_lora_rank": 8}
        | {"kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "n_shared_experts": 1},
    ),
    "exaone4": ("Exaone4Config", _GROUPED),
    "falcon": ("FalconConfig", {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}),
    "falcon_alibi": (
        "FalconConfig",
        {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "alibi": True, "multi_query": False}
        | {"parallel_attn": False, "bias": True},
    ),
    "falcon_new": (
        "FalconConfig",
        {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_kv_heads": 1}
        | {"new_decoder_architecture": True},
    ),
    "falcon_mamba": ("FalconMambaConfig", {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}),
    "gemma": ("GemmaConfig", _WIDE_HEADS),
    "gemma2": ("Gemma2Config", _WIDE_HEADS),
    "gemma3": ("Gemma3TextConfig", _WIDE_HEADS),
    "glm": ("GlmConfig", {**_WIDE_HEADS, "pad_token_id": 1}),
    "glm4": ("Glm4Config", {**_WIDE_HEADS, "pad_token_id": 1}),
    "gpt2": ("GPT2Config", _OLD),
    "gpt_bigcode": ("GPTBigCodeConfig", _OLD),
    "gpt_neo": (
        "GPTNeoConfig",
        {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_position_embeddings": 64}
        | {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    ),
    "gpt_neox": ("GPTNeoXConfig", _SIZES),
    "gpt_oss": ("GptOssConfig", {**_WIDE_HEADS, **_LOCAL, "sliding_window": 4}),
    "gptj": ("GPTJConfig", {**_OLD, "rotary_dim": 4}),
    "granite": ("GraniteConfig", _GROUPED),
    "granitemoe": ("GraniteMoeConfig", {**_GROUPED, **_LOCAL}),
    "helium": ("HeliumConfig", _WIDE_HEADS),
    "jamba": (
        "JambaConfig",
        {**_GROUPED, "num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1}
        | {"expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 4, "use_mamba_kernels": False}
        | {"mamba_dt_rank": 4},
    ),
    "lfm2": ("Lfm2Config", {**_GROUPED, "layer_types": ["conv", "full_attention"]}),
    "llama": ("LlamaConfig", _GROUPED),
    "mamba": ("MambaConfig", {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}),
    "mamba2": (
        "Mamba2Config",
        {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 1}
        | {"chunk_size": 8},
    ),
    "mistral": ("MistralConfig", {**_WIDE_HEADS, "sliding_window": 4}),
    "mixtral": ("MixtralConfig", {**_WIDE_HEADS, **_LOCAL}),
    "mpt": ("MptConfig", {"d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 64, "expansion_ratio": 2}),
    "nemotron": ("NemotronConfig", _GROUPED),
    "olmo": ("OlmoConfig", _GROUPED),
    "olmo2": ("Olmo2Config", _GROUPED),
    "olmoe": ("OlmoeConfig", {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2}),
    "openai-gpt": ("OpenAIGPTConfig", _OLD),
    "opt": ("OPTConfig", {**_SIZES, "ffn_dim": 24, "word_embed_proj_dim": 16}),
    "persimmon": ("PersimmonConfig", _SIZES),
    "phi": ("PhiConfig", _SIZES),
    "phi3": ("Phi3Config", {**_GROUPED, "pad_token_id": 1}),
    "phimoe": ("PhimoeConfig", {**_GROUPED, **_LOCAL}),
    "qwen2": ("Qwen2Config", _GROUPED),
    "qwen2_moe": ("Qwen2MoeConfig", {**_GROUPED, **_EXPERTS, "shared_expert_intermediate_size": 24}),
    "qwen3": ("Qwen3Config", _WIDE_HEADS),
    "qwen3_moe": ("Qwen3MoeConfig", {**_WIDE_HEADS, **_EXPERTS}),
    "qwen3_next": (
        "Qwen3NextConfig",
        {**_WIDE_HEADS, **_EXPERTS, "shared_expert_intermediate_size": 16, "linear_num_value_heads": 2}
        | {"linear_num_key_heads": 1, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
        | {"layer_types": ["linear_attention", "full_attention"]},
    ),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        {**_WIDE_HEADS, "lru_width": 16, "block_types": ["recurrent", "attention"], "attention_window_size": 8},
    ),
    "rwkv": ("RwkvConfig", {"hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16}),
    "smollm3": ("SmolLM3Config", {**_GROUPED, "pad_token_id": 1}),
    "stablelm": ("StableLmConfig", _GROUPED),
    "starcoder2": ("Starcoder2Config", _GROUPED),
    "xglm": (
        "XGLMConfig",
        {"d_model": 16, "num_layers": 2, "attention_heads": 2, "ffn_dim": 24, "max_position_embeddings": 64},
    ),
}
_CLASSIFIERS: dict[str, tuple[str, dict[str, Any]]] = {
    "albert": ("AlbertConfig", {**_SIZES, "embedding_size": 8}),
    "bart": ("BartConfig", _BETWEEN),
    "bert": ("BertConfig", _SIZES),
    "big_bird": ("BigBirdConfig", {**_SIZES, "block_size": 2, "num_random_blocks": 1}),
    "bloom": ("BloomConfig", {"hidden_size": 16, "n_layer": 2, "n_head": 2}),
    "camembert": ("CamembertConfig", {**_SIZES, "type_vocab_size": 1}),
    "convbert": ("ConvBertConfig", {**_SIZES, "embedding_size": 16, "conv_kernel_size": 3}),
    "data2vec-text": ("Data2VecTextConfig", {**_SIZES, "type_vocab_size": 1}),
    "deberta": ("DebertaConfig", {**_SIZES, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    "deberta-v2": ("DebertaV2Config", {**_SIZES, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    "distilbert": (
        "DistilBertConfig",
        {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 64},
    ),
    "electra": ("ElectraConfig", {**_SIZES, "embedding_size": 8}),
    "ernie": ("ErnieConfig", _SIZES),
    "esm": ("EsmConfig", {**_SIZES, "pad_token_id": 1, "mask_token_id": 3, "position_embedding_type": "absolute"}),
    "falcon": ("FalconConfig", {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}),
    "fnet": ("FNetConfig", {**_SIZES}),
    "funnel": (
        "FunnelConfig",
        {"block_sizes": [1, 1], "num_decoder_layers": 1, "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 24},
    ),
    "gemma": ("GemmaConfig", _WIDE_HEADS),
    "gpt2": ("GPT2Config", _OLD),
    "ibert": ("IBertConfig", {**_SIZES, "type_vocab_size": 1}),
    "llama": ("LlamaConfig", _GROUPED),
    "longformer": ("LongformerConfig", {**_SIZES, "attention_window": [4, 4], "type_vocab_size": 1}),
    "mbart": ("MBartConfig", _BETWEEN),
    "mobilebert": (
        "MobileBertConfig",
        {**_SIZES, "embedding_size": 16, "intra_bottleneck_size": 16, "num_feedforward_networks": 1},
    ),
    "modernbert": ("ModernBertConfig", {**_SIZES, "local_attention": 4}),
    "mpnet": ("MPNetConfig", _SIZES),
    "mt5": ("MT5Config", _T5),
    "nystromformer": ("NystromformerConfig", {**_SIZES, "num_landmarks": 2, "segment_means_seq_len": 8}),
    "opt": ("OPTConfig", {**_SIZES, "ffn_dim": 24, "word_embed_proj_dim": 16}),
    "qwen2": ("Qwen2Config", _GROUPED),
    "rembert": ("RemBertConfig", {**_SIZES, "input_embedding_size": 8, "output_embedding_size": 8}),
    "roberta": ("RobertaConfig", {**_SIZES, "type_vocab_size": 1}),
    "roformer": ("RoFormerConfig", {**_SIZES, "embedding_size": 16}),
    "squeezebert": (
        "SqueezeBertConfig",
        {**_SIZES, "embedding_size": 16, "q_groups": 2, "k_groups": 2, "v_groups": 2, "intermediate_groups": 2}
        | {"output_groups": 2},
    ),
    "t5": ("T5Config", _T5),
    "umt5": ("UMT5Config", _T5),
    "xlm": ("XLMConfig", {"emb_dim": 16, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 64}),
    "xlm-roberta": ("XLMRobertaConfig", {**_SIZES, "type_vocab_size": 1}),
    "xlnet": ("XLNetConfig", {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24}),
}
_READERS = ("albert", "bert", "deberta-v2", "distilbert", "electra", "gpt2", "llama", "modernbert")
_READERS += ("mpnet", "roberta", "xlnet", "bart")

_NO_LINEAR = "no linear layer .* use adapter_method layernorm"
#: What some cannot do; everything else holds for all.
_EXCEPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"batches": False, "forward_mode": False} for name in ("bloom", "bloom/classes", "recurrent_gemma")},
    **{name: {"batches": False} for name in ("falcon", "falcon_new", "falcon/classes", "longformer/classes")},
    **{f"{name}/classes": {"padding": "none"} for name in ("convbert", "fnet", "mobilebert")},
    "xlnet/classes": {"padding": "left"},
    "ibert/classes": {"refused": _NO_LINEAR, "reason": "its layers are quantised linear ones"},
    "nystromformer/classes": {
        "refused": "a first forward pass, of 9 tokens, failed",
        "reason": "it takes texts of one length only",
    },
    "squeezebert/classes": {"refused": _NO_LINEAR, "reason": "its layers are convolutions"},
}
ARCHITECTURES: dict[str, Architecture] = {
    **_rows("causal_lm", _DECODERS, _EXCEPTIONS),
    **_rows("classification", _CLASSIFIERS, _EXCEPTIONS),
    **_rows("question_answering", {name: _CLASSIFIERS[name] for name in _READERS}, _EXCEPTIONS),
}
#: One of each kind; the others are slow tests.
FAST = ("bloom", "falcon", "llama", "mamba", "mixtral", "xglm", "bert/classes", "fnet/classes", "longformer/classes")
FAST += ("roberta/classes", "t5/classes", "xlnet/classes", "bert/spans")


def described() -> str:
    """The matrix in words, for ``docs/models.md``; print it with ``python -m tests.model.architectures``."""
    titles = {"causal_lm": "Language models", "classification": "Classifiers", "question_answering": "Span readers"}
    lines = []
    for task, title in titles.items():
        rows = [row.name for row in ARCHITECTURES.values() if row.task == task and not row.refused]
        lines.append(f"**{title}** ({len(rows)}): {', '.join(f'`{name}`' for name in rows)}.\n")
    lines += [
        "| architecture | several probes in a pass | forward mode | samples of different lengths |",
        "|---|---|---|---|",
    ]
    passes = {"right": "share a pass", "left": "share a pass, padded on the left", "none": "never share a pass"}
    for name, row in ARCHITECTURES.items():
        if row.refused:
            lines.append(f"| `{name}` | not with LoRA: {row.reason} | | |")
        elif not (row.batches and row.forward_mode) or row.padding != "right":
            batches = "yes" if row.batches else "one by one, said"
            forward_mode = "yes" if row.forward_mode else "refused by name"
            lines.append(f"| `{name}` | {batches} | {forward_mode} | {passes[row.padding]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(described())
