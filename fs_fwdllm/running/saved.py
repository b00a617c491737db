"""The end of a run: what was saved is loaded again, from its files alone, and must be what was evaluated.

Whatever separates a saved folder from the model a run ends with (a value rounded to the base's precision, a padding
token the architecture counts positions by, a tokenizer that splits otherwise, a name that was lost) shows in the loss
of the batches the run was evaluated on, of which a few are compared. That costs one loading;
``fwdllm.check_saved: false`` leaves it out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fs_fwdllm.core.trainables import Trainables
from fs_fwdllm.data.batches import evaluation_batches
from fs_fwdllm.data.types import Batch, Example
from fs_fwdllm.errors import ModelError
from fs_fwdllm.evaluation.metrics import evaluate
from fs_fwdllm.inference import TrainedModel, load
from fs_fwdllm.model.objective import Objective
from fs_fwdllm.model.quiet import quiet_transformers
from fs_fwdllm.running.heap import give_back_freed_memory
from fs_fwdllm.running.session import Session

__all__ = ["check_saved"]

#: Relative to a loss of one and above. The same values give the same bits on one machine; the rest is for accelerators.
_TOLERANCE = 1e-5
#: Texts whose tokens are compared.
_TEXTS = 20
#: Of the batches a run was evaluated on, shortest to longest.
_BATCHES = 4
#: Training samples that stand in where a run has nothing to evaluate on.
_SAMPLES = 8


def check_saved(session: Session, saved: Path, trainables: Trainables, say: Callable[[str], None]) -> None:
    """Load what was saved and compare it with the run, on a few of ``session.evaluation_batches``; without these, on a
    few training samples.

    Args:
        saved: the saved folder.
        trainables: what was saved, as the run holds it.
        say: where a process without any sample says that nothing was compared.

    Raises:
        ModelError: the folder cannot be loaded, or gives another loss or other tokens than the run.
    """
    batches = _spread(session.evaluation_batches) or _training_batches(session)
    if not batches:
        say(f"{saved.name}/ is not compared with the run: this process holds no sample")
        return
    give_back_freed_memory()  # the rounds' activations need not lie beside a second model
    trained = load(saved, str(session.device))
    _compare_tokens(session.loaded.tokenizer, trained, _some_examples(session), saved)
    expected = _loss_of_run(session, trainables, batches)
    found = _loss(trained.objective, batches, session, trained.tokenizer)
    if not _agree(found, expected):
        raise ModelError(
            f"{saved}: loaded again it gives the loss {found:.8g}, but the run's was {expected:.8g}: what is saved is "
            "not what was trained. The checkpoint is intact; please report this with config.yaml. fwdllm.check_saved "
            "false ends runs without the comparison"
        )


def _spread(batches: Sequence[Batch]) -> list[Batch]:
    places = sorted({place * (len(batches) - 1) // (_BATCHES - 1) for place in range(_BATCHES)}) if batches else []
    return [batches[place] for place in places]


def _agree(found: float, expected: float) -> bool:
    if not math.isfinite(expected):
        return not math.isfinite(found)
    return abs(found - expected) <= _TOLERANCE * max(1.0, abs(expected))


def _loss_of_run(session: Session, trainables: Trainables, batches: Sequence[Batch]) -> float:
    with session.at(trainables):
        return _loss(session.parts.objective, batches, session, session.loaded.tokenizer)


def _loss(objective: Objective, batches: Sequence[Batch], session: Session, tokenizer: Any) -> float:
    return float(evaluate(objective, batches, [], session.data.label_names, tokenizer)["loss"])


def _some_examples(session: Session) -> list[Example]:
    held = (client.train or client.test for client in session.data.clients.values())
    return [example for examples in held for example in examples][:_TEXTS]


def _training_batches(session: Session) -> list[Batch]:
    examples = _some_examples(session)[:_SAMPLES]
    return evaluation_batches(examples, _SAMPLES, session.loaded.tokenizer.pad_token_id, "saved")


def _compare_tokens(tokenizer: Any, trained: TrainedModel, examples: Sequence[Example], saved: Path) -> None:
    """The saved tokenizer must split texts of the data as the run's does."""
    for example in examples:
        text = tokenizer.decode(example.input_ids, skip_special_tokens=True)
        with quiet_transformers():  # some texts become more tokens than they were cut to; they are not computed with
            is_split_alike = tokenizer(text)["input_ids"] == trained.tokenizer(text)["input_ids"]
        if not is_split_alike:
            raise ModelError(f"{saved}: the saved tokenizer splits {text[:60]!r} otherwise than the run's")
