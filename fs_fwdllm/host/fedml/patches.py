"""What is changed inside a running FedML, all of it here, once a process: :func:`enable`.

* ``fedml.init`` asks a server on the internet for a configuration, whatever the file says; it does no longer.
* The single-process and MPI simulators ignore custom trainers or aggregators; given ours, they use them
  (:mod:`~fs_fwdllm.host.fedml.simulators`). Anybody else's arguments go where they always went.
* A client process says as it joins which base it has and how it is configured, and the server hears it.
* The server is told which silo's payload has come, so that a deadline can name who is missing, and does not look for
  tensors in what is not a state dictionary.
* The gRPC receiver asks its queue millions of times a second whether it is empty; ours lets it sleep in between.
"""

from __future__ import annotations

import importlib
import queue
import time
from typing import Any

from fs_fwdllm.host.fedml.aggregator import FwdLLMAggregator
from fs_fwdllm.host.fedml.simulators import MPISimulator, SingleProcessSimulator
from fs_fwdllm.host.fedml.trainer import FwdLLMTrainer

__all__ = ["enable"]

_POLL_S = 0.002
_MARK = "_fs_fwdllm_enabled"
#: Under which names FedML's message of a client that is there has our digest and our settings' hashes.
_BASE, _SETTINGS = "fs_fwdllm_base", "fs_fwdllm_settings"


class PatientQueue(queue.Queue[Any]):
    """A queue whose answer "empty" takes a moment, for a reader that never sleeps."""

    def qsize(self) -> int:
        size = super().qsize()
        if not size:
            time.sleep(_POLL_S)
        return size


def enable() -> None:
    """Make this process's FedML use our trainer and aggregator everywhere, offline. Calling it again does nothing."""
    mlops = importlib.import_module("fedml.core.mlops")
    if getattr(mlops, _MARK, False):
        return
    _stay_offline(mlops)
    _use_our_simulators()
    _say_and_hear_what_must_agree()
    _hear_arrivals()
    _let_grpc_sleep()
    setattr(mlops, _MARK, True)


def _stay_offline(mlops: Any) -> None:
    fetch = mlops.fetch_config

    def fetch_config(args: Any, *rest: Any, **named: Any) -> Any:
        return fetch(args, *rest, **named) if getattr(args, "using_mlops", False) else None

    mlops.fetch_config = fetch_config


def _use_our_simulators() -> None:
    simulator = importlib.import_module("fedml.simulation.simulator")
    for name, ours in (("SimulatorSingleProcess", SingleProcessSimulator), ("SimulatorMPI", MPISimulator)):
        setattr(simulator, name, _choosing(getattr(simulator, name), ours))


def _choosing(stock: Any, ours: Any) -> Any:
    def make(
        args: Any, device: Any, dataset: Any, model: Any, client_trainer: Any = None, server_aggregator: Any = None
    ) -> Any:
        is_ours = isinstance(client_trainer, FwdLLMTrainer) or isinstance(server_aggregator, FwdLLMAggregator)
        return (ours if is_ours else stock)(args, device, dataset, model, client_trainer, server_aggregator)

    return make


def _say_and_hear_what_must_agree() -> None:
    status = importlib.import_module("fedml.cross_silo.client.message_define").MyMessage.MSG_TYPE_C2S_CLIENT_STATUS
    clients: Any = importlib.import_module("fedml.cross_silo.client.client_initializer")
    servers: Any = importlib.import_module("fedml.cross_silo.server.server_initializer")
    stock_client, stock_server = clients.ClientMasterManager, servers.FedMLServerManager

    class SayingManager(stock_client):  # type: ignore[misc, valid-type]
        """FedML's manager of a client process, which also says our trainer's base and settings."""

        def send_message(self, message: Any) -> None:
            trainer = self.trainer_dist_adapter.trainer.trainer
            if message.get_type() == status and isinstance(trainer, FwdLLMTrainer):
                message.add_params(_BASE, trainer.base)
                message.add_params(_SETTINGS, trainer.settings)
            super().send_message(message)

    class HearingManager(stock_server):  # type: ignore[misc, valid-type]
        """FedML's manager of the server, which also hears our clients' bases and settings."""

        def handle_message_client_status_update(self, msg_params: Any) -> None:
            ours = self.aggregator.aggregator
            if not isinstance(ours, FwdLLMAggregator):
                super().handle_message_client_status_update(msg_params)
                return
            silo = self.client_real_ids.index(msg_params.get_sender_id())
            ours.admission.note(silo, msg_params.get(_BASE), msg_params.get(_SETTINGS))
            super().handle_message_client_status_update(msg_params)
            ours.require_start()

    clients.ClientMasterManager, servers.FedMLServerManager = SayingManager, HearingManager


def _hear_arrivals() -> None:
    initializer: Any = importlib.import_module("fedml.cross_silo.server.server_initializer")
    stock = initializer.FedMLAggregator

    class HearingAggregator(stock):  # type: ignore[misc, valid-type]
        """FedML's collector of payloads, which also tells our aggregator what it collects."""

        def add_local_trained_result(self, index: int, model_params: Any, sample_num: float) -> None:
            if not isinstance(self.aggregator, FwdLLMAggregator):
                super().add_local_trained_result(index, model_params, sample_num)
                return
            self.aggregator.note_arrival(index)
            # Our aggregator judges the payload: what is no dictionary must not be searched for tensors here.
            super().add_local_trained_result(index, {}, sample_num)
            self.model_dict[index] = model_params

    initializer.FedMLAggregator = HearingAggregator


def _let_grpc_sleep() -> None:
    server: Any = importlib.import_module("fedml.core.distributed.communication.grpc.grpc_server")
    manager: Any = importlib.import_module("fedml.core.distributed.communication.grpc.grpc_comm_manager")

    class PatientServicer(server.GRPCCOMMServicer):
        """FedML's gRPC receiver with a patient queue."""

        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            self.message_q = PatientQueue()

    manager.GRPCCOMMServicer = PatientServicer
