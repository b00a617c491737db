"""A tokenizer of whole words, made here, so that no test of the data part needs a file of anybody's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fs_fwdllm.config import Config, parse_config

_CORPUS = [
    "Below is an instruction that describes a task , paired with an input that provides further context .",
    "Write a response that appropriately completes the request . ### Instruction : ### Input : ### Response :",
    "one two three four five six seven eight nine ten None add the numbers red green blue a",
]


def word_tokenizer(start: bool) -> PreTrainedTokenizerFast:
    """Tokens are words and single punctuation marks; ``start``: whether it puts its start token before a text."""
    inner = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", "[BOS]", "[EOS]"]
    inner.train_from_iterator(_CORPUS, trainers.WordLevelTrainer(special_tokens=special))
    if start:
        inner.post_processor = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", bos_token="[BOS]", eos_token="[EOS]"
    )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer(start=True)


@pytest.fixture(scope="session")
def tokenizer_without_start() -> PreTrainedTokenizerFast:
    return word_tokenizer(start=False)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, Any], Path]:
    """``write("x.jsonl", rows)`` writes rows (or text, or bytes) in the format of the ending, under ``tmp_path``."""

    def write_file(name: str, content: Any) -> Path:
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        elif path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
        else:
            path.write_text(json.dumps(content), encoding="utf-8")
        return path

    return write_file


@pytest.fixture
def configure(tmp_path: Path) -> Callable[..., Config]:
    """A configuration whose data folder is ``tmp_path``: ``configure("x.json@llm", {"federate.client_num": 3})``."""

    def build(data_type: str, settings: dict[str, Any] | None = None) -> Config:
        tree: dict[str, Any] = {}
        defaults = {"data.root": str(tmp_path), "data.type": data_type, "federate.client_num": 3, "llm.tok_len": 64}
        for key, value in {**defaults, **(settings or {})}.items():
            *sections, leaf = key.split(".")
            node = tree
            for section in sections:
                node = node.setdefault(section, {})
            node[leaf] = value
        return parse_config(tree)

    return build
