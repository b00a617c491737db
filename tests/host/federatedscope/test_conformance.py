"""The same file and the same data: every host ends with the same bits, and counts the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.host.federatedscope.federation import Federation, presplit, write_config
from tests.host.federatedscope.participants import Starter
from tests.host.fixtures import models, world
from tests.host.small import World, read_jsonl

__all__ = ["models", "world"]

_MEZO = {"federate.method": "fedmezo", "trainer.type": "mezotrainer"}
_FORWARD = {"federate.method": "fedfwd", "trainer.type": "fwdtrainer", "fwdllm.probes": 3}

#: ``{case: settings}``; each combines several of what could differ between hosts.
CASES: dict[str, dict[str, Any]] = {
    "mezo": _MEZO,
    "forward gradients": _FORWARD,
    "mezo, decay, some clients, strategy": {
        **_MEZO, "train.optimizer.weight_decay": 0.01, "federate.sample_client_num": 2,
        "train.train_strategy": "round-wise", "fwdllm.strategy_span": 0.01, "federate.total_round_num": 5,
    },
    "forward gradients, momentum, some clients, schedule": {
        **_FORWARD, "fwdllm.server_momentum": 0.5, "federate.sample_client_num": 2,
        "train.scheduler.type": "cosine", "federate.total_round_num": 5,
    },
    "forward gradients, adam, some clients": {
        **_FORWARD, "fwdllm.server_optimizer": "adam", "fwdllm.server_betas": [0.9, 0.99], "train.optimizer.lr": 0.01,
        "federate.sample_client_num": 2,
    },
    "forward gradients along common directions, by vote": {
        **_FORWARD, "fwdllm.directions": "common", "fwdllm.robust.statistic": "krum", "fwdllm.robust.liars": 0.4,
    },
    "mezo in groups, decay, some clients": {
        **_MEZO, "fwdllm.directions": "groups", "fwdllm.direction_groups": 2, "train.optimizer.weight_decay": 0.01,
        "federate.sample_client_num": 3,
    },
    "a mixed fleet in parts": {
        **_FORWARD,
        "fwdllm.parts": [{"match": "lora_A", "slopes": "projected", "scalars": 7}, {"match": "*", "rate": 0.5}],
        "fwdllm.fleet": [{"clients": [2], "slopes": "projected", "scalars": 5}],
    },
    "mezo, a share of the clients": {**_MEZO, "federate.sample_client_rate": 0.5},
    "fedavg with our trainer, model-diff": {
        "federate.method": "fedavg", "trainer.type": "mezotrainer", "train.train_strategy": "model-diff",
        "fwdllm.strategy_span": 0.01, "fwdllm.probes": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_hosts_agree_on_every_bit_and_byte(case: str, world: World, launcher: Starter, tmp_path: Path) -> None:
    cfg = write_config(world, {"data.type": presplit(world), **CASES[case]})
    federation = Federation(cfg, tmp_path, launcher)
    expected = federation.local()
    assert len(set(expected.digests)) == len(expected.digests) - 1, "every round moves the parameters"
    assert federation.standalone() == expected
    assert federation.distributed() == expected


@pytest.mark.parametrize("kind", ["presplit@text", "texts.jsonl@text"])
def test_a_classifier_is_the_same_on_the_host(kind: str, world: World, launcher: Starter, tmp_path: Path) -> None:
    settings = {**_MEZO, "data.type": kind, "data.root": str(world.root)}
    if kind == "presplit@text":
        for client in (1, 2, 3):
            world.texts(12, f"client_{client}.jsonl")
    federation = Federation(write_config(world, settings, language_model=False), tmp_path, launcher)
    assert federation.standalone() == federation.local()


def test_how_results_are_asked_for_changes_nothing(world: World, launcher: Starter, tmp_path: Path) -> None:
    """Evaluation by clients sends them the parameters of the round; what they train on stays the same."""
    settings = {**_MEZO, "data.type": presplit(world), "federate.make_global_eval": False, "eval.freq": 2}
    federation = Federation(write_config(world, settings), tmp_path, launcher)
    expected, seen, apart = federation.local(), federation.standalone(), federation.distributed()
    assert seen.digests == apart.digests == expected.digests
    assert seen.traffic == apart.traffic


def test_a_rate_follows_from_who_takes_part(world: World, launcher: Starter, tmp_path: Path) -> None:
    """A server whose host has read its own rows only learns it as clients join."""
    rows = [{"question": f"w{row % 50 + 3}", "answer": "w3 #### 4"} for row in range(60)]
    (world.root / "gsm8k_train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (world.root / "gsm8k_test.jsonl").write_text(json.dumps(rows[0]) + "\n")
    settings = {
        **_FORWARD, "fwdllm.rate_for_trainables": 50, "data.type": "gsm8k@llm", "data.root": str(world.root),
        "fwdllm.data.reader": "host", "llm.tok_len": 256,
    }  # fmt: skip
    federation = Federation(write_config(world, settings), tmp_path, launcher)
    expected = federation.standalone()
    assert federation.distributed() == expected
    rates = [
        {rate for line in read_jsonl(federation.folder(name) / "metrics.jsonl") for rate in _rates(line)}
        for name in ("standalone", "server")
    ]
    assert rates[0] == rates[1] and max(rates[0]) < 0.01


def _rates(line: dict[str, Any]) -> list[float]:
    return list(line.get("learning_rate", {}).values())
