"""A run seen from the server, without the transport: what every host does between "start" and "finished".

    open_round -> frames for clients ... receive frames of clients -> close_round -> record

A host owns processes and messages. It asks :class:`RunDriver` for the frames of a round, carries them to the clients by
whatever means it has, hands back what arrives, and closes the round when all have answered or its deadline is over.
Sampling, accounting, reporting, checkpoints and resumption are the same for all hosts because they are here, once.
:func:`answer` is the client's side of the wire.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console

from fs_fwdllm.config import Config
from fs_fwdllm.core.wire import Assignment, ClientUpdate, decode, encode
from fs_fwdllm.data.types import Example
from fs_fwdllm.errors import CheckpointError, FwdLLMError, TrainingStalledError, WireError
from fs_fwdllm.method import ClientWorker, RoundReport, RoundServer, assemble_server
from fs_fwdllm.model.card import results_of
from fs_fwdllm.report import RunFolder, RunReporter
from fs_fwdllm.report.record import method_name
from fs_fwdllm.running.accounting import Accounting
from fs_fwdllm.running.arithmetic import model_facts
from fs_fwdllm.running.checkpoint import Checkpoint, config_fingerprint, is_of, read_checkpoint, require_same_inputs
from fs_fwdllm.running.extension import describe_extension
from fs_fwdllm.running.keeping import Keeper, Kept
from fs_fwdllm.running.sampling import clients_asked, sample_clients
from fs_fwdllm.running.saved import check_saved
from fs_fwdllm.running.session import Session
from fs_fwdllm.running.slope_check import remark_on_slopes
from fs_fwdllm.running.watching import Watch

__all__ = ["RunDriver", "answer", "answers", "choose_clients", "follow", "read_own_checkpoint"]


def answer(worker: ClientWorker, frame: bytes, examples: Sequence[Example]) -> bytes:
    """Do what an assignment's frame asks and return the frame of the update.

    Raises:
        WireError: the frame is not an assignment.
        DataError, DivergenceError: as :meth:`fs_fwdllm.method.ClientWorker.work` has them.
    """
    return encode(worker.work(decode(frame, Assignment), examples))


def answers(
    worker: ClientWorker, frames: Mapping[int, bytes], examples: Mapping[int, Sequence[Example]]
) -> Iterator[tuple[int, bytes]]:
    """Every client's :func:`answer`, in order; several of them at a time where the worker says so."""
    clients = list(frames)
    size = worker.side_by_side(clients)
    for first in range(0, len(clients), size):
        group = clients[first : first + size]
        work = [partial(answer, worker, frames[client], examples[client]) for client in group]
        yield from zip(group, worker.objective.meeting.together(work), strict=True)


def follow(worker: ClientWorker, frame: bytes) -> None:
    """Bring a worker's replica to the parameters a frame of :meth:`RunDriver.current_state_for` leads to."""
    assignment = decode(frame, Assignment)
    worker.replica.follow(assignment.catch_up, assignment.digest)


def choose_clients(server: RoundServer, config: Config, round_index: int, available: Sequence[int]) -> list[int]:
    """Whom a round asks: whom the method wants, or else a draw that depends on the seed and the round alone."""
    wanted = server.wanted_clients(available)
    if wanted is not None:
        return wanted
    sampled_in = server.sampling_index_for(round_index)
    return sample_clients(config.seed, sampled_in, available, clients_asked(config, len(available)))


def read_own_checkpoint(folder: RunFolder) -> Checkpoint:
    """The checkpoint in a run folder, if the folder's configuration is still the one that made it.

    Raises:
        CheckpointError: there is none, it is damaged, the configuration was changed, or another process is at it.
    """
    with folder.locked():
        checkpoint = read_checkpoint(folder.checkpoint_path)
        changed = not is_of(checkpoint, folder.config())
    if changed:
        raise CheckpointError(f"{folder.config_path}: was changed after the checkpoint was written; start a new run")
    return checkpoint


#: Prefix of the worker's tensors in a checkpoint.
_WORKER = "worker."


class RunDriver:
    """The server's half of a run. A context manager: leaving it closes the run's files.

    Args:
        session: configuration, model and data of this process; ``session.client_samples`` names the clients.
        folder: the run folder.
        checkpoint: where to continue; ``None`` starts anew.
        console: where progress is shown; standard output unless told.
        worker: the clients' worker where they are simulated in this process; what it keeps between rounds goes into the
            checkpoint.

    Attributes:
        next_round: the round that is open, or will be opened next, counted from 0.
        missing: clients of the open round that have not answered.
    """

    def __init__(
        self,
        session: Session,
        folder: RunFolder,
        checkpoint: Checkpoint | None = None,
        console: Console | None = None,
        worker: ClientWorker | None = None,
    ) -> None:
        self.session = session
        self.folder = folder
        self._worker = worker
        self.server = assemble_server(session.parts, session.client_samples, folder.blocks_path)
        self.accounting = Accounting(session.device)
        self._fingerprint = config_fingerprint(folder.config())  # the session's has what loading found out, too
        self.next_round = 0
        self.missing: set[int] = set()
        self._answers: list[ClientUpdate] = []
        self._unreadable: dict[int, str] = {}
        self._asked = 0
        self._report: RoundReport | None = None
        self._rounds_before = self.total_rounds if checkpoint is None else checkpoint.total_rounds
        if checkpoint is None:
            # New weights are drawn from the seed: who loads the same model holds the same bits, as digests prove.
            for client in session.client_samples:
                self.server.note_holds(client, self.server.digest)
        else:
            self._continue_from(checkpoint)
        with ExitStack() as opened:
            opened.enter_context(folder.locked())
            self._reporter = RunReporter(
                folder,
                session.config,
                total_rounds=self.total_rounds,
                start_round=self.next_round + 1 if self.next_round else 0,
                console=console,
            )
            opened.push(self._reporter)
            self.say = self._reporter.say
            self._watch = Watch(session.config, self.say)
            session.progress = self._reporter.evaluating
            self.keeper = Keeper(session, folder, checkpoint, self.say, self.server)
            self._opened = opened.pop_all()

    def _continue_from(self, checkpoint: Checkpoint) -> None:
        if not self.session.config.fwdllm.accept_changed_inputs:
            require_same_inputs(checkpoint, self.session.inputs, self.folder.path)
        self.next_round = checkpoint.next_round
        self.server.load_state(checkpoint.tensors, checkpoint.numbers)
        self.accounting.restore(checkpoint.counters)
        if self._worker is not None:
            self._worker.load_state(_unprefixed(checkpoint.tensors, _WORKER))

    def __enter__(self) -> RunDriver:
        self._reporter.__enter__()
        self.session.announce(self.say)
        if not self.next_round and (remark := remark_on_slopes(self.session)):
            self.say(remark)
        if self.total_rounds != self._rounds_before:
            self.say(describe_extension(self.session.config, self._rounds_before, self.next_round))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._opened:
            if kind is not None and issubclass(kind, TrainingStalledError):
                with suppress(FwdLLMError):  # the error that stopped the run is the one to be seen
                    self.keeper.stop_for_ruin()
            self._opened.pop_all().__exit__(kind, error, trace)

    @property
    def total_rounds(self) -> int:
        return self.session.config.federate.total_round_num

    @property
    def finished(self) -> bool:
        return self.next_round >= self.total_rounds or self.keeper.says_stop

    def expected_bytes(self, client: int) -> int:
        """Longest frame that is taken from ``client`` now; 0 while nothing is expected from it."""
        return self.server.answer_limit_bytes(client) if client in self.missing else 0

    @property
    def answered(self) -> int:
        """Clients of the open round whose answer could be read."""
        return len(self._answers)

    @property
    def answers_needed(self) -> int:
        """Answers without which a round that is out of time stops the run (``fwdllm.min_answers``); none where the
        method gives the work to other clients, and stops by itself when that fails again and again."""
        return 0 if self.server.reassigns else self.session.config.fwdllm.min_answers

    @property
    def evaluation_is_due(self) -> bool:
        """Whether the round that was just closed is to be followed by an evaluation."""
        return self.session.evaluates_after(self.next_round)

    def record_start(self, evaluation: dict[str, float] | None) -> None:
        """Write the line of round 0: the model before training."""
        self.keeper.note_start(evaluation)
        facts = model_facts(self.session.parts, self.session.data)
        line = {"round": 0, "digest": self.server.digest.hex(), "model": facts, "eval": evaluation}
        self._reporter.round({**line, **self.accounting.columns()})

    def open_round(self) -> dict[int, bytes]:
        """Draw the clients of the next round; the frame each is to be sent."""
        available = sorted(self.session.client_samples)
        clients = choose_clients(self.server, self.session.config, self.next_round, available)
        frames = {client: encode(given) for client, given in self.server.assign(self.next_round, clients).items()}
        for client, frame in frames.items():
            self.accounting.ledger.download(client, frame)
        self.missing, self._answers, self._unreadable = set(frames), [], {}
        self._asked = len(frames)
        self._reporter.answered(0, self._asked)
        return frames

    def reopen_for(self, client: int) -> bytes:
        """The open round's frame anew, for a client that came back and has not answered."""
        frame = encode(self.server.reassign(client))
        self.accounting.ledger.download(client, frame)
        return frame

    def current_state_for(self, client: int) -> bytes:
        """A frame without work, that brings ``client`` to the server's present parameters (for an evaluation)."""
        frame = encode(self.server.current_state_for(client))
        self.accounting.ledger.download(client, frame)
        return frame

    def whole_state_for(self, client: int) -> bytes:
        """A frame without work that carries all parameters, for a process that was started anew by a resumed run.

        It is not counted: the files of a resumed run read as if the run had never stopped.
        """
        state = replace(self.server.current_state_for(client), catch_up=(self.server.dense_frame(),))
        return encode(state)

    def receive(self, client: int, frame: bytes) -> None:
        """Take what arrived from ``client``. What cannot be read, is longer than any answer to what it was asked, or
        speaks for another client, is left out and named in the round's report."""
        self.accounting.ledger.upload(client, frame)
        self.missing.discard(client)
        self._reporter.answered(self._asked - len(self.missing), self._asked)
        try:
            update = decode(frame, ClientUpdate, limit_bytes=self.server.answer_limit_bytes(client))
            if update.client != client:
                raise WireError(f"client {client} sent an update in the name of client {update.client}")
        except WireError as error:
            self.refuse(client, error)
        else:
            self._answers.append(update)

    def refuse(self, client: int, error: WireError) -> None:
        """Leave out what came instead of ``client``'s frame: the transport handed over something that is not one."""
        self.missing.discard(client)
        self._unreadable[client] = "unreadable"
        self.say(f"warning: round {self.next_round + 1}: client {client}: {error}")

    def close_round(self) -> RoundReport:
        """Step with the answers that came; clients that are still missing are reported as such.

        Raises:
            TrainingStalledError: as :meth:`fs_fwdllm.method.RoundServer.absorb`.
        """
        report = self.server.absorb(self._answers)
        report.rejected.update(self._unreadable)
        self._watch.round(report)
        self.session.diagnose(self.server, report)
        self._report = report
        self.missing = set()
        return report

    def record(self, evaluation: dict[str, float] | None = None) -> None:
        """Write the closed round's line, its traffic and, when due, a checkpoint; then the next round may be opened."""
        assert self._report is not None, "close_round comes first"
        traffic = self.accounting.close_round(self._report)
        line = {**_line(self._report), **self.accounting.columns()}
        if evaluation is not None:
            line["eval"] = evaluation
        self._reporter.round(line, traffic)
        self._watch_evaluation(evaluation)
        # After its line: a run killed in between repeats the round, and the line is written anew.
        self.keeper.note_round(self._report, evaluation)
        due = self.session.checkpoints_after(self.next_round)
        self.next_round += 1
        if due or self.finished:
            self._write_checkpoint()

    def _watch_evaluation(self, evaluation: dict[str, float] | None) -> None:
        loss, start = _loss_of(evaluation), self.keeper.losses.start
        if loss is not None and start is not None:
            self._watch.evaluation(self.next_round + 1, loss, start)

    def finish(self) -> Path:
        """Save what was trained, the best round and the last, and close the report. Returns the folder for use."""
        line = {"round": self.next_round, "digest": self.server.digest.hex(), **self.accounting.columns()}
        last = Kept(self.next_round, self.server.digest.hex(), self.keeper.last_evaluation, self.server.trainables)
        kept = self.keeper.finish(last, lambda item: self._results(line, item))
        if self.session.config.fwdllm.check_saved:
            used = kept[0]  # the other is written by the same hands, and loading takes time
            check_saved(self.session, used.path, used.trainables, self.say)
        line |= self.keeper.columns(kept)
        if self.next_round < self.total_rounds:
            line["stopped_early"] = True
            self.say(f"stopped early after round {self.next_round}: {self.keeper.why_it_stops()}")
        self._reporter.finish(line)
        self.say(self.keeper.describe(kept))
        return kept[0].path

    def _results(self, line: dict[str, object], kept: Kept) -> dict[str, Any]:
        """What the model card says of the run."""
        config, held = self.session.config, self.session.client_samples
        data = f"{config.data.type}, {sum(held.values()):,} training samples on {len(held)} clients"
        known = {**line, "round": kept.round, "digest": kept.digest}
        return {"method": method_name(config), "data": data, **results_of(known, kept.evaluation)}

    @torch.no_grad()
    def _write_checkpoint(self) -> None:
        kept = {} if self._worker is None else self._worker.state_tensors()
        checkpoint = Checkpoint(
            next_round=self.next_round,
            tensors=self.server.state_tensors() | {f"{_WORKER}{name}": tensor for name, tensor in kept.items()},
            numbers=self.server.state_numbers(),
            counters=self.accounting.counters(),
            fingerprint=self._fingerprint,
            inputs=self.session.inputs,
            evaluations=self.keeper.evaluations,
            total_rounds=self.total_rounds,
        )
        self.keeper.write_checkpoint(checkpoint)


def _loss_of(evaluation: Mapping[str, Any] | None) -> float | None:
    """The loss of an evaluation; infinite where it is NaN, ``None`` where nothing was evaluated."""
    loss = None if evaluation is None else evaluation.get("loss")
    return math.inf if loss is not None and math.isnan(loss) else loss


def _line(report: RoundReport) -> dict[str, object]:
    return {
        "round": report.round_index + 1,
        "digest": report.digest.hex(),
        "train_loss": report.train_loss,
        "learning_rate": {str(client): rate for client, rate in report.learning_rates.items()},
        "loss": {str(client): loss for client, loss in report.losses.items()},
        "rejected": {str(client): reason for client, reason in report.rejected.items()},
        "clipped": {str(client): factor for client, factor in report.clipped.items()},
        "capped": {str(client): samples for client, samples in report.capped.items()},
        **({"outvoted": report.outvoted} if report.outvoted else {}),
        **report.columns,
    }


def _unprefixed(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
