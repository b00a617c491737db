"""The host's client worker: takes work as one text field, answers with one, evaluates when asked.

What it receives is our frames as base64 text; nothing is unpickled, and the host's own messages that would carry
pickled parameters are refused. In a process of its own it also says that it is there, again and again while it has
nothing to do: so a server that was restarted learns of it, and a server that is gone is noticed.
"""

from __future__ import annotations

import logging
import os
import time
from typing import Any

from federatedscope.core.message import Message
from federatedscope.core.workers import Client

from fs_fwdllm.host.driver import answer, follow
from fs_fwdllm.host.federatedscope.names import MESSAGE_EVALUATE, MESSAGE_UPDATE, MESSAGE_WORK
from fs_fwdllm.host.federatedscope.process import HostModel, HostProcess
from fs_fwdllm.host.federatedscope.transport import HostError, is_reachable, next_message
from fs_fwdllm.wire import from_text, to_text

__all__ = ["FwdLLMClient"]

logger = logging.getLogger("federatedscope.fs_fwdllm")

_SAY_HERE_EVERY_S = 5.0


class FwdLLMClient(Client):
    """A client of any of our methods. Arguments as the host's own client."""

    def __init__(self, *arguments: Any, config: Any = None, model: HostModel | None = None, **named: Any) -> None:
        super().__init__(*arguments, config=config, model=model, **named)
        if config is None or model is None:  # the host asks an unconfigured worker for its handlers
            return
        self._process: HostProcess = model.process
        self._examples = list(getattr(self.data, "train_data", None) or [])
        self._incarnation = int.from_bytes(os.urandom(3), "little")

    def _register_default_handlers(self) -> None:
        super()._register_default_handlers()
        self.register_handlers(MESSAGE_WORK, self.callback_funcs_for_work, [MESSAGE_UPDATE])
        self.register_handlers(MESSAGE_EVALUATE, self.callback_funcs_for_evaluate, ["metrics"])
        for kind in ("model_para", "ss_model_para", "evaluate"):
            self.register_handlers(kind, self.callback_funcs_for_foreign_message, [None])

    def join_in(self) -> None:
        """Tell the server who we are, where, how many samples we hold, and what parameters."""
        distributed = self.mode == "distributed"
        address = self.local_address if distributed else {"host": "", "port": 0}
        content = {
            **address,
            "client": int(self._cfg.distribute.data_idx) if distributed and self.ID < 0 else int(self.ID),
            "samples": len(self._examples),
            "incarnation": self._incarnation,
            "digest": self._process.worker.replica.digest.hex(),
        }
        self._send("join_in", content)

    def run(self) -> None:
        """Handle messages until the server says that it is over (distributed mode).

        Raises:
            HostError: nothing has listened at the server's address for ``fwdllm.deadline_s`` seconds.
        """
        gone_since: float | None = None
        while True:
            message = next_message(self.comm_manager, _SAY_HERE_EVERY_S)
            if message is not None:
                gone_since = None
                handler = self.msg_handlers.get(message.msg_type, self.callback_funcs_for_foreign_message)
                handler(message)
                if message.msg_type == "finish":
                    return
                continue
            if is_reachable(self.comm_manager.neighbors[self.server_id]):
                gone_since = None
                self.join_in()
                continue
            gone_since = gone_since or time.monotonic()
            self._give_up_after(gone_since)

    def _give_up_after(self, gone_since: float) -> None:
        deadline_s = self._process.config.fwdllm.deadline_s
        if time.monotonic() - gone_since > deadline_s:
            raise HostError(
                f"client {self.ID}: nothing listens at the server's address "
                f"{self.comm_manager.neighbors[self.server_id]} for {deadline_s:g} s (fwdllm.deadline_s); start the "
                "server again with federate.restore_from set to its run folder, then this client"
            )

    def callback_funcs_for_work(self, message: Any) -> None:
        """Do a round's work and send the update."""
        self.state = message.state
        frame = answer(self._process.worker, from_text(message.content), self._examples)
        self._send(MESSAGE_UPDATE, to_text(frame))

    def callback_funcs_for_evaluate(self, message: Any) -> None:
        """Follow the server, then evaluate as the host's client does."""
        follow(self._process.worker, from_text(message.content))
        message.content = None  # the host's handler would load parameters from it
        super().callback_funcs_for_evaluate(message)

    def callback_funcs_for_finish(self, message: Any) -> None:
        """The server says that it is over, and perhaps why."""
        if message.content:
            logger.error("client %d: the server has stopped: %s", self.ID, message.content)
        self._monitor.finish_fl()

    def callback_funcs_for_foreign_message(self, message: Any) -> None:
        """Leave alone what is not ours: the host's messages of parameters would have to be unpickled."""
        logger.warning("client %d: dropped a message of type %r", self.ID, message.msg_type)

    def _send(self, kind: str, content: Any) -> None:
        receiver = [self.server_id]
        self.comm_manager.send(
            Message(msg_type=kind, sender=self.ID, receiver=receiver, state=max(self.state, 0), content=content)
        )

