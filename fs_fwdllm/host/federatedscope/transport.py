"""Waiting on the host's gRPC messages without spinning, and without waiting for ever.

The host's ``receive`` is a loop that keeps a core busy until a message comes. Here a short sleep is between two looks,
and after each look the caller gets the chance to see to its deadlines. A participant that is gone is noticed by its
port: nothing answers there any more.
"""

from __future__ import annotations

import logging
import socket
import time
from typing import Any

from fs_fwdllm.errors import FwdLLMError

__all__ = ["HostError", "is_reachable", "next_message", "own_port_is_free"]

logger = logging.getLogger("federatedscope.fs_fwdllm")

_LOOK_EVERY_S = 0.005
_CONNECT_WITHIN_S = 1.0


class HostError(FwdLLMError):
    """A participant of a distributed run is gone, or never came."""


def next_message(manager: Any, wait_s: float) -> Any:
    """The next readable message of a gRPC communication manager, ``None`` if none comes within ``wait_s`` seconds.

    What cannot be read as a message of the host's is dropped with a warning.
    """
    until = time.monotonic() + wait_s
    while True:
        if manager.server_funcs.msg_queue:
            try:
                return manager.receive()
            except Exception as error:  # whatever the bytes made the host's parser raise, they are not a message
                logger.warning("dropped a message that cannot be read (%s: %s)", type(error).__name__, error)
                continue
        if time.monotonic() >= until:
            return None
        time.sleep(_LOOK_EVERY_S)


def is_reachable(address: str) -> bool:
    """Whether something listens at ``host:port``."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=_CONNECT_WITHIN_S):
            return True
    except OSError:
        return False


def own_port_is_free(host: str, port: int) -> bool:
    """Whether a server could listen at ``host:port``: the host's gRPC server would share a taken port in silence."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True
