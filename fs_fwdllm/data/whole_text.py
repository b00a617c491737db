"""Tokens of a text that is read in parts: those of the whole text, cut where the parts meet.

What a tokenizer makes of a text depends on what stands beside it. SentencePiece puts a "▁" before a text that stands
alone, so an answer tokenised apart begins with a token no text has in that place; byte-level BPE merges across a border
(``":"`` and ``"\\n\\n"`` may be one token). So nothing here is assembled from pieces: the whole text is tokenised once,
and a border is found by tokenising the text *up to* it as well. The tokens both have in common come before the border;
that is what a model has read when it is asked to go on from there.

Special tokens around a text (:class:`Frame`) are put where the tokenizer puts them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Frame", "common_start", "frame_of", "inner_ids", "taught_positions", "token_ids"]

#: Texts handed to the tokenizer at once: enough to use its threads, few enough to bound memory.
_TEXTS_PER_CALL = 1000


@dataclass(frozen=True)
class Frame:
    """The special tokens a tokenizer puts before and after a text."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


def token_ids(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    pairs: Sequence[str] | None = None,
    **options: Any,
) -> Iterator[list[int]]:
    """The tokens of each text, or pair of texts; ``options`` are the tokenizer's own."""
    for first in range(0, len(texts), _TEXTS_PER_CALL):
        window = slice(first, first + _TEXTS_PER_CALL)
        given = [list(texts[window])] + ([list(pairs[window])] if pairs is not None else [])
        yield from tokenizer(*given, verbose=False, **options)["input_ids"]


def inner_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text without those the tokenizer would put around it."""
    return list(token_ids(tokenizer, texts, add_special_tokens=False))


def frame_of(tokenizer: PreTrainedTokenizerBase) -> Frame:
    """What the tokenizer puts around a text."""
    framed, (inner,) = tokenizer("a", verbose=False)["input_ids"], inner_ids(tokenizer, ["a"])
    extra = len(framed) - len(inner)
    before = next((start for start in range(extra + 1) if framed[start : start + len(inner)] == inner), 0)
    return Frame(tuple(framed[:before]), tuple(framed[before + len(inner) :]))


def common_start(*sequences: Sequence[Any]) -> int:
    """How many items all sequences begin with."""
    agreeing = takewhile(lambda items: all(item == items[0] for item in items), zip(*sequences, strict=False))
    return sum(1 for _ in agreeing)


def taught_positions(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], spans: Sequence[Sequence[tuple[int, int]]]
) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Tokenise texts, and find the tokens of some parts of each.

    A part begins with the first token that the text up to it does not have, and ends with the last token that belongs
    to it wholly or in part.

    Args:
        spans: for each text the parts, as ``(first, last plus one)`` of their characters, in order.

    Returns:
        For each text its tokens and, in the same order, the parts as ``(first, last plus one)`` of the tokens.
    """
    borders = [
        sorted({place for span in parts for place in span} - {len(text)})
        for text, parts in zip(texts, spans, strict=True)
    ]
    wholes = inner_ids(tokenizer, texts)
    prefixes = iter(
        inner_ids(tokenizer, [text[:place] for text, places in zip(texts, borders, strict=True) for place in places])
    )
    found = []
    for text, whole, places, parts in zip(texts, wholes, borders, spans, strict=True):
        first, last = {len(text): len(whole)}, {len(text): len(whole)}
        for place in places:
            prefix = next(prefixes)
            first[place] = common_start(prefix, whole)
            last[place] = first[place] + (first[place] < len(prefix))
        found.append((whole, [(first[start], last[end]) for start, end in parts]))
    return found
