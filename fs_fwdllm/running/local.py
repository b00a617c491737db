"""The embedded host: a whole federated run in one process, on one page.

Assign, send, work, send, absorb, evaluate, record. Everything a client and the server say to each other passes through
real frames, which are counted; the worker follows the server only by what those frames carry, so every round proves
again that the parameters can be rebuilt from seeds and scalars.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fs_fwdllm.config import Config, load_config
from fs_fwdllm.method import assemble_worker
from fs_fwdllm.report import RunFolder
from fs_fwdllm.report.terminal import loading
from fs_fwdllm.running.driver import RunDriver, answers, read_own_checkpoint
from fs_fwdllm.running.extension import give_rounds
from fs_fwdllm.running.preflight import check_beforehand
from fs_fwdllm.running.sampling import clients_per_round
from fs_fwdllm.running.session import Session

if TYPE_CHECKING:
    from fs_fwdllm.running.checkpoint import Checkpoint

__all__ = ["resume", "run", "run_file"]


def run(config: Config) -> Path:
    """Train as ``config`` says and return the run folder.

    Raises:
        FwdLLMError: see the subtypes; the last checkpoint stays valid whatever happens.
    """
    check_beforehand(config)
    RunFolder.require_place(config)
    with loading(config):
        session = Session.open(config)
    clients_per_round(config, len(session.client_samples))  # refused before there is a folder
    return _train(session, RunFolder.create(config), None)


def run_file(cfg: Path, overrides: list[str]) -> Path:
    """Train as the file ``cfg`` with ``key value`` overrides says. Raises as :func:`run`."""
    return run(load_config(cfg, overrides))


def resume(path: str | Path, rounds: int | None = None) -> Path:
    """Continue an interrupted run from its last checkpoint; the result is the uninterrupted run's, bit for bit.

    Args:
        rounds: how many rounds it is to have in all, instead of what its configuration says. A finished run goes on.

    Raises:
        CheckpointError: no run or no checkpoint there, its configuration was changed, or another process works in it.
        ConfigError: it has done as many ``rounds`` already.
    """
    folder = RunFolder.open(path)
    with folder.locked():
        checkpoint = read_own_checkpoint(folder)
        if rounds is not None:
            give_rounds(folder, checkpoint, rounds)
        config = folder.config()
        with loading(config):
            session = Session.open(config)
        return _train(session, folder, checkpoint)


def _train(session: Session, folder: RunFolder, checkpoint: Checkpoint | None) -> Path:
    worker = assemble_worker(session.parts)
    examples = {client: held.train for client, held in session.data.clients.items()}
    with RunDriver(session, folder, checkpoint, worker=worker) as driver:
        server = driver.server
        if checkpoint is None:
            driver.record_start(session.evaluate_first(server.trainables, driver.say))
        else:
            worker.replica.follow([server.dense_frame()], server.digest)
        while not driver.finished:
            for client, frame in answers(worker, driver.open_round(), examples):
                driver.receive(client, frame)
            driver.close_round()
            driver.record(session.evaluate(server.trainables) if driver.evaluation_is_due else None)
        driver.finish()
    return folder.path
