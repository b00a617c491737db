"""FedML's server: hands out the driver's frames silo by silo and gives back what the silos answer. No mathematics."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedml.core import ServerAggregator

from fs_fwdllm.errors import FwdLLMError, HostError, WireError
from fs_fwdllm.host.fedml.admission import Admission
from fs_fwdllm.host.fedml.payload import Orders, pack_orders, unpack_answers
from fs_fwdllm.host.fedml.watchdog import Watchdog
from fs_fwdllm.host.placement import Placement
from fs_fwdllm.report import RunFolder
from fs_fwdllm.running.checkpoint import Checkpoint
from fs_fwdllm.running.driver import RunDriver
from fs_fwdllm.running.session import Session

__all__ = ["FwdLLMAggregator", "RunStart"]

Payloads = dict[int, "OrderedDict[str, object]"]


@dataclass(frozen=True)
class RunStart:
    """Where a server begins: its run folder, and the checkpoint it continues from, if any."""

    folder: RunFolder
    checkpoint: Checkpoint | None = None


class FwdLLMAggregator(ServerAggregator):
    """What FedML calls an aggregator: the server's half of a round.

    FedML counts ``comm_round`` rounds whatever happens. A run that has fewer left (it was resumed) ends when it is
    done; FedML's remaining rounds then carry empty payloads.

    Args:
        session: configuration, model and data of this process.
        args: FedML's arguments.
        placement: which client lives in which silo.
        start: the run folder and checkpoint.
        watchdog: armed while the server waits for the silos.
        patience_s: how long that may take in a round.

    Attributes:
        admission: told by FedML's manager who has joined.
        trained_path: where what was trained is, once the run is over.
    """

    def __init__(
        self, session: Session, args: Any, placement: Placement, start: RunStart, watchdog: Watchdog, patience_s: float
    ) -> None:
        super().__init__(session.loaded.model, args)
        self._session = session
        self._placement = placement
        self.admission = Admission(session, placement)
        self._stopped_by: FwdLLMError | None = None
        self._start = start
        self._watchdog = watchdog
        self._patience_s = patience_s
        self._driver: RunDriver | None = None
        self._asked: dict[int, dict[int, bytes]] = {}
        self._unheard: set[int] = set()
        self._payloads: Payloads = {}
        self._rounds_done = 0
        self._evaluation: dict[str, float] | None = None
        self.trained_path: Path | None = None

    @property
    def folder(self) -> RunFolder:
        return self._start.folder

    @property
    def silos_asked(self) -> list[int]:
        """The silos that have work in the open round, in order; all of them when there is none left to do."""
        return [silo for silo, frames in self._asked.items() if frames] or list(range(self._placement.processes))

    def set_id(self, aggregator_id: int) -> None:
        """FedML calls this last, before it waits for the client processes."""
        super().set_id(aggregator_id)
        self._unheard = set(range(self._placement.processes))
        self._wait()

    def note_arrival(self, silo: int) -> None:
        """FedML has received a silo's payload (it hands them over when all are there)."""
        self._unheard.discard(silo)

    def get_model_params(self) -> Payloads:
        """The payloads of the first round, by silo. FedML asks several times; the run starts at the first.

        Where other processes wait for it, an error of ours is told them first: see :meth:`require_start`.
        """
        if not self._payloads:
            try:
                with self._closing_on_error():
                    self.admission.close()
                    self._open()
                    self._prepare_payloads()
            except FwdLLMError as error:
                if not self.admission.has_others:
                    raise
                self._stopped_by = type(error)("; ".join([str(error), *self.admission.remarks()]))
                self._payloads = self._dismiss_all(self._stopped_by)
        return dict(self._payloads)

    def require_start(self) -> None:
        """To be called when the first payloads have been sent.

        Raises:
            FwdLLMError: the run cannot begin, and every process has been told so.
        """
        if self._stopped_by is not None:
            raise self._stopped_by

    def _dismiss_all(self, error: FwdLLMError) -> Payloads:
        stopped = f"the server has stopped: {type(error).__name__}: {error}"
        return {
            silo: pack_orders(Orders(is_last=True, refusal=self.admission.refusals.get(silo, stopped)))
            for silo in range(self._placement.processes)
        }

    def set_model_params(self, model_parameters: Any) -> None:
        """The driver holds the parameters."""

    def on_before_aggregation(self, raw_client_model_or_grad_list: list[Any]) -> tuple[list[Any], list[int]]:
        """Nobody is left out here: the method's server judges every answer."""
        return raw_client_model_or_grad_list, list(range(len(raw_client_model_or_grad_list)))

    def aggregate(self, raw_client_model_or_grad_list: Sequence[tuple[float, Any]]) -> Payloads:
        """Close the round with one payload of every silo, in order of silos; the payloads of the next round.

        Raises:
            FwdLLMError: as :meth:`fs_fwdllm.running.driver.RunDriver.close_round`.
        """
        return self.close_round({silo: payload for silo, (_, payload) in enumerate(raw_client_model_or_grad_list)})

    def close_round(self, payloads: dict[int, Any]) -> Payloads:
        """As :meth:`aggregate`, from ``{silo: payload}``; a silo without work need not be there."""
        self._watchdog.disarm()
        driver = self._opened
        with self._closing_on_error():
            if not driver.finished:
                for silo, payload in payloads.items():
                    self._take(driver, silo, payload)
                driver.close_round()
                evaluation = self._session.evaluate(driver.server.trainables) if driver.evaluation_is_due else None
                driver.record(evaluation)
                self._evaluation = evaluation or self._evaluation
            self._rounds_done += 1
            self._prepare_payloads()
        return dict(self._payloads)

    def on_after_aggregation(self, aggregated_model_or_grad: Any) -> Any:
        """Payloads leave as they are."""
        return aggregated_model_or_grad

    def test(self, test_data: Any, device: Any = None, args: Any = None) -> tuple[float | None, ...]:
        """The last evaluation, in FedML's form: accuracy (``None`` without one), loss, and two empty places."""
        seen = self._evaluation or {}
        return seen.get("accuracy", seen.get("token_accuracy")), seen.get("loss"), None, None

    def test_all(self, train_data_local_dict: Any, test_data_local_dict: Any, device: Any, args: Any) -> bool:
        """Evaluations follow ``frequency_of_the_test`` in :meth:`close_round`; there is no other."""
        return True

    def close(self, error: BaseException | None = None) -> None:
        """Close the run's files, saying how to go on if an error ended it."""
        driver, self._driver = self._driver, None
        if driver is not None:
            driver.__exit__(type(error) if error else None, error, None)

    @property
    def _opened(self) -> RunDriver:
        if self._driver is None:
            raise HostError("FedML handed over answers, but the run has not begun or is over")
        return self._driver

    def _open(self) -> None:
        self._driver = driver = RunDriver(self._session, self._start.folder, self._start.checkpoint)
        driver.__enter__()
        for remark in self.admission.remarks():
            driver.say(remark)
        if self._start.checkpoint is None:
            driver.record_start(self._session.evaluate_first(driver.server.trainables, driver.say))

    def _prepare_payloads(self) -> None:
        """Open the next round, or finish; then every silo has a payload and the server waits, if FedML goes on."""
        driver = self._opened
        starts_anew = self._rounds_done == 0 and self._start.checkpoint is not None
        fedml_ends, refusals = self._rounds_done >= self.args.comm_round, self.admission.refusals
        frames = {} if driver.finished else driver.open_round()
        if driver.finished and self.trained_path is None:
            self.trained_path = driver.finish()
        self._asked = self._placement.split(frames)
        self._payloads = {
            silo: pack_orders(
                Orders(
                    frames=asked,
                    state=driver.whole_state_for(silo + 1) if starts_anew and silo not in refusals else b"",
                    is_last=fedml_ends,
                    refusal=refusals.get(silo, ""),
                )
            )
            for silo, asked in self._asked.items()
        }
        self._unheard = set(self._asked)
        if fedml_ends:
            self.close()
            self._watchdog.wind_down()
        else:
            self._wait()

    def _wait(self) -> None:
        self._watchdog.arm(self._patience_s, self._what_is_missing)

    def _take(self, driver: RunDriver, silo: int, payload: Any) -> None:
        asked = self._asked[silo]
        try:
            answers = unpack_answers(payload)
        except WireError as error:
            for client in asked:
                driver.refuse(client, error)
            return
        for client, frame in answers.items():
            if client in asked:
                driver.receive(client, frame)
            else:
                driver.say(f"warning: round {driver.next_round + 1}: silo {silo} spoke for client {client}; left out")

    def _what_is_missing(self) -> str:
        names = ", ".join(f"client process rank {silo + 1}" for silo in sorted(self._unheard))
        return f"no answer within {self._patience_s:g} s from {names or 'the client processes'}"

    @contextmanager
    def _closing_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._watchdog.disarm()
            self.close(error)
            raise
