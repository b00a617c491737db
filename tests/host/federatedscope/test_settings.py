"""One configuration, two readers; and runs that are none of our business."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fs_fwdllm.errors import ConfigError
from fs_fwdllm.host.federatedscope.settings import refuse_client_settings
from tests.host.federatedscope.federation import Federation, outcome_of, presplit, write_config
from tests.host.federatedscope.participants import Starter
from tests.host.fixtures import models, world
from tests.host.small import World, read_jsonl

__all__ = ["models", "world"]

_WRONG = {
    ("federate.total_round_nums", "3"): "federate.total_round_nums: unknown key (value 3); did you mean "
    "'federate.total_round_num'",
    ("fwdllm.probs", "3"): "did you mean 'fwdllm.probes'",
    ("federate.client_num", "2.7"): "federate.client_num: Input should be a valid integer, but the value is 2.7",
    ("fwdllm.estimator", "centrl"): "did you mean 'central'",
    ("fedprox.use", "True"): "fedprox.use True: federate.method",
    ("aggregator.robust_rule", "krum"): "aggregator.robust_rule 'krum': our servers aggregate scalars",
}


@pytest.mark.parametrize(("override", "said"), _WRONG.items(), ids=[key for key, _ in _WRONG])
def test_a_mistake_is_named(
    override: tuple[str, str], said: str, world: World, launcher: Starter, tmp_path: Path
) -> None:
    cfg = write_config(world, {"federate.method": "fedmezo", "data.type": presplit(world)})
    run = Federation(cfg, tmp_path, launcher).start_standalone(*override)
    assert run.wait() != 0
    assert said in run.text and "error: ConfigError" in run.text


def test_the_hook_checks_what_was_written_too(world: World, hooked: Starter, tmp_path: Path) -> None:
    cfg = write_config(world, {"federate.method": "fedmezo", "data.type": presplit(world)})
    run = Federation(cfg, tmp_path, hooked).start_standalone("federate.client_num", "2.7")
    assert run.wait() != 0
    assert "federate.client_num: Input should be a valid integer, but the value is 2.7" in run.text


def test_settings_of_single_clients_are_refused_and_not_ignored() -> None:
    refuse_client_settings(None)
    refuse_client_settings({})
    with pytest.raises(ConfigError, match=r"--client_cfg: .*client_1, client_2.*train.train_strategy"):
        refuse_client_settings({"client_2": {"train": {}}, "client_1": {}})


def _dolly(world: World, categories: int) -> dict[str, Any]:
    rows = [
        {"instruction": f"w{row % 50 + 3}", "context": "", "response": "w3 w4", "category": f"c{row % categories}"}
        for row in range(60)
    ]
    (world.root / "databricks-dolly-15k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"data.type": "dolly-15k@llm", "data.root": str(world.root)}


@pytest.mark.parametrize(("reader", "source"), [("own", "gsm8k_train.jsonl"), ("host", "gsm8k@llm")])
@pytest.mark.parametrize("splitter", ["lda", "meta"])
def test_data_without_categories_is_refused_where_the_host_would_loop(
    splitter: str, reader: str, source: str, world: World, launcher: Starter, tmp_path: Path
) -> None:
    rows = [{"question": f"w{row % 50 + 3}", "answer": "w3 #### 4"} for row in range(60)]
    (world.root / "gsm8k_train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    place = {"data.type": "gsm8k@llm", "data.root": str(world.root)}
    settings = {**place, "data.splitter": splitter, "fwdllm.data.reader": reader}
    cfg = write_config(world, {"federate.method": "fedmezo", **settings})
    run = Federation(cfg, tmp_path, launcher).start_standalone()
    assert run.wait() != 0
    assert f"{source}: data.splitter {splitter} groups " in run.text and "error: DataError" in run.text


@pytest.mark.parametrize("reader", ["own", "host"])
@pytest.mark.parametrize("splitter", ["lda", "meta"])
def test_fewer_categories_than_clients(
    splitter: str, reader: str, world: World, launcher: Starter, tmp_path: Path
) -> None:
    """The host's ``meta`` fails here; ours gives every client a part of a category, or leaves some without samples."""
    settings = {**_dolly(world, 2), "data.splitter": splitter, "federate.client_num": 4, "llm.tok_len": 96}
    settings["fwdllm.data.reader"] = reader
    federation = Federation(write_config(world, {"federate.method": "fedmezo", **settings}), tmp_path, launcher)
    run = federation.start_standalone()
    run.succeed()
    assert len(outcome_of(federation.folder("standalone")).digests) == 6


def test_the_hosts_own_trainer_is_left_alone(world: World, launcher: Starter, hooked: Starter, tmp_path: Path) -> None:
    """``fedavg`` with ``llmtrainer``: our registrations and ``train.train_strategy`` change no number."""
    settings = {
        "federate.method": "fedavg", "trainer.type": "llmtrainer", "data.type": "instructions.jsonl@llm",
        "data.root": str(world.root), "federate.share_local_model": True, "federate.total_round_num": 2,
        "federate.make_global_eval": False, "eval.freq": 1,
    }  # fmt: skip
    cfg = write_config(world, settings)
    strategy = ("train.train_strategy", "model-diff")
    stock = _STOCK.format(arguments=["--cfg", str(cfg), "outdir", str(tmp_path / "stock"), "expname", "run"])
    (tmp_path / "stock.yaml").write_text(_without_ours(cfg.read_text()))
    stock = stock.replace(str(cfg), str(tmp_path / "stock.yaml"))
    hooked.start([], tmp_path, name="stock", before=stock).succeed()
    federation = Federation(cfg, tmp_path, launcher)
    federation.start_standalone(*strategy, name="plain").succeed()
    assert not federation.folder("plain").exists()
    plain, expected = (tmp_path / name / "run" / "eval_results.log" for name in ("plain", "stock"))
    assert plain.read_text() == expected.read_text()
    assert "Results_weighted_avg" in plain.read_text()


#: The host's main with every registration of ours taken back.
_STOCK = """
import runpy, sys
import federatedscope.register as register
for name in dir(register):
    if name.endswith("_dict"):
        for key in [key for key in getattr(register, name) if str(key).startswith("fs_fwdllm")]:
            del getattr(register, name)[key]
sys.argv = ["federatedscope/main.py", *{arguments!r}]
runpy.run_path("federatedscope/main.py", run_name="__main__")
raise SystemExit(0)
"""


def _without_ours(text: str) -> str:
    import yaml

    tree = yaml.safe_load(text)
    for name in ("fwdllm", "threads"):
        tree.pop(name, None)
    return yaml.safe_dump(tree)


def test_presplit_data_for_the_hosts_own_trainer(world: World, launcher: Starter, tmp_path: Path) -> None:
    settings = {
        "federate.method": "fedavg", "trainer.type": "llmtrainer", "data.type": presplit(world),
        "federate.share_local_model": True, "federate.total_round_num": 2, "federate.make_global_eval": False,
        "eval.freq": 1,
    }  # fmt: skip
    federation = Federation(write_config(world, settings), tmp_path, launcher)
    federation.start_standalone().succeed()
    assert "Results_weighted_avg" in (tmp_path / "standalone" / "run" / "eval_results.log").read_text()


def test_every_clients_rate_is_in_the_report(world: World, launcher: Starter, tmp_path: Path) -> None:
    settings = {"federate.method": "fedavg", "trainer.type": "mezotrainer", "train.train_strategy": "random"}
    cfg = write_config(world, {**settings, "data.type": presplit(world), "fwdllm.strategy_span": 0.01})
    federation = Federation(cfg, tmp_path, launcher)
    federation.standalone()
    rounds = [line for line in read_jsonl(federation.folder("standalone") / "metrics.jsonl") if "learning_rate" in line]
    rates = [rate for line in rounds for rate in line["learning_rate"].values()]
    assert len(rates) == 12 and len(set(rates)) > 6
