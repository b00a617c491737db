"""What a run will cost, before it is run: parameters, passes, bytes and peak memory. Nothing is trained.

**Passes and bytes are counted, not estimated.** The real server is played through its rounds with answers that say
nothing (:mod:`.dry_run`), and the sums are what the run's ``metrics.jsonl`` will say, provided that every asked client
answers. With a variance gate that holds if the gate never waits; the run whose every step waits to the limit is
forecast beside it. Of a run longer than the rounds that are played, the later rounds count as much as the second half
of the played ones did on average. Block training is played for two cycles, and its uploads are upper bounds
(:mod:`fs_fwdllm.method.cybgd.forecast`).

Passes per client and round, for ``K`` steps and ``P`` probes: central ``2 K P``, one-sided ``K (1 + P)``, forward mode
``K (ceil(P / probes_per_batch) + P)``, backpropagation ``K`` forward and ``K`` backward, ``2 K`` forward with
checkpointing.

**Memory is an estimate**; :mod:`.memory` has its formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fs_fwdllm.config import Config
from fs_fwdllm.evaluation.linear_probe import LinearProbe
from fs_fwdllm.forecast.dry_run import Cost, dry_rounds
from fs_fwdllm.forecast.memory import MemoryEstimate, Traffic, estimate_memory, resident_bytes
from fs_fwdllm.forecast.noise import PartForecast, forecast_parts, noise_remarks
from fs_fwdllm.forecast.reference import check_reference, reference_of
from fs_fwdllm.forecast.timing import Pace, find_pace
from fs_fwdllm.method.parts import work_plans
from fs_fwdllm.model.base.packed import elements_of
from fs_fwdllm.report.units import format_bytes, format_count, format_seconds
from fs_fwdllm.running.session import Session

__all__ = ["Cost", "Plan", "make_plan"]


@dataclass(frozen=True)
class Plan:
    """The forecast of a run.

    Attributes:
        adapter: which parameters are trained.
        clients, clients_with_data, clients_per_round: all; those that can be asked; those that are asked.
        steps: fewest and most local steps of a client in a round.
        parts: where the slopes of each part come from, and how well a round will know it; none for methods that send
            none.
        costliest_client: the largest of each number over the clients of the first round.
        first_round, last_round, run: sums over clients; of the last round that was played.
        rounds_per_step: fewest and most rounds of a server step, which the variance gate decides.
        run_of_longest_steps: as ``run``, if every step takes the most rounds.
        memory: predicted peak, part by part.
        pace: what a pass takes on this machine.
        batches: different ones that the run sees.
        remarks: what a run would say of the configuration before it starts.
        advice: what only a plan says: how slopes could be spread better.
        reference: what a linear classifier reaches on the same features; ``None`` unless asked for.
    """

    method: str
    model: str
    adapter: str
    trainable_parameters: int
    total_parameters: int
    clients: int
    clients_with_data: int
    clients_per_round: int
    rounds: int
    steps: tuple[int, int]
    parts: tuple[PartForecast, ...]
    costliest_client: Cost
    first_round: Cost
    last_round: Cost
    run: Cost
    rounds_per_step: tuple[int, int]
    run_of_longest_steps: Cost
    memory: MemoryEstimate
    pace: Pace = field(compare=False)  # measured, so that no two are equal
    batches: int
    remarks: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()
    reference: LinearProbe | None = None

    def rows(self) -> list[tuple[str, str]]:
        """``(name, value)`` pairs to print."""
        share = self.trainable_parameters / self.total_parameters
        steps = " to ".join(str(steps) for steps in sorted(set(self.steps)))
        clients = f"{self.clients_per_round} a round of {self.clients_with_data} with data ({self.clients} in all)"
        client, memory = self.costliest_client, self.memory
        copies = f"{format_bytes(memory.replicas_bytes)} + {format_bytes(memory.messages_bytes)}"
        return [
            ("method", self.method),
            ("model", self.model),
            ("trained", f"{self.adapter}: {self.trainable_parameters:,} of {self.total_parameters:,} ({share:.2%})"),
            ("clients", clients),
            ("rounds", format_count(self.rounds)),
            *self._gate_rows(),
            ("steps per client and round", steps),
            *((f"slopes, {part.name}", part.in_words()) for part in self.parts),
            ("passes per client and round", _passes(client)),
            ("passes per round", _passes(self.first_round)),
            ("passes of the run", _passes(self.run)),
            ("time here per client and round", f"about {format_seconds(self.pace.seconds_of(client, self.steps[1]))}"),
            ("time here of all clients' work", f"about {format_seconds(self.pace.seconds_of(self.run, self.batches))}"),
            *self._disk_rows(),
            ("upload per client and round", format_bytes(client.upload_bytes)),
            ("download per client, first round", format_bytes(client.download_bytes)),
            ("first round, all clients", _traffic(self.first_round)),
            ("a late round, all clients", _traffic(self.last_round)),
            ("the run, if all clients answer", _traffic(self.run)),
            ("peak memory (estimate)", format_bytes(memory.peak_bytes)),
            ("  process and model", f"{format_bytes(memory.process_bytes)} + {format_bytes(memory.model_bytes)}"),
            ("  replicas and messages", copies),
            ("  work, or evaluation", f"{format_bytes(memory.work_bytes)}, {format_bytes(memory.evaluation_bytes)}"),
            ("  prefix cache", format_bytes(memory.prefix_cache_bytes)),
            ("  check, and the best round", f"{format_bytes(memory.check_bytes)} + {format_bytes(memory.best_bytes)}"),
            *([("reference", str(self.reference))] if self.reference is not None else []),
        ]

    def _disk_rows(self) -> list[tuple[str, str]]:
        if not self.pace.read_bytes:
            return []
        reads = self.pace.read_bytes_of(self.costliest_client), self.pace.read_bytes_of(self.run)
        return [
            ("read from the disk", f"{format_bytes(reads[0])} per client and round, {format_bytes(reads[1])} in all")
        ]

    def _gate_rows(self) -> list[tuple[str, str]]:
        fewest, most = self.rounds_per_step
        if fewest == most:
            return []
        return [
            ("server steps (the gate decides)", f"{-(-self.rounds // most):,} to {self.rounds // fewest:,}"),
            ("the run, if the gate waits each time", _traffic(self.run_of_longest_steps)),
        ]


def _passes(cost: Cost) -> str:
    return f"{cost.forward_passes:,} forward, {cost.backward_passes:,} backward"


def _traffic(cost: Cost) -> str:
    return f"{format_bytes(cost.upload_bytes)} up, {format_bytes(cost.download_bytes)} down"


def make_plan(config: Config) -> Plan:
    """Load what ``config`` names and forecast its run.

    Raises:
        FwdLLMError: whatever a run would raise while it loads; see the subtypes.
    """
    if config.fwdllm.report.linear_probe:
        check_reference(config)
    before_loading_bytes = resident_bytes()
    session = Session.open(config)
    plans = work_plans(config, session.client_samples)
    steps = min(plan.steps for plan in plans.values()), max(plan.steps for plan in plans.values())
    rounds = list(dry_rounds(session))
    parts = forecast_parts(session, plans, len(rounds[0]))
    gate = config.fwdllm.gate
    longest = 1 if gate.kind == "none" else 1 + gate.max_repeats
    run = _whole_run(rounds, config)
    traffic = Traffic(max(cost.download_bytes for clients in rounds for cost in clients), run.upload_bytes)
    return Plan(
        method=config.method.name,
        model=config.model.type,
        adapter=session.loaded.peft_method,
        trainable_parameters=session.parts.trainables.count,
        total_parameters=elements_of(session.loaded.model),
        clients=len(session.data.clients),
        clients_with_data=len(session.client_samples),
        clients_per_round=len(rounds[0]),
        rounds=config.federate.total_round_num,
        steps=steps,
        parts=tuple(parts),
        costliest_client=_largest(rounds[0]),
        first_round=sum(rounds[0], Cost()),
        last_round=sum(rounds[-1], Cost()),
        run=run,
        rounds_per_step=(1, longest),
        run_of_longest_steps=run if longest == 1 else _whole_run(list(dry_rounds(session, gate_waits=True)), config),
        memory=estimate_memory(session, len(rounds[0]), steps[1], before_loading_bytes, traffic),
        pace=find_pace(session),
        batches=_batches(session, len(rounds[0]) * steps[1]),
        remarks=tuple(session.remarks()),
        advice=tuple(noise_remarks(session.parts, parts)),
        reference=reference_of(session) if config.fwdllm.report.linear_probe else None,
    )


def _batches(session: Session, visits_of_round: int) -> int:
    """Different batches that a run sees, at most."""
    size = session.config.dataloader.batch_size
    held = sum(-(-samples // size) for samples in session.client_samples.values())
    return min(held, session.config.federate.total_round_num * visits_of_round)


def _whole_run(played: Sequence[list[Cost]], config: Config) -> Cost:
    """The sum, of all rounds: those that were not played count as the later half of the others."""
    sums = [sum(clients, Cost()) for clients in played]
    late = sums[len(sums) // 2 :]
    unplayed = config.federate.total_round_num - len(sums)
    return sum(sums, Cost()) + sum(late, Cost()).times(unplayed / len(late))


def _largest(costs: Sequence[Cost]) -> Cost:
    return Cost(
        max(cost.upload_bytes for cost in costs),
        max(cost.download_bytes for cost in costs),
        max(cost.forward_passes for cost in costs),
        max(cost.backward_passes for cost in costs),
    )
