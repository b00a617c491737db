"""How a model behaves, found out by running it once on a few tokens, whatever its architecture is called.

What is read from a batch must not depend on the padding beside a sample, nor on tokens that come later. Instead of a
list of architectures there is a trial when a model is loaded:

* A language model runs a text and the padded beginning of it. If they differ where both have the same tokens, the model
  reads ahead, and there is nothing to learn from it as a language model.
* A classifier, or a reader of spans, runs a short sample alone and beside a longer one. Where padding on the right
  changes the result, padding on the left is tried (XLNet sums a text up at its last position), and where that does not
  help either (convolutions and Fourier transforms mix padding in) samples of different lengths never share a pass.

A model that cannot run at all is told apart from a mistake of a run's own before the first round, and in ``plan``.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from fs_fwdllm.data.types import Example, Task
from fs_fwdllm.errors import FwdLLMError, ModelError
from fs_fwdllm.model.half_precision import HALF_DTYPES
from fs_fwdllm.model.initialisation import private_torch_rng

__all__ = [
    "PADDED_RIGHT",
    "Conduct",
    "drop_unknown_mask",
    "first_results",
    "foreign_code",
    "output_layer_of",
    "trial_examples",
    "trial_rows",
    "try_out",
]

#: Largest difference that is rounding, as a share of the largest logit.
_ROUNDING, _HALF_ROUNDING = 1e-4, 0.05
_LONG, _SHORT = 9, 4
#: What code that is not ours may end in; interrupts are no failures.
_FAILURES = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, MemoryError, NameError, OSError,
    RuntimeError, TypeError, ValueError,
)  # fmt: skip


@dataclass(frozen=True)
class Conduct:
    """How samples have to be put before a model.

    Attributes:
        padding: the side; ``"none"`` where samples of different lengths must not share a pass.
        ends_in_head: the logits of a language model are what its output layer puts out: no scale and no cap follows.
    """

    padding: Literal["right", "left", "none"] = "right"
    ends_in_head: bool = False

    def remarks(self) -> list[str]:
        """What a user should know of it."""
        if self.padding == "none":
            return [
                "warning: this model's result for a sample depends on the padding beside it, so that only samples of "
                "equal length share a pass: batches of mixed lengths take longer"
            ]
        if self.padding == "left":
            return ["samples are padded on the left, since this model sums a text up at its last position"]
        return []


#: How most models take it.
PADDED_RIGHT = Conduct()


@contextmanager
def foreign_code(what: str) -> Iterator[None]:
    """Whatever the code of a model raises inside becomes a :class:`~fs_fwdllm.errors.ModelError` that says ``what``."""
    try:
        yield
    except FwdLLMError:
        raise
    except _FAILURES as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ModelError(f"{what}: {type(error).__name__}{f': {reason:.300}' if reason else ''}") from error


def trial_rows(tokenizer: Any, vocabulary: int, longest: int, *, paired: bool = False) -> list[list[int]]:
    """Two made-up samples of different lengths, the shorter first, framed as the tokenizer frames a text.

    Args:
        vocabulary: tokens the model knows.
        longest: tokens a sample may have.
        paired: frame them as two texts.
    """
    framed = list(tokenizer("a", "a")["input_ids"] if paired else tokenizer("a")["input_ids"])
    special = {*tokenizer.all_special_ids, tokenizer.pad_token_id} - {tokenizer.unk_token_id}
    first = next((place for place, token in enumerate(framed) if token not in special), len(framed))
    after = next((place for place in range(first, len(framed)) if framed[place] in special), len(framed))
    frame = framed[:first], framed[after:]
    words = [token for token in range(min(vocabulary, 4 * _LONG + len(special))) if token not in special] or [0]
    room = max(1, longest - sum(map(len, frame)))
    return [
        [*frame[0], *(words[(3 * place + 1) % len(words)] for place in range(min(count, room))), *frame[1]]
        for count in (_SHORT, _LONG)
    ]


def trial_examples(rows: Sequence[Sequence[int]], task: Task) -> list[Example]:
    """``rows`` with labels of ``task``, all of them possible."""
    labels: dict[str, Any] = {"question_answering": [[0, 0]]}
    kind = np.float32 if task == "regression" else np.int32
    return [
        Example(
            np.array(row, dtype=np.int32),
            np.array(row if task == "causal_lm" else labels.get(task, 0), dtype=kind),
        )
        for row in rows
    ]


def output_layer_of(model: nn.Module) -> nn.Module | None:
    """A language model's projection to its vocabulary, if it says which layer that is."""
    finder = getattr(model, "get_output_embeddings", None)
    if finder is None:
        return None
    try:
        found: nn.Module | None = finder()
        return found
    except (AttributeError, NotImplementedError):
        return None


def drop_unknown_mask(model: nn.Module) -> None:
    """Let a model whose forward pass takes no ``attention_mask`` be called like the others."""
    parameters = inspect.signature(model.forward).parameters
    if "attention_mask" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return

    def without_mask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {key: value for key, value in kwargs.items() if key != "attention_mask"}

    model.register_forward_pre_hook(without_mask, with_kwargs=True)


@torch.no_grad()
def try_out(model: nn.Module, rows: Sequence[Sequence[int]], task: Task, pad_token_id: int, name: str) -> Conduct:
    """Run a model in evaluation mode on :func:`trial_rows`, and see how it takes padding.

    Raises:
        ModelError: it cannot run, its results are not finite, or it is no language model.
    """
    half = any(parameter.dtype in HALF_DTYPES for parameter in model.parameters())
    run = _Runner(model, rows, pad_token_id, _HALF_ROUNDING if half else _ROUNDING)
    try:
        with private_torch_rng(0), foreign_code(f"{name}: a first forward pass, of {len(rows[1])} tokens, failed"):
            return _conduct(run, task, name, half)
    except ModelError as error:
        if half and "not implemented for" in str(error):
            return PADDED_RIGHT  # by this processor; the accelerator that half precision is for may have it
        raise


def _conduct(run: _Runner, task: Task, name: str, half: bool) -> Conduct:
    if task == "causal_lm":
        with run.watched_head() as put_out:
            together = run.together("right")
        _require_finite(together, name, half)
        if not run.agree(together[0], together[1][: len(together[0])], shared=run.shared):
            raise ModelError(
                f"{name}: its result for a token depends on later ones, so that it is no causal language model "
                "(an encoder, perhaps); use it as a classifier, PATH@transformers with model.task "
                "SequenceClassification, or take a decoder"
            )
        return Conduct(ends_in_head=len(put_out) == 1 and all(map(torch.equal, together, run.cut(put_out[0]))))
    alone = run.alone()
    _require_finite([alone], name, half)
    for side in ("right", "left") if task == "classification" else ("right",):
        if run.agree(alone, run.together(side)[0]):
            return Conduct(side)
    return Conduct("none")


@dataclass
class _Runner:
    model: nn.Module
    rows: Sequence[Sequence[int]]
    pad_token_id: int
    rounding: float

    @property
    def shared(self) -> int:
        """Leading tokens that both rows have."""
        pairs = zip(*self.rows, strict=False)
        return next((place for place, (one, other) in enumerate(pairs) if one != other), len(self.rows[0]))

    def alone(self) -> torch.Tensor:
        return first_results(self.model, self.rows[0])[0]

    def together(self, side: str) -> list[torch.Tensor]:
        width = len(self.rows[1])
        padding = [self.pad_token_id] * (width - len(self.rows[0])), [0] * (width - len(self.rows[0]))
        ids, mask = list(self.rows[0]), [1] * len(self.rows[0])
        ids, mask = (padding[0] + ids, padding[1] + mask) if side == "left" else (ids + padding[0], mask + padding[1])
        results = _results(self.model, [ids, list(self.rows[1])], [mask, [1] * width])
        return self.cut(results) if results[0].dim() > 1 else results

    def cut(self, results: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        """Results for every token of two padded rows, without those for padding on the right."""
        return [result[: len(row)] for result, row in zip(results, self.rows, strict=True)]

    @contextmanager
    def watched_head(self) -> Iterator[list[torch.Tensor]]:
        """While this lasts, what the output layer of a language model puts out goes into the list, float32."""
        head, seen = output_layer_of(self.model), []
        hooks = [head.register_forward_hook(lambda *call: seen.append(call[2].float()))] if head is not None else []
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()

    def agree(self, one: torch.Tensor, other: torch.Tensor, shared: int | None = None) -> bool:
        scale = max(float(one.abs().max()), float(other.abs().max()), 1e-30)
        return bool(float((one[:shared] - other[:shared]).abs().max()) <= self.rounding * scale)


def first_results(model: nn.Module, row: Sequence[int]) -> list[torch.Tensor]:
    """What a model says of one sample by itself: ``[classes]``, or ``[tokens, ...]``; float32."""
    return _results(model, [list(row)], [[1] * len(row)])


def _results(model: nn.Module, ids: list[list[int]], mask: list[list[int]]) -> list[torch.Tensor]:
    """Per row ``[classes]``, or ``[tokens, ...]`` where there is a result for every token; float32."""
    device = next(model.parameters()).device
    output = model(input_ids=torch.tensor(ids, device=device), attention_mask=torch.tensor(mask, device=device))
    if getattr(output, "logits", None) is not None:
        return list(output.logits.float())
    return list(torch.stack([output.start_logits, output.end_logits], dim=-1).float())


def _require_finite(results: Sequence[torch.Tensor], name: str, half: bool) -> None:
    if not all(bool(torch.isfinite(result).all()) for result in results):
        cure = (
            "try fwdllm.base.compute_dtype bfloat16 or float32" if half else "the weights are damaged; copy them anew"
        )
        raise ModelError(f"{name}: its first forward pass gives NaN or infinity; {cure}")
