"""Who takes part in a run, where they are, and how they are told something: the server's half without the rounds."""

from __future__ import annotations

import logging
import time
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from federatedscope.core.message import Message
from federatedscope.core.workers import Server

from fs_fwdllm.errors import WireError
from fs_fwdllm.host.federatedscope.intake import DROPPED, limit_intake
from fs_fwdllm.host.federatedscope.listening import bind_host, settle_addresses
from fs_fwdllm.host.federatedscope.run_state import HostModel
from fs_fwdllm.host.federatedscope.secure import Tls, listening, tls_of
from fs_fwdllm.host.federatedscope.transport import Hello, Sender, reachable
from fs_fwdllm.host.tls import name_of

__all__ = ["MemberServer"]

logger = logging.getLogger("federatedscope.fs_fwdllm")

_LOOK_FOR_CLIENTS_EVERY_S = 2.0


class MemberServer(Server):
    """A server that knows its clients: they join, are out of reach for a while, are restarted, or are gone.

    Arguments as the host's own server.
    """

    def __init__(
        self, *arguments: Any, config: Any = None, model: HostModel | None = None, data: Any = None, **named: Any
    ) -> None:
        self._tls: Tls | None = None
        if config is not None and config.federate.mode.lower() == "distributed":
            # Once more: it is some time since the address was looked at, and gRPC would share a taken port in silence.
            settle_addresses(config)
            named["host"], self._tls = bind_host(config), tls_of(config)
        with listening(self._tls):
            super().__init__(*arguments, config=config, model=model, data=data, **named)
        self._clients: dict[int, Hello] = {}
        self._undelivered: set[int] = set()
        self._looked_for_clients = 0.0
        self._sender: Sender | None = None
        if config is not None and model is not None and self.mode == "distributed":
            limit_intake(self.comm_manager, range(1, self.client_num + 1))
            self._sender = Sender(self.comm_manager, model.process.config.fwdllm.deadline_s, self._tls)

    @property
    @abstractmethod
    def _is_running(self) -> bool:
        """Whether the first round has been opened."""

    @abstractmethod
    def _refusal(self, hello: Hello) -> str:
        """Why a client is not taken in; empty if it is."""

    @abstractmethod
    def _start(self) -> None:
        """Everybody is here."""

    @abstractmethod
    def _catch_up(self, client: int) -> None:
        """Send a client what it missed, if the run is waiting for it."""

    def callback_funcs_for_join_in(self, message: Any) -> None:
        """A client says that it is there: for the first time, again, or anew after it was restarted.

        Raises:
            WireError: the message is malformed.
        """
        hello = self._certified(Hello.read(message.content), message.sender)
        client = self._number_of(hello)
        if not 0 < client <= self.client_num:
            # Nobody calls an address of a stranger's choice; a client that is not taken in gives up by itself.
            DROPPED.say(f"refused client {client}: this run has clients 1 to {self.client_num} (federate.client_num)")
            return
        if refusal := self._refusal(hello):
            logger.warning("refused client %d: %s", client, refusal)
            if self._sender is not None:
                self._sender(f"{hello.host}:{hello.port}", self._message(client, "finish", refusal))
            return
        known, self._clients[client] = self._clients.get(client), hello
        self.comm_manager.add_neighbors(client, {"host": hello.host, "port": hello.port})
        if known is None or known.incarnation != hello.incarnation:
            self._admit(client, "joined" if known is None else "is here again")
        elif client in self._undelivered:  # it was out of reach when it was sent something
            self._catch_up(client)

    def _certified(self, hello: Hello, sender: int) -> Hello:
        """``hello`` with the number of the client's certificate, where there are certificates.

        Raises:
            WireError: it asks for another one.
        """
        if self._tls is None:
            return hello
        if hello.client > 0 and hello.client != sender:
            raise WireError(f"with the certificate of {name_of(sender)!r} it asks to join as {name_of(hello.client)!r}")
        return replace(hello, client=sender)

    def _number_of(self, hello: Hello) -> int:
        if hello.client > 0:
            return hello.client
        known = {joined.incarnation: client for client, joined in self._clients.items()}
        return known.get(hello.incarnation, max(self._clients, default=0) + 1)

    def _admit(self, client: int, how: str) -> None:
        if self._sender is not None:
            self._tell({client: str(client)}, "assign_client_id")
            logger.info("client %d %s", client, how)
        if self._is_running:
            self._catch_up(client)
        elif len(self._clients) == self.client_num:
            self._start()

    def _drop_gone(self, waiting: set[int]) -> None:
        """Stop waiting for clients whose port is closed: their process has ended."""
        if time.monotonic() - self._looked_for_clients < _LOOK_FOR_CLIENTS_EVERY_S:
            return
        listens = reachable(self.comm_manager.neighbors[client] for client in sorted(waiting))
        self._looked_for_clients = time.monotonic()
        for client in sorted(waiting):
            address = self.comm_manager.neighbors[client]
            if not listens[address]:
                logger.warning("client %d is gone: nothing listens at %s", client, address)
                waiting.discard(client)

    def _tell(self, contents: Mapping[int, str], kind: str) -> None:
        """Send a message of one kind to each client; who cannot be reached gets it when it says that it is there."""
        messages = {client: self._message(client, kind, content) for client, content in contents.items()}
        if self._sender is None:
            for message in messages.values():
                self.comm_manager.send(message)
            return
        addresses = self.comm_manager.neighbors
        delivered = self._sender.to_many([(addresses[client], message) for client, message in messages.items()])
        for client, arrived in zip(messages, delivered, strict=True):
            (self._undelivered.discard if arrived else self._undelivered.add)(client)

    def _message(self, client: int, kind: str, content: str) -> Any:
        return Message(msg_type=kind, sender=self.ID, receiver=[client], state=self.state, content=content)
