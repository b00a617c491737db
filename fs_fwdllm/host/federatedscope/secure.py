"""Mutual TLS for the host's gRPC, which knows neither certificates nor who has sent a message.

The host listens where its communication manager is built, and sends over channels without protection. Here the manager
listens with certificates while it is built (the host's tree stays as it is), and :class:`Tls` opens the channels for
:class:`~fs_fwdllm.host.federatedscope.transport.Sender`. Who sends is taken from the certificate: a message that says
it is somebody else's does not get as far as the queue.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fs_fwdllm.errors import HostError
from fs_fwdllm.host.addresses import is_wildcard, joined, parsed
from fs_fwdllm.host.federatedscope.intake import DROPPED, claimed_by
from fs_fwdllm.host.tls import TlsFiles, name_of, number_of

__all__ = ["Tls", "listening", "tls_of"]

logger = logging.getLogger("federatedscope.fs_fwdllm")

#: The sender of messages from a client that has not been given its number yet.
_NOBODY_YET = -1


@dataclass(frozen=True)
class Tls:
    """What a process connects and listens with.

    Attributes:
        files: its certificates and key.
        hears_clients: it is the server, and takes messages from clients; else it is a client, and takes the server's.
    """

    files: TlsFiles
    hears_clients: bool

    @cached_property
    def _contents(self) -> tuple[bytes, bytes, bytes]:
        return self.files.contents()

    def channel(self, address: str, receiver: int, options: tuple[tuple[str, Any], ...], compression: Any) -> Any:
        """A channel to a participant, which it proves to be; the server also that it is the one at ``address``."""
        import grpc

        ca, certificate, key = self._contents
        if receiver:
            options = (*options, ("grpc.ssl_target_name_override", name_of(receiver)))
        credentials = grpc.ssl_channel_credentials(ca, key, certificate)
        return grpc.secure_channel(address, credentials, options=options, compression=compression)

    def complaint(self, address: str, receiver: int) -> str:
        """Why nobody is reached there, if certificates are the reason; else empty."""
        host, port = parsed(address)
        return self.files.complaint((host, port), name_of(receiver) if receiver else host)

    def serve(self, manager: Any, max_workers: int, host: str, port: int, options: Any) -> Any:
        """What the host's ``gRPCCommManager.serve`` does, with certificates.

        Raises:
            HostError: the port is taken.
        """
        import grpc
        from federatedscope.core.proto import gRPC_comm_manager_pb2_grpc as services

        ca, certificate, key = self._contents
        manager.server_funcs = _receiver(hears_clients=self.hears_clients)
        server = grpc.server(ThreadPoolExecutor(max_workers), compression=manager.comp_method, options=options)
        services.add_gRPCComServeFuncServicer_to_server(manager.server_funcs, server)
        credentials = grpc.ssl_server_credentials([(key, certificate)], ca, require_client_auth=True)
        try:
            server.add_secure_port(f"{host}:{port}", credentials)
        except RuntimeError as error:
            raise HostError(f"{host}:{port}: cannot be listened at ({error})") from error
        server.start()
        return server


def tls_of(config: Any) -> Tls | None:
    """What a process of a distributed run has by ``fwdllm.tls``; ``None`` where it is to speak without protection.

    Args:
        config: the host's configuration.

    Raises:
        ConfigError: some of the files are not given or cannot be used, or are another participant's.
    """
    files, own = TlsFiles.of(config.fwdllm.tls), config.distribute
    if files is None:
        return None
    is_server = own.role == "server"
    host = "" if is_wildcard(own.server_host) else parsed(joined(own.server_host, 0))[0]
    number = 0 if is_server else own.data_idx if own.data_idx > 0 else None
    files.require_usable(number, host, "distribute.server_host")
    return Tls(files, hears_clients=is_server)


@contextmanager
def listening(tls: Tls | None) -> Iterator[None]:
    """While a worker of the host is built: its communication manager listens with certificates, if there are any."""
    if tls is None:
        yield
        return
    from federatedscope.core.communication import gRPCCommManager

    def serve(manager: Any, max_workers: int, host: str, port: int, options: Any) -> Any:
        return tls.serve(manager, max_workers, host, port, options)

    stock, gRPCCommManager.serve = gRPCCommManager.serve, serve
    try:
        yield
    finally:
        gRPCCommManager.serve = stock


def _receiver(*, hears_clients: bool) -> Any:
    from federatedscope.core.gRPC_server import gRPCComServeFunc

    class Receiver(gRPCComServeFunc):
        """The host's, which takes a message only from whom it says it is."""

        def sendMessage(self, request: Any, context: Any) -> Any:
            import grpc

            name = _name_in(context)
            number, claimed = number_of(name), claimed_by(request)
            refusal = ""
            if number is None or (number > 0) != hears_clients:
                refusal = f"a message with the certificate of {name!r}: nobody of that name is listened to here"
            elif claimed not in (number, _NOBODY_YET if hears_clients else number):
                refusal = f"a message with the certificate of {name!r} that says it is of {_told(claimed)}"
            if refusal:
                DROPPED.say(f"dropped {refusal}")
                context.abort(grpc.StatusCode.PERMISSION_DENIED, refusal)
            request.msg["sender"].single_msg.int_value = number
            return super().sendMessage(request, context)

    return Receiver()


def _name_in(context: Any) -> str:
    """The common name of the peer's certificate."""
    names = context.auth_context().get("x509_common_name", [])
    return names[0].decode(errors="replace") if names else ""


def _told(claimed: int | None) -> str:
    return "nobody" if claimed is None or claimed < 0 else repr(name_of(claimed))
