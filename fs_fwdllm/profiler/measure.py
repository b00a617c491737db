"""What a candidate is worth: similarity of gradients, cost, and a short trial; and which learning rate suits one.

All candidates see the same clients, the same batches and the same number of forward passes. A learning rate that suits
one number of parameters does not suit another, so several multiples of the configured rate get an eighth of the passes
each, and the best of them all; the baseline of every claim is the same configuration with another adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from fs_fwdllm.config.methods import examples_of
from fs_fwdllm.core.direction import DirectionKey, direction_seed
from fs_fwdllm.core.replay import Contributions, add_contributions
from fs_fwdllm.core.trainables import flatten
from fs_fwdllm.data import client_batches
from fs_fwdllm.data.types import Batch
from fs_fwdllm.errors import ConfigError, FwdLLMError
from fs_fwdllm.estimator import Backprop, make_estimator
from fs_fwdllm.forecast.memory import estimate_memory, resident_bytes
from fs_fwdllm.method.parts import work_plans
from fs_fwdllm.profiler.candidates import Candidate
from fs_fwdllm.profiler.trial import Trial, evaluate_at, run_trial
from fs_fwdllm.running.sampling import clients_per_round
from fs_fwdllm.running.session import Session

__all__ = ["Budget", "Lead", "Measured", "Watch", "check_profile", "lead", "measure", "rank", "search_rates"]

#: Told what is being done, and the share of the candidate's work that is over.
Watch = Callable[[str, float], None]

#: Part of a trial's passes that goes into judging one learning rate.
_SHARE_OF_A_RATE = 8


@dataclass(frozen=True)
class Budget:
    """How much to spend on a candidate.

    Attributes:
        probes: directions of the gradient whose similarity is measured.
        batches: client batches it is measured on.
        forward_passes: of one trial, spent on rounds of the configured method.
        rate_factors: multiples of ``train.optimizer.lr`` to choose from, with an eighth of the passes each.
    """

    probes: int = 64
    batches: int = 4
    forward_passes: int = 400
    rate_factors: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0)

    @property
    def whole(self) -> int:
        """Forward passes of a candidate, about."""
        return self.similarity + self.forward_passes + len(self.rate_factors) * self.of_a_rate

    @property
    def similarity(self) -> int:
        """Forward passes, about, that the similarity takes."""
        return 2 * self.probes * self.batches

    @property
    def of_a_rate(self) -> int:
        """Forward passes of judging one learning rate."""
        return self.forward_passes // _SHARE_OF_A_RATE


@dataclass(frozen=True)
class Measured:
    """What was found out about a candidate.

    Attributes:
        trainable: number of trainable parameters.
        cosine: of the ``probes``-direction forward gradient to the backpropagated one, mean over batches.
        expected_cosine: ``sqrt(K / (K + d - 1))``, what isotropic directions give.
        memory_bytes: predicted peak of a run.
        dense_bytes: of one dense copy of the trainables; what a new client downloads.
        loss_before, loss_after: on the evaluation split, before and after the best trial.
        metric: the task's first metric after it; NaN if there is none.
        learning_rate: of the best trial.
        seconds: of the best trial.
        row_losses: after it, the loss of each label of the evaluation, in order.
        problem: why the candidate could not be measured; empty if it was.
    """

    candidate: Candidate
    trainable: int = 0
    cosine: float = math.nan
    expected_cosine: float = math.nan
    memory_bytes: int = 0
    dense_bytes: int = 0
    loss_before: float = math.nan
    loss_after: float = math.nan
    metric: float = math.nan
    learning_rate: float = math.nan
    seconds: float = math.nan
    row_losses: np.ndarray = field(default_factory=lambda: np.zeros(0), repr=False, compare=False)
    problem: str = ""


def rank(measured: Sequence[Measured]) -> list[Measured]:
    """Best first: lowest evaluation loss after the trial; what could not be measured comes last."""
    return sorted(measured, key=lambda item: (bool(item.problem), math.isnan(item.loss_after), item.loss_after))


@dataclass(frozen=True)
class Lead:
    """By how much the best candidate's loss is below the second's, and the standard error of that over ``rows``."""

    difference: float
    standard_error: float
    rows: int
    second: str

    @property
    def is_chance(self) -> bool:
        """Whether the difference is within two standard errors."""
        return not self.difference > 2 * self.standard_error


def lead(ranked: Sequence[Measured]) -> Lead | None:
    """The lead of the first of ``ranked`` over the second, row by row; ``None`` if fewer than two learnt at all."""
    if len(ranked) < 2 or not all(len(item.row_losses) for item in ranked[:2]):
        return None
    differences = ranked[1].row_losses - ranked[0].row_losses
    rows = len(differences)
    error = float(differences.std(ddof=1)) / math.sqrt(rows) if rows > 1 else math.inf
    return Lead(float(differences.mean()), error, rows, ranked[1].candidate.name)


def check_profile(first: Session) -> None:
    """Refuse what cannot be profiled.

    Raises:
        ConfigError: the configured method needs backpropagation, or there is nothing to evaluate on.
    """
    if not first.config.method.measures_slopes:
        raise ConfigError(
            f"federate.method {first.config.federate.method!r}: the profiler is for forward-only methods; set "
            f"{examples_of(lambda facts: facts.measures_slopes)}"
        )
    own = first.config.fwdllm
    if own.parts or own.fleet:
        raise ConfigError(
            f"fwdllm.{'parts' if own.parts else 'fleet'}: the profiler compares what to train under one source for all "
            "of it and all clients; leave the key out, and look at a divided configuration with fs-fwdllm plan"
        )
    if not first.evaluation_batches:
        raise ConfigError("data.splits: the profiler needs validation or test samples; give them a share")


def measure(first: Session, candidate: Candidate, budget: Budget, watch: Watch) -> Measured:
    """Measure one candidate on the data of an opened session.

    A candidate that the model has no place for is returned with its ``problem`` said, not raised.

    Raises:
        ConfigError: as :func:`check_profile`.
    """
    check_profile(first)
    before_bytes = resident_bytes()
    try:
        session = Session.assemble(candidate.apply(first.config), first.loaded.tokenizer, first.data)
        session.evaluation_batches = first.evaluation_batches
        return _measure(session, candidate, budget, before_bytes, watch)
    except FwdLLMError as error:
        return Measured(candidate, problem=f"{type(error).__name__}: {error}")


def _measure(session: Session, candidate: Candidate, budget: Budget, before_bytes: int, watch: Watch) -> Measured:
    watch("similarity of gradients", 0.0)
    count = session.parts.trainables.count
    per_round = clients_per_round(session.config, len(session.client_samples))
    steps = max(plan.steps for plan in work_plans(session.config, session.client_samples).values())
    found = Measured(
        candidate,
        trainable=count,
        cosine=_similarity(session, budget),
        expected_cosine=math.sqrt(budget.probes / (budget.probes + count - 1)),
        memory_bytes=estimate_memory(session, per_round, steps, before_bytes).peak_bytes,
        dense_bytes=session.parts.trainables.bytes,
        loss_before=evaluate_at(session, session.parts.trainables)[0],
    )
    done = budget.similarity
    short = []
    for rate in _rates(session, budget):
        watch(f"learning rate {rate:g}", done / budget.whole)
        short.append(run_trial(session, budget.of_a_rate, rate))
        done += budget.of_a_rate
    chosen = min(short, key=lambda trial: trial.loss_after).learning_rate
    watch(f"trial at learning rate {chosen:g}", done / budget.whole)
    best = run_trial(session, budget.forward_passes, chosen)
    return replace(
        found,
        loss_after=best.loss_after,
        metric=best.metric,
        learning_rate=best.learning_rate,
        seconds=best.seconds,
        row_losses=best.row_losses,
    )


def search_rates(session: Session, budget: Budget, watch: Watch) -> Iterator[Trial]:
    """A trial of ``budget.forward_passes`` of the configuration as it is at each learning rate, one after the other.

    Raises:
        ConfigError: as :func:`check_profile`.
    """
    check_profile(session)
    for number, rate in enumerate(_rates(session, budget)):
        watch(f"learning rate {rate:g}", number / len(budget.rate_factors))
        yield run_trial(session, budget.forward_passes, rate)


def _rates(session: Session, budget: Budget) -> list[float]:
    return [session.config.train.optimizer.lr * factor for factor in budget.rate_factors]


def _similarity(session: Session, budget: Budget) -> float:
    """Mean cosine of the forward gradient to the backpropagated one, at the starting point."""
    parts = session.parts
    distribution = parts.replica.replayer.distribution
    own = parts.config.fwdllm
    estimator = make_estimator(parts.model, parts.trainables, distribution, own, full=parts.full)
    backprop = Backprop(parts.model)
    cosines = []
    for number, batch in enumerate(_client_batches(session, budget.batches)):
        seeds = [direction_seed(number, 0, 0, probe) for probe in range(budget.probes)]
        keys = [DirectionKey(session.config.seed, seed) for seed in seeds]
        slopes = estimator.slopes(parts.objective.on(batch), keys)
        estimate = [torch.zeros_like(tensor.detach()) for tensor in parts.trainables.tensors]
        contributions = Contributions(seeds, slopes.values / len(seeds))
        add_contributions(estimate, contributions, session.config.seed, distribution)
        backprop.gradient(parts.objective.on(batch))
        exact = [
            torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in parts.trainables.tensors
        ]
        cosines.append(_cosine(estimate, exact))
        for tensor in parts.trainables.tensors:
            tensor.grad = None
    return math.fsum(cosines) / len(cosines)


def _client_batches(session: Session, count: int) -> list[Batch]:
    settings, clients = session.parts.batches, list(session.client_samples)
    return [
        client_batches(
            session.data.clients[client].train, client=client, round_index=0, steps=1, batch_size=settings.batch_size,
            seed=settings.seed, pad_token_id=settings.pad_token_id, shuffle=settings.shuffle,
        )[0]
        for client in clients[:count]
    ]  # fmt: skip


def _cosine(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> float:
    a, b = flatten(first).astype("float64"), flatten(second).astype("float64")
    norms = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / norms if norms else 0.0
