"""Every example row of the documentation is read, as what the page says it is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fs_fwdllm.config.own_sections import FwdllmDataConfig
from fs_fwdllm.data.files import FILE_ENDINGS, read_table
from fs_fwdllm.data.inspection import inspect_table
from fs_fwdllm.data.templates import TEMPLATES

PAGE = (Path(__file__).resolve().parents[2] / "docs/data.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r'```\w+ title="([\w.]+)"\n(.*?)```', PAGE, flags=re.DOTALL)
EXPECTED = {
    "tickets.csv": "texts (text) with labels (label)",
    "reviews.jsonl": "texts (text) with labels (label)",
    "stars.csv": "texts (text) with labels (label)",
    "alpaca.json": "instructions (alpaca)",
    "dolly.jsonl": "instructions (dolly)",
    "gsm8k.jsonl": "instructions (gsm8k)",
    "messages.jsonl": "conversations (messages)",
    "sharegpt.json": "conversations (conversations)",
    "completions.jsonl": "completions (prompt and completion)",
    "chat_completions.jsonl": "conversations (prompt and completion)",
    "questions.jsonl": "questions with a context (SQuAD)",
}


def test_every_example_is_one_that_is_tried() -> None:
    assert {name for name, _ in EXAMPLES} == set(EXPECTED)


@pytest.mark.parametrize(("name", "content"), EXAMPLES, ids=[name for name, _ in EXAMPLES])
def test_an_example_is_read_as_the_page_says(write, tokenizer, name, content) -> None:
    assert (
        inspect_table(read_table(write(name, content)), FwdllmDataConfig(), tokenizer=tokenizer).format
        == EXPECTED[name]
    )


def test_the_page_names_every_ending_template_and_key() -> None:
    for word in (*FILE_ENDINGS, *TEMPLATES):
        assert f"`{word}`" in PAGE, word
    for key in re.findall(r"`fwdllm\.data\.(\w+)", PAGE):
        assert key in FwdllmDataConfig.model_fields, key
