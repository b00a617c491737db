"""The records that data passes through: examples, the clients that hold them, and the padded batch a model sees.

An :class:`Example` is already tokenised, so that a run tokenises every text once. A :class:`Batch` carries a ``key``
that names exactly which examples, in which order, it was padded from: equal keys mean equal arrays, which is what lets
the prefix cache reuse activations across rounds without changing a bit of the result.

What ``labels`` are depends on the task, and their number of dimensions tells which they are:

======================  ==========================================================================  ===============
task                    labels of an example                                                        of a batch
======================  ==========================================================================  ===============
``classification``      the class index, shape ``[]``                                               ``[batch]``
``label_words``         the same; the classes are words a language model may continue with          ``[batch]``
``regression``          a number, float32, shape ``[]``                                             ``[batch]``
``causal_lm``           ``[tokens]``, not shifted, ``-100`` where the prompt is masked              ``[batch, tokens]``
``question_answering``  ``[1, 2]``: first and last token of the answer, ``-100`` if it is elsewhere  ``[batch, 2]``
======================  ==========================================================================  ===============
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from fs_fwdllm.data.templates import PromptTemplate

__all__ = ["IGNORED_LABEL", "Batch", "ClientData", "Example", "FederatedData", "Reference", "Task", "rows_fingerprint"]

Task = Literal["causal_lm", "classification", "label_words", "question_answering", "regression"]

#: Label of a position that does not count towards the loss (PyTorch's and Hugging Face's convention).
IGNORED_LABEL = -100


@dataclass(frozen=True)
class Reference:
    """What an answer is compared with.

    Attributes:
        question: names the question; examples with the same name are windows on one context.
        answers: the answers that count as right, the one that is taught first; empty for a question without an answer.
        context: the text a span is cut from; empty where answers are generated.
        offsets: int32 ``[tokens, 2]``: first and last-plus-one character of ``context`` under each token, ``-1`` for
            tokens outside it; ``None`` where answers are generated.
        no_answer: the token of the window that stands for "no answer"; ``None`` where every question has one.
    """

    question: str
    answers: tuple[str, ...]
    context: str = ""
    offsets: np.ndarray | None = None
    no_answer: int | None = None


@dataclass(frozen=True)
class Example:
    """One tokenised sample.

    Attributes:
        input_ids: int32 array of shape ``[tokens]``.
        labels: int32 array; the module's table has its shape.
        segments: int32 ``[tokens]``, 0 over the question and 1 over the context, where there are two texts.
        reference: what the answer is compared with, for tasks that are judged by text.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    segments: np.ndarray | None = None
    reference: Reference | None = None

    @property
    def is_taught(self) -> bool:
        """Whether there is anything to learn from: a window without the answer has none, every number has."""
        return self.labels.dtype.kind == "f" or bool((self.labels != IGNORED_LABEL).any())


def rows_fingerprint(parts: Sequence[Sequence[Example]]) -> str:
    """16 bytes, in hexadecimal, that name the tokens and labels of all examples, and who holds which."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        state.update(f"{len(part)};".encode())
        for example in part:
            for values in (example.input_ids, example.labels):
                kind = "<f4" if values.dtype.kind == "f" else "<i4"
                state.update(f"{values.shape}".encode())
                state.update(np.ascontiguousarray(values, dtype=kind).tobytes())
    return state.hexdigest()


@dataclass(frozen=True)
class Batch:
    """Padded arrays of some examples; where a model takes them in they become tensors on its device
    (:mod:`fs_fwdllm.model.inputs`).

    Attributes:
        input_ids: int64 ``[batch, tokens]``, padded on the right.
        attention_mask: int64 ``[batch, tokens]``, one where there is a token.
        labels: int64; the module's table has its shape.
        key: names the examples and their order; ``None`` where the batch will not be seen again.
        token_type_ids: int64 ``[batch, tokens]``, the examples' segments; ``None`` where they have none.
        references: the examples' references, in order; empty where they have none.
    """

    input_ids: np.ndarray
    attention_mask: np.ndarray
    labels: np.ndarray
    key: Hashable | None = None
    token_type_ids: np.ndarray | None = None
    references: tuple[Reference, ...] = ()

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])


@dataclass
class ClientData:
    """What one client holds. Any split may be empty."""

    train: list[Example] = field(default_factory=list)
    val: list[Example] = field(default_factory=list)
    test: list[Example] = field(default_factory=list)


@dataclass
class FederatedData:
    """All clients of a simulation, numbered from 1 as FederatedScope does, and the server's evaluation splits.

    Attributes:
        task: what the labels mean.
        clients: ``{client id: data}``.
        val, test: the server's evaluation examples (the union over clients unless the config names a test file, the
            data file has a test split of its own, or whole clients are held out).
        label_names: the classes in index order; empty where there are none.
        label_tokens: for ``label_words`` the token that stands for each class, in index order.
        remarks: what a user should know of how the data was read.
        template: how the texts of a language model's answers were written; ``None`` for other tasks.
        unanswerable: whether questions about contexts may have no answer.
    """

    task: Task
    clients: dict[int, ClientData]
    val: list[Example]
    test: list[Example]
    label_names: list[str] = field(default_factory=list)
    label_tokens: list[int] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    template: PromptTemplate | None = None
    unanswerable: bool = False
