"""Evaluating without training: a finished run on any of its splits or on a file, or an untrained model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fs_fwdllm.config import Config
from fs_fwdllm.data import load_federated_data
from fs_fwdllm.data.batches import evaluation_batches
from fs_fwdllm.data.types import Example, FederatedData
from fs_fwdllm.errors import ConfigError, DataError, nearest
from fs_fwdllm.evaluation.metrics import check_metrics, evaluate
from fs_fwdllm.inference import TrainedModel, load
from fs_fwdllm.report import RunFolder
from fs_fwdllm.running.session import Session

__all__ = ["SPLITS", "evaluate_config", "evaluate_file", "evaluate_run"]

SPLITS = ("test", "val", "train")
_BATCH_SIZE = 32


def evaluate_run(
    path: str | Path, split: str = "test", metrics: Sequence[str] = (), device: str = "cpu"
) -> dict[str, Any]:
    """The metrics of a run's trained model on a split of the run's data.

    Args:
        path: the run folder.
        split: ``test``, ``val`` or ``train``.
        metrics: besides the loss; empty takes the run's.

    Raises:
        CheckpointError: ``path`` is no run folder.
        ConfigError: an unknown split or metric.
        DataError: the split is empty, or the data has other classes now.
        ModelError: there is no trained model.
    """
    _check_split(split)
    config = RunFolder.open(path).config()
    trained = load(path, device)
    data = load_federated_data(config, trained.tokenizer)
    if tuple(data.label_names) != trained.classes and data.label_names:
        raise DataError(
            f"{config.data.type}: has the classes {', '.join(data.label_names)}, but the model was trained for "
            f"{', '.join(trained.classes)}; the data was changed since"
        )
    return _evaluated(trained, _examples(data, split), metrics or config.eval.metrics)


def evaluate_file(
    path: str | Path, file: str | Path, metrics: Sequence[str] = (), device: str = "cpu"
) -> dict[str, Any]:
    """The metrics of a trained model on all rows of a file that has the training's fields.

    Args:
        path: a run folder, or a saved folder that was moved elsewhere.

    Raises:
        ConfigError, DataError, ModelError: as :func:`evaluate_run`; a label of the file is none of the model's classes.
    """
    trained = load(path, device)
    return _evaluated(trained, load_federated_data(_of_file(trained, Path(file)), trained.tokenizer).test, metrics)


def evaluate_config(config: Config, split: str = "") -> dict[str, Any]:
    """The metrics of the untrained model that a configuration names.

    Args:
        split: ``test`` or ``val``; empty takes ``eval.split``.

    Raises:
        ConfigError, DataError, ModelError: see their messages.
    """
    if split:
        _check_split(split)
        if split == "train":
            raise ConfigError("split 'train': a configuration's model is evaluated on test or val")
        config.eval.split = [split]
    session = Session.open(config)
    found = session.evaluate(session.parts.trainables)
    if found is None:
        raise DataError(f"data.splits: leave no sample in {' and '.join(config.eval.split)}; nothing to evaluate on")
    return found


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ConfigError(f"split {split!r}: must be one of {', '.join(SPLITS)}{nearest(split, SPLITS)}")


def _examples(data: FederatedData, split: str) -> list[Example]:
    trained_on = [example for _, client in sorted(data.clients.items()) for example in client.train]
    splits = {"test": data.test, "val": data.val, "train": trained_on}
    if not splits[split]:
        others = [name for name in SPLITS if splits[name]]
        raise DataError(f"split {split!r}: has no sample in this run; {' and '.join(others) or 'none'} has some")
    return splits[split]


def _of_file(trained: TrainedModel, file: Path) -> Config:
    """The training's configuration with all rows of a file for its test split."""
    config = trained.config.model_copy(deep=True)
    config.data.root, config.data.splits, config.data.splitter = str(file.parent), [1.0, 0.0, 0.0], ""
    config.data.type = f"{file.name}@{config.data.type.rpartition('@')[2]}"
    config.federate.client_num = 1
    own = config.fwdllm.data
    own.labels = list(trained.classes)
    own.test_file, own.partition, own.partition_method, own.natural = file.name, "", "", ""
    own.held_out_clients, own.centralised, own.max_test_samples = 0.0, False, 0
    return config


def _evaluated(trained: TrainedModel, examples: list[Example], metrics: Sequence[str]) -> dict[str, Any]:
    wanted = check_metrics(list(metrics), trained.task)
    batches = evaluation_batches(examples, _BATCH_SIZE, trained.tokenizer.pad_token_id)
    return evaluate(trained.objective, batches, wanted, list(trained.classes), trained.tokenizer)
