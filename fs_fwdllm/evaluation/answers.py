"""Answers as text: which span a model points at, and how an answer is compared with those that count as right.

Exact match and F1 follow SQuAD's official evaluation (Rajpurkar et al., arXiv:1606.05250): lower case, no punctuation,
no articles, single spaces; F1 over the bag of words; the best of several right answers counts. A question may have no
answer (SQuAD v2, arXiv:1806.03822): then only the empty answer is right.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np
import torch

from fs_fwdllm.data.types import Reference

__all__ = ["MAX_ANSWER_TOKENS", "BestSpans", "exact_match", "f1_score", "judge", "judge_apart", "normalise"]

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
    """Harmonic mean of precision and recall over the words the two share; no words at all are right only for none."""
    words, right = normalise(answer).split(), normalise(gold).split()
    if not words or not right:
        return float(words == right)
    shared = sum((Counter(words) & Counter(right)).values())
    return 2 * shared / (len(words) + len(right)) if shared else 0.0


def judge(answers: Mapping[str, str], gold: Mapping[str, Iterable[str]]) -> dict[str, float]:
    """Mean ``exact_match`` and ``f1`` (0 to 1) over the questions of ``gold``; an absent answer is an empty one."""
    exact, overlap = _means(_scores(answers, gold)[0])
    return {"exact_match": exact, "f1": overlap}


def judge_apart(answers: Mapping[str, str], gold: Mapping[str, Iterable[str]]) -> dict[str, float]:
    """The same over the questions with a right answer, and over those without; NaN where there is none of the kind.

    Returns:
        ``has_answer_exact_match``, ``has_answer_f1`` and ``no_answer_exact_match``.
    """
    scores, answerable = _scores(answers, gold)
    exact, overlap = _means(scores[answerable])
    return {
        "has_answer_exact_match": exact,
        "has_answer_f1": overlap,
        "no_answer_exact_match": _means(scores[~answerable])[0],
    }


def _scores(answers: Mapping[str, str], gold: Mapping[str, Iterable[str]]) -> tuple[np.ndarray, np.ndarray]:
    """``[questions, 2]``: exact match and F1; and ``[questions]``: whether there is a right answer."""
    scores, answerable = [], []
    for question, rights in gold.items():
        known = [right for right in rights if normalise(right)]
        answer = answers.get(question, "")
        scores.append([max(score(answer, right) for right in known or [""]) for score in (exact_match, f1_score)])
        answerable.append(bool(known))
    return np.array(scores).reshape(-1, 2), np.array(answerable, dtype=bool)


def _means(scores: np.ndarray) -> tuple[float, float]:
    exact, overlap = scores.mean(axis=0) if len(scores) else (np.nan, np.nan)
    return float(exact), float(overlap)


class BestSpans:
    """For each question the best span over all its windows, by the sum of the scores of its two ends.

    Where questions may have no answer, a window's token for "no answer" competes: the answer is empty if the lowest of
    those scores over the windows is above the best span's.
    """

    def __init__(self) -> None:
        self.gold: dict[str, tuple[str, ...]] = {}
        self._spans: dict[str, str] = {}
        self._scores: dict[str, float] = {}
        self._silence: dict[str, float] = {}

    @property
    def answers(self) -> dict[str, str]:
        """``{question: the answer}`` of all questions that have been taken in."""
        return {
            question: "" if self._silence.get(question, -np.inf) > self._scores[question] else span
            for question, span in self._spans.items()
        }

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
            if reference.no_answer is not None:
                silence = float(start[reference.no_answer] + end[reference.no_answer])
                self._silence[reference.question] = min(silence, self._silence.get(reference.question, np.inf))
            score, first, last = _best_span(start, end, reference.offsets)
            if score > self._scores.get(reference.question, -np.inf):
                characters = slice(reference.offsets[first, 0], reference.offsets[last, 1])
                self._scores[reference.question] = score
                self._spans[reference.question] = reference.context[characters]


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
