"""Who takes part over TLS is who the certificates say, and nobody else is heard; a client must be configured alike."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fs_fwdllm.host.certificates import make_certificates
from fs_fwdllm.host.supervise import free_ports
from fs_fwdllm.host.tls import name_of
from tests.host.federatedscope.federation import Federation, outcome_of, presplit, write_config
from tests.host.federatedscope.participants import Participant, Starter
from tests.host.fixtures import models, world
from tests.host.small import World

__all__ = ["models", "world"]

pytest.importorskip("cryptography", reason="certificates are made with it: pip install 'fs-fwdllm[secure]'")

_BOUND_S = 90


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders of certificates for a server and two clients: ``ours``, and ``others`` of another authority."""
    folder = tmp_path_factory.mktemp("certificates")
    for authority in ("ours", "others"):
        make_certificates(folder / authority, clients=2, hosts=["127.0.0.1"])
    return folder


@dataclass
class SecureFederation:
    """A federation of two clients whose participants have certificates."""

    plain: Federation
    made: Path

    def keys(self, number: int, authority: str = "ours") -> list[object]:
        """The overrides that give a process a participant's certificate."""
        name, folder = name_of(number), self.made / authority
        files = {"ca": "ca.pem", "certificate": f"{name}.pem", "key": f"{name}.key"}
        return [word for key, file in files.items() for word in (f"fwdllm.tls.{key}", folder / file)]

    def server(self) -> Participant:
        return self.plain.start_server(*self.keys(0))

    def client(self, number: int, *more: object, authority: str = "ours", **named: Any) -> Participant:
        return self.plain.start_client(number, *self.keys(number, authority), *more, **named)

    def sends(self, to: int, who: str, senders: list[int], **hello: object) -> list[str]:
        """How a stranger's messages to a participant end, a join and an update for each sender that they claim.

        Args:
            who: with the certificate of whom, ``ours/client-1``; "" has none, and ``plain`` speaks no TLS.
            hello: what the join says otherwise than client 2 would.
        """
        said = {
            "client": 2, "samples": 3, "incarnation": 5, "digest": "00", "base": "", "settings": "",
            "host": "127.0.0.1", "port": 1, **hello,
        }  # fmt: skip
        source = _SENDS.format(
            who=who, port=self.plain.ports[to], name=name_of(to), senders=senders, hello=said, folder=str(self.made)
        )
        name = f"stranger{len(self.plain.starter.started)}"
        stranger = self.plain.starter.start([], self.plain.root, name=name, before=source)
        lines = stranger.succeed(_BOUND_S).splitlines()
        return [line.removeprefix("ends ") for line in lines if line.startswith("ends ")]


_SENDS = """
import grpc
from federatedscope.core.message import Message
from federatedscope.core.proto import gRPC_comm_manager_pb2_grpc as services
def read(name):
    with open({folder!r} + "/" + name, "rb") as file:
        return file.read()
who, address = {who!r}, "127.0.0.1:{port}"
own = (read(who + ".key"), read(who + ".pem")) if "/" in who else (None, None)
credentials = grpc.ssl_channel_credentials(read("ours/ca.pem"), *own)
options = [("grpc.ssl_target_name_override", {name!r})]
channel = (
    grpc.insecure_channel(address) if who == "plain" else grpc.secure_channel(address, credentials, options=options)
)
send = services.gRPCComServeFuncStub(channel).sendMessage
for sender in {senders!r}:
    for kind, content in (("join_in", {hello!r}), ("fwdllm_update", "AAAA")):
        try:
            send(Message(kind, sender, [0], 0, content).transform(), timeout=10)
            print("ends TAKEN", flush=True)
        except grpc.RpcError as error:
            print("ends", error.code().name, flush=True)
raise SystemExit(0)
"""


@pytest.fixture
def federation(world: World, launcher: Starter, made: Path, tmp_path: Path) -> SecureFederation:
    settings = {
        "federate.method": "fedmezo", "data.type": presplit(world, 2), "federate.client_num": 2,
        "federate.total_round_num": 2, "fwdllm.deadline_s": 60.0,
    }  # fmt: skip
    return SecureFederation(Federation(write_config(world, settings), tmp_path, launcher, clients=2), made)


def test_a_run_over_tls_ends_with_the_bits_of_any_other(federation: SecureFederation) -> None:
    """While others want to be heard: without TLS, without a certificate, with one of another authority, client 1 in
    the name of client 2 and of the server."""
    server = federation.server()
    server.says("Listen to", _BOUND_S)
    for who in ("plain", "", "others/client-2"):
        assert federation.sends(0, who, [2]) == ["UNAVAILABLE"] * 2, who
    assert federation.sends(0, "ours/client-1", [2, 0]) == ["PERMISSION_DENIED"] * 4
    assert federation.sends(0, "ours/client-1", [1], client=2) == ["TAKEN"] * 2
    assert federation.sends(0, "ours/client-1", [-1], client=0) == ["TAKEN"] * 2
    clients = [federation.client(number) for number in (1, 2)]
    for participant in (server, *clients):
        participant.succeed(_BOUND_S)
    assert outcome_of(federation.plain.folder("server")) == federation.plain.local()
    written = (federation.plain.folder("server") / "config.yaml").read_text()
    assert str(federation.made) not in written, "what a run is known by names no files: it may go on with renewed ones"
    assert "dropped a message with the certificate of 'client-1' that says it is of 'client-2'" in server.text
    assert "dropped a message with the certificate of 'client-1' that says it is of 'server'" in server.text
    assert "with the certificate of 'client-1' it asks to join as 'client-2'" in server.text
    assert "refused client 1: " in server.text, "who asks for a number gets that of its certificate"
    assert "refused client 2: " not in server.text and server.text.count("client 2 joined") == 1
    for reason in ("WRONG_VERSION_NUMBER", "PEER_DID_NOT_RETURN_A_CERTIFICATE", "CERTIFICATE_VERIFY_FAILED"):
        assert reason in server.text, "gRPC says it"


def test_who_is_not_believed_is_told_and_gives_up(federation: SecureFederation) -> None:
    """A client of another authority, and one without TLS."""
    server = federation.server()
    server.says("Listen to", _BOUND_S)
    other = federation.client(1, "fwdllm.deadline_s", 6, authority="others")
    plain = federation.plain.start_client(2, "fwdllm.deadline_s", 6)
    for number, refused in ((1, other), (2, plain)):
        assert refused.wait(_BOUND_S) != 0
        assert f"error: HostError: client {number}: the server's address 127.0.0.1" in refused.text
        assert "has taken nothing in within 6 s" in refused.text
    assert "was not delivered (the certificate there is refused here: unable to get local issuer cert" in other.text
    assert "joined" not in server.text


#: Listens in the place of the server with the certificate of a client.
_POSES = """
import grpc, time
from concurrent.futures import ThreadPoolExecutor
def read(name):
    with open({folder!r} + "/" + name, "rb") as file:
        return file.read()
own = [(read("ours/client-2.key"), read("ours/client-2.pem"))]
server = grpc.server(ThreadPoolExecutor(2))
server.add_secure_port("127.0.0.1:{port}", grpc.ssl_server_credentials(own, read("ours/ca.pem"), True))
server.start()
print("poses", flush=True)
time.sleep({bound})
"""


def test_a_client_is_not_taken_for_the_server(federation: SecureFederation) -> None:
    """Neither where the server is called, nor where it calls."""
    federation.plain.ports = free_ports(3)
    source = _POSES.format(folder=str(federation.made), port=federation.plain.ports[0], bound=_BOUND_S)
    posing = federation.plain.starter.start([], federation.plain.root, name="posing", before=source)
    posing.says("poses", _BOUND_S)
    client = federation.client(1, "fwdllm.deadline_s", 8)
    client.says("Listen to", _BOUND_S)
    assert federation.sends(1, "ours/client-2", [2, 0]) == ["PERMISSION_DENIED"] * 4
    assert client.wait(_BOUND_S) != 0
    assert "the certificate there is refused here: IP address mismatch" in client.text
    assert "a message with the certificate of 'client-2': nobody of that name is listened to here" in client.text


def test_files_that_do_not_fit_are_told_before_anything_is_loaded(federation: SecureFederation) -> None:
    started = {
        "error: ConfigError: fwdllm.tls.certificate and fwdllm.tls.key: not given": federation.plain.start_server(
            *federation.keys(0)[:2]
        ),
        "its common name is 'client-2', but is to be that of this process (client-1)": federation.client(
            1, *federation.keys(2)
        ),
    }
    for said, participant in started.items():
        assert participant.wait(_BOUND_S) != 0
        assert said in participant.text and "Traceback" not in participant.text


def test_a_client_that_is_configured_otherwise_is_told_and_the_others_go_on(federation: SecureFederation) -> None:
    server, client = federation.server(), federation.client(1)
    keys = {"fwdllm.estimator": "one_sided", "fwdllm.probes": 3, "fwdllm.radius": 0.5, "seed": 77}
    other = federation.client(2, *(word for pair in keys.items() for word in pair))
    assert other.wait(_BOUND_S) != 0
    refused = (
        "the server does not take this client: it is configured for other work than the server's in fwdllm.estimator "
        "(the server has 'central'), fwdllm.probes (the server has 1), fwdllm.radius (the server has"
    )
    assert f"error: HostError: client 2: {refused}" in other.text
    assert "seed (the server has another); give it the server's values" in other.text
    again = federation.client(2, name="again")
    for participant in (server, client, again):
        participant.succeed(_BOUND_S)
    assert f"refused client 2: {refused}" in server.text
    assert outcome_of(federation.plain.folder("server")).rejected == [{}, {}]
