"""Block training inside FederatedScope: the local host's bits and bytes, frames in pieces, visits that end early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.host.federatedscope.federation import Federation, outcome_of, presplit, write_config
from tests.host.federatedscope.participants import Starter, wait_until
from tests.host.fixtures import models, world
from tests.host.small import World, read_jsonl
from tests.method.cybgd.settings import blocks

__all__ = ["models", "world"]

_BOUND_S = 120
_METHOD = {"federate.method": "fedcybgd", "trainer.type": "cybgdtrainer", "federate.total_round_num": 5}

CASES: dict[str, dict[str, Any]] = {
    "one block a round": {"fwdllm.blocks.schedule": "ascending"},
    "two blocks, bfloat16, int8 both ways, dropped layers": {
        "fwdllm.blocks.parallel_blocks": 2, "fwdllm.blocks.embeddings": "in", "fwdllm.base.compute_dtype": "bfloat16",
        "fwdllm.blocks.upload": "int8", "fwdllm.blocks.download.inactive": "int8",
        "fwdllm.blocks.download.drop_ratio": 0.5,
    },
    "base on the disk": {"fwdllm.base.stream": True, "fwdllm.blocks.norm": "in"},
    "state on the server": {"fwdllm.blocks.optimizer_state": "server", "fwdllm.blocks.schedule": "rotating"},
}  # fmt: skip

#: Python that runs in a participant first: texts are cut into pieces of 2000 bytes.
_SMALL_PIECES = """
import fs_fwdllm.host.federatedscope.transport as module
cut = module.split
def split(text):
    pieces = cut(text, 2000)
    if len(pieces) > 1:
        print(f"in {len(pieces)} pieces", flush=True)
    return pieces
module.split = split
"""

#: Python that runs in a client first: in its first visit it says so and waits for ever, with the block half trained.
_STUCK = """
import pathlib, time
from fs_fwdllm.method.cybgd.optimiser import BlockOptimizer
real = BlockOptimizer.take_step
def take_step(self, rate):
    real(self, rate)
    pathlib.Path({flag!r}).touch()
    time.sleep(600)
BlockOptimizer.take_step = take_step
"""


def _federation(world: World, launcher: Starter, root: Path, settings: dict[str, Any]) -> Federation:
    chosen = {"data.type": presplit(world), **blocks(), **_METHOD, "fwdllm.deadline_s": 600.0, **settings}
    return Federation(write_config(world, chosen), root, launcher)


@pytest.mark.parametrize("case", CASES)
def test_hosts_agree_on_every_bit_and_byte(case: str, world: World, launcher: Starter, tmp_path: Path) -> None:
    federation = _federation(world, launcher, tmp_path, CASES[case])
    expected = federation.local()
    assert len(set(expected.digests)) == len(expected.digests) - 1, "every round moves the parameters"
    assert federation.standalone() == expected
    assert federation.distributed() == expected


def test_large_frames_travel_in_pieces(world: World, launcher: Starter, tmp_path: Path) -> None:
    federation = _federation(world, launcher, tmp_path, CASES["one block a round"])
    server = federation.start_server(before=_SMALL_PIECES)
    clients = [federation.start_client(client, before=_SMALL_PIECES) for client in (1, 2, 3)]
    for participant in (server, *clients):
        assert " pieces" in participant.succeed(_BOUND_S)
    assert outcome_of(federation.folder("server")) == federation.local()


@pytest.mark.parametrize("case", CASES)
def test_evaluation_by_clients_changes_no_bit(case: str, world: World, launcher: Starter, tmp_path: Path) -> None:
    settings = {**CASES[case], "federate.make_global_eval": False, "eval.freq": 2}
    federation = _federation(world, launcher, tmp_path, settings)
    expected = federation.local()
    assert federation.standalone().digests == expected.digests
    if case == "one block a round":
        assert federation.distributed().digests == expected.digests


def test_a_block_whose_client_is_killed_is_visited_by_another(world: World, launcher: Starter, tmp_path: Path) -> None:
    """One visit a round: its round has no answer at all, and the run goes on; later turns of the client fail too."""
    settings = {"fwdllm.blocks.schedule": "ascending", "federate.total_round_num": 6}
    federation = _federation(world, launcher, tmp_path, settings)
    flag = tmp_path / "half trained"
    server = federation.start_server()
    clients = {
        client: federation.start_client(client, before=_STUCK.format(flag=str(flag)) if client == 2 else "")
        for client in (1, 2, 3)
    }
    wait_until(flag.exists, _BOUND_S, lambda: "client 2 was never asked")
    clients[2].kill()
    for participant in (server, clients[1], clients[3]):
        participant.succeed(_BOUND_S)
    lines = read_jsonl(federation.folder("server") / "metrics.jsonl")[1:-1]
    asked = [line["blocks"] for line in lines]
    failed = [index for index, line in enumerate(lines) if line["rejected"] == {"2": "no_answer"}]
    assert failed[0] == 1 and [line["rejected"] for index, line in enumerate(lines) if index not in failed] == [
        {} for _ in range(6 - len(failed))
    ]
    for index in failed:
        (block,) = asked[index].values()
        assert lines[index]["reassigned_blocks"] == [block] and lines[index]["digest"] == lines[index - 1]["digest"]
        if index + 1 < len(lines):
            assert asked[index + 1] == {"3": block}, "the next client visits it, first of all"
    assert min(lines[-1]["block_visits"]) >= 1


@pytest.mark.parametrize("stream", [False, True], ids=["in memory", "on the disk"])
def test_a_client_that_is_started_anew_goes_on_visiting(
    stream: bool, world: World, launcher: Starter, tmp_path: Path
) -> None:
    """It has lost what it held; the server learns that and sends it the visit it was asked for, in full."""
    settings = {**CASES["state on the server"], "federate.total_round_num": 6, "fwdllm.base.stream": stream}
    federation = _federation(world, launcher, tmp_path, settings)
    expected = federation.local()
    flag = tmp_path / "half trained"
    server = federation.start_server()
    stuck = (
        _STUCK.format(flag=str(flag))
        .replace("    real(self", "    visits.append(1)\n    real(self")
        .replace("    pathlib", "    if len(visits) < 4: return\n    pathlib")
        + "visits = []\n"
    )
    clients = {client: federation.start_client(client, before=stuck if client == 2 else "") for client in (1, 2, 3)}
    wait_until(flag.exists, _BOUND_S, lambda: "client 2 was not asked twice")
    clients[2].signal(19)  # SIGSTOP: its port stays open, so that the round waits for it
    clients[2].kill()
    again = federation.start_client(2, name="again")
    for participant in (server, clients[1], clients[3], again):
        participant.succeed(_BOUND_S)
    lines = read_jsonl(federation.folder("server") / "metrics.jsonl")[1:-1]
    rejected = [line["rejected"] for line in lines]
    assert set(map(str, rejected)) <= {"{}", "{'2': 'no_answer'}"} and rejected[-1] == {}
    if rejected == [{}] * 6:  # it was back before it was missed
        assert outcome_of(federation.folder("server")).digests == expected.digests
