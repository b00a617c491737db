"""Metrics against scikit-learn's on known predictions, weighted by labels, and under the host's names too."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import sklearn.metrics
import torch
from torch import nn

from fs_fwdllm.core.trainables import Trainables
from fs_fwdllm.data.types import IGNORED_LABEL, Batch
from fs_fwdllm.errors import ConfigError
from fs_fwdllm.evaluation.metrics import METRICS, check_metrics, evaluate, majority_scores
from fs_fwdllm.model.objective import Objective

CLASSES = 4


class Lookup(nn.Module):
    """Logits are rows of a table: of the first token's for a classifier, of every token's for a language model."""

    def __init__(self, table, per_token):
        super().__init__()
        self.table = nn.Parameter(torch.as_tensor(table, dtype=torch.float32))
        self.per_token = per_token

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(logits=self.table[input_ids if self.per_token else input_ids[:, 0]])


def objective(task, table):
    model = Lookup(table, task == "causal_lm").eval()
    return Objective(model, Trainables.of_model(model), task)


def batch(input_ids, labels):
    ids = torch.as_tensor(np.atleast_2d(input_ids))
    return Batch(ids, torch.ones_like(ids), torch.as_tensor(labels))


def classification(seed, sizes):
    """Batches of unequal size, with what each sample is and what is predicted for it."""
    rng = np.random.default_rng(seed)
    table = rng.normal(size=(50, CLASSES))
    ids = rng.integers(0, 50, sum(sizes))
    labels = rng.integers(0, CLASSES - 1, sum(sizes))  # the last class never occurs
    cuts = np.cumsum(sizes)[:-1]
    pairs = zip(np.split(ids, cuts), np.split(labels, cuts), strict=True)
    batches = [batch(part[:, None], truth) for part, truth in pairs]
    return objective("classification", table), batches, table[ids], labels


@pytest.mark.parametrize("sizes", [[30], [7, 1, 13], [1] * 5])
@pytest.mark.parametrize("seed", [0, 1])
def test_classification_metrics_are_scikit_learns(sizes, seed):
    model, batches, logits, labels = classification(seed, sizes)
    found = evaluate(model, batches, METRICS["classification"])
    predictions = logits.argmax(1)
    shifted = logits - logits.max(1, keepdims=True)
    chances = np.exp(shifted) / np.exp(shifted).sum(1, keepdims=True)
    assert list(found) == ["loss", "accuracy", "majority_accuracy", "macro_f1", "mcc"]
    assert found == pytest.approx(
        {
            "loss": sklearn.metrics.log_loss(labels, chances, labels=range(CLASSES)),
            "accuracy": sklearn.metrics.accuracy_score(labels, predictions),
            "majority_accuracy": max(np.mean(labels == label) for label in range(CLASSES)),
            "macro_f1": sklearn.metrics.f1_score(labels, predictions, average="macro"),
            "mcc": sklearn.metrics.matthews_corrcoef(labels, predictions),
        },
        rel=1e-6,
    )


def test_by_hand():
    """Truth 0 0 0 1 1 2, predictions 0 0 1 1 0 2."""
    table = 50.0 * torch.eye(3)
    found = evaluate(
        objective("classification", table),
        [batch([[0], [0], [1]], [0, 0, 0]), batch([[1], [0], [2]], [1, 1, 2])],
        METRICS["classification"],
    )
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found["majority_accuracy"] == pytest.approx(3 / 6)
    assert found["macro_f1"] == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    assert found["mcc"] == pytest.approx((4 * 6 - 14) / math.sqrt((36 - 14) * (36 - 14)))
    assert found["loss"] == pytest.approx(2 * 50 / 6)


def test_only_what_was_asked_for():
    model, batches, *_ = classification(0, [8])
    assert list(evaluate(model, batches, ["mcc"])) == ["loss", "mcc"]
    assert evaluate(model, batches, ["mcc"])["mcc"] == evaluate(model, batches, METRICS["classification"])["mcc"]


def test_one_class_predicted_throughout_is_a_number():
    found = evaluate(
        objective("classification", [[9.0, 0, 0]]), [batch([[0], [0], [0]], [0, 1, 0])], METRICS["classification"]
    )
    assert found["accuracy"] == found["majority_accuracy"] == pytest.approx(2 / 3)
    assert found["mcc"] == 0
    assert found["macro_f1"] == pytest.approx(0.4)


def test_language_model_metrics():
    """Every labelled token counts once, whatever row or batch it is in; the first token is never predicted."""
    table = torch.randn(12, 12, generator=torch.Generator().manual_seed(1))
    rows = [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 0]]
    labels = [[1, 2, 3, 4], [IGNORED_LABEL] * 3 + [8], [IGNORED_LABEL, 10, IGNORED_LABEL, IGNORED_LABEL]]
    pairs = [(1, 2), (2, 3), (3, 4), (7, 8), (9, 10)]
    batches = [batch(rows[:1], labels[:1]), batch(rows[1:], labels[1:])]
    table[2] = 20 * torch.eye(12)[3]  # one prediction is right for certain
    found = evaluate(objective("causal_lm", table), batches, METRICS["causal_lm"])
    losses = [-torch.log_softmax(table[token].double(), 0)[following].item() for token, following in pairs]
    hits = [int(table[token].argmax()) == following for token, following in pairs]
    assert 0 < np.mean(hits) < 1
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert found["token_accuracy"] == pytest.approx(np.mean(hits))


@pytest.mark.parametrize("size", [1e4, math.nan])
def test_a_perplexity_beyond_all_numbers_is_infinite(size):
    table = torch.zeros(3, 3)
    table[0, 0] = size
    found = evaluate(objective("causal_lm", table), [batch([[0, 1]], [[0, 1]])], METRICS["causal_lm"])
    assert found["perplexity"] == math.inf


def test_all_metrics_of_the_task_when_none_is_named():
    assert check_metrics([], "classification") == ["accuracy", "majority_accuracy", "macro_f1", "mcc"]
    assert check_metrics([], "causal_lm") == ["token_accuracy", "perplexity"]


@pytest.mark.parametrize(
    ("names", "task", "expected"),
    [
        (["acc"], "classification", ["accuracy"]),
        (["f1", "mcc"], "classification", ["macro_f1", "mcc"]),
        (["loss", "acc"], "classification", ["accuracy"]),
        (["avg_loss", "total", "perplexity"], "causal_lm", ["perplexity"]),
    ],
)
def test_the_hosts_names(names, task, expected):
    assert check_metrics(names, task) == expected


@pytest.mark.parametrize(
    ("name", "task", "words"),
    [
        ("acuracy", "classification", ["'acuracy'", "did you mean 'accuracy'", "macro_f1"]),
        ("perplexity", "classification", ["'perplexity'", "classification"]),
        ("acc", "causal_lm", ["'acc'", "causal_lm", "token_accuracy"]),
        ("mcc", "causal_lm", ["'mcc'", "perplexity"]),
    ],
)
def test_an_unknown_metric_names_the_key_the_value_and_the_choices(name, task, words):
    with pytest.raises(ConfigError, match=r"eval\.metrics") as error:
        check_metrics([name], task)
    assert all(word in str(error.value) for word in words), error.value


def test_binary_f1_is_that_of_the_second_class_and_only_on_request():
    from fs_fwdllm.evaluation.metrics import METRICS, of_classes

    predicted, actual = np.array([1, 1, 0, 0, 1]), np.array([1, 0, 1, 0, 1])
    assert of_classes(predicted, actual, ["binary_f1"], [])["binary_f1"] == pytest.approx(2 / 3)
    assert check_metrics(["binary_f1"], "classification") == ["binary_f1"]
    assert "binary_f1" not in METRICS["classification"] and "binary_f1" not in check_metrics([], "classification")


def test_always_answering_the_most_frequent_class_is_scored_like_any_answer():
    _, batches, _, labels = classification(0, [7, 13])
    most_frequent = np.full_like(labels, np.bincount(labels).argmax())
    found = majority_scores(batches, ["macro_f1", "binary_f1", "mcc", "per_class"])
    assert found == pytest.approx(
        {
            "majority_accuracy": np.mean(labels == most_frequent),
            "majority_macro_f1": sklearn.metrics.f1_score(labels, most_frequent, average="macro"),
            "majority_binary_f1": sklearn.metrics.f1_score(labels == 1, most_frequent == 1),
        }
    )
    assert list(majority_scores(batches, ["mcc"])) == ["majority_accuracy"]


def test_progress_is_told_batch_by_batch():
    told = []
    model, batches, *_ = classification(0, [3, 4, 5])
    evaluate(model, batches, ["accuracy"], progress=lambda done, total: told.append((done, total)))
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]
