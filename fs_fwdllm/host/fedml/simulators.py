"""FedML's simulators with our trainer and aggregator in them, which the stock ones ignore.

``sp`` is FedML's own loop, :meth:`FedAvgAPI.train`, with our objects put where it has built-in ones. For ``MPI`` the
managers of FedML's cross-silo mode are used over the same transport: unlike those of its MPI simulator they call the
aggregator and every hook, and end after any number of rounds (the simulator's clients wait for ever with
``comm_round: 1``).
"""

from __future__ import annotations

import json
from typing import Any

from fedml.cross_silo import Client, Server
from fedml.simulation.sp.fedavg import FedAvgAPI

from fs_fwdllm.host.fedml.aggregator import FwdLLMAggregator, Payloads
from fs_fwdllm.host.fedml.trainer import FwdLLMTrainer

__all__ = ["MPISimulator", "SingleProcessSimulator", "fit_to_silos"]


class SingleProcessSimulator(FedAvgAPI):
    """All clients in turn in this process."""

    def __init__(
        self,
        args: Any,
        device: Any,
        dataset: Any,
        model: Any,
        client_trainer: FwdLLMTrainer,
        server_aggregator: FwdLLMAggregator,
    ) -> None:
        super().__init__(args, device, dataset, model)
        self._aggregator = server_aggregator
        # FedAvgAPI asks it for what is to be sent first, and hands it what it has got from _aggregate.
        self.model_trainer = server_aggregator
        for client in self.client_list:
            client.model_trainer = client_trainer
        self._silos: list[int] = []

    def run(self) -> None:
        """Every round. An error of any kind closes the run's files before it leaves."""
        try:
            self.train()
        except BaseException as error:
            self._aggregator.close(error)
            raise

    def _client_sampling(self, round_idx: int, client_num_in_total: int, client_num_per_round: int) -> list[int]:
        self.args.round_idx = round_idx
        self._silos = self._aggregator.silos_asked
        return self._silos

    def _aggregate(self, w_locals: list[tuple[float, Any]]) -> Payloads:
        return self._aggregator.close_round(
            {silo: payload for silo, (_, payload) in zip(self._silos, w_locals, strict=False)}
        )

    def _local_test_on_all_clients(self, round_idx: int) -> None:
        """Evaluations follow ``frequency_of_the_test`` in the aggregator."""


class MPISimulator:
    """One process a silo, and one for the server, under ``mpiexec``."""

    def __init__(
        self,
        args: Any,
        device: Any,
        dataset: Any,
        model: Any,
        client_trainer: FwdLLMTrainer | None,
        server_aggregator: FwdLLMAggregator | None,
    ) -> None:
        # FedML counts the server among the workers here, and in the cross-silo mode it does not.
        fit_to_silos(args, args.comm.Get_size() - 1)
        args.scenario, args.n_proc_in_silo, args.proc_rank_in_silo = "horizontal", 1, 0
        if args.rank == 0:
            self.runner: Any = Server(args, device, dataset, model, server_aggregator)
        else:
            self.runner = Client(args, device, dataset, model, client_trainer)

    def run(self) -> None:
        """The work is done when this object has been made, as in FedML's cross-silo mode."""


def fit_to_silos(args: Any, silos: int) -> None:
    """Tell FedML's managers that every one of ``silos`` takes part in every round, so that they draw none."""
    args.worker_num = args.client_num_in_total = args.client_num_per_round = silos
    args.client_id_list = json.dumps(list(range(1, silos + 1)) if args.rank == 0 else [args.rank])
