"""A learning rate that follows from what is trained: found without a sweep, or carried over from another model.

**Safe.** A linear head on standardised features has a loss whose curvature is bounded by the features' number alone
(:mod:`fs_fwdllm.core.safe_rate`). With ``fwdllm.first_rate: safe`` a run takes the rate that this bound allows for the
head as it starts, for the slopes that its clients send. It is resolved when the model is loaded and is a rate like any
other from then on: schedules and parts' factors apply to it.

**Carried over.** A rate that was found with ``d`` trainables is too high with many more of them, although the loss is
no steeper: along ``n`` directions each, ``C`` clients estimate the gradient with ``1 + (d - 1) / (C n)`` times its
squared length in the mean (:mod:`fs_fwdllm.forecast.noise`), and that is what a step must not amplify. With
``fwdllm.rate_for_trainables: d`` the rate of the file is divided by as much as that has grown. It is never raised: with
fewer trainables it is the curvature that bounds it, of which nothing is known.
"""

from __future__ import annotations

from typing import Any

from fs_fwdllm.config import Config
from fs_fwdllm.config.host_sections import OptimizerConfig
from fs_fwdllm.config.sources import division_of, groups_of_sources
from fs_fwdllm.core.safe_rate import curvature_of_standardised, safe_rate
from fs_fwdllm.core.trainables import Trainables
from fs_fwdllm.errors import ConfigError
from fs_fwdllm.method.parts import direction_sets
from fs_fwdllm.model import LoadedModel
from fs_fwdllm.model.sentence_classifier import SentenceClassifier

__all__ = ["check_first_rate", "describe_rate", "with_first_rate"]


_DEFAULT = OptimizerConfig.model_fields["lr"].default


def check_first_rate(config: Config) -> None:
    """Refuse a rate beside one that is to be found, and one that cannot be carried over; before anything is loaded.

    Raises:
        ConfigError: names the keys.
    """
    given, wanted = config.train.optimizer.lr, config.fwdllm.rate_for_trainables
    reasons = {
        "clients of this method send no slopes, whose noise would bound a rate": not config.method.measures_slopes,
        "fwdllm.first_rate 'safe' finds the rate itself": config.fwdllm.first_rate != "given",
        "every part of fwdllm.parts has a number and a rate of its own": bool(config.fwdllm.parts),
    }
    if wanted and (why := next((reason for reason, holds in reasons.items() if holds), "")):
        raise ConfigError(f"fwdllm.rate_for_trainables {wanted}: {why}; leave it out (0)")
    if config.fwdllm.first_rate != "given" and given != _DEFAULT:
        raise ConfigError(
            f"train.optimizer.lr {given:g}: fwdllm.first_rate 'safe' finds the rate itself; leave train.optimizer.lr "
            f"out (or {_DEFAULT:g}), or set fwdllm.first_rate: given"
        )


def with_first_rate(config: Config, loaded: LoadedModel, clients: int) -> Config:
    """``config`` with ``train.optimizer.lr`` resolved, where a safe one or one that is carried over is asked for.

    Args:
        clients: of a round.

    Raises:
        ConfigError: a rate is given too, or the trained head is not a linear one on standardised features.
    """
    check_first_rate(config)
    if config.fwdllm.first_rate != "given":
        return _at_rate(config, _safe_rate(config, loaded, clients))
    known = config.fwdllm.rate_for_trainables
    if not known:
        return config
    count, rate = Trainables.of_model(loaded.model).count, config.train.optimizer.lr
    slopes = _pooled(config, clients) * _fewest(config, 0)
    return _at_rate(config, rate * min(1.0, _squared_length(known, slopes) / _squared_length(count, slopes)))


def describe_rate(given: Config, resolved: Config) -> str:
    """Where the rate is from that :func:`with_first_rate` made of what was ``given``; empty where it is that."""
    before, rate = given.train.optimizer.lr, resolved.train.optimizer.lr
    if given.fwdllm.first_rate != "given":
        return f"learning rate {rate:.3g}, from the head's curvature (fwdllm.first_rate: safe)"
    if rate == before:
        return ""
    return (
        f"learning rate {rate:.3g}: train.optimizer.lr {before:g} is for {given.fwdllm.rate_for_trainables:,} "
        "trainables (fwdllm.rate_for_trainables), and the estimate is noisier with more"
    )


def _safe_rate(config: Config, loaded: LoadedModel, clients: int) -> float:
    head = _head_of(loaded)
    curvature = curvature_of_standardised(head.in_features, head.out_features, at_start=True)
    pooling, scalars = 1 if config.method.clients_step else clients, 0
    if config.method.measures_slopes:
        names = Trainables.of_model(loaded.model).names
        part = division_of(config, names).owners[next(i for i, name in enumerate(names) if "classifier" in name)]
        pooling, scalars = _pooled(config, clients), _fewest(config, part)
    return safe_rate(curvature, clients=pooling, scalars=scalars, momentum=config.fwdllm.server_momentum)


def _pooled(config: Config, clients: int) -> int:
    """Clients whose slopes along directions of their own make one step."""
    return 1 if config.method.clients_step else min(clients, direction_sets(config).count or clients)


def _fewest(config: Config, part: int) -> int:
    """Slopes of a client that sends fewest of a part, of those that send any."""
    counts = [sources[part].probes for sources in groups_of_sources(config)]
    return min((count for count in counts if count), default=1)


def _squared_length(trainables: int, slopes: int) -> float:
    """Of the gradient as so many slopes estimate it, in the mean, where its own is 1."""
    return 1.0 + (trainables - 1) / slopes


def _at_rate(config: Config, rate: float) -> Config:
    """``config`` at ``rate``, which is given from now on."""
    optimizer = config.train.optimizer.model_copy(update={"lr": rate})
    own = config.fwdllm.model_copy(update={"first_rate": "given", "rate_for_trainables": 0})
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
