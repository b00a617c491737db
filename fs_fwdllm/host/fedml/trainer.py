"""FedML's client: takes a payload, lets the worker answer every frame in it, hands back a payload. No mathematics."""

from __future__ import annotations

from typing import Any

from fedml.core import ClientTrainer

from fs_fwdllm.errors import HostError, WireError
from fs_fwdllm.host.fedml.identity import say
from fs_fwdllm.host.fedml.payload import Orders, pack_answers, unpack_orders
from fs_fwdllm.host.fedml.watchdog import Watchdog
from fs_fwdllm.method import assemble_worker
from fs_fwdllm.running.agreement import settings_of_work, settings_text
from fs_fwdllm.running.driver import answer, follow
from fs_fwdllm.running.session import Session

__all__ = ["FwdLLMTrainer"]


class FwdLLMTrainer(ClientTrainer):
    """What FedML calls a trainer: one silo's half of a round, for however many clients live there.

    Args:
        session: configuration, model and data of this process.
        args: FedML's arguments.
        watchdog: armed while the silo waits for the server.
        patience_s: how long that may take.
        alone: there is no other process, so that nothing has to agree.

    Attributes:
        base, settings: digest of this process's base and hashes of its settings, which the server compares with its
            own; empty if there is no other process.
        refusal: why the server gives this process no work; empty if it does.
    """

    def __init__(self, session: Session, args: Any, watchdog: Watchdog, patience_s: float, *, alone: bool) -> None:
        super().__init__(session.loaded.model, args)
        # Read now: FedML swallows errors while it connects.
        self.base = b"" if alone else session.base_digest
        self.settings = "" if alone else settings_text(settings_of_work(session))
        self.refusal = ""
        self._worker = assemble_worker(session.parts)
        self._watchdog = watchdog
        self._patience_s = patience_s
        self._orders = Orders()
        self._answers: dict[int, bytes] = {}

    def set_id(self, trainer_id: int) -> None:
        """FedML calls this with the silo's number, counted from 0, before it waits for the server."""
        super().set_id(trainer_id)
        self._wait()

    def set_model_params(self, model_parameters: Any) -> None:
        """Take a payload: this silo's own, or (in one process) a plain dictionary of all silos'.

        Raises:
            WireError: it is not a payload of ours.
            HostError: it says that the run is over before it began.
        """
        self._watchdog.disarm()
        if type(model_parameters) is dict:
            if self.id not in model_parameters:
                raise WireError(f"the server's payload holds nothing for silo {self.id}")
            model_parameters = model_parameters[self.id]
        self._orders = unpack_orders(model_parameters)
        if self._orders.is_last:
            self._watchdog.wind_down()
        if self._orders.refusal and not self.refusal:
            self._be_refused(self._orders.refusal)

    def _be_refused(self, why: str) -> None:
        """Stay for FedML, whose server waits for every process in every round, so that the others can go on."""
        self.refusal = why
        if self._orders.is_last:
            raise HostError(why)
        say(f"{why}; until the run is over this process stays without work")

    def train(self, train_data: Any, device: Any = None, args: Any = None) -> None:
        """Answer every assignment on the data of its client.

        Raises:
            FwdLLMError: as :meth:`fs_fwdllm.method.ClientWorker.work` has them.
        """
        if self._orders.state:
            follow(self._worker, self._orders.state)
        self._answers = {
            client: answer(self._worker, frame, train_data.of(client)) for client, frame in self._orders.frames.items()
        }

    def get_model_params(self) -> dict[str, object]:
        """The payload of the silo's answers."""
        self._wait()
        return pack_answers(self._answers)

    def test(self, test_data: Any, device: Any = None, args: Any = None) -> None:
        """Evaluation is the server's."""

    def _wait(self) -> None:
        """From here on the server has the next word."""
        self._watchdog.arm(self._patience_s, lambda: f"heard nothing from the server for {self._patience_s:g} s")
