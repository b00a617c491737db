"""Where processes listen and are reached: addresses as users write them, and why one cannot be used.

"Cannot listen" has several causes with several cures, and a transport that fails later tells none of them apart:
another program has the port, the address is another machine's, nobody knows the name. So an address is tried before
anything is loaded, and the message says which it is, and which key to change.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Iterable
from contextlib import ExitStack, suppress

from fs_fwdllm.errors import ConfigError, HostError, shown

__all__ = ["check_port", "is_listening", "is_own", "is_wildcard", "joined", "parsed", "require_free", "require_known"]

_LAST_PORT = 65535
_FIRST_FREE_FOR_ALL = 1024


def joined(host: str, port: int) -> str:
    """``host:port`` as URLs and gRPC have it: an IPv6 address stands in brackets."""
    bare = _bare(host)
    return f"[{bare}]:{port}" if ":" in bare else f"{bare}:{port}"


def parsed(address: str) -> tuple[str, int]:
    """Inverse of :func:`joined`. Raises ``ValueError`` if it is not an address."""
    host, _, port = address.rpartition(":")
    return _bare(host), int(port)


def _bare(host: str) -> str:
    return host.strip().removeprefix("[").removesuffix("]")


def check_port(port: object, key: str) -> int:
    """``port``, if it is one.

    Raises:
        ConfigError: it is not a whole number from 1 to 65535.
    """
    if type(port) is not int or not 0 < port <= _LAST_PORT:
        raise ConfigError(f"{key} {shown(port)}: must be a port, a whole number from 1 to {_LAST_PORT}")
    return port


def is_wildcard(host: str) -> bool:
    """Whether ``host`` means all addresses of a machine: one can listen there, and nobody can be reached there."""
    with suppress(ValueError):
        return ipaddress.ip_address(_bare(host)).is_unspecified
    return False


def is_own(host: str) -> bool:
    """Whether ``host`` is an address of this machine."""
    with suppress(OSError), ExitStack() as doors:
        for family, place in _places(host, 0):
            _bind(doors, family, place)
        return True
    return False


def require_known(host: str, key: str) -> None:
    """Check that the name ``host`` leads to an address.

    Raises:
        HostError: it leads nowhere.
    """
    try:
        _places(host, 0)
    except OSError as error:
        raise HostError(f"{key} {host!r}: no address is known for that name ({_reason(error)}); {_FORMS}") from error


def require_free(host: str, port: int, host_key: str, port_key: str, elsewhere: str = "") -> None:
    """Check that a process of this machine can listen at ``host`` and ``port``.

    Args:
        host_key, port_key: what a user changes.
        elsewhere: what to do where the address is another machine's.

    Raises:
        ConfigError: ``port`` is none.
        HostError: it cannot; the message tells the causes apart.
    """
    check_port(port, port_key)
    require_known(host, host_key)
    try:
        with ExitStack() as doors:
            for family, place in _places(host, port):
                _bind(doors, family, place)
    except OSError as error:
        raise HostError(_explain(error, host, port, host_key, port_key, elsewhere)) from error


def is_listening(address: tuple[str, int], within_s: float = 1.0) -> bool:
    """Whether somebody can be connected to at a host and a port."""
    with suppress(OSError), socket.create_connection((_bare(address[0]), address[1]), within_s):
        return True
    return False


_FORMS = "allowed are a name, an IPv4 address, or an IPv6 address such as ::1"


def _places(host: str, port: int) -> Iterable[tuple[int, tuple[object, ...]]]:
    """Socket family and address of every place that ``host`` leads to."""
    try:
        found = socket.getaddrinfo(_bare(host) or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except UnicodeError as error:  # a label that no name may have
        raise OSError(errno.EINVAL, str(error)) from error
    return [(family, place) for family, _, _, _, place in found]


def _bind(doors: ExitStack, family: int, place: tuple[object, ...]) -> None:
    door = doors.enter_context(socket.socket(family, socket.SOCK_STREAM))
    door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        door.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    door.bind(place)


def _explain(error: OSError, host: str, port: int, host_key: str, port_key: str, elsewhere: str) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return f"{port_key} {port}: something else listens at {joined(host, port)}; choose another port"
        case errno.EADDRNOTAVAIL | errno.EAFNOSUPPORT:
            cure = f"; {elsewhere}" if elsewhere else ""
            return f"{host_key} {host!r}: is not an address of this machine, so nothing here can listen there{cure}"
        case errno.EACCES | errno.EPERM:
            return (
                f"{port_key} {port}: this user may not listen there (ports below {_FIRST_FREE_FOR_ALL} need "
                "privileges); choose another port"
            )
    return f"{host_key} {host!r}, {port_key} {port}: cannot be listened at ({_reason(error)})"


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
