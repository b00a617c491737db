"""Answers as text: which span a model points at, and how an answer is compared with those that count as right.

Exact match and F1 follow SQuAD's official evaluation (Rajpurkar et al., arXiv:1606.05250): lower case, no punctuation,
no articles, single spaces; F1 over the bag of words; the best of several right answers counts.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np
import torch

from fs_fwdllm.data.types import Reference

__all__ = ["MAX_ANSWER_TOKENS", "BestSpans", "exact_match", "f1_score", "judge", "normalise"]

#: The longest span that is considered, in tokens.
MAX_ANSWER_TOKENS = 30

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """The form in which answers are compared."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(answer: str, gold: str) -> float:
    """1 if the two are the same once normalised, else 0."""
    return float(normalise(answer) == normalise(gold))


def f1_score(answer: str, gold: str) -> float:
    """Harmonic mean of precision and recall over the words the two share."""
    words, right = normalise(answer).split(), normalise(gold).split()
    shared = sum((Counter(words) & Counter(right)).values())
    return 2 * shared / (len(words) + len(right)) if shared else 0.0


def judge(answers: Mapping[str, str], gold: Mapping[str, Iterable[str]]) -> dict[str, float]:
    """Mean ``exact_match`` and ``f1`` (0 to 1) over the questions of ``gold``; an absent answer is an empty one."""
    scores = [
        [max(score(answers.get(question, ""), right) for right in rights) for score in (exact_match, f1_score)]
        for question, rights in ((question, list(rights)) for question, rights in gold.items())
    ]
    exact, overlap = np.mean(scores, axis=0)
    return {"exact_match": float(exact), "f1": float(overlap)}


class BestSpans:
    """For each question the best span over all its windows, by the sum of the scores of its two ends."""

    def __init__(self) -> None:
        self.answers: dict[str, str] = {}
        self.gold: dict[str, tuple[str, ...]] = {}
        self._scores: dict[str, float] = {}

    def add(self, logits: torch.Tensor, references: Iterable[Reference]) -> None:
        """Take in a batch.

        Args:
            logits: ``[2 * batch, tokens]``, the scores of being the first token above those of being the last.
            references: of the batch's windows, in order.
        """
        starts, ends = logits.cpu().chunk(2)
        for start, end, reference in zip(starts, ends, references, strict=True):
            self.gold[reference.question] = reference.answers
            assert reference.offsets is not None
            score, first, last = _best_span(start, end, reference.offsets)
            if score > self._scores.get(reference.question, -np.inf):
                characters = slice(reference.offsets[first, 0], reference.offsets[last, 1])
                self._scores[reference.question] = score
                self.answers[reference.question] = reference.context[characters]


def _best_span(start: torch.Tensor, end: torch.Tensor, offsets: np.ndarray) -> tuple[float, int, int]:
    """``(score, first token, last token)`` of the best span inside the context; score ``-inf`` if there is none."""
    inside = np.flatnonzero(offsets[:, 0] >= 0)
    if not len(inside):
        return -np.inf, 0, 0
    low, high = int(inside[0]), int(inside[-1]) + 1
    scores = start[low:high, None] + end[None, low:high]
    allowed = torch.ones_like(scores, dtype=torch.bool).triu().tril(MAX_ANSWER_TOKENS - 1)
    scores = scores.masked_fill(~allowed, -torch.inf).nan_to_num(nan=-torch.inf, neginf=-torch.inf)
    best = int(scores.argmax())
    first, last = divmod(best, high - low)
    return float(scores[first, last]), low + first, low + last
