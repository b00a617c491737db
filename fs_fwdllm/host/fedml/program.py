"""From FedML's arguments to the objects a FedML program passes to ``FedMLRunner``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fedml
import torch
from torch import nn

from fs_fwdllm.errors import HostError
from fs_fwdllm.host.fedml.aggregator import FwdLLMAggregator, RunStart
from fs_fwdllm.host.fedml.dataset import make_dataset
from fs_fwdllm.host.fedml.identity import end_process
from fs_fwdllm.host.fedml.patches import enable
from fs_fwdllm.host.fedml.settings import FedMLSettings, resolve_settings
from fs_fwdllm.host.fedml.simulators import fit_to_silos
from fs_fwdllm.host.fedml.trainer import FwdLLMTrainer
from fs_fwdllm.host.fedml.watchdog import Watchdog
from fs_fwdllm.host.placement import Placement
from fs_fwdllm.report import RunFolder
from fs_fwdllm.running.driver import read_own_checkpoint
from fs_fwdllm.running.sampling import clients_per_round
from fs_fwdllm.running.session import Session

__all__ = ["Program", "build", "init"]

#: How long FedML may take to close its transport once the last payload has been delivered.
_ENDING_S = 60.0
#: A client also waits while the server waits for the slowest of the others, and evaluates.
_CLIENTS_PATIENCE = 3.0


@dataclass
class Program:
    """What ``FedMLRunner(args, device, dataset, model, client_trainer, server_aggregator)`` is given.

    A process that is only a client has no ``server_aggregator``, and the server of several processes no
    ``client_trainer``.
    """

    args: Any
    device: torch.device
    dataset: list[Any]
    model: nn.Module
    client_trainer: FwdLLMTrainer | None
    server_aggregator: FwdLLMAggregator | None
    watchdog: Watchdog

    def run(self) -> None:
        """Run FedML with all of it; returns when this process has done its part.

        Raises:
            HostError: the server gave it none.
            FwdLLMError: whatever stops a run.
        """
        self.watchdog.ending_s = math.inf if self.args.backend == "sp" else _ENDING_S
        fedml.FedMLRunner(
            self.args, self.device, self.dataset, self.model, self.client_trainer, self.server_aggregator
        ).run()
        self.watchdog.disarm()
        if self.client_trainer is not None and self.client_trainer.refusal:
            raise HostError(self.client_trainer.refusal)


def init(args: Any = None) -> Any:
    """``fedml.init`` offline: no request to the internet, standard output and logging left alone.

    Args:
        args: FedML's arguments; ``None`` reads the command line and the file it names, as FedML does.
    """
    enable()
    return fedml.init(args, check_env=False, should_init_logs=False)


def build(
    args: Any,
    folder: RunFolder | None = None,
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
    on_expiry: Callable[[str], None] = end_process,
) -> Program:
    """Everything a process needs for its part, which ``args.rank`` says, or MPI.

    Args:
        args: FedML's arguments, after :func:`init`; their counts of clients are set to what FedML's managers need.
        folder: the run folder; the server makes a new one unless told.
        overrides: ``key value`` pairs that go before ``args`` and the files they name.
        resume: continue from the checkpoint in ``folder``.
        on_expiry: what to do when other processes do not answer in time; ends this one unless told.

    Raises:
        FwdLLMError: see the subtypes.
    """
    enable()
    path = Path(getattr(args, "yaml_config_file", "") or "fedml_config.yaml")
    settings = resolve_settings(vars(args), path.parent, overrides)
    if not settings.config.expname:
        settings.config.expname = path.stem
    session = Session.open(settings.config)
    alone = settings.is_single_process
    asked = clients_per_round(settings.config, len(session.client_samples))
    silos = _silos(args, settings, session)
    _complete(args, settings)
    if alone:
        args.client_num_in_total, args.client_num_per_round = silos, asked
    else:
        fit_to_silos(args, silos)
    placement, watchdog = Placement(silos), Watchdog(on_expiry)
    patience_s = math.inf if alone else settings.deadline_s
    trainer = aggregator = None
    if alone or args.rank != 0:
        trainer = FwdLLMTrainer(session, args, watchdog, _CLIENTS_PATIENCE * patience_s, alone=alone)
    if alone or args.rank == 0:
        start = _start(settings, folder, resume=resume)
        aggregator = FwdLLMAggregator(session, args, placement, start, watchdog, patience_s)
    dataset = make_dataset(session, placement)
    return Program(args, session.device, dataset, session.loaded.model, trainer, aggregator, watchdog)


def _silos(args: Any, settings: FedMLSettings, session: Session) -> int:
    if settings.is_single_process:
        return max(session.data.clients)
    if settings.args["backend"] == "MPI":
        return int(args.comm.Get_size()) - 1
    return settings.worker_num


def _complete(args: Any, settings: FedMLSettings) -> None:
    """Give FedML's loops what the file left out, and the number of rounds that was resolved."""
    for key, value in settings.args.items():
        if not hasattr(args, key):
            setattr(args, key, value)
    args.comm_round = settings.config.federate.total_round_num
    args.frequency_of_the_test = 1  # counted by us


def _start(settings: FedMLSettings, folder: RunFolder | None, *, resume: bool) -> RunStart:
    if folder is None:
        folder = RunFolder.create(settings.config)
    return RunStart(folder, read_own_checkpoint(folder) if resume else None)
