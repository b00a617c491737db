"""The embedded host: a whole federated run in one process, on one page.

Assign, send, work, send, absorb, evaluate, record. Everything a client and the server say to each other passes through
real frames, which are counted; the worker follows the server only by what those frames carry, so every round proves
again that the parameters can be rebuilt from seeds and scalars.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fs_fwdllm.config import Config
from fs_fwdllm.errors import CheckpointError, WireError
from fs_fwdllm.host.accounting import Accounting
from fs_fwdllm.host.checkpoint import Checkpoint, config_fingerprint, read_checkpoint, write_checkpoint
from fs_fwdllm.host.sampling import clients_per_round, sample_clients
from fs_fwdllm.host.session import Session
from fs_fwdllm.method import RoundReport, assemble_server, assemble_worker
from fs_fwdllm.report import RunFolder, RunReporter
from fs_fwdllm.wire import Assignment, ClientUpdate, decode, encode

if TYPE_CHECKING:
    from fs_fwdllm.method import ClientWorker, RoundServer

__all__ = ["resume", "run"]


def run(config: Config) -> Path:
    """Train as ``config`` says and return the run folder.

    Raises:
        FwdLLMError: see the subtypes; the last checkpoint stays valid whatever happens.
    """
    session = Session.open(config)
    clients_per_round(config, len(session.client_samples))  # refused before there is a folder
    return _train(session, RunFolder.create(config), None)


def resume(path: str | Path) -> Path:
    """Continue an interrupted run from its last checkpoint; the result is the uninterrupted run's, bit for bit.

    Raises:
        CheckpointError: no run or no checkpoint there, or its configuration was changed.
    """
    folder = RunFolder.open(path)
    config = folder.config()
    checkpoint = read_checkpoint(folder.checkpoint_path)
    if checkpoint.fingerprint != config_fingerprint(config):
        raise CheckpointError(f"{folder.config_path}: was changed after the checkpoint was written; start a new run")
    return _train(Session.open(config), folder, checkpoint)


def _train(session: Session, folder: RunFolder, checkpoint: Checkpoint | None) -> Path:
    config, data = session.config, session.data
    worker = assemble_worker(session.parts)
    server = assemble_server(session.parts, session.client_samples)
    accounting = Accounting(session.device)
    start = 0
    if checkpoint is not None:
        start = checkpoint.next_round
        server.load_state(checkpoint.tensors, checkpoint.numbers)
        worker.load_state({name[7:]: value for name, value in checkpoint.tensors.items() if name[:7] == "worker."})
        accounting.restore(checkpoint.counters)
        worker.replica.follow([server.dense_frame()], server.digest)

    total = config.federate.total_round_num
    per_round = clients_per_round(config, len(session.client_samples))
    with RunReporter(folder, config, total_rounds=total, start_round=start + 1 if start else 0) as reporter:
        session.announce(reporter.say)
        if start == 0:
            initial = {"round": 0, "digest": server.digest.hex(), "eval": session.evaluate(server.trainables)}
            reporter.round({**initial, **accounting.columns()})
        for round_index in range(start, total):
            available = sorted(session.client_samples)
            wanted = server.wanted_clients(round_index, available)
            clients = sample_clients(config.seed, round_index, available, per_round) if wanted is None else wanted
            updates = []
            for client, assignment in server.assign(round_index, clients).items():
                download = encode(assignment)
                accounting.ledger.download(client, download)
                upload = _work(worker, download, data.clients[client].train)
                accounting.ledger.upload(client, upload)
                updates.append(_receive(upload))
            report = server.absorb(updates)
            session.watch(report, reporter.say)
            traffic = accounting.close_round(report)
            line = {**_line(report), **accounting.columns()}
            if session.evaluates_after(round_index):
                line["eval"] = session.evaluate(server.trainables)
            reporter.round(line, traffic)
            # After its line: a run killed in between repeats the round, and the line is written anew.
            if session.checkpoints_after(round_index):
                _write(folder, config, server, worker, accounting, round_index + 1)
        trained = session.save(folder.path, server.trainables)
        reporter.finish({"round": total, "digest": server.digest.hex(), "saved": trained.name, **accounting.columns()})
    return folder.path


def _work(worker: ClientWorker, download: bytes, examples: list) -> bytes:
    """The client's side of the wire."""
    assignment = decode(download)
    if not isinstance(assignment, Assignment):
        raise WireError(f"a client was sent a {type(assignment).__name__} instead of an assignment")
    return encode(worker.work(assignment, examples))


def _receive(upload: bytes) -> ClientUpdate:
    """The server's side of the wire."""
    update = decode(upload)
    if not isinstance(update, ClientUpdate):
        raise WireError(f"the server was sent a {type(update).__name__} instead of an update")
    return update


def _line(report: RoundReport) -> dict[str, object]:
    return {
        "round": report.round_index + 1,
        "digest": report.digest.hex(),
        "train_loss": report.train_loss,
        "learning_rate": {str(client): rate for client, rate in report.learning_rates.items()},
        "loss": {str(client): loss for client, loss in report.losses.items()},
        "rejected": {str(client): reason for client, reason in report.rejected.items()},
        **report.details,
    }


@torch.no_grad()
def _write(
    folder: RunFolder,
    config: Config,
    server: RoundServer,
    worker: ClientWorker,
    accounting: Accounting,
    next_round: int,
) -> None:
    kept = {f"worker.{name}": tensor for name, tensor in worker.state_tensors().items()}
    checkpoint = Checkpoint(
        next_round=next_round,
        tensors=server.state_tensors() | kept,
        numbers=server.state_numbers(),
        counters=accounting.counters(),
        fingerprint=config_fingerprint(config),
    )
    write_checkpoint(folder.checkpoint_path, checkpoint)
