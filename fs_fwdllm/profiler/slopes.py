"""Whether a configuration's slopes are slopes: measured beside backpropagation in float32 on the same batch.

A digest proves that everybody rebuilt the same update; it says nothing of the numbers that went into it. A base in
half precision, a radius that is too small for it or too large for the loss, an engine that rounds activations: each
passes every digest and uploads noise. What tells is the correlation of what the configured source measures with
``<gradient, z>`` along the same directions ``z``: the share of a step that is signal is its square.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fs_fwdllm.config import Config
from fs_fwdllm.config.own_sections import FROZEN, FwdllmConfig
from fs_fwdllm.config.sources import Source, groups_of_sources
from fs_fwdllm.core.direction import DirectionKey, make_distribution
from fs_fwdllm.data import client_batches
from fs_fwdllm.data.types import Batch
from fs_fwdllm.errors import ConfigError
from fs_fwdllm.method.parts import Parts
from fs_fwdllm.running.session import Session

__all__ = ["ENOUGH", "SlopeCheck", "check_slopes"]

#: Above this correlation a step is as good as one along exact slopes: what is lost is the probes' own noise.
ENOUGH = 0.99
#: Multiples of ``fwdllm.radius`` that are tried where the configured one does not do.
_OTHER_RADII = (0.1, 10.0, 100.0)


@dataclass(frozen=True)
class SlopeCheck:
    """What one source of slopes is worth.

    Attributes:
        slopes: a word of ``fwdllm.estimator``.
        match: the part of the trainables, as ``fwdllm.parts`` names it; empty for all of them.
        probes: directions that were looked along.
        correlation: with the exact slopes; NaN where these are all zero.
        relative_error: root mean square of the difference over that of the exact slopes.
        other_radii: correlation by radius, where the configured one does not do and there are others.
    """

    slopes: str
    match: str
    probes: int
    correlation: float
    relative_error: float
    other_radii: tuple[tuple[float, float], ...] = ()

    @property
    def is_enough(self) -> bool:
        """Whether the slopes can be kept as they are."""
        return self.correlation >= ENOUGH


def check_slopes(config: Config, probes: int = 32) -> list[SlopeCheck]:
    """Measure the slopes of every source of a configuration on the first client's first batch, where training starts.

    Args:
        probes: directions for each source.

    Raises:
        ConfigError: the method measures no slopes.
        DataError, ModelError, EstimatorError: see their messages.
    """
    if not config.method.measures_slopes:
        raise ConfigError(
            f"federate.method {config.federate.method}: backpropagates and measures no slopes, so nothing is to check"
        )
    session = Session.open(config)
    batch = _first_batch(session)
    exact = _exact(session)
    found: dict[tuple[str, str], SlopeCheck] = {}
    for group, sources in enumerate(groups_of_sources(config)):
        client = _first_client(config, group)
        measured = _measure(session.parts, batch, client, sources, probes)
        expected = _measure(exact, batch, client, sources, probes)
        for part, source in enumerate(sources):
            match = config.fwdllm.parts[part].match if config.fwdllm.parts else ""
            if source.slopes == FROZEN or (source.slopes, match) in found:
                continue
            radii: tuple[tuple[float, float], ...] = ()
            correlation, error = _compared(measured[part], expected[part])
            if not correlation >= ENOUGH and source.estimator.has_radius:
                radii = tuple(_at_other_radii(session.parts, batch, client, sources, probes, part, expected[part]))
            found[source.slopes, match] = SlopeCheck(source.slopes, match, probes, correlation, error, radii)
    return list(found.values())


def _exact(session: Session) -> Parts:
    """The same trainables on a base that computes in float32, with slopes from backpropagation."""
    own = session.config.fwdllm
    parts = [
        part if part.slopes == FROZEN else part.model_copy(update={"slopes": "projected", "probes": 0})
        for part in own.parts
    ]
    base = own.base.model_copy(update={"compute_dtype": "float32"})
    changes = {"estimator": "projected", "parts": parts, "fleet": [], "base": base, "gradient_checkpointing": False}
    config = session.config.model_copy(
        update={
            "fwdllm": own.model_copy(update=changes),
            "train": session.config.train.model_copy(update={"is_enable_half": False}),
        }
    )
    if session.loaded.base_dtype == torch.float32:
        return session.parts.with_config(config)
    return Session.open(config).parts


def _first_batch(session: Session) -> Batch:
    client, batches = next(iter(session.client_samples)), session.parts.batches
    return client_batches(
        session.data.clients[client].train, client=client, round_index=0, steps=1, batch_size=batches.batch_size,
        seed=batches.seed, pad_token_id=batches.pad_token_id,
    )[0]  # fmt: skip


def _first_client(config: Config, group: int) -> int:
    """A client of the group of a fleet; 0 for whoever is in none."""
    if group == 0:
        return 0
    named = config.fwdllm.fleet[group - 1].clients
    if not isinstance(named, int):
        return named[0]
    before = [one.clients for one in config.fwdllm.fleet[: group - 1]]
    return 1 + sum(one for one in before if isinstance(one, int))


def _measure(parts: Parts, batch: Batch, client: int, sources: Sequence[Source], probes: int) -> list[np.ndarray]:
    """Per part the slopes along the same directions, whoever measures them; none for a part that is frozen."""
    estimator = parts.measuring(make_distribution(parts.config.fwdllm.direction))(client)
    counts = [0 if source.slopes == FROZEN else probes for source in sources]
    keys = [[DirectionKey(parts.config.seed, probe) for probe in range(count)] for count in counts]
    values = estimator.slopes(parts.objective.on(batch), keys).values.astype(np.float64)
    return np.split(values, np.cumsum(counts)[:-1])


def _compared(measured: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """Correlation about zero, and the relative root mean square error."""
    scale = float(np.sqrt(np.square(expected).sum()))
    if not scale or not np.isfinite(measured).all():
        return float("nan"), float("nan")
    size = float(np.sqrt(np.square(measured).sum()))
    error = float(np.sqrt(np.square(measured - expected).sum())) / scale
    return (float(measured @ expected) / (size * scale) if size else 0.0), error


def _at_other_radii(
    parts: Parts, batch: Batch, client: int, sources: Sequence[Source], probes: int, part: int, expected: np.ndarray
) -> list[tuple[float, float]]:
    found = []
    for factor in _OTHER_RADII:
        own: FwdllmConfig = parts.config.fwdllm.model_copy(update={"radius": parts.config.fwdllm.radius * factor})
        there = parts.with_config(parts.config.model_copy(update={"fwdllm": own}))
        found.append((own.radius, _compared(_measure(there, batch, client, sources, probes)[part], expected)[0]))
    return found
