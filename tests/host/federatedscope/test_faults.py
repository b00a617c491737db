"""What ends, stalls, comes back or talks nonsense in a gRPC federation has a defined outcome, and nothing hangs."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from fs_fwdllm.host.addresses import is_own
from tests.host.federatedscope.federation import Federation, outcome_of, presplit, write_config
from tests.host.federatedscope.participants import Participant, Starter, wait_until
from tests.host.fixtures import models, world
from tests.host.small import World, read_jsonl
from tests.method.cybgd.settings import blocks
from tests.model.tiny import flip_a_bit

__all__ = ["models", "world"]

_BOUND_S = 90

#: Python that runs in a client first: in its ``turn``-th round it does ``then`` before it works.
_IN_ROUND = """
import os, pathlib, signal, time
import fs_fwdllm.host.federatedscope.client as module
real, rounds = module.answer, []
def answer(*arguments):
    rounds.append(1)
    if len(rounds) == {turn}:
        {then}
    return real(*arguments)
module.answer = answer
"""


def _waits_for(flag: Path, turn: int) -> str:
    reached = f"pathlib.Path({str(flag) + '.reached'!r}).touch()"
    return _IN_ROUND.format(
        turn=turn, then=f"{reached}\n        while not os.path.exists({str(flag)!r}): time.sleep(0.02)"
    )


def _reached(flag: Path) -> None:
    wait_until(Path(f"{flag}.reached").exists, _BOUND_S, lambda: f"nobody waits for {flag.name}")


@pytest.fixture
def flag(tmp_path: Path) -> Path:
    """A file that lets a waiting client go on."""
    return tmp_path / "go"


def _federation(world: World, launcher: Starter, root: Path, clients: int = 3, **settings: Any) -> Federation:
    chosen = {
        "federate.method": "fedmezo", "data.type": presplit(world, clients), "federate.client_num": clients,
        "fwdllm.deadline_s": 60.0, **{key.replace("__", "."): value for key, value in settings.items()},
    }  # fmt: skip
    return Federation(write_config(world, chosen), root, launcher, clients=clients)


def _start(federation: Federation, before: dict[int, str]) -> tuple[Participant, dict[int, Participant]]:
    server = federation.start_server()
    clients = range(1, federation.clients + 1)
    return server, {client: federation.start_client(client, before=before.get(client, "")) for client in clients}


def test_a_client_killed_in_a_round_is_left_out(world: World, launcher: Starter, tmp_path: Path, flag: Path) -> None:
    federation = _federation(world, launcher, tmp_path, fwdllm__deadline_s=600.0)
    server, clients = _start(federation, {3: _waits_for(flag, turn=2)})
    _reached(flag)
    clients[3].kill()
    server.succeed(_BOUND_S)  # long before the deadline: a process that has ended is noticed
    clients[1].succeed(_BOUND_S)
    clients[2].succeed(_BOUND_S)
    assert outcome_of(federation.folder("server")).rejected == [{}, *[{"3": "no_answer"}] * 3]


def test_a_client_that_stalls_misses_its_deadline_and_comes_back(
    world: World, launcher: Starter, tmp_path: Path
) -> None:
    stops_itself = _IN_ROUND.format(turn=2, then="os.kill(os.getpid(), signal.SIGSTOP)")
    federation = _federation(world, launcher, tmp_path, clients=2, fwdllm__deadline_s=12.0, federate__total_round_num=3)
    server, clients = _start(federation, {2: stops_itself})
    server.says("was not delivered", _BOUND_S)  # the third round's work, while the second one's deadline is over
    clients[2].signal(signal.SIGCONT)
    server.succeed(_BOUND_S)
    clients[1].succeed(_BOUND_S)
    clients[2].succeed(_BOUND_S)
    assert outcome_of(federation.folder("server")).rejected == [{}, {"2": "no_answer"}, {}]
    assert "came late or unasked" in server.text


def test_too_few_answers_stop_the_run_for_everybody(
    world: World, launcher: Starter, tmp_path: Path, flag: Path
) -> None:
    federation = _federation(world, launcher, tmp_path, clients=2, fwdllm__min_answers=2)
    server, clients = _start(federation, {2: _waits_for(flag, turn=2)})
    _reached(flag)
    clients[2].kill()
    assert server.wait(_BOUND_S) != 0
    assert "error: TrainingStalledError: round 2: 1 client answered, but 2 are needed" in server.text
    assert clients[1].wait(_BOUND_S) != 0
    assert "error: HostError: client 1: the server has stopped: TrainingStalledError" in clients[1].text


def test_too_few_clients_stop_the_run(world: World, launcher: Starter, tmp_path: Path) -> None:
    federation = _federation(world, launcher, tmp_path, clients=2, fwdllm__deadline_s=6.0, fwdllm__min_answers=2)
    server, client = federation.start_server(), federation.start_client(1)
    assert server.wait(_BOUND_S) != 0
    assert "clients joined within 6 s (fwdllm.deadline_s), but 2 are needed" in server.text
    assert client.wait(_BOUND_S) != 0
    assert "error: HostError: client" in client.text


def test_a_restarted_client_rejoins_and_catches_up(world: World, launcher: Starter, tmp_path: Path, flag: Path) -> None:
    federation = _federation(world, launcher, tmp_path, federate__total_round_num=5)
    blocked = tmp_path / "never"
    server, clients = _start(federation, {1: _waits_for(flag, turn=3), 3: _waits_for(blocked, turn=2)})
    _reached(blocked)
    clients[3].kill()
    _reached(flag)
    again = federation.start_client(3, name="again")
    server.says("client 3 is here again", _BOUND_S)
    flag.touch()
    for participant in (server, clients[1], clients[2], again):
        participant.succeed(_BOUND_S)
    rejected = outcome_of(federation.folder("server")).rejected
    assert rejected[1] == {"3": "no_answer"}
    assert rejected[0] == rejected[3] == rejected[4] == {}, "it follows the server's bits, or it would be refused"


@pytest.mark.parametrize(
    "settings",
    [
        {"federate.method": "fedfwd", "fwdllm.server_momentum": 0.5},
        # two visits a round, so that each client is asked in every round; trained blocks are in files of the first run
        {**blocks(parallel_blocks=2), "trainer.type": "cybgdtrainer", "fwdllm.base.stream": True},
    ],
    ids=["momentum", "blocks on the disk"],
)
def test_a_restarted_server_ends_where_the_uninterrupted_one_does(
    settings: dict[str, Any], world: World, launcher: Starter, tmp_path: Path, flag: Path
) -> None:
    federation = _federation(world, launcher, tmp_path, clients=2, **settings)
    expected = federation.local()
    server, clients = _start(federation, {1: _waits_for(flag, turn=3)})
    _reached(flag)
    server.kill()
    flag.touch()
    again = federation.start_server("federate.restore_from", federation.folder("server"), name="again")
    for participant in (again, *clients.values()):
        participant.succeed(_BOUND_S)
    lines = read_jsonl(federation.folder("again") / "metrics.jsonl")
    assert [line["round"] for line in lines] == [3, 4, 4]
    assert [line["digest"] for line in lines] == expected.digests[-3:]
    finished = federation.start_standalone("federate.restore_from", federation.folder("again"), name="finished")
    assert finished.wait(_BOUND_S) != 0
    assert "that run has finished; nothing is left to do" in finished.text


def test_clients_give_up_on_a_server_that_stays_away(
    world: World, launcher: Starter, tmp_path: Path, flag: Path
) -> None:
    federation = _federation(world, launcher, tmp_path, clients=1, fwdllm__deadline_s=10.0)
    server, clients = _start(federation, {1: _waits_for(flag, turn=2)})
    _reached(flag)
    server.kill()
    since = time.monotonic()
    flag.touch()
    assert clients[1].wait(_BOUND_S) != 0
    assert time.monotonic() - since > 9
    assert "has taken nothing in within 10 s (fwdllm.deadline_s)" in clients[1].text
    assert "federate.restore_from" in clients[1].text


def test_a_port_that_is_taken_is_refused(world: World, launcher: Starter, tmp_path: Path) -> None:
    federation = _federation(world, launcher, tmp_path, clients=1)
    first = federation.start_server()
    first.says("Listen to", _BOUND_S)
    second = federation.start_server(name="second")
    assert second.wait(_BOUND_S) != 0
    assert "error: HostError: distribute.server_port" in second.text
    assert first.poll() is None


#: What a stranger sends to everybody; a field that is unpickled leaves a file behind.
_NONSENSE = """
import base64, pickle, socket, grpc
from federatedscope.core.message import Message
from federatedscope.core.proto import gRPC_comm_manager_pb2 as protocol, gRPC_comm_manager_pb2_grpc as services

class Bomb:
    def __reduce__(self):
        return open, ({trace!r}, "w")

bomb = base64.b64encode(pickle.dumps(Bomb())).decode()
hello = dict(client=1, samples=3, incarnation=5, digest="00", base="", settings="", host="127.0.0.1", port=1)
piece = "fwdllm-piece " + "0" * 32
pieces = [piece, f"{{piece}} 0 2 300 abc", f"{{piece}} 1 2 300 "]
contents = [bomb, *pieces, [5, {{"w": bomb}}], {{"w": bomb}}, 3, 0.5, "@", "", {{1: 2}}, [], {{**hello, "client": 99}},
            {{**hello, "digest": "zz"}}, {{**hello, "base": 3}}, {{**hello, "client": bomb}},
            {{**hello, "port": 70000}}, {{"client": 1}}]
kinds = ["model_para", "ss_model_para", "evaluate", "join_in", "join_in_info", "address", "ask_for_join_in_info",
         "metrics", "assign_client_id", "fwdllm_work", "fwdllm_update", "fwdllm_evaluate", "no such type", ""]
for port in {ports!r}:
    with socket.create_connection(("127.0.0.1", port)) as raw:
        raw.sendall(bytes(range(256)) * 40)
    with grpc.insecure_channel(f"127.0.0.1:{{port}}") as channel:
        send = services.gRPCComServeFuncStub(channel).sendMessage
        for kind in kinds:
            for content in contents:
                if kind == "assign_client_id" and content == 3:
                    continue  # that one is well formed, and nobody is asked for a password
                send(Message(kind, 7, [0], 1, content).transform(), timeout=20)
        send(protocol.MessageRequest(), timeout=20)
        send(Message({{"a": 1}}, 7, [0], 1, 3).transform(), timeout=20)
        send(Message("metrics", "seven", [0], 1, 3).transform(), timeout=20)
        send(Message("fwdllm_update", 1, [0], 77, "AAAA").transform(), timeout=20)
raise SystemExit(0)
"""


def test_nonsense_is_dropped_and_nothing_is_unpickled(
    world: World, launcher: Starter, tmp_path: Path, flag: Path
) -> None:
    federation = _federation(world, launcher, tmp_path, clients=2)
    expected = federation.local()
    server, clients = _start(federation, {1: _waits_for(flag, turn=2)})
    _reached(flag)
    trace = tmp_path / "unpickled"
    nonsense = _NONSENSE.format(trace=str(trace), ports=federation.ports)
    launcher.start([], tmp_path, name="stranger", before=nonsense).succeed(_BOUND_S)
    flag.touch()
    for participant in (server, *clients.values()):
        participant.succeed(_BOUND_S)
        assert "dropped a message of type 'model_para'" in participant.text
        assert "dropped a piece of a fwdllm_update message of 7, which is not waited for" in participant.text
    assert not trace.exists()
    assert outcome_of(federation.folder("server")) == expected


def test_nonsense_before_the_start_is_dropped_too(world: World, launcher: Starter, tmp_path: Path) -> None:
    federation = _federation(world, launcher, tmp_path, clients=1)
    server = federation.start_server()
    server.says("Listen to", _BOUND_S)
    nonsense = _NONSENSE.format(trace=str(tmp_path / "unpickled"), ports=federation.ports[:1])
    launcher.start([], tmp_path, name="stranger", before=nonsense).succeed(_BOUND_S)
    federation.start_client(1).succeed(_BOUND_S)
    server.succeed(_BOUND_S)
    assert not (tmp_path / "unpickled").exists()


#: Sends what nobody wants, fifty times a second, until nobody listens any more.
_FLOOD = """
import time, grpc
from federatedscope.core.message import Message
from federatedscope.core.proto import gRPC_comm_manager_pb2_grpc as services
channel = grpc.insecure_channel("127.0.0.1:{port}")
send = services.gRPCComServeFuncStub(channel).sendMessage
try:
    while True:
        send(Message("no such type", 7, [0], 1, 3).transform(), timeout=20)
        time.sleep(0.02)
except grpc.RpcError:
    raise SystemExit(0)
"""


def test_a_flood_of_foreign_messages_does_not_put_off_a_deadline(
    world: World, launcher: Starter, tmp_path: Path
) -> None:
    federation = _federation(world, launcher, tmp_path, clients=2, fwdllm__deadline_s=8.0, federate__total_round_num=2)
    server, clients = _start(federation, {2: _waits_for(tmp_path / "never", turn=1)})
    server.says("client 2 joined", _BOUND_S)
    flood = launcher.start([], tmp_path, name="flood", before=_FLOOD.format(port=federation.ports[0]))
    server.succeed(_BOUND_S)
    clients[1].succeed(_BOUND_S)
    flood.succeed(_BOUND_S)
    assert "dropped a message of type 'no such type' from 7 (100 such by now)" in server.text
    assert outcome_of(federation.folder("server")).rejected == [{"2": "no_answer"}] * 2


#: Sends what strangers may, as fast as it goes, to everybody who listens, until nobody does; says how many it sent.
_STRANGERS = """
import itertools, os, threading, grpc
from federatedscope.core.message import Message
from federatedscope.core.proto import gRPC_comm_manager_pb2_grpc as services
piece = "fwdllm-piece " + "0" * 32
hello = dict(client=99, samples=3, incarnation=5, digest="00", base="", settings="", host="127.0.0.1", port=1)
contents = [3, "@", "x" * 65536, f"{{piece}} 0 2 300000 " + "y" * 4096, hello]
kinds = ["no such type", "fwdllm_update", "fwdllm_work", "metrics", "join_in", "model_para"]
messages = [Message(kind, sender, [0], state, content).transform() for kind, content, sender, state
            in itertools.product(kinds, contents, (7, 99), (0, 1, 5))]
sent = []
def flood(port):
    send = services.gRPCComServeFuncStub(grpc.insecure_channel(f"127.0.0.1:{{port}}")).sendMessage
    for message in itertools.cycle(messages):
        try:
            send(message, timeout=20)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                return
        sent.append(1)
floods = [threading.Thread(target=flood, args=(port,)) for port in {ports}]
[one.start() for one in floods], [one.join() for one in floods]
print(f"sent {{len(sent)}}")
raise SystemExit(0)
"""
#: A client that takes its time, so that a run lasts a second for every two rounds.
_SLOW = """
import time
import fs_fwdllm.host.federatedscope.client as module
real = module.answer
def answer(*arguments):
    time.sleep(0.5)
    return real(*arguments)
module.answer = answer
"""
#: Rounds of the run that strangers flood; FLOODED_ROUNDS=120 is a flood of a minute.
_FLOODED_ROUNDS = int(os.environ.get("FLOODED_ROUNDS", "6"))


def test_a_run_that_strangers_flood_ends_as_one_without_them(world: World, launcher: Starter, tmp_path: Path) -> None:
    federation = _federation(world, launcher, tmp_path, clients=2, federate__total_round_num=_FLOODED_ROUNDS)
    expected = federation.local()
    server, clients = _start(federation, {1: _SLOW})
    server.says("client 2 joined", _BOUND_S)
    strangers = _STRANGERS.format(ports=list(federation.ports))
    flood = launcher.start([], tmp_path, name="flood", before=strangers)
    for participant in (server, *clients.values()):
        participant.succeed(_BOUND_S + _FLOODED_ROUNDS)
    sent = int(flood.succeed(_BOUND_S).split("sent ")[1].split()[0])
    assert sent > 100 * _FLOODED_ROUNDS / 2, "a flood"
    print(f"{sent} messages of strangers in {_FLOODED_ROUNDS} rounds")
    assert outcome_of(federation.folder("server")) == expected


#: Asks to be taken in as a client that the run does not have, and says how often it is called back.
_INTRUDER = """
import socket, grpc
from federatedscope.core.message import Message
from federatedscope.core.proto import gRPC_comm_manager_pb2_grpc as services
door = socket.create_server(("127.0.0.1", 0))
place = dict(host="127.0.0.1", port=door.getsockname()[1])
hello = dict(client=99, samples=3, incarnation=5, digest="00", base="", settings="", **place)
with grpc.insecure_channel("127.0.0.1:{port}") as channel:
    services.gRPCComServeFuncStub(channel).sendMessage(Message("join_in", 7, [0], 1, hello).transform(), timeout=20)
door.settimeout(3)
try:
    door.accept()
except TimeoutError:
    print("nobody called")
raise SystemExit(0)
"""


def test_nobody_is_called_at_an_address_of_a_strangers_choice(world: World, launcher: Starter, tmp_path: Path) -> None:
    """A client that the server does not have gives up by itself."""
    federation = _federation(world, launcher, tmp_path, clients=2, fwdllm__deadline_s=15.0)
    server = federation.start_server("federate.client_num", 1, "fwdllm.deadline_s", 120.0)
    server.says("Listen to", _BOUND_S)
    intruder = launcher.start([], tmp_path, name="intruder", before=_INTRUDER.format(port=federation.ports[0]))
    unwanted = federation.start_client(2)
    assert "nobody called" in intruder.succeed(_BOUND_S)
    server.says("refused client 99: this run has clients 1 to 1 (federate.client_num)", _BOUND_S)
    assert unwanted.wait(_BOUND_S) != 0
    assert "error: HostError: client 2: the server at 127.0.0.1" in unwanted.text
    assert "may be more than the server's federate.client_num" in unwanted.text


def test_clients_give_up_on_a_server_that_is_stopped(
    world: World, launcher: Starter, tmp_path: Path, flag: Path
) -> None:
    """Its port is open, but nobody takes in what arrives there."""
    federation = _federation(world, launcher, tmp_path, clients=1, fwdllm__deadline_s=8.0)
    server, clients = _start(federation, {1: _waits_for(flag, turn=2)})
    _reached(flag)
    server.signal(signal.SIGSTOP)
    flag.touch()
    assert clients[1].wait(_BOUND_S) != 0
    assert "error: HostError: client 1: the server's address" in clients[1].text


_BREAKS = """
import fs_fwdllm.running.driver as module
def close_round(self):
    raise RuntimeError("a fault of the test")
module.RunDriver.close_round = close_round
"""


def test_an_error_of_any_kind_is_told_to_everybody(world: World, launcher: Starter, tmp_path: Path) -> None:
    federation = _federation(world, launcher, tmp_path, clients=1)
    server, client = federation.start_server(before=_BREAKS), federation.start_client(1)
    assert server.wait(_BOUND_S) != 0
    last = server.text.splitlines()[-1]
    assert last.startswith("error: HostError: FederatedScope stops with RuntimeError: a fault of the test")
    assert client.wait(_BOUND_S) != 0
    assert "the server has stopped: RuntimeError: a fault of the test" in client.text


#: A message is lost on the way, so that nobody ever says anything again.
_SILENCE = "import fs_fwdllm.host.federatedscope.members as module; module.MemberServer._admit = lambda *_: None"


def test_a_simulation_that_stands_still_is_no_success(world: World, launcher: Starter, tmp_path: Path) -> None:
    federation = _federation(world, launcher, tmp_path, clients=1)
    run = federation.start_standalone(before=_SILENCE)
    assert run.wait(_BOUND_S) != 0
    assert "error: HostError: FederatedScope has returned before the run was over" in run.text


@pytest.mark.parametrize("reader", ["own", "host"])
def test_a_run_in_which_nobody_has_work_is_an_error_at_once(
    reader: str, world: World, launcher: Starter, tmp_path: Path
) -> None:
    """``llm.tok_len`` cuts off every answer: neither success without a round, nor waiting without an end."""
    settings = {"federate.client_num": 1, "data.type": "instructions.jsonl@llm", "data.root": str(world.root)}
    more = {"llm.tok_len": 3, "fwdllm.data.reader": reader, "federate.method": "fedmezo", "fwdllm.deadline_s": 60.0}
    federation = Federation(write_config(world, {**settings, **more}), tmp_path, launcher, clients=1)
    together, server, client = federation.start_standalone(), federation.start_server(), federation.start_client(1)
    for participant in (together, server):
        assert participant.wait(_BOUND_S) != 0
        assert "error: DataError: " in participant.text and "llm.tok_len" in participant.text
    assert client.wait(_BOUND_S) != 0
    assert "error: " in client.text and "DataError: " in client.text


@pytest.mark.parametrize(("host", "bind"), [("::1", ""), ("127.0.0.1", "0.0.0.0")])
def test_addresses_of_every_form(host: str, bind: str, world: World, launcher: Starter, tmp_path: Path) -> None:
    """IPv6, names, and listening apart from where others call."""
    if ":" in host + bind and not is_own("::1"):
        pytest.skip("this machine has no IPv6 loopback address")
    federation = _federation(world, launcher, tmp_path, clients=1, federate__total_round_num=1)
    more = ["distribute.server_host", host, *(["fwdllm.bind_host", bind] if bind else [])]
    server, client = federation.start_server(*more), federation.start_client(1, *more, "distribute.client_host", host)
    server.succeed(_BOUND_S)
    client.succeed(_BOUND_S)
    assert outcome_of(federation.folder("server")) == federation.local()


def test_an_address_that_cannot_be_is_named_before_anything_is_loaded(
    world: World, launcher: Starter, tmp_path: Path
) -> None:
    federation = _federation(world, launcher, tmp_path, clients=1)
    elsewhere = federation.start_server("distribute.server_host", "192.0.2.7", name="elsewhere")
    unknown = federation.start_client(1, "distribute.server_host", "no-such-machine.invalid", name="unknown")
    wildcard = ("distribute.server_host", "192.0.2.7", "distribute.client_host", "0.0.0.0")
    unreachable = federation.start_client(1, *wildcard, name="unreachable")
    for participant, said in (
        (elsewhere, "error: HostError: distribute.server_host '192.0.2.7': is not an address of this machine"),
        (unknown, "error: HostError: distribute.server_host 'no-such-machine.invalid': no address is known"),
        (unreachable, "error: ConfigError: distribute.client_host '0.0.0.0'"),
    ):
        assert participant.wait(_BOUND_S) != 0
        assert said in participant.text and "Traceback" not in participant.text


def test_a_client_with_another_base_is_told_and_the_others_go_on(
    world: World, launcher: Starter, tmp_path: Path
) -> None:
    """One bit in the middle of its weights: nothing of the size, the names or either end of the file says so."""
    federation = _federation(world, launcher, tmp_path, clients=2, federate__total_round_num=2, fwdllm__deadline_s=20.0)
    folder = flip_a_bit(shutil.copytree(world.model("llama"), tmp_path / "other"))
    server, client = federation.start_server(), federation.start_client(1)
    other = federation.start_client(2, "model.type", f"{folder}@huggingface_llm")
    assert other.wait(_BOUND_S) != 0
    assert "error: HostError: client 2: the server does not take this client: its base model is another" in other.text
    assert "give it a copy of the same folder" in other.text
    again = federation.start_client(2, name="again")  # with the server's
    for participant in (server, client, again):
        participant.succeed(_BOUND_S)
    assert "refused client 2" in server.text
    assert outcome_of(federation.folder("server")).rejected == [{}, {}]
