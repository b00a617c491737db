"""Small real tokenizers of every family, trained here, so that laws about tokens can be tested on each.

They differ in what a text's tokens depend on beside the text: a "▁" before a text of its own, merges across a space or
a line's end, special tokens around, small letters.
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

__all__ = ["EVERY", "FAMILIES", "REAL", "SLOW", "family", "real_tokenizer"]

CORPUS = [
    "Below is an instruction that describes a task, paired with an input that provides further context. ",
    "Write a response that appropriately completes the request.\n\n### Instruction:\nAdd the numbers\n\n### Response:",
    "A review: it was great, truly wonderful.\nLabel: great\nA review: terrible, bad and boring.\nLabel: bad\n\n",
    "Hello there.\n\nHow are you?\n\nFine: thanks: yes\n\n Human: Assistant: System: user assistant ::\n\n:\n\n",
    "the cat sat on the mat; good goods, better best, sports world business science",
] * 8

_SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
_NAMES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
_START = {"single": "<s> $A", "special_tokens": [("<s>", 1)]}


def _bpe(pre_tokenizer: Any, **options: Any) -> Tokenizer:
    inner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizer
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    inner.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=480, special_tokens=_SPECIAL + alphabet, show_progress=False, **options)
    )
    return inner


def _byte_level(across_spaces: bool) -> Tokenizer:
    """GPT-2's kind; across spaces, whatever stands together is merged, also a prompt's end and an answer's start."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not across_spaces)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=420, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    return inner


def _sentencepiece_bpe(dummy_prefix: bool) -> Tokenizer:
    """Llama's pipeline; without the dummy prefix, Gemma's."""
    inner = _bpe(pre_tokenizers.Metaspace())
    replace = normalizers.Replace(" ", "▁")
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if dummy_prefix else replace
    inner.pre_tokenizer = None
    inner.post_processor = processors.TemplateProcessing(**_START)
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return inner


def _unigram() -> Tokenizer:
    """T5's pipeline: a "▁" before every text, white space run together, an end token of its own accord."""
    inner = Tokenizer(models.Unigram())
    inner.normalizer = normalizers.Replace(Regex(" {2,}"), " ")
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=_SPECIAL, unk_token="<unk>", show_progress=False)
    inner.train_from_iterator(CORPUS, trainer)
    inner.decoder = decoders.Metaspace()
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return inner


def _word_piece() -> Tokenizer:
    """BERT's pipeline: small letters, ``[CLS]`` before and ``[SEP]`` after (under our names)."""
    inner = Tokenizer(models.WordPiece(unk_token="<unk>"))
    inner.normalizer = normalizers.BertNormalizer()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=_SPECIAL, show_progress=False)
    inner.train_from_iterator(CORPUS, trainer)
    inner.decoder = decoders.WordPiece()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return inner


FAMILIES = {
    "byte-level": lambda: _byte_level(False),
    "byte-level across spaces": lambda: _byte_level(True),
    "SentencePiece BPE": lambda: _sentencepiece_bpe(True),
    "SentencePiece BPE without prefix": lambda: _sentencepiece_bpe(False),
    "Unigram": _unigram,
    "WordPiece": _word_piece,
}
#: Needs the sentencepiece library: a tokenizer in Python that knows no offsets.
SLOW = "SentencePiece in Python"
EVERY = (*FAMILIES, SLOW)


@cache
def family(name: str) -> Any:
    """A trained tokenizer of a family; whoever changes it copies it first."""
    return _slow() if name == SLOW else PreTrainedTokenizerFast(tokenizer_object=FAMILIES[name](), **_NAMES)


def _slow() -> Any:
    sentencepiece = pytest.importorskip("sentencepiece")
    backend = pytest.importorskip("transformers.tokenization_utils_sentencepiece").SentencePieceBackend
    folder = Path(tempfile.mkdtemp(prefix="fs_fwdllm_tokenizer_"))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=str(folder / "model"), model_type="unigram", vocab_size=150,
        hard_vocab_limit=False, pad_id=3, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return backend(vocab_file=str(folder / "model.model"), **_NAMES)


_MODELS = Path("../shared/data/models")
REAL = ("stories260K", "mixed-5m")


def real_tokenizer(name: str) -> Any:
    """The tokenizer of a real small model, or ``None`` where it is absent."""
    return AutoTokenizer.from_pretrained(_MODELS / name) if (_MODELS / name).is_dir() else None
