"""The host's server worker: its messages, evaluation and files around a :class:`~fs_fwdllm.running.driver.RunDriver`.

A round is opened by sending every drawn client its frame as text, and closed when all have answered or its deadline is
over. Evaluation is the host's: clients (or the server, with ``federate.make_global_eval``) evaluate, the host merges,
logs, keeps the best, stops early and saves. The next round is opened after the evaluation, so that what is evaluated is
what a round ended with.

In a simulation all of this happens inside the handlers the host calls. In distributed mode :meth:`FwdLLMServer.run`
waits for messages itself, with deadlines: for clients to join, to answer, to evaluate.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import IO, Any, cast

from rich.console import Console

from fs_fwdllm.core.wire import text_bytes, to_text
from fs_fwdllm.errors import CheckpointError, HostError, TrainingStalledError, WireError, shown
from fs_fwdllm.host.chunks import Joiner
from fs_fwdllm.host.federatedscope import run_state
from fs_fwdllm.host.federatedscope.intake import DROPPED
from fs_fwdllm.host.federatedscope.members import MemberServer
from fs_fwdllm.host.federatedscope.names import MESSAGE_EVALUATE, MESSAGE_UPDATE, MESSAGE_WORK
from fs_fwdllm.host.federatedscope.results import LogLines, latest_evaluation, results_in, with_value_to_choose_by
from fs_fwdllm.host.federatedscope.run_state import HostModel
from fs_fwdllm.host.federatedscope.trainer import let_monitor_know
from fs_fwdllm.host.federatedscope.transport import Hello, dispatch, frame_in, next_message
from fs_fwdllm.model.base.identity import UNTOLD_BASE
from fs_fwdllm.running.agreement import refusal_of
from fs_fwdllm.running.driver import RunDriver

__all__ = ["FwdLLMServer"]

logger = logging.getLogger("federatedscope.fs_fwdllm")

#: What a server takes in distributed mode; the host's other messages need not be honoured, and some are unpickled.
_TAKEN = ("join_in", MESSAGE_UPDATE, "metrics")
_LOOK_AT_DEADLINES_EVERY_S = 0.2
#: Messages that are handled between two looks at the deadlines, at most: strangers may send without an end.
_MESSAGES_AT_ONCE = 1000


class FwdLLMServer(MemberServer):
    """The server of any of our methods. Arguments as the host's own server."""

    is_finish: bool

    def __init__(
        self, *arguments: Any, config: Any = None, model: HostModel | None = None, data: Any = None, **named: Any
    ) -> None:
        super().__init__(*arguments, config=config, model=model, data=data, **named)
        if config is None or model is None:  # the host asks an unconfigured worker for its handlers
            return
        self._process = model.process
        let_monitor_know(self._monitor)
        self.aggregator = TrainedParameters(self)
        self.aggregators = [self.aggregator]
        self._driver: RunDriver | None = None
        self._joiner = Joiner()
        self._evaluating: set[int] = set()
        self._waiting_since = time.monotonic()

    def _register_default_handlers(self) -> None:
        super()._register_default_handlers()
        self.register_handlers(MESSAGE_UPDATE, self.callback_funcs_for_update, [MESSAGE_WORK, "evaluate", "finish"])
        self.register_handlers("model_para", self.callback_funcs_for_foreign_message, [None])

    @property
    def _is_running(self) -> bool:
        return self._driver is not None

    @property
    def driver(self) -> RunDriver:
        if self._driver is None:
            raise RuntimeError("the run has not started: clients are still joining")
        return self._driver

    def _refusal(self, hello: Hello) -> str:
        if self.mode != "distributed":
            return ""
        session = self._process.session
        if session.base_digest and not hello.base:
            logger.warning("client %d %s", hello.client, UNTOLD_BASE)
        return refusal_of(session, hello.base, hello.settings)

    def _catch_up(self, client: int) -> None:
        """Send a client what it missed, if the run is waiting for it."""
        self.driver.server.note_holds(client, self._clients[client].digest)
        if client in self.driver.missing:
            self._tell({client: to_text(self.driver.reopen_for(client))}, MESSAGE_WORK)
        elif client in self._evaluating:
            self._tell({client: to_text(self.driver.current_state_for(client))}, MESSAGE_EVALUATE)

    # --- rounds ------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        session = self._process.session
        session.admit({client: hello.samples for client, hello in sorted(self._clients.items()) if hello.samples})
        run_state.require_work(session.config, len(session.client_samples))
        folder, checkpoint = run_state.open_folder(self._process, Path(self._cfg.outdir))
        console = Console(file=cast(IO[str], LogLines()), highlight=False, width=200, color_system=None)
        simulated = self._process.worker if self.mode == "standalone" else None
        self._driver = RunDriver(session, folder, checkpoint, console, worker=simulated)
        self._driver.__enter__()
        if checkpoint is None:
            self._restore_parameters()
            self._driver.record_start(None)
        # Nothing is sent to those who hold it: the initial parameters follow from the seed, and clients may have gone
        # on while the server was away.
        for client, hello in self._clients.items():
            self._driver.server.note_holds(client, hello.digest)
        self.state = self._driver.next_round
        if self._cfg.federate.make_global_eval:
            self.trainer.held = self._driver.server.trainables
        logger.info("----------- Starting training (Round #%d) -------------", self.state)
        self._open_round()

    def _restore_parameters(self) -> None:
        """Start from parameters in the host's own format."""
        path = self._process.restore_from
        if not path:
            return
        if not os.path.exists(path):
            raise CheckpointError(f"federate.restore_from {path!r}: there is no such file or run folder")
        self.aggregator.load_model(path)
        logger.info("starts from the parameters in %s", path)

    def _open_round(self) -> None:
        frames = self.driver.open_round()
        self._tell({client: to_text(frame) for client, frame in frames.items()}, MESSAGE_WORK)
        self._waiting_since = time.monotonic()

    def callback_funcs_for_update(self, message: Any) -> None:
        """Take a client's update; the last one closes the round."""
        client = int(message.sender)
        if self._driver is None or client not in self._driver.missing or message.state != self.state:
            DROPPED.say(f"an update of client {client} came late or unasked and is left out")
            return
        try:
            frame = frame_in(message, self._driver.expected_bytes(client))
        except WireError as error:
            self._driver.refuse(client, error)
        else:
            self._driver.receive(client, frame)
        if not self._driver.missing:
            self._close_round()

    def _expected_text(self, message: Any) -> int:
        """Longest text that ``message`` may be a piece of: an update that its sender was asked for in this round."""
        if self._driver is None or message.msg_type != MESSAGE_UPDATE or message.state != self.state:
            return 0
        return text_bytes(self._driver.expected_bytes(message.sender))

    def _close_round(self) -> None:
        self._joiner.forget()
        self.driver.close_round()
        self.state = self.driver.next_round + 1
        if self.driver.evaluation_is_due:
            logger.info("Server: Starting evaluation at the end of round %d.", self.state - 1)
            self._waiting_since = time.monotonic()
            self.eval()
        else:
            self.driver.record(None)
            self._open_round()

    # --- evaluation --------------------------------------------------------------------------------------------

    def broadcast_model_para(self, msg_type: str = "evaluate", **_: Any) -> None:
        """Ask every client to evaluate the present parameters (the host calls this from :meth:`eval`)."""
        self._evaluating = set(self._clients)
        frames = {client: to_text(self.driver.current_state_for(client)) for client in sorted(self._clients)}
        self._tell(frames, MESSAGE_EVALUATE)

    def callback_funcs_for_metrics(self, message: Any) -> None:
        """Take a client's results; the last one ends the evaluation."""
        client = int(message.sender)
        if client not in self._evaluating or message.state != self.state:
            return
        self.driver.server.note_holds(client, self.driver.server.digest)
        self.msg_buffer["eval"].setdefault(self.state, {})[client] = results_in(message.content)
        self._evaluating.discard(client)
        if not self._evaluating:
            self._merge_and_format_eval_results()

    def _merge_and_format_eval_results(self) -> None:
        """As the host does, unless nobody has results for the split that decides on the best round."""
        results = self.msg_buffer["eval"].setdefault(self.state, {})
        key = self._cfg.eval.best_res_update_round_wise_key
        if any(key in name for held in results.values() for name in held or ()):
            super()._merge_and_format_eval_results()
            return
        logger.warning("nobody evaluated %r after round %d", key, self.state)
        self.driver.record(None)
        if self.driver.finished:
            self.save_best_results()
            self.terminate()
        else:
            self._open_round()

    def check_and_save(self) -> None:
        """After an evaluation: record it, let the host save and decide on stopping, then go on."""
        evaluation = latest_evaluation(self.history_results, self._cfg.eval.split)
        choice = self._process.session.choice
        self.driver.record(with_value_to_choose_by(evaluation, self.history_results, choice))
        self.early_stopper = _DriversStop(self.driver)
        super().check_and_save()
        if not self.is_finish and self.driver.finished:  # the host asks nobody where only the server evaluates
            self.save_best_results()
            self.terminate()
        if not self.is_finish:
            self._open_round()

    # --- the end -----------------------------------------------------------------------------------------------

    def terminate(self, msg_type: str = "finish") -> None:
        """Tell the clients that it is over, and close our run folder."""
        if self.is_finish:
            return
        self.is_finish = self._process.is_over = True
        self._monitor.finish_fl()
        self._tell(dict.fromkeys(sorted(self._clients), ""), msg_type)
        if self._driver is not None:
            self._driver.finish()
            self._driver.__exit__(None, None, None)

    def run(self) -> None:
        """Wait for messages and see to the deadlines until the run is over (distributed mode).

        Raises:
            HostError: too few clients joined within ``fwdllm.deadline_s``.
            TrainingStalledError: too few clients answered a round within it.
            FwdLLMError: whatever stops a run; the clients are told first.
        """
        try:
            while not self.is_finish:
                self._handle_messages()
                self._see_to_deadlines()
        except Exception as error:
            self._stop_for(error)
            raise

    def _handle_messages(self) -> None:
        """Wait for a message, then handle what has come, before anybody is found to be late."""
        waiting = len(self.comm_manager.server_funcs.msg_queue)
        for _ in range(min(max(waiting, 1), _MESSAGES_AT_ONCE)):
            message = next_message(self.comm_manager, _LOOK_AT_DEADLINES_EVERY_S, self._joiner, self._expected_text)
            if message is not None:
                dispatch(self, message, _TAKEN)
            if self.is_finish or message is None:
                return

    def callback_funcs_for_foreign_message(self, message: Any) -> None:
        """Leave alone what is not ours: the host's messages of parameters would have to be unpickled."""
        DROPPED.say(f"dropped a message of type {shown(message.msg_type)} from {message.sender}")

    def _stop_for(self, error: Exception) -> None:
        self.is_finish = True
        self._tell(
            dict.fromkeys(sorted(self._clients), f"the server has stopped: {type(error).__name__}: {error}"), "finish"
        )
        if self._driver is not None:
            self._driver.__exit__(type(error), error, error.__traceback__)

    # --- deadlines ---------------------------------------------------------------------------------------------

    def _see_to_deadlines(self) -> None:
        if self.is_finish:
            return
        own = self._process.config.fwdllm
        over = time.monotonic() - self._waiting_since > own.deadline_s
        if self._driver is None:
            if over:
                self._start_with_who_is_here(own.min_answers)
        elif self._driver.missing:
            self._drop_gone(self._driver.missing)
            if over or not self._driver.missing:
                self._close_with_who_answered(self.driver.answers_needed)
        elif self._evaluating:
            self._drop_gone(self._evaluating)
            if over:
                logger.warning("clients %s did not evaluate in time", sorted(self._evaluating))
                self._evaluating.clear()
            if not self._evaluating:
                self._merge_and_format_eval_results()

    def _start_with_who_is_here(self, minimum: int) -> None:
        deadline_s = self._process.config.fwdllm.deadline_s
        if len(self._clients) < minimum:
            raise HostError(
                f"{len(self._clients)} of {self.client_num} clients joined within {deadline_s:g} s "
                f"(fwdllm.deadline_s), but {minimum} are needed (fwdllm.min_answers)"
            )
        logger.warning("starts with %d of %d clients: the others did not join", len(self._clients), self.client_num)
        self._start()

    def _close_with_who_answered(self, minimum: int) -> None:
        answered = self.driver.answered
        if answered < minimum:
            raise TrainingStalledError(
                f"round {self.driver.next_round + 1}: {answered} {'client' if answered == 1 else 'clients'} answered, "
                f"but {minimum} are needed (fwdllm.min_answers); continue with "
                f"federate.restore_from {str(self.driver.folder.path)!r} when they are back"
            )
        self._close_round()


class _DriversStop:
    """Stands where the host expects its early stopping, which a resumed run would have to begin anew."""

    def __init__(self, driver: RunDriver) -> None:
        self._driver = driver

    def track_and_check(self, history: Any) -> bool:
        """Whether ``early_stop.*`` ends the run before its last round."""
        return self._driver.finished and self._driver.next_round < self._driver.total_rounds


class TrainedParameters:
    """Stands where the host expects an aggregator: saves and loads the trained parameters in the host's format."""

    def __init__(self, server: FwdLLMServer) -> None:
        self._server = server

    def save_model(self, path: str, cur_round: int = -1) -> None:
        """As :func:`~fs_fwdllm.host.federatedscope.run_state.save_values`."""
        run_state.save_values(path, cur_round, self._server.driver.server.trainables)

    def load_model(self, path: str) -> int:
        """As :func:`~fs_fwdllm.host.federatedscope.run_state.load_values`."""
        server = self._server.driver.server
        finished_rounds = run_state.load_values(path, server.trainables)
        server.note_parameters_changed()
        return finished_rounds
