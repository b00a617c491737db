"""The tokenizer of a model, made fit for batches: it cuts, it has a padding token, and it ends texts where it must.

Models that sum a text up at its end-of-text token (T5 and BART as classifiers) need that token in every sample; a
tokenizer that does not add one is taught to, so that what is saved beside the model goes on doing it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers.processors import Sequence, TemplateProcessing
from transformers import AutoTokenizer

from fs_fwdllm.config import Config
from fs_fwdllm.errors import ModelError
from fs_fwdllm.model.base_folder import config_of_base
from fs_fwdllm.model.gguf_settings import gguf_tokenizer
from fs_fwdllm.model.quiet import quiet_transformers
from fs_fwdllm.model.sentence_layout import transformer_folder
from fs_fwdllm.model.source import ModelSource, model_source, reading

__all__ = ["load_tokenizer"]


def load_tokenizer(config: Config, folder: Path | None = None) -> Any:
    """The tokenizer of ``model.type``: pads on the right, cuts at ``llm.tok_len`` tokens, always has a padding token.

    A missing padding token becomes the model's own, else the end-of-text token (padding is masked out), else a new
    ``[PAD]``.

    Args:
        config: names the model.
        folder: where the tokenizer is, if it is not the model's.

    Raises:
        ConfigError: ``model.type`` or ``model.task`` is malformed.
        ModelError: there is no such tokenizer, or it lacks a token that the model cannot do without.
    """
    source = model_source(config)
    place = source.transformer if folder is None else str(transformer_folder(folder))
    settings = config_of_base(source)
    with reading(source, "tokenizer") as safely, quiet_transformers():
        options = {"padding_side": "right", "model_max_length": config.llm.tok_len, **safely}
        if source.gguf is not None and folder is None:
            tokenizer = gguf_tokenizer(source.gguf, settings, **options)
        else:
            tokenizer = AutoTokenizer.from_pretrained(place, **options)
    if tokenizer.pad_token_id is None:
        _give_padding(tokenizer, settings)
    if source.task == "classification" and getattr(settings, "is_encoder_decoder", False):
        _end_texts(tokenizer, settings, source)
    return tokenizer


def _give_padding(tokenizer: Any, settings: Any) -> None:
    own = getattr(settings.get_text_config(), "pad_token_id", None)
    token = _token(tokenizer, own)
    if token is not None and token in tokenizer.all_special_tokens:
        tokenizer.pad_token = token
    elif tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    else:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})


def _token(tokenizer: Any, number: Any) -> str | None:
    """The token with this id, if there is one."""
    known = isinstance(number, int) and 0 <= number < len(tokenizer)
    return str(tokenizer.convert_ids_to_tokens(number)) if known else None


def _end_texts(tokenizer: Any, settings: Any, source: ModelSource) -> None:
    """Make sure that every text has the end-of-text token the model looks for."""
    wanted = settings.get_text_config().eos_token_id
    end = _token(tokenizer, wanted)
    if end is None or wanted == tokenizer.pad_token_id:
        raise ModelError(
            f"{source.name}: this model classifies a text by its end-of-text token (eos_token_id {wanted!r} in "
            "config.json), but its tokenizer has no such token beside the padding; give it the tokenizer it was made "
            "with, or take an encoder"
        )
    if wanted in tokenizer("a")["input_ids"]:
        return
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            f"{source.name}: its tokenizer does not end texts with {end!r}, which this model classifies them by; save "
            "it with add_eos_token, or take an encoder"
        )
    ending = TemplateProcessing(single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, wanted)])
    backend.post_processor = Sequence([backend.post_processor, ending]) if backend.post_processor else ending
