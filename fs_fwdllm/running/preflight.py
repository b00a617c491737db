"""What can be said of a configuration before anything is loaded: every host asks first, and only then starts anything.

A mistake that shows itself after the model was loaded, or after all processes were started, costs minutes and leaves
folders behind; the same mistake here costs nothing.
"""

from __future__ import annotations

import torch

from fs_fwdllm.config import Config
from fs_fwdllm.data.readers import data_task
from fs_fwdllm.data.sources import read_source
from fs_fwdllm.errors import ConfigError
from fs_fwdllm.evaluation.metrics import check_metrics
from fs_fwdllm.method import check_combination
from fs_fwdllm.model.source import model_source, model_task

__all__ = ["ask_hub_last", "check_beforehand", "check_task"]

#: What data a model is for, in the words of ``data.type``.
_DATA_OF_MODEL = {
    "causal_lm": "NAME@llm, or NAME@text to classify by label words",
    "classification": "NAME@text",
    "question_answering": "NAME@qa",
}


def check_beforehand(config: Config) -> None:
    """Check what needs no file to be read.

    Raises:
        ConfigError: settings do not go together, a metric is not the task's, or there is no such accelerator.
        ModelError: the folder of the model, or the package that has it, does not exist.
    """
    check_combination(config)
    check_metrics(config.eval.metrics, data_task(config))
    model_source(config)
    found = torch.cuda.device_count() if config.use_gpu else 0
    if found and config.device >= found:
        raise ConfigError(f"device {config.device}: this machine has accelerators 0 to {found - 1}; -1 takes the first")


def ask_hub_last(config: Config) -> None:
    """Read the data before a hub is asked for the model: a mistake in it is told at once, and without a network.

    Raises:
        ConfigError, DataError: as :func:`~fs_fwdllm.data.sources.read_source`.
    """
    if not model_source(config).is_local:
        read_source(config)


def check_task(config: Config) -> None:
    """Refuse data that the model is not for (instructions for a classifier), before anything is loaded.

    Raises:
        ConfigError: names the three keys.
    """
    task, model = data_task(config), model_task(config)
    if model != {"label_words": "causal_lm", "regression": "classification"}.get(task, task):
        raise ConfigError(
            f"data.type {config.data.type!r} does not go with model.type {config.model.type!r} and model.task "
            f"{config.model.task!r}: that model needs data of the form {_DATA_OF_MODEL[model]}"
        )
