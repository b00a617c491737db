"""The host's client worker: takes work as one text field, answers with one, evaluates when asked.

What it receives is our frames as base64 text; nothing is unpickled, and the host's own messages that would carry
pickled parameters are left alone. In a process of its own it also says that it is there, again and again while it has
nothing to do: so a server that was restarted learns of it, and a server that is gone is noticed.
"""

from __future__ import annotations

import logging
import os
import time
from typing import Any

from federatedscope.core.message import Message
from federatedscope.core.workers import Client

from fs_fwdllm.core.wire import to_text
from fs_fwdllm.errors import HostError, WireError, shown
from fs_fwdllm.host.chunks import WHOLE_BYTES, Joiner
from fs_fwdllm.host.federatedscope.intake import DROPPED, limit_intake
from fs_fwdllm.host.federatedscope.listening import bind_host, settle_addresses
from fs_fwdllm.host.federatedscope.names import MESSAGE_EVALUATE, MESSAGE_UPDATE, MESSAGE_WORK, NO_RESULTS
from fs_fwdllm.host.federatedscope.run_state import HostModel, HostProcess, save_values
from fs_fwdllm.host.federatedscope.secure import listening, tls_of
from fs_fwdllm.host.federatedscope.transport import Hello, Sender, dispatch, frame_in, next_message, reachable
from fs_fwdllm.running.agreement import settings_of_work, settings_text
from fs_fwdllm.running.driver import answer, follow

__all__ = ["FwdLLMClient"]

logger = logging.getLogger("federatedscope.fs_fwdllm")

#: What a client takes in distributed mode; the host's other messages need not be honoured, and some are unpickled.
_TAKEN = ("assign_client_id", MESSAGE_WORK, MESSAGE_EVALUATE, "converged", "finish")
_LONGEST_SILENCE_S = 30.0
_HELLOS_PER_DEADLINE = 20


class FwdLLMClient(Client):
    """A client of any of our methods. Arguments as the host's own client."""

    def __init__(self, *arguments: Any, config: Any = None, model: HostModel | None = None, **named: Any) -> None:
        reached_at, tls = named.get("host", ""), None
        if config is not None and config.federate.mode.lower() == "distributed":
            settle_addresses(config)
            named["host"], tls = bind_host(config), tls_of(config)
        with listening(tls):
            super().__init__(*arguments, config=config, model=model, **named)
        if config is None or model is None:  # the host asks an unconfigured worker for its handlers
            return
        if self.local_address is not None:
            self.local_address["host"] = reached_at
        self._process: HostProcess = model.process
        self._examples = list(getattr(self.data, "train_data", None) or [])
        self._incarnation = int.from_bytes(os.urandom(3), "little")
        self._asked_for = int(self._cfg.distribute.data_idx) if self.mode == "distributed" else int(self.ID)
        self._deadline_s = self._process.config.fwdllm.deadline_s
        self._sender: Sender | None = None
        if self.mode == "distributed":
            limit_intake(self.comm_manager, [self.server_id])
            self._sender = Sender(self.comm_manager, self._deadline_s, tls)
        self._unsent: Any = None

    def _register_default_handlers(self) -> None:
        super()._register_default_handlers()
        self.register_handlers(MESSAGE_WORK, self.callback_funcs_for_work, [MESSAGE_UPDATE])
        self.register_handlers(MESSAGE_EVALUATE, self.callback_funcs_for_evaluate, ["metrics"])
        for kind in ("model_para", "ss_model_para", "evaluate"):
            self.register_handlers(kind, self.callback_funcs_for_foreign_message, [None])

    def join_in(self) -> bool:
        """Tell the server who we are, where, how many samples we hold, what parameters, and how we are configured;
        whether it was told."""
        session, alone = self._process.session, self.mode != "distributed"
        hello = Hello(
            client=self._asked_for if self.ID < 0 else int(self.ID),
            samples=len(self._examples),
            incarnation=self._incarnation,
            digest=self._process.worker.replica.digest,
            base=b"" if alone else session.base_digest,
            settings="" if alone else settings_text(settings_of_work(session)),
            **(self.local_address or {}),
        )
        return self._send("join_in", hello.content())

    def run(self) -> None:
        """Handle messages until the server says that it is over (distributed mode).

        Raises:
            HostError: the server stopped for an error, took nothing in for ``fwdllm.deadline_s`` seconds, or has not
                taken this client into the run in that time.
        """
        started = heard = looked = time.monotonic()
        joiner = Joiner()
        patience_s = min(_LONGEST_SILENCE_S, self._deadline_s / _HELLOS_PER_DEADLINE)
        while True:
            message = next_message(self.comm_manager, patience_s, joiner, self._expected_text)
            if message is not None:
                dispatch(self, message, _TAKEN)
                if message.msg_type == "finish":
                    return
                if message.msg_type in _TAKEN:
                    heard = looked = time.monotonic()
            # By the clock, since strangers may send without an end.
            if time.monotonic() - looked < patience_s:
                continue
            if self._is_there_still():
                heard = time.monotonic()
            self._give_up_after(heard, started)
            looked = time.monotonic()

    def _expected_text(self, message: Any) -> int:
        """Longest text that ``message`` may be a piece of: the server alone sends long ones."""
        is_ours = message.sender == self.server_id and message.msg_type in (MESSAGE_WORK, MESSAGE_EVALUATE)
        return WHOLE_BYTES if is_ours else 0

    def _is_there_still(self) -> bool:
        """Whether the server takes in what we have to say: a process that is stopped has an open port, too."""
        return all(reachable([self._server_address]).values()) and self._send_again() and self.join_in()

    @property
    def _server_address(self) -> str:
        return str(self.comm_manager.neighbors[self.server_id])

    def _give_up_after(self, heard: float, started: float) -> None:
        now, waited = time.monotonic(), f"within {self._deadline_s:g} s (fwdllm.deadline_s)"
        if now - heard > self._deadline_s:
            raise HostError(
                f"client {self._asked_for}: the server's address {self._server_address} has taken nothing in {waited}; "
                "start the server again with federate.restore_from set to its run folder, then this client"
            )
        if self.ID < 0 and now - started > self._deadline_s:
            raise HostError(
                f"client {self._asked_for}: the server at {self._server_address} has not taken it in {waited}: "
                f"distribute.data_idx {self._asked_for} may be more than the server's federate.client_num"
            )

    def callback_funcs_for_assign_id(self, message: Any) -> None:
        """Take the number the server gives us."""
        if not str(message.content).isdecimal():
            raise WireError(f"the server's number for a client is {message.content!r}")
        super().callback_funcs_for_assign_id(message)

    def callback_funcs_for_work(self, message: Any) -> None:
        """Do a round's work and send the update."""
        self.state = message.state
        self._send(MESSAGE_UPDATE, to_text(answer(self._process.worker, frame_in(message), self._examples)))

    def callback_funcs_for_evaluate(self, message: Any) -> None:
        """Follow the server, evaluate every split, and send the results in the host's terms."""
        follow(self._process.worker, frame_in(message))
        self.state = message.state
        results: dict[str, float] = {}
        for split in self._cfg.eval.split:
            results |= self.trainer.evaluate(split)
        if results:
            self._log_results(results)
        self._send("metrics", results or NO_RESULTS)

    def _log_results(self, results: dict[str, float]) -> None:
        formatted = self._monitor.format_eval_res(
            results, rnd=self.state, role=f"Client #{self.ID}", forms=["raw"], return_raw=True
        )
        logger.info(formatted)
        if not any(self._cfg.eval.best_res_update_round_wise_key in key for key in results):
            return
        best = self._monitor.update_best_result(self.best_results, results, results_type=f"client #{self.ID}")
        if best and self._cfg.federate.save_client_model and self._cfg.federate.save_to:
            folder, name = os.path.split(self._cfg.federate.save_to)
            path = os.path.join(folder, f"client_{self.ID}_{name}")
            save_values(path, self.state, self._process.worker.replica.trainables)

    def callback_funcs_for_finish(self, message: Any) -> None:
        """The server says that it is over.

        Raises:
            HostError: it is over because of an error, or for this client alone.
        """
        self._process.is_over = self.mode == "distributed" or self._process.is_over
        self._monitor.finish_fl()
        if message.content:
            raise HostError(f"client {self._asked_for if self.ID < 0 else self.ID}: {message.content}")

    def callback_funcs_for_foreign_message(self, message: Any) -> None:
        """Leave alone what is not ours: the host's messages of parameters would have to be unpickled."""
        DROPPED.say(f"client {self.ID}: dropped a message of type {shown(message.msg_type)}")

    def _send(self, kind: str, content: Any) -> bool:
        """Send to the server; whether it was delivered."""
        message = Message(
            msg_type=kind, sender=self.ID, receiver=[self.server_id], state=max(self.state, 0), content=content
        )
        if self._sender is None:
            self.comm_manager.send(message)
            return True
        delivered = self._sender(self._server_address, message)
        if kind != "join_in":  # which is said again and again anyway
            self._unsent = None if delivered else message
        return delivered

    def _send_again(self) -> bool:
        """Send what did not arrive; a server that no longer wants it leaves it out. Whether nothing is left unsent."""
        if self._unsent is None or self._sender is None:
            return True
        if not self._sender(self._server_address, self._unsent):
            return False
        self._unsent = None
        return True
