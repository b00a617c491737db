"""Answers as text: SQuAD's own rules by hand, the best span against the slow search, per-class counts."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import sklearn.metrics
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fs_fwdllm.core.trainables import Trainables
from fs_fwdllm.data.batches import collate
from fs_fwdllm.data.types import IGNORED_LABEL, Batch, Example, Reference
from fs_fwdllm.errors import DataError
from fs_fwdllm.evaluation.answers import (
    MAX_ANSWER_TOKENS,
    BestSpans,
    exact_match,
    f1_score,
    judge,
    judge_apart,
    normalise,
)
from fs_fwdllm.evaluation.generation import MAX_NEW_TOKENS, generate_answers
from fs_fwdllm.evaluation.metrics import METRICS, check_metrics, evaluate
from fs_fwdllm.model import load_model, load_tokenizer
from fs_fwdllm.model.objective import Objective
from tests.model.tiny import save_tiny_model, tiny_config


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Norman conquest", "norman conquest"),
        ("  a  cat, an owl & the\tdog! ", "cat owl dog"),
        ("Theatre another", "theatre another"),
        ("U.S.", "us"),
        ("the", ""),
        ("10,000", "10000"),
    ],
)
def test_normal_form(text, expected):
    assert normalise(text) == expected


@pytest.mark.parametrize(
    ("answer", "gold", "exact", "f1"),
    [
        ("the Normans", "Normans.", 1, 1),
        ("10th century", "the 10th and 11th centuries", 0, 2 * (1 / 2) * (1 / 4) / (1 / 2 + 1 / 4)),
        ("Denmark, Iceland", "Denmark, Iceland and Norway", 0, 2 * 1 * 0.5 / 1.5),
        ("cat cat dog", "cat dog dog", 0, 2 / 3),
        ("x", "y", 0, 0),
        ("", "y", 0, 0),
    ],
)
def test_by_hand(answer, gold, exact, f1):
    assert exact_match(answer, gold) == exact
    assert f1_score(answer, gold) == pytest.approx(f1)


def test_the_best_of_several_right_answers_counts_and_silence_is_wrong():
    gold = {"a": ("x", "the cat"), "b": ("dog house",), "c": ("z",)}
    assert judge({"a": "cat", "b": "dog"}, gold) == pytest.approx({"exact_match": 1 / 3, "f1": (1 + 2 / 3) / 3})


@given(st.text(), st.text())
def test_scores_are_shares_and_symmetric(one, two):
    assert 0 <= f1_score(one, two) <= 1
    assert f1_score(one, two) == f1_score(two, one)
    assert f1_score(one, two) >= exact_match(one, two) or not normalise(one)


def slow_best(starts, ends, offsets):
    best, answer = -np.inf, None
    for first in range(len(offsets)):
        for last in range(first, min(first + MAX_ANSWER_TOKENS, len(offsets))):
            if offsets[first, 0] >= 0 and offsets[last, 0] >= 0 and starts[first] + ends[last] > best:
                best, answer = starts[first] + ends[last], (first, last)
    return best, answer


@pytest.mark.parametrize("seed", range(6))
def test_the_best_span_is_the_slow_searchs_over_all_windows(seed):
    rng = np.random.default_rng(seed)
    context = "".join(rng.choice(list("abcdef "), 300))
    spans, found = BestSpans(), []
    for window in range(3):
        tokens = 60
        begins = np.arange(tokens) * 4 + window * 8
        offsets = np.stack([begins, begins + 4], 1).astype(np.int32)
        offsets[:7] = offsets[-3:] = -1
        starts, ends = rng.normal(size=(2, tokens)).astype(np.float32)
        starts[2] = ends[58] = 100  # outside the context
        score, (first, last) = slow_best(starts, ends, offsets)
        found.append((score, context[offsets[first, 0] : offsets[last, 1]]))
        logits = torch.from_numpy(np.stack([starts, ends]))
        spans.add(logits, [Reference("q", ("gold",), context, offsets)])
    assert spans.answers == {"q": max(found)[1]}
    assert spans.gold == {"q": ("gold",)}


def test_logits_that_are_no_numbers_answer_nothing_and_do_not_crash():
    offsets = np.array([[0, 1], [1, 2]], dtype=np.int32)
    spans = BestSpans()
    spans.add(torch.full((2, 2), torch.nan), [Reference("q", ("gold",), "ab", offsets)])
    assert judge(spans.answers, spans.gold) == {"exact_match": 0.0, "f1": 0.0}


class Pointer(nn.Module):
    """Scores of being first and last, looked up by token."""

    def __init__(self, starts, ends):
        super().__init__()
        self.starts, self.ends = nn.Parameter(torch.tensor(starts)), nn.Parameter(torch.tensor(ends))

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(start_logits=self.starts[input_ids], end_logits=self.ends[input_ids])


def test_question_answering_end_to_end():
    """Two windows of one question; the answer 'b' is in the second, whose scores are higher."""
    model = Pointer([0.0, 1.0, 2.0, 9.0], [0.0, 1.0, 2.0, 9.0]).eval()
    objective = Objective(model, Trainables.of_model(model), "question_answering")
    offsets = np.array([[-1, -1], [0, 1], [2, 3]], dtype=np.int32)

    def window(ids, labels):
        reference = Reference("q", ("b",), "a b", offsets)
        return Example(np.array(ids), np.array([labels]), np.array([0, 1, 1]), reference)

    examples = [window([0, 1, 2], [IGNORED_LABEL] * 2), window([0, 1, 3], [2, 2])]
    found = evaluate(objective, [collate(examples, 0)], METRICS["question_answering"])
    log_sum = np.log(np.exp([0.0, 1.0, 9.0]).sum())
    assert found == pytest.approx({"loss": log_sum - 9.0, "exact_match": 1.0, "f1": 1.0}, rel=1e-3)


def test_per_class_counts_are_scikit_learns():
    rng = np.random.default_rng(3)
    table = torch.from_numpy(rng.normal(size=(30, 4))).float()

    class Lookup(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(table)

        def forward(self, input_ids, attention_mask):
            return SimpleNamespace(logits=self.table[input_ids[:, 0]])

    model = Lookup().eval()
    ids, labels = rng.integers(0, 30, 50), rng.integers(0, 3, 50)  # class 3 is predicted, but never true
    batch = Batch(torch.tensor(ids)[:, None], torch.ones(50, 1, dtype=torch.long), torch.tensor(labels))
    objective = Objective(model, Trainables.of_model(model), "classification")
    found = evaluate(objective, [batch], check_metrics(["per_class", "acc"], "classification"), ["a", "b", "c", "d"])
    predicted = table[ids].argmax(1).numpy()
    per_class = found["per_class"]
    assert per_class["labels"] == ["a", "b", "c", "d"]
    assert per_class["confusion"] == sklearn.metrics.confusion_matrix(labels, predicted, labels=range(4)).tolist()
    recalls = sklearn.metrics.recall_score(labels, predicted, average=None, labels=range(3))
    assert per_class["recall"][:3] == pytest.approx(list(recalls)) and per_class["recall"][3] is None
    assert list(found) == ["loss", "per_class", "accuracy"]


def test_what_is_only_reported_on_request():
    assert "per_class" not in check_metrics([], "classification")
    assert check_metrics(["f1"], "question_answering") == ["f1"] == check_metrics(["f1"], "causal_lm")
    assert check_metrics(["f1"], "label_words") == ["macro_f1"]


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    config = tiny_config(save_tiny_model(tmp_path_factory.mktemp("llama") / "m", "llama"), classifier=False)
    tokenizer = load_tokenizer(config)
    return load_model(config, tokenizer).model, tokenizer


def prompts(tokenizer, references=True):
    def example(row, ids):
        labels = [IGNORED_LABEL] * (len(ids) - 1) + ids[-1:]
        reference = Reference(f"q{row}", ("w3",)) if references else None
        return Example(np.array(ids), np.array(labels), reference=reference)

    rows = [[5, 9, 11, 30], [40, 41, 42, 43, 44, 45, 3], [7, 8]]
    return [example(row, ids) for row, ids in enumerate(rows)], [ids[:-1] for ids in rows]


def test_generated_answers_are_the_greedy_continuation_whatever_the_batch(writer):
    model, tokenizer = writer
    examples, starts = prompts(tokenizer)
    together, gold = generate_answers(model, [collate(examples, 1)], tokenizer)
    for row, start in enumerate(starts):
        tokens = list(start)
        for _ in range(MAX_NEW_TOKENS):
            with torch.no_grad():
                tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
            if tokens[-1] == tokenizer.eos_token_id:
                break
        assert together[f"q{row}"] == tokenizer.decode(tokens[len(start) :], skip_special_tokens=True)
    assert gold == {f"q{row}": ("w3",) for row in range(3)}


def test_generation_is_evaluated_on_request_and_needs_references(writer):
    model, tokenizer = writer
    objective = Objective(model, Trainables.of_model(model), "causal_lm")
    examples, _ = prompts(tokenizer)
    found = evaluate(objective, [collate(examples, 1)], ["exact_match", "f1"], tokenizer=tokenizer)
    assert found["exact_match"] <= found["f1"] <= 1
    examples, _ = prompts(tokenizer, references=False)
    with pytest.raises(DataError, match="reference answers"):
        evaluate(objective, [collate(examples, 1)], ["f1"], tokenizer=tokenizer)


def test_silence_is_the_answer_where_it_scores_more_than_every_span_in_every_window():
    """SQuAD v2's rule by hand: the lowest "no answer" score over the windows against the best span's."""
    offsets = np.array([[-1, -1], [0, 1], [2, 3]], dtype=np.int32)

    def answer(*windows: list[float]) -> str:
        spans = BestSpans()
        for scores in windows:
            reference = Reference("q", (), "a b", offsets, no_answer=0)
            spans.add(torch.tensor([scores, scores]), [reference])
        return spans.answers["q"]

    assert answer([9.0, 1.0, 2.0]) == "" and answer([1.0, 1.0, 2.0]) == "b"
    assert answer([9.0, 1.0, 2.0], [8.0, 3.0, 1.0]) == ""
    assert answer([9.0, 1.0, 2.0], [0.5, 3.0, 1.0]) == "a", "one window is sure enough"


def test_questions_with_and_without_an_answer_are_told_apart_as_in_squad_v2():
    gold = {"a": ("the cat",), "b": (), "c": ("",), "d": ("dog",)}
    answers = {"a": "cat", "b": "", "c": "owl", "d": ""}
    assert judge(answers, gold) == {"exact_match": 0.5, "f1": 0.5}
    assert judge_apart(answers, gold) == {
        "has_answer_exact_match": 0.5, "has_answer_f1": 0.5, "no_answer_exact_match": 0.5,
    }  # fmt: skip
    assert np.isnan(judge_apart({"a": "cat"}, {"a": ("cat",)})["no_answer_exact_match"])
    names = ["f1", "has_answer_f1", "no_answer_exact_match"]
    assert check_metrics(names, "question_answering") == names == check_metrics(names, "causal_lm")
