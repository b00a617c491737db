"""Whether what a source of slopes measures are slopes: compared with exact ones along the same directions.

A digest proves that everybody rebuilt the same update; it says nothing of the numbers that went into it. A base in half
precision, a radius that is too small for its losses or too large for their curvature: each passes every digest and
sends noise. :func:`remark_on_slopes` looks at two probes before a run's first round, where that costs a hundredth of
the run at most; ``fs-fwdllm doctor --slopes`` (:mod:`fs_fwdllm.profiler.slopes`) measures as closely as one likes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
from torch.nn.attention import SDPBackend, sdpa_kernel

from fs_fwdllm.config import Config
from fs_fwdllm.config.own_sections import FROZEN
from fs_fwdllm.config.sources import Source, sources_of
from fs_fwdllm.core.direction import DirectionKey, make_distribution
from fs_fwdllm.data import client_batches
from fs_fwdllm.data.types import Batch
from fs_fwdllm.errors import EstimatorError
from fs_fwdllm.method import Parts
from fs_fwdllm.method.parts import passes_of_client, work_plans
from fs_fwdllm.running.sampling import clients_asked
from fs_fwdllm.running.session import Session

__all__ = ["compared", "first_batch", "measured_slopes", "remark_on_slopes"]

_PROBES = 2
#: Passes of the look at two probes, about: measured in both ways, a tangent counting as two.
_PASSES_OF_A_LOOK = 12
_LARGEST_SHARE = 0.01
#: Above this error the slopes that were looked at are more noise than signal.
_TOO_FAR_OFF = 0.5


def remark_on_slopes(session: Session) -> str | None:
    """A warning if two probes of a first batch are more noise than signal, beside forward mode on the same base.

    Nothing is looked at where slopes have no radius, where the look would be a noticeable part of the run, over a base
    on the disk, or where the model has an operation that forward mode cannot differentiate.
    """
    config, parts = session.config, session.parts
    if not config.method.measures_slopes or parts.full or parts.objective.meeting.largest > 1:
        return None
    client = next((one for one in session.client_samples if any(map(_has_radius, sources_of(config, one)))), None)
    if client is None or _LARGEST_SHARE * _passes_of_run(session, client) < _PASSES_OF_A_LOOK:
        return None
    batch, sources = first_batch(session), sources_of(config, client)
    try:
        with sdpa_kernel(SDPBackend.MATH) if config.fwdllm.attention != "eager" else nullcontext():
            exact = parts.with_config(_in_forward_mode(config, sources))
            expected = measured_slopes(exact, batch, client, _PROBES)
    except EstimatorError:
        return None
    measured = measured_slopes(parts, batch, client, _PROBES)
    errors = [
        (compared(mine, theirs)[1] if np.isfinite(mine).all() else np.inf, source.slopes)
        for mine, theirs, source in zip(measured, expected, sources, strict=True)
        if _has_radius(source) and theirs.any()  # LoRA's A has no slope while B is zero
    ]
    worst = max(errors, default=(0.0, ""))
    if worst[0] <= _TOO_FAR_OFF:
        return None
    return (
        f"warning: two slopes of {worst[1]!r} are off by {worst[0]:.0%} where training starts (fwdllm.radius "
        f"{config.fwdllm.radius:g}, a base in {str(session.loaded.base_dtype).removeprefix('torch.')}): clients would "
        "mostly send noise; fs-fwdllm doctor --slopes FILE says what to change"
    )


def _has_radius(source: Source) -> bool:
    return source.estimator is not None and source.estimator.has_radius


def _passes_of_run(session: Session, client: int) -> int:
    """Forward passes of all clients and rounds, if all measured as ``client`` does."""
    config, held = session.config, session.client_samples
    a_round = passes_of_client(config, client, work_plans(config, held)[client].steps).forward
    return config.federate.total_round_num * clients_asked(config, len(held)) * a_round


def _in_forward_mode(config: Config, sources: Sequence[Source]) -> Config:
    """The same directions for what has a radius; the rest is frozen."""
    own = config.fwdllm
    words = ["forward_mode" if _has_radius(source) else FROZEN for source in sources]
    parts = [
        part.model_copy(update={"slopes": word, "probes": int(word != FROZEN), "scalars": 0})
        for part, word in zip(own.parts, words, strict=False)
    ]
    changes = {"estimator": "forward_mode", "parts": parts, "fleet": [], "probes": _PROBES, "probes_per_batch": 1}
    return config.model_copy(update={"fwdllm": own.model_copy(update=changes)})


def first_batch(session: Session) -> Batch:
    """The first client's first batch of a run."""
    client, batches = next(iter(session.client_samples)), session.parts.batches
    return client_batches(
        session.data.clients[client].train, client=client, round_index=0, steps=1, batch_size=batches.batch_size,
        seed=batches.seed, pad_token_id=batches.pad_token_id,
    )[0]  # fmt: skip


def measured_slopes(parts: Parts, batch: Batch, client: int, probes: int) -> list[np.ndarray]:
    """Per part ``probes`` slopes as ``client`` measures them, float64, along directions that depend on the seed alone;
    none for a part that is frozen."""
    estimator = parts.measuring(make_distribution(parts.config.fwdllm.direction))(client)
    counts = [probes if count else 0 for count in estimator.probes]
    keys = [[DirectionKey(parts.config.seed, probe) for probe in range(count)] for count in counts]
    values = estimator.slopes(parts.objective.on(batch), keys).values.astype(np.float64)
    return np.split(values, np.cumsum(counts)[:-1])


def compared(measured: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """Correlation about zero, and the relative root mean square error; NaN where all of ``expected`` are zero."""
    scale = float(np.sqrt(np.square(expected).sum()))
    if not scale or not np.isfinite(measured).all():
        return float("nan"), float("nan")
    size = float(np.sqrt(np.square(measured).sum()))
    error = float(np.sqrt(np.square(measured - expected).sum())) / scale
    return (float(measured @ expected) / (size * scale) if size else 0.0), error
