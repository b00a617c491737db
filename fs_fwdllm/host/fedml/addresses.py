"""FedML's table of addresses, read before FedML does: who listens where in a gRPC run.

FedML 0.9.6 takes a CSV file ``eid,rank,grpc_server_ip,grpc_server_port[,ingress_ip]``, gives ranks without a line an
address of its own invention, shares a taken port in silence, and then waits. So the whole table is checked first, and a
mistake is named with the file, its line and the rank.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fs_fwdllm.errors import ConfigError, shown
from fs_fwdllm.host.addresses import check_port, joined, require_free
from fs_fwdllm.host.fedml.settings import FedMLSettings

__all__ = ["Place", "read_addresses", "require_free_places", "server_address"]

_COLUMNS = ("eid", "rank", "grpc_server_ip", "grpc_server_port")
_KEY = "grpc_ipconfig_path"
_BY_HAND = "on several machines start each process by hand: python -m fs_fwdllm.host.fedml --cf FILE --rank N"


@dataclass(frozen=True)
class Place:
    """Where a rank listens, and which line of the table says so."""

    host: str
    port: int
    line: str

    @property
    def address(self) -> tuple[str, int]:
        return self.host, self.port


def read_addresses(settings: FedMLSettings) -> dict[int, Place]:
    """The place of every rank of a gRPC run.

    Raises:
        ConfigError: there is no table, it is not FedML 0.9.6's, or a rank has no place of its own in it.
    """
    path = settings.args.get(_KEY)
    if not path:
        raise ConfigError(
            f"{_KEY}: backend GRPC started by hand needs a CSV file '{','.join(_COLUMNS)}'; fs-fwdllm run --host fedml "
            "makes one for processes on this machine"
        )
    if not isinstance(path, str):
        raise ConfigError(f"{_KEY}: must be the path of a file, but is {shown(path)}")
    try:
        with Path(path).open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, restval=""))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{_KEY}: {path} cannot be read ({getattr(error, 'strerror', None) or error})") from error
    missing = [name for name in _COLUMNS if name not in (rows[0] if rows else ())]
    if missing:
        raise ConfigError(
            f"{_KEY}: {path} has no column {missing[0]!r}; FedML 0.9.6's first line is '{','.join(_COLUMNS)}', without "
            "spaces, and every rank has a line below it"
        )
    found: dict[int, Place] = {}
    for number, row in enumerate(rows, start=2):
        rank, place = _read(row, f"{_KEY} {path} line {number}")
        if rank in found:
            raise ConfigError(f"{place.line}: rank {rank} has a line already")
        same = next((other for other, there in found.items() if there.address == place.address), None)
        if same is not None:
            raise ConfigError(f"{place.line}: rank {rank} has the address of rank {same}, {joined(*place.address)}")
        found[rank] = place
    absent = [rank for rank in range(settings.worker_num + 1) if rank not in found]
    if absent:
        who = "the server (eid 0)" if absent[0] == 0 else f"rank {absent[0]} (worker_num is {settings.worker_num})"
        raise ConfigError(f"{_KEY}: {path} has no line for {who}")
    return found


def _read(row: Mapping[str, str], line: str) -> tuple[int, Place]:
    for name in _COLUMNS:
        if row[name] != row[name].strip() or not row[name]:
            raise ConfigError(f"{line}: {name} is {shown(row[name])}; FedML needs a value without spaces")
    for name in ("eid", "rank", "grpc_server_port"):
        if not row[name].isdecimal():
            raise ConfigError(f"{line}: {name} {shown(row[name])}: must be a whole number")
    host = row["grpc_server_ip"]
    if ":" in host and not host.startswith("["):
        raise ConfigError(f"{line}: grpc_server_ip {host!r}: FedML needs an IPv6 address in brackets, [{host}]")
    port = check_port(int(row["grpc_server_port"]), f"{line}: grpc_server_port")
    return int(row["eid"]), Place(host, port, line)


def server_address(settings: FedMLSettings) -> tuple[str, int]:
    """Where the server of a gRPC run listens. Raises as :func:`read_addresses`."""
    return read_addresses(settings)[0].address


def require_free_places(places: Mapping[int, Place], ranks: Iterable[int]) -> None:
    """Check that processes of this machine can listen at the places of some ranks.

    Raises:
        HostError: somebody else has a port, or the address is another machine's; the message has the rank and line.
    """
    for rank in ranks:
        place = places[rank]
        name = f"{place.line} (rank {rank}):"
        require_free(place.host, place.port, f"{name} grpc_server_ip", f"{name} grpc_server_port", _BY_HAND)
