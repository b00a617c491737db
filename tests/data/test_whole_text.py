"""Tokens are those of the whole text, per family of tokenizers: prompts and answers, chat turns, label words."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from fs_fwdllm.data.conversations import as_conversations
from fs_fwdllm.data.examples import conversation_examples
from fs_fwdllm.data.label_words import LabelWords
from fs_fwdllm.data.table import Table
from fs_fwdllm.data.templates import PromptTemplate
from fs_fwdllm.data.whole_text import common_start, frame_of, taught_positions
from fs_fwdllm.errors import ConfigError, DataError
from tests.data.tokenizer_families import EVERY, REAL, family, real_tokenizer

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PIECES = st.lists(
    st.sampled_from(["Hello", " ", "\n", "\n\n", ":", "great", "bad ", "é", "the cat", "  ", "Z9", "日本"]), max_size=6
).map("".join)


@pytest.fixture(params=[*EVERY, *REAL])
def tokenizer(request):
    name = request.param
    found = real_tokenizer(name) if name in REAL else family(name)
    if found is None:
        pytest.skip(f"../shared/data/models/{name} is absent")
    return copy.deepcopy(found)


def whole_of(tokenizer, text):
    """What the tokenizer makes of a text and the end token after it."""
    tokens = tokenizer(text)["input_ids"]
    return tokens if tokens[-1:] == [tokenizer.eos_token_id] else [*tokens, tokenizer.eos_token_id]


def inner(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def example_of(tokenizer, row, template="none", tok_len=4000):
    table = as_conversations(Table("rows.jsonl", [row], [1]))
    (example,), _ = conversation_examples(table, PromptTemplate(template, tokenizer), tok_len)
    return example


@pytest.mark.parametrize(
    "answer", ["Hello there", " Hello", "\n\nHello", ": yes", "a", "good", "  two", "日本 é", "great\n"]
)
@pytest.mark.parametrize("prompt", ["### Response:", "A review: great\nLabel", "Hello.\n", "the ", "a", "é:\n\n"])
def test_prompt_and_answer_are_one_text(tokenizer, prompt, answer):
    example = example_of(tokenizer, {"prompt": prompt, "completion": answer})
    whole = whole_of(tokenizer, prompt + answer)
    assert example.input_ids.tolist() == whole
    start = max(1, common_start([*frame_of(tokenizer).before, *inner(tokenizer, prompt)], whole))
    assert example.labels.tolist() == [-100] * start + whole[start:]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=PIECES, answer=PIECES)
def test_any_prompt_and_any_answer_are_one_text(tokenizer, prompt, answer):
    whole = whole_of(tokenizer, prompt + answer)
    assume(len(whole) > 1)  # nothing comes before the only token of a text, so nothing predicts it
    example = example_of(tokenizer, {"prompt": prompt, "completion": answer})
    assert example.input_ids.tolist() == whole
    start = int((example.labels != -100).argmax())
    assert example.labels.tolist() == [-100] * start + whole[start:]
    assert (
        start >= 1 and whole[:start] == [*frame_of(tokenizer).before, *inner(tokenizer, prompt)][:start]
    ) or start == 1


def test_an_instruction_is_one_text(tokenizer):
    row = {"instruction": "Add the numbers", "input": "one two", "output": "three cats"}
    example = example_of(tokenizer, row, "alpaca")
    template = PromptTemplate("alpaca", tokenizer)
    messages = [{"role": "user", "content": "Add the numbers", "input": "one two"}]
    prompt = template.prompt(messages)
    assert prompt.endswith("### Input:\none two\n\n### Response:") and "paired with an input" in prompt
    assert example.input_ids.tolist() == whole_of(tokenizer, prompt + "three cats")
    start = int((example.labels != -100).argmax())
    assert template.prompt_ids(messages)[:start] == example.input_ids[:start].tolist()
    assert start >= len(template.prompt_ids(messages)) - 1


def test_turns_of_a_chat_are_one_text(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    messages = [
        {"role": "system", "content": "Be kind"},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "great"},
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "sat on the mat"},
    ]
    example = example_of(tokenizer, {"messages": messages}, "chat")
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert example.input_ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    taught = [int(label) for label in example.labels if label != -100]
    assert taught.count(end) == 2 and taught[-1] == end
    words = tokenizer.decode(taught).replace("<|im_end|>", " ").split()
    assert words == ["great", "sat", "on", "the", "mat"]
    template = PromptTemplate("chat", tokenizer)
    asked = template.prompt_ids(messages[:4])
    start = len(asked)
    assert (
        example.input_ids[:start].tolist() == asked
        and example.labels[start] != -100
        and example.labels[start - 1] == -100
    )
    assert template.stop_ids() == [tokenizer.eos_token_id, end]


def test_marked_answers_are_those_that_are_found(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    messages = [
        {"role": role, "content": text}
        for role, text in zip(["user", "assistant"] * 2, ["a", "the cat", "b", "é"], strict=True)
    ]
    tokenizer.chat_template = CHATML
    found = example_of(tokenizer, {"messages": messages}, "chat")
    tokenizer.chat_template = CHATML.replace(
        "{{ message.content }}<|im_end|>\n",
        "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ message.content }}<|im_end|>{% endif %}{{ '\n' }}",
    )  # fmt: skip
    marked = example_of(tokenizer, {"messages": messages}, "chat")
    assert marked.input_ids.tolist() == found.input_ids.tolist()
    assert marked.labels.tolist() == found.labels.tolist()


@pytest.mark.parametrize("prompt", ["A review: {text}\nLabel:", "{text}", "{text} Label: ", "Label {text} :\n"])
def test_label_words_are_one_text_with_the_prompt(tokenizer, prompt):
    labels = ["great", "bad"]
    words = LabelWords(prompt, labels, tokenizer)
    before = list(frame_of(tokenizer).before)
    space = "" if prompt[-1].isspace() else " "
    for text, tokens in zip(texts := ["it was great", "boring", "é:"], words.encode(texts, 500), strict=True):
        for word, own in zip(labels, words.tokens, strict=True):
            whole = [
                *before,
                *tokenizer(prompt.format(text=text) + space + word, add_special_tokens=False)["input_ids"],
            ]
            assert whole[: len(tokens)] == tokens and whole[len(tokens)] == own


@pytest.mark.parametrize("tok_len", [24, 30, 41])
def test_a_long_text_is_cut_and_read_as_a_whole_again(tokenizer, tok_len):
    words = LabelWords("x: {text}\nLabel:", ["great", "bad"], tokenizer)
    text = "the cat sat on the mat; " * 30
    (tokens,) = words.encode([text], tok_len)
    assert len(tokens) <= tok_len
    ends = [
        length for length in range(len(text))
        if words.encode([text[:length]], 4000) == [tokens]
    ]  # fmt: skip
    assert ends, "the tokens are those of some start of the text"
    longer = words.encode([text[: ends[-1] + 1]], 4000)[0]
    slow = not getattr(tokenizer, "is_fast", False)
    assert len(longer) > tok_len - (8 if slow else 3), "no more is cut than has to be"


def test_words_that_start_alike_are_refused(tokenizer):
    with pytest.raises(ConfigError, match="start with the same token"):
        LabelWords("{text}:", ["great", "great"], tokenizer)


def test_no_room_for_the_text_is_said(tokenizer):
    assert LabelWords("x: {text}\nLabel:", ["great", "bad"], tokenizer).encode(["boring"], 2) == [None]


def test_a_border_between_two_tokens_belongs_to_what_follows():
    tokenizer = family("byte-level across spaces")
    ((tokens, ((first, last),)),) = taught_positions(tokenizer, ["Hello.\n\nHow"], [[(7, 11)]])
    pieces = tokenizer.convert_ids_to_tokens(tokens)
    assert any("ĊĊ" in piece for piece in pieces), "the tokenizer merges across the border"
    assert "ĊĊ" in pieces[first] and last == len(tokens)
    assert tokenizer("Hello.\n", add_special_tokens=False)["input_ids"][:first] == tokens[:first]


def test_class_words_have_mass_where_a_model_learnt_them():
    """A model that has only ever seen whole texts puts its mass on the tokens we read."""
    tokenizer = family("SentencePiece BPE")
    words = LabelWords("A review: {text}\nLabel:", ["great", "bad"], tokenizer)
    texts = {"great": "it was wonderful", "bad": "it was boring"}
    wholes = [tokenizer(f"A review: {text}\nLabel: {word}")["input_ids"] for word, text in texts.items()]
    following: dict[tuple[int, ...], torch.Tensor] = {}
    for whole in wholes:
        for place in range(1, len(whole)):
            counts = following.setdefault(tuple(whole[:place]), torch.zeros(len(tokenizer)))
            counts[whole[place]] += 1
    for index, tokens in enumerate(words.encode(list(texts.values()), 200)):
        counts = following[tuple(tokens)]
        assert float(counts[words.tokens].sum() / counts.sum()) == 1.0
        assert int(counts[words.tokens].argmax()) == index


def test_a_template_that_hides_the_answer_is_refused_by_file_and_row():
    tokenizer = copy.deepcopy(family("byte-level"))
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bad"}]}
    for template, reason in (
        ("{% for message in messages %}{{ message.content | length }}{% endfor %}", "cannot be found"),
        ("{{ raise_exception('only the user may speak') }}", "only the user may speak"),
        ("{% for message in messages %}{{ message.content.nothing() }}{% endfor %}", "refuses"),
        ("{% for %}", "refuses"),
        ("{{ 1 / 0 }}", "refuses"),
    ):
        tokenizer.chat_template = template
        with pytest.raises(DataError, match=rf"rows\.jsonl, row 1: .*{reason}"):
            example_of(tokenizer, row, "chat")
