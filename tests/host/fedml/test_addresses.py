"""FedML's table of addresses: whatever is wrong with it is named with its line, and nothing is invented."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from fs_fwdllm.config import parse_config
from fs_fwdllm.errors import ConfigError, HostError
from fs_fwdllm.host.fedml.addresses import read_addresses, require_free_places, server_address
from fs_fwdllm.host.fedml.settings import FedMLSettings

_HEAD = "eid,rank,grpc_server_ip,grpc_server_port"


def _settings(path: object, workers: int = 2) -> FedMLSettings:
    return FedMLSettings({"backend": "GRPC", "grpc_ipconfig_path": path, "worker_num": workers}, parse_config({}), 60.0)


def _table(folder: Path, *lines: str, head: str = _HEAD) -> FedMLSettings:
    path = folder / "grpc.csv"
    path.write_text("".join(f"{line}\n" for line in (head, *lines)), encoding="utf-8")
    return _settings(str(path))


def test_a_table_says_where_every_rank_listens(tmp_path: Path) -> None:
    settings = _table(tmp_path, "2,2,10.0.0.3,9102", "0,0,a.example,9100", "1,1,[::1],9101")
    places = read_addresses(settings)
    assert {rank: place.address for rank, place in places.items()} == {
        0: ("a.example", 9100), 1: ("[::1]", 9101), 2: ("10.0.0.3", 9102),
    }  # fmt: skip
    assert server_address(settings) == ("a.example", 9100)
    extra = _table(tmp_path, "0,0,a,1,", "1,1,b,2,c", "2,2,d,3", head=f"{_HEAD},ingress_ip")
    assert len(read_addresses(extra)) == 3


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ((), "has no column 'eid'"),
        (("0,0,a,1", "1,1,b,2"), r"has no line for rank 2 \(worker_num is 2\)"),
        (("1,1,b,2", "2,2,c,3"), r"has no line for the server \(eid 0\)"),
        (("0,0,a,1", "1,1,b,2", "1,1,c,3"), "line 4: rank 1 has a line already"),
        (("0,0,a,1", "1,1,a,1", "2,2,c,3"), "line 3: rank 1 has the address of rank 0, a:1"),
        (("0,0,a,1", "1,1,b,port", "2,2,c,3"), "line 3: grpc_server_port 'port': must be a whole number"),
        (("0,0,a,70000", "1,1,b,2", "2,2,c,3"), "line 2: grpc_server_port 70000: must be a port"),
        (("0,0,a,1", "1,1, b,2", "2,2,c,3"), "line 3: grpc_server_ip is ' b'; FedML needs a value without spaces"),
        (("0,0,a,1", "1,1,,2", "2,2,c,3"), "line 3: grpc_server_ip is ''"),
        (("0,0,a,1", "1,1", "2,2,c,3"), "line 3: grpc_server_ip is ''"),
        (("0,0,::1,1", "1,1,b,2", "2,2,c,3"), r"line 2: .*in brackets, \[::1\]"),
        (("-1,0,a,1", "1,1,b,2", "2,2,c,3"), "line 2: eid '-1': must be a whole number"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(lines: tuple[str, ...], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"grpc_ipconfig_path.*{said}"):
        read_addresses(_table(tmp_path, *lines))


@pytest.mark.parametrize("head", ["receiver_id,ip", "eid, rank, grpc_server_ip, grpc_server_port", ""])
def test_another_table_is_not_guessed_at(head: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no column"):
        read_addresses(_table(tmp_path, "0,127.0.0.1", head=head))


def test_a_table_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary.csv").write_bytes(bytes(range(256)))
    for path in (None, "", [1], str(tmp_path / "absent.csv"), str(tmp_path), str(tmp_path / "binary.csv")):
        with pytest.raises(ConfigError, match="grpc_ipconfig_path"):
            read_addresses(_settings(path))


def test_a_port_that_is_taken_names_rank_and_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as door:
        port = door.getsockname()[1]
        places = read_addresses(_table(tmp_path, "0,0,192.0.2.7,9100", f"1,1,127.0.0.1,{port}", "2,2,127.0.0.1,1"))
        with pytest.raises(HostError, match=rf"line 3 \(rank 1\): grpc_server_port {port}: something else listens"):
            require_free_places(places, [1])
        with pytest.raises(HostError, match=r"line 2 \(rank 0\): grpc_server_ip '192\.0\.2\.7': is not an address of"):
            require_free_places(places, [0])
