"""Settings that are valid alone but not together, refused before anything is loaded.

What belongs to one method is its recipe's own check; what belongs to an estimator, its class is asked. Here stands what
follows from the facts of a method, whichever it is.
"""

from __future__ import annotations

import math

from fs_fwdllm.config.methods import MethodFacts, examples_of
from fs_fwdllm.config.own_sections import FwdllmConfig
from fs_fwdllm.config.schema import Config
from fs_fwdllm.config.sources import estimators_of, groups_of_sources
from fs_fwdllm.errors import ConfigError
from fs_fwdllm.method.parts import recipe_of
from fs_fwdllm.model.trainable_parts import adapter_request

__all__ = ["check_combination"]

#: Trained behind all layers that compute in the base's dtype.
_BEHIND_THE_BASE = ("head", "output_residual")
_BASELINES = ("SGD", "AdamW")


def check_combination(config: Config) -> None:
    """Refuse settings that are valid alone but not together.

    Raises:
        ConfigError: names the keys and the way out.
    """
    facts, recipe = config.method, recipe_of(config)
    if config.train.train_strategy != "frozen" and (facts.trains_blocks or not facts.clients_step):
        reason = "blocks are visited at the schedule's rate" if facts.trains_blocks else "the server takes the steps"
        alternatives = examples_of(lambda other: other.clients_step and not other.trains_blocks)
        raise ConfigError(
            f"train.train_strategy {config.train.train_strategy!r}: with {facts.name} {reason}, so clients have no "
            f"learning rate of their own; set train.train_strategy: frozen, or use a method whose clients step: "
            f"{alternatives}"
        )
    if not facts.pools_slopes or config.fwdllm.upload != "scalars":
        _refuse_pacing(config)
    if not facts.trains_blocks:
        _refuse_block_settings(config, facts)
    if config.fwdllm.robust.statistic != "mean":
        _check_statistic(config)
    if facts.measures_slopes:
        _check_sources(config)
    elif config.fwdllm.parts or config.fwdllm.fleet:
        key = "parts" if config.fwdllm.parts else "fleet"
        raise ConfigError(
            f"fwdllm.{key}: says where slopes come from, and {facts.name} sends none; leave it out, or use "
            f"{examples_of(lambda other: other.measures_slopes)}"
        )
    recipe.check(config)


def _check_statistic(config: Config) -> None:
    """A vote needs clients that answer the same questions."""
    own, statistic = config.fwdllm, config.fwdllm.robust.statistic
    if not config.method.measures_slopes:
        raise ConfigError(
            f"fwdllm.robust.statistic {statistic!r}: is taken probe by probe, and {config.method.name} sends no "
            f"slopes; set it to mean, or use {examples_of(lambda facts: facts.measures_slopes)}"
        )
    needed: dict[str, tuple[object, tuple[object, ...]]] = {
        "fwdllm.directions": (own.directions, ("common", "groups")),
        "fwdllm.upload": (own.upload, ("scalars",)),
        "fwdllm.fleet": (own.fleet, ([],)),
        "train.batch_or_epoch": (config.train.batch_or_epoch, ("batch",)),
    }
    for key, (value, allowed) in needed.items():
        if value not in allowed:
            raise ConfigError(
                f"{key} {value!r}: with fwdllm.robust.statistic {statistic!r} all clients of a set must look along the "
                f"same directions; set it to {' or '.join(map(repr, allowed))}, or the statistic to mean"
            )


def _check_sources(config: Config) -> None:
    own, used = config.fwdllm, estimators_of(config)
    for word, estimator in used.items():
        if own.attention == "sdpa" and not estimator.works_with_fused_attention:
            raise ConfigError(
                f"fwdllm.attention 'sdpa': fused attention has no forward-mode derivative, which slopes {word!r} need; "
                "set fwdllm.attention: eager"
            )
        if own.probes_per_batch > 1 and not config.llm.adapter.use and not estimator.batches_whole_models:
            raise ConfigError(
                f"fwdllm.probes_per_batch {own.probes_per_batch}: full-parameter tuning would need that many copies of "
                "the model; set it to 1 or use an adapter (llm.adapter.use: true)"
            )
    _refuse_rounding(config)
    probing = [source for group in groups_of_sources(config) for source in group if source.slopes in used]
    most = max(source.estimator.largest_batch(source.probes) for source in probing)
    if own.probes_per_batch > most:
        raise ConfigError(
            f"fwdllm.probes_per_batch {own.probes_per_batch}: more than {_most_probes(config)}; allowed are 1 to {most}"
        )
    if own.parts or own.fleet:
        _check_division(config)


def _refuse_rounding(config: Config) -> None:
    """Differences of losses that a bfloat16 base rounds to two digits are noise, whatever becomes of them."""
    own, (trained, _) = config.fwdllm, adapter_request(config)
    if own.base.compute_dtype != "bfloat16" or trained in ("full", *_BEHIND_THE_BASE):
        return
    for word, estimator in estimators_of(config).items():
        least = estimator.least_bfloat16_radius
        if (own.radius_scale == "relative" and math.isfinite(least)) or own.radius >= least:
            continue
        larger = f", fwdllm.radius {least:g} or more" if math.isfinite(least) else ""
        raise ConfigError(
            f"fwdllm.base.compute_dtype 'bfloat16': slopes {word!r} at fwdllm.radius {own.radius:g} would mostly be "
            "the base's rounding (a correlation of -0.3 to 0.4 with the exact ones where it was measured); use "
            f"fwdllm.estimator: forward_mode, which has no radius{larger}, or fwdllm.base.compute_dtype: float32"
        )


def _most_probes(config: Config) -> str:
    own = config.fwdllm
    return "the probes of any part" if own.parts or own.fleet else f"fwdllm.probes {own.probes}"


def _check_division(config: Config) -> None:
    """What is made for one source of slopes says nothing, or something else, where there are several."""
    own = config.fwdllm
    key = "fwdllm.parts" if own.parts else "fwdllm.fleet"
    for name, value, neutral in (
        ("fwdllm.sampling.kind", own.sampling.kind, "none"),
        ("fwdllm.step.report_cosine", own.step.report_cosine, False),
        ("train.optimizer.weight_decay", config.train.optimizer.weight_decay, 0.0),
    ):
        if value != neutral:
            raise ConfigError(f"{name} {value!r}: does not go with {key}; set it to {neutral!r}, or leave {key} out")
    if own.gate.kind == "published":
        raise ConfigError(
            f"fwdllm.gate.kind 'published': takes all slopes for those of one part, which {key} does not have; use "
            "'relative' or 'none'"
        )


def _refuse_pacing(config: Config) -> None:
    """Gate, sampling, step control and Adam mean nothing where no server step is built from pooled slopes."""
    own = config.fwdllm
    asked = [
        f"{name} {value!r}"
        for name, value, neutral in (
            ("fwdllm.gate.kind", own.gate.kind, "none"),
            ("fwdllm.gate.tensor", own.gate.tensor, "all"),
            ("fwdllm.sampling.kind", own.sampling.kind, "none"),
            ("fwdllm.step.control", own.step.control, "none"),
            ("fwdllm.step.report_norms", own.step.report_norms, False),
            ("fwdllm.step.report_cosine", own.step.report_cosine, False),
            ("fwdllm.server_optimizer", own.server_optimizer, "sgd"),
            ("fwdllm.server_betas", own.server_betas, FwdllmConfig.model_fields["server_betas"].default),
            ("fwdllm.server_epsilon", own.server_epsilon, FwdllmConfig.model_fields["server_epsilon"].default),
        )
        if value != neutral
    ]
    if asked:
        raise ConfigError(
            f"{asked[0]}: needs a server that pools slopes, which federate.method {config.federate.method!r} with "
            f"fwdllm.upload {own.upload!r} does not; use {examples_of(lambda facts: facts.pools_slopes)} with "
            "fwdllm.upload: scalars"
        )


def _refuse_block_settings(config: Config, facts: MethodFacts) -> None:
    """What only block training honours must not be ignored elsewhere."""
    only = f"only {examples_of(lambda other: other.trains_blocks)} has it"
    if config.grad.grad_clip > 0:
        raise ConfigError(f"grad.grad_clip {config.grad.grad_clip}: {facts.name} does not clip, {only}; set it to -1")
    if config.grad.grad_accum_count > 1:
        raise ConfigError(
            f"grad.grad_accum_count {config.grad.grad_accum_count}: {facts.name} does not accumulate, {only}; set it "
            "to 1 and raise dataloader.batch_size"
        )
    if config.train.optimizer.type not in _BASELINES:
        raise ConfigError(
            f"train.optimizer.type {config.train.optimizer.type!r}: {facts.name} has 'SGD' and 'AdamW', {only}"
        )
