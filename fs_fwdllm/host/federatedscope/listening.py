"""Where the processes of a distributed run listen, checked before anything is loaded.

FederatedScope has one address a participant, at which it listens and by which others reach it. Behind a router or in a
container these are two: ``distribute.server_host`` and ``distribute.client_host`` are what others use, and
``fwdllm.bind_host`` is where the process listens.
"""

from __future__ import annotations

from typing import Any

from fs_fwdllm.errors import ConfigError
from fs_fwdllm.host.addresses import check_port, is_own, is_wildcard, joined, require_free, require_known

__all__ = ["bind_host", "settle_addresses"]

_ROLES = ("server", "client")
_BIND = "if others reach this machine by it, set fwdllm.bind_host to where to listen (0.0.0.0 is all of its addresses)"


def settle_addresses(config: Any) -> None:
    """Check a process's own address and the server's, and give IPv6 addresses the brackets that gRPC wants.

    Args:
        config: the host's configuration of a process in distributed mode; changed in place.

    Raises:
        ConfigError: a port is none, the role is unknown, or the server could not reach the client.
        HostError: nothing can listen at the process's own address, or the server's name leads nowhere.
    """
    own, role = config.distribute, config.distribute.role
    if role not in _ROLES:
        raise ConfigError(f"distribute.role {role!r}: allowed are {' and '.join(map(repr, _ROLES))}")
    host_key = "fwdllm.bind_host" if config.fwdllm.bind_host else f"distribute.{role}_host"
    require_free(bind_host(config), own[f"{role}_port"], host_key, f"distribute.{role}_port", _BIND)
    if role == "client":
        _check_reach(own)
    for name in _ROLES:
        own[f"{name}_host"] = _as_grpc_has_it(own[f"{name}_host"])


def bind_host(config: Any) -> str:
    """Where this process listens, as gRPC has it."""
    return _as_grpc_has_it(config.fwdllm.bind_host or config.distribute[f"{config.distribute.role}_host"])


def _check_reach(own: Any) -> None:
    check_port(own.server_port, "distribute.server_port")
    require_known(own.server_host, "distribute.server_host")
    is_here = is_wildcard(own.server_host) or is_own(own.server_host)
    if is_here and own.client_port == own.server_port:
        raise ConfigError(
            f"distribute.client_port {own.client_port}: is the server's, on the same machine; give another"
        )
    if not is_here and is_wildcard(own.client_host):
        raise ConfigError(
            f"distribute.client_host {own.client_host!r}: the server at {joined(own.server_host, own.server_port)} is "
            "to answer there, but that is an address to listen at, not one to be reached by; set it to this machine's "
            "own, and fwdllm.bind_host to 0.0.0.0 if the process is to listen at all of them"
        )


def _as_grpc_has_it(host: str) -> str:
    return joined(host, 0).removesuffix(":0")
