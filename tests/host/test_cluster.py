"""A server and its clients as processes of one command: started in order, watched, and ended together.

The laws of the supervision are shown with small stand-in programs; ``tests/host/federatedscope`` has the real ones.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fs_fwdllm.config.load import read_tree
from fs_fwdllm.errors import ConfigError, HostError
from fs_fwdllm.host.federatedscope import RUN_FOLDER
from fs_fwdllm.host.federatedscope.cluster import (
    Cluster,
    choose_ports,
    prepare,
    process_trees,
    read_deadline_s,
    run_cluster,
)
from fs_fwdllm.host.supervise import LOOPBACK

pytestmark = pytest.mark.slow

#: Reads its configuration, listens if it is the server, then does what ``behaviour`` says of its role.
_STAND_IN = """
import json, os, socket, sys, time, yaml
from pathlib import Path
tree = yaml.safe_load(Path(sys.argv[1]).read_text())
own, role = tree["distribute"], tree["distribute"]["role"]
print("the output dir is", tree["outdir"], flush=True)
behaviour = tree["behaviour"][role]
if role == "server" and behaviour != "never listen":
    door = socket.create_server((own["server_host"], own["server_port"]))
if role == "client":
    socket.create_connection((own["server_host"], own["server_port"]), 5).close()
if isinstance(behaviour, str):
    time.sleep(60)
time.sleep(0.3)
raise SystemExit(behaviour)
"""


def make(folder: Path, server: int | str, client: int | str, clients: int = 2) -> Cluster:
    ports = choose_ports(1 + clients)
    tree = {"outdir": str(folder / "here"), "behaviour": {"server": server, "client": client}}
    program = folder / "stand_in.py"
    program.write_text(_STAND_IN)
    return Cluster(folder, process_trees(tree, ports, folder), (sys.executable, str(program)))


def run(cluster: Cluster, deadline_s: float = 20.0) -> tuple[int, float]:
    started = time.monotonic()
    code = run_cluster(cluster, deadline_s)
    took_s = time.monotonic() - started
    assert not cluster.processes.running(), "something still runs"
    return code, took_s


def test_every_process_has_its_role_number_and_port(tmp_path: Path) -> None:
    tree = {"outdir": "o", "expname": "e", "federate": {"client_num": 2}, "distribute": {"grpc_compression": "gzip"}}
    trees = process_trees(tree, [7001, 7002, 7003], tmp_path)
    assert list(trees) == ["server", "client1", "client2"]
    assert [own["distribute"]["data_idx"] for own in trees.values()] == [0, 1, 2]
    assert {own["distribute"]["server_port"] for own in trees.values()} == {7001}
    assert trees["client2"]["distribute"]["client_port"] == 7003
    assert trees["server"]["distribute"]["role"] == "server" and trees["client1"]["distribute"]["role"] == "client"
    assert all(own["distribute"]["grpc_compression"] == "gzip" for own in trees.values())
    assert all(own["federate"] == {"client_num": 2, "mode": "distributed"} for own in trees.values())
    assert (trees["server"]["outdir"], trees["server"]["expname"]) == ("o", "e")
    assert (trees["client1"]["outdir"], trees["client1"]["expname"]) == (str(tmp_path), "client1")
    assert "mode" not in tree["federate"], "what was given is not changed"


def test_every_run_has_a_folder_of_its_own(tmp_path: Path) -> None:
    """Two runs of one name, at once or one after the other, must not read each other's configuration."""
    config = tmp_path / "c.yaml"
    config.write_text("federate: {client_num: 1}\n")
    arguments = [str(config), "outdir", str(tmp_path / "out"), "expname", "same"]
    first, second = prepare(arguments), prepare(arguments)
    (tmp_path / "out" / "same-3").mkdir()  # what a run of this name has left, its processes' folder being gone
    third = prepare(arguments)
    names = [cluster.trees["server"]["expname"] for cluster in (first, second, third)]
    assert names == ["same", "same-2", "same-4"]
    assert [cluster.folder.name for cluster in (first, second, third)] == [f"{name}_processes" for name in names]
    assert all(cluster.trees["client1"]["outdir"] == str(cluster.folder) for cluster in (first, second, third))


def test_an_output_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("federate: {client_num: 1}\n")
    with pytest.raises(ConfigError, match=r"outdir .*is a file, not a folder"):
        prepare([str(config), "outdir", str(config)])


def test_a_port_that_is_taken_is_named_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server((LOOPBACK, 0)) as door:
        port = door.getsockname()[1]
        monkeypatch.setenv("FS_FWDLLM_PORT", str(port - 1))
        with pytest.raises(HostError, match=rf"FS_FWDLLM_PORT {port - 1}: port {port}: something else listens"):
            choose_ports(2)


def test_the_error_of_a_process_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cluster = make(tmp_path, server=1, client="wait")
    (tmp_path / "stand_in.py").write_text("print('a line'); print('error: DataError: no rows'); raise SystemExit(1)")
    code, _ = run(cluster)
    assert code == 1
    said = capsys.readouterr().out
    assert said == f"error: server: DataError: no rows; its log is {tmp_path / 'server.log'}\n"


def test_a_run_ends_with_the_server(tmp_path: Path) -> None:
    cluster = make(tmp_path, server=0, client=0)
    code, _ = run(cluster)
    assert code == 0 and cluster.processes.ended() == {"server": 0, "client1": 0, "client2": 0}


def test_the_run_folder_is_ours_if_there_is_one(tmp_path: Path) -> None:
    cluster = make(tmp_path, server=0, client=0)
    run(cluster)
    assert cluster.run_folder() is None
    (tmp_path / "here" / RUN_FOLDER).mkdir(parents=True)
    assert cluster.run_folder() == tmp_path / "here" / RUN_FOLDER


def test_the_exit_code_is_the_servers_and_its_log_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, took_s = run(make(tmp_path, server=7, client="wait"))
    assert code == 7 and took_s < 15
    assert "server ended with exit code 7" in capsys.readouterr().out


def test_a_client_that_fails_ends_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, took_s = run(make(tmp_path, server="wait", client=3))
    assert code == 3 and took_s < 15
    assert "exit code 3" in capsys.readouterr().out


def test_a_server_that_never_listens_meets_the_deadline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cluster = make(tmp_path, server="never listen", client=0)
    code, took_s = run(cluster, deadline_s=1.0)
    assert code == 124 and took_s < 10
    assert "FS_FWDLLM_DEADLINE_S" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_every_process(number: signal.Signals, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("federate: {client_num: 2}\nbehaviour: {server: wait, client: wait}\n")
    (tmp_path / "stand_in.py").write_text(_STAND_IN)
    program = (
        "import sys; from fs_fwdllm.host.federatedscope.cluster import main;"
        "sys.exit(main(['c.yaml'], [sys.executable, 'stand_in.py']))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    folder = tmp_path / "exp" / "c_processes"
    until = time.monotonic() + 30
    while not (folder / "client2.log").is_file() or not (folder / "client2.log").read_text():
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130 and "interrupted" in said
    port = read_tree(folder / "server.yaml")["distribute"]["server_port"]
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), 1.0)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "CONFIG"),
        (["absent.yaml"], "absent.yaml"),
        (["c.yaml", "federate.client_num", "0"], "federate.client_num 0"),
        (["c.yaml", "federate.client_num", "many"], "federate.client_num 'many'"),
        (["c.yaml", "seed"], "pairs"),
    ],
)
def test_bad_arguments_are_named(
    arguments: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text("federate: {client_num: 2}\n")
    with pytest.raises(ConfigError, match=named):
        prepare(arguments)


@pytest.mark.parametrize(("name", "value"), [("PORT", "0"), ("PORT", "65535"), ("PORT", "x"), ("DEADLINE_S", "-1")])
def test_bad_environment_variables_are_named(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"FS_FWDLLM_{name}", value)
    with pytest.raises(ConfigError, match=f"FS_FWDLLM_{name} '{value}'"):
        choose_ports(3)
        read_deadline_s()


def test_ports_are_free_or_those_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(set(choose_ports(5))) == 5
    monkeypatch.setenv("FS_FWDLLM_PORT", "40100")
    assert choose_ports(3) == [40100, 40101, 40102]
