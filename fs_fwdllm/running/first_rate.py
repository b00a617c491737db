"""A first learning rate without a sweep, where the curvature is known beforehand.

A linear head on standardised features has a loss whose curvature is bounded by the features' number alone
(:mod:`fs_fwdllm.core.safe_rate`). With ``fwdllm.first_rate: safe`` a run takes the rate that this bound allows for the
head as it starts, for the slopes that its clients send. It is resolved when the model is loaded and is a rate like any
other from then on: schedules and parts' factors apply to it.
"""

from __future__ import annotations

from typing import Any

from fs_fwdllm.config import Config
from fs_fwdllm.config.host_sections import OptimizerConfig
from fs_fwdllm.config.sources import division_of, groups_of_sources
from fs_fwdllm.core.safe_rate import curvature_of_standardised, safe_rate
from fs_fwdllm.core.trainables import Trainables
from fs_fwdllm.errors import ConfigError
from fs_fwdllm.model import LoadedModel
from fs_fwdllm.model.sentence_classifier import SentenceClassifier

__all__ = ["check_first_rate", "with_first_rate"]

_DEFAULT = OptimizerConfig.model_fields["lr"].default


def check_first_rate(config: Config) -> None:
    """Refuse a rate beside one that is to be found; before anything is loaded. Raises ``ConfigError``."""
    given = config.train.optimizer.lr
    if config.fwdllm.first_rate != "given" and given != _DEFAULT:
        raise ConfigError(
            f"train.optimizer.lr {given:g}: fwdllm.first_rate 'safe' finds the rate itself; leave train.optimizer.lr "
            f"out (or {_DEFAULT:g}), or set fwdllm.first_rate: given"
        )


def with_first_rate(config: Config, loaded: LoadedModel, clients: int) -> Config:
    """``config`` with ``train.optimizer.lr`` resolved, where it asks for a safe one; else as it is.

    Args:
        clients: of a round.

    Raises:
        ConfigError: a rate is given too, or the trained head is not a linear one on standardised features.
    """
    if config.fwdllm.first_rate == "given":
        return config
    check_first_rate(config)
    head = _head_of(loaded)
    curvature = curvature_of_standardised(head.in_features, head.out_features, at_start=True)
    pooling, scalars = 1 if config.method.clients_step else clients, 0
    if config.method.measures_slopes:
        names = Trainables.of_model(loaded.model).names
        part = division_of(config, names).owners[next(i for i, name in enumerate(names) if "classifier" in name)]
        counts = [sources[part].probes for sources in groups_of_sources(config)]
        scalars = min((count for count in counts if count), default=1)
        if config.fwdllm.directions == "common":
            pooling = 1
    rate = safe_rate(curvature, clients=pooling, scalars=scalars, momentum=config.fwdllm.server_momentum)
    optimizer = config.train.optimizer.model_copy(update={"lr": rate})
    own = config.fwdllm.model_copy(update={"first_rate": "given"})
    return config.model_copy(update={"train": config.train.model_copy(update={"optimizer": optimizer}), "fwdllm": own})


def _head_of(loaded: LoadedModel) -> Any:
    """The linear head of a sentence classifier."""
    model: Any = loaded.model
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(base, SentenceClassifier) or base.features.layout.scale != "layer_norm":
        raise ConfigError(
            "fwdllm.first_rate 'safe': is for a linear classifier on standardised features, which needs a sentence "
            "encoder (fwdllm.pooling) and fwdllm.feature_scale layer_norm; set fwdllm.first_rate: given, and find "
            "train.optimizer.lr with fs-fwdllm sweep"
        )
    return getattr(base.classifier, "original_module", base.classifier)
