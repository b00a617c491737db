"""Whether a configuration's slopes are slopes: measured beside backpropagation in float32 on the same batch.

Why a digest does not tell is said in :mod:`fs_fwdllm.running.slope_check`. What tells is the correlation of what the
configured source measures with ``<gradient, z>`` along the same directions ``z``: the share of a step that is signal is
its square.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fs_fwdllm.config import Config
from fs_fwdllm.config.own_sections import FROZEN, FwdllmConfig
from fs_fwdllm.config.sources import groups_of_sources
from fs_fwdllm.data.types import Batch
from fs_fwdllm.errors import ConfigError
from fs_fwdllm.method.parts import Parts
from fs_fwdllm.running.session import Session
from fs_fwdllm.running.slope_check import compared, first_batch, measured_slopes

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
    batch = first_batch(session)
    exact = _exact(session)
    found: dict[tuple[str, str], SlopeCheck] = {}
    for group, sources in enumerate(groups_of_sources(config)):
        client = _first_client(config, group)
        measured = measured_slopes(session.parts, batch, client, probes)
        expected = measured_slopes(exact, batch, client, probes)
        for part, source in enumerate(sources):
            match = config.fwdllm.parts[part].match if config.fwdllm.parts else ""
            if source.slopes == FROZEN or (source.slopes, match) in found:
                continue
            radii: tuple[tuple[float, float], ...] = ()
            correlation, error = compared(measured[part], expected[part])
            if not correlation >= ENOUGH and source.estimator.has_radius:
                radii = tuple(_at_other_radii(session.parts, batch, client, probes, part, expected[part]))
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


def _first_client(config: Config, group: int) -> int:
    """A client of the group of a fleet; 0 for whoever is in none."""
    if group == 0:
        return 0
    named = config.fwdllm.fleet[group - 1].clients
    if not isinstance(named, int):
        return named[0]
    before = [one.clients for one in config.fwdllm.fleet[: group - 1]]
    return 1 + sum(one for one in before if isinstance(one, int))


def _at_other_radii(
    parts: Parts, batch: Batch, client: int, probes: int, part: int, expected: np.ndarray
) -> list[tuple[float, float]]:
    found = []
    for factor in _OTHER_RADII:
        own: FwdllmConfig = parts.config.fwdllm.model_copy(update={"radius": parts.config.fwdllm.radius * factor})
        there = parts.with_config(parts.config.model_copy(update={"fwdllm": own}))
        found.append((own.radius, compared(measured_slopes(there, batch, client, probes)[part], expected)[0]))
    return found
