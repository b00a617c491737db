"""The reference that ``fs-fwdllm plan`` prints on request: a logistic regression on what a run's head would read."""

from __future__ import annotations

from fs_fwdllm.config import Config
from fs_fwdllm.data.batches import evaluation_batches
from fs_fwdllm.data.readers import data_task
from fs_fwdllm.data.types import Example
from fs_fwdllm.errors import ConfigError
from fs_fwdllm.evaluation.linear_probe import LinearProbe, Rows, features_of, fit_linear_probe
from fs_fwdllm.running.session import Session

__all__ = ["check_reference", "reference_of"]

_BATCH_SIZE = 32


def check_reference(config: Config) -> None:
    """Refuse the key where there are no frozen features to classify by, before anything is loaded.

    Raises:
        ConfigError: the task is not classification, or the body is trained.
    """
    task = data_task(config)
    if task != "classification" or config.model.num_labels == 1:
        raise ConfigError(
            f"fwdllm.report.linear_probe: is a reference for classifiers, and this run's task is {task}; leave it out"
        )
    if config.method.trains_blocks or not config.llm.adapter.use:
        raise ConfigError(
            "fwdllm.report.linear_probe: is a reference on frozen features, but this run trains the parameters that "
            "make them; leave it out, or train a head (llm.adapter.args adapter_method head)"
        )


def reference_of(session: Session) -> LinearProbe:
    """The reference for the data that ``session`` holds. Raises what :mod:`~fs_fwdllm.evaluation.linear_probe` does."""
    data = session.data
    training = [example for _, client in sorted(data.clients.items()) for example in client.train]
    splits = {"test": data.test, "val": data.val}
    evaluated = next((name for name in session.config.eval.split if splits.get(name)), "")
    chooser = _features(session, data.val, "val") if data.val and evaluated != "val" else None
    counted = _features(session, splits.get(evaluated, []), evaluated)
    return fit_linear_probe(_features(session, training, "train"), chooser, counted)


def _features(session: Session, examples: list[Example], split: str) -> Rows:
    pad_token_id = session.loaded.tokenizer.pad_token_id
    batches = evaluation_batches(examples, _BATCH_SIZE, pad_token_id, f"probe, {split}")
    return features_of(session.parts.objective, batches)
