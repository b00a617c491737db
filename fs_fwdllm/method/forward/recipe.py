"""Which parts make the forward-gradient methods: plain, or with FwdLLM's gate, directed sampling and step control."""

from __future__ import annotations

from fs_fwdllm.config.schema import Config
from fs_fwdllm.core.direction import AimedDirections
from fs_fwdllm.errors import ConfigError
from fs_fwdllm.method.client import ClientWorker
from fs_fwdllm.method.first_order.dense import GradientServer, optimizer_factory
from fs_fwdllm.method.forward.client import LookingWorker
from fs_fwdllm.method.forward.pacing import Pacing
from fs_fwdllm.method.forward.server import PooledServer
from fs_fwdllm.method.forward.server_optimizer import check_server_optimizer, make_server_optimizer
from fs_fwdllm.method.parts import Parts, Recipe, direction_sets
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
        sets=direction_sets(parts.config),
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
    )


def _check(config: Config) -> None:
    own = config.fwdllm
    check_server_optimizer(own)
    if own.sampling.kind == "corrected" and own.probes < 2:
        raise ConfigError(
            f"fwdllm.probes {own.probes}: fwdllm.sampling.kind 'corrected' spends one probe of a step on the "
            "reference; allowed are 2 or more"
        )
    if own.directions != "own":
        _check_shared(config)
    if own.gate.tensor != "all" and own.gate.kind != "published":
        raise ConfigError(
            f"fwdllm.gate.tensor {own.gate.tensor!r}: only fwdllm.gate.kind 'published' looks at one tensor; set it to "
            "'all' or the kind to 'published'"
        )


def _check_shared(config: Config) -> None:
    """What cannot be had along directions that clients share, or along the rows of a matrix."""
    own = config.fwdllm
    orthogonal = direction_sets(config).orthogonal
    allowed: dict[str, tuple[object, tuple[object, ...]]] = {
        "fwdllm.gate.kind": (own.gate.kind, ("none",) if orthogonal else ("none", "relative")),
        "fwdllm.sampling.kind": (own.sampling.kind, ("none",)),
        "fwdllm.upload": (own.upload, ("scalars",)),
    }
    if orthogonal:
        allowed |= {"fwdllm.fleet": (own.fleet, ([],)), "fwdllm.direction": (own.direction, ("rademacher",))}
    for key, (value, values) in allowed.items():
        if value not in values:
            raise ConfigError(
                f"{key} {value!r}: does not go with fwdllm.directions {own.directions!r}; set it to "
                f"{' or '.join(map(repr, values))}, or fwdllm.directions to own"
            )


RECIPE = Recipe(_make_worker, _make_server, check=_check)
