"""Which parts make the forward-gradient methods: plain, or with FwdLLM's gate, directed sampling and step control."""

from __future__ import annotations

from fs_fwdllm.config.schema import Config
from fs_fwdllm.config.sources import estimators_of
from fs_fwdllm.core.direction import AimedDirections
from fs_fwdllm.errors import ConfigError
from fs_fwdllm.method.client import ClientWorker
from fs_fwdllm.method.first_order.dense import GradientServer, optimizer_factory
from fs_fwdllm.method.forward.client import LookingWorker
from fs_fwdllm.method.forward.pacing import Pacing
from fs_fwdllm.method.forward.server import PooledServer
from fs_fwdllm.method.forward.server_optimizer import check_server_optimizer, make_server_optimizer
from fs_fwdllm.method.parts import Parts, Recipe
from fs_fwdllm.method.server import RoundServer, ServerSettings

__all__ = ["RECIPE"]


def _make_worker(parts: Parts) -> ClientWorker:
    own, distribution = parts.config.fwdllm, parts.replica.replayer.distribution
    aimed = None if own.sampling.kind == "none" else AimedDirections(distribution)
    return LookingWorker(
        parts.objective,
        parts.replica,
        parts.batches,
        parts.measuring(aimed or distribution),
        aimed,
        dense_upload=own.upload == "dense",
        in_common=own.directions == "common",
    )


def _make_server(parts: Parts, settings: ServerSettings) -> RoundServer:
    own = parts.config.fwdllm
    if own.upload == "dense":
        factory = optimizer_factory("SGD", weight_decay=0.0, momentum=own.server_momentum)
        return GradientServer(parts.server_replayer(), settings, factory)
    pacing = Pacing.of(own, parts.trainables)
    return PooledServer(
        parts.server_replayer(),
        settings,
        optimizer=make_server_optimizer(own),
        pacing=pacing,
        in_common=own.directions == "common",
    )


def _check(config: Config) -> None:
    own = config.fwdllm
    check_server_optimizer(own)
    if own.sampling.kind == "corrected" and own.probes < 2:
        raise ConfigError(
            f"fwdllm.probes {own.probes}: fwdllm.sampling.kind 'corrected' spends one probe of a step on the "
            "reference; allowed are 2 or more"
        )
    if own.directions == "common":
        _check_common(config)
    if own.gate.tensor != "all" and own.gate.kind != "published":
        raise ConfigError(
            f"fwdllm.gate.tensor {own.gate.tensor!r}: only fwdllm.gate.kind 'published' looks at one tensor; set it to "
            "'all' or the kind to 'published'"
        )


def _check_common(config: Config) -> None:
    """Directions in common lose what one client alone would see, so they are for slopes of which there are many."""
    own = config.fwdllm
    if probing := [word for word, estimator in estimators_of(config).items() if not estimator.exact]:
        raise ConfigError(
            f"fwdllm.directions 'common': with slopes {probing[0]!r} every client would spend its passes on the "
            "same few directions; use closed_form or projected for every part, or fwdllm.directions: own"
        )
    for key, value, neutral in (
        ("fwdllm.fleet", own.fleet, []),
        ("fwdllm.direction", own.direction, "rademacher"),
        ("fwdllm.gate.kind", own.gate.kind, "none"),
        ("fwdllm.sampling.kind", own.sampling.kind, "none"),
        ("fwdllm.upload", own.upload, "scalars"),
    ):
        if value != neutral:
            raise ConfigError(f"{key} {value!r}: does not go with fwdllm.directions 'common'; set it to {neutral!r}")


RECIPE = Recipe(_make_worker, _make_server, check=_check)
