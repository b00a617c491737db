"""Answers a language model writes: greedy continuation of the prompts of evaluation batches.

The prompt of an example is what precedes its first label. Prompts of a batch are padded on the left and continued
together; generation keeps the keys and values of earlier tokens, which changes nothing but the time it takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from fs_fwdllm.data.types import IGNORED_LABEL, Batch
from fs_fwdllm.model.trial import foreign_code

__all__ = ["MAX_NEW_TOKENS", "continue_prompts", "generate_answers"]

#: The longest answer that is written, in tokens.
MAX_NEW_TOKENS = 32


def generate_answers(
    model: Any, batches: Iterable[Batch], tokenizer: Any
) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """``{question: what the model writes}`` and ``{question: right answers}`` for the samples with references."""
    answers: dict[str, str] = {}
    gold: dict[str, tuple[str, ...]] = {}
    for batch in batches:
        if not batch.references:
            continue
        prompts = [_prompt(tokens, labels) for tokens, labels in zip(batch.input_ids, batch.labels, strict=True)]
        for reference, text in zip(batch.references, continue_prompts(model, prompts, tokenizer), strict=True):
            answers[reference.question], gold[reference.question] = text, reference.answers
    return answers, gold


def _prompt(tokens: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return tokens[: int((labels != IGNORED_LABEL).argmax())]


@torch.no_grad()
def continue_prompts(
    model: Any,
    prompts: Sequence[np.ndarray],
    tokenizer: Any,
    max_new_tokens: int = MAX_NEW_TOKENS,
    stop: Sequence[int] | None = None,
    **options: Any,
) -> list[str]:
    """What the model writes after each prompt (token ids), without special tokens.

    Args:
        max_new_tokens: of each text.
        stop: the tokens that end a text; the tokenizer's end token unless told.
        options: of transformers' ``generate``; greedy unless told.

    Raises:
        ModelError: the model's own code fails.
    """
    width = max(map(len, prompts))
    tokens = np.full((len(prompts), width), tokenizer.pad_token_id, dtype=np.int64)
    mask = np.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    device = next(model.parameters()).device
    with foreign_code(f"{type(model).__name__}: continuing {len(prompts)} prompts of up to {width} tokens"):
        written = model.generate(
            input_ids=torch.as_tensor(tokens, device=device), attention_mask=torch.as_tensor(mask, device=device),
            max_new_tokens=max_new_tokens, num_beams=1, use_cache=True, pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id if stop is None else list(stop), **{"do_sample": False, **options},
        )  # fmt: skip
    texts: list[str] = tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)
    return texts
