"""Every configuration file of the project loads, and means what its name says."""

from __future__ import annotations

from pathlib import Path

import pytest

from fs_fwdllm.config import load_config
from fs_fwdllm.method import check_combination

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
#: All of ours; those for FedML are in FedML's own form.
FILES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml") if path.parent.name != "fedml")


def test_there_are_files() -> None:
    assert {"demo.yaml", "fwd_alpaca.yaml", "federatedscope/mezo_gsm8k_iid.yaml"} <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_a_file_loads_with_a_method_and_settings_that_go_together(name: str) -> None:
    check_combination(load_config(CONFIGS / name))


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("federatedscope/")])
def test_the_published_settings_say_what_their_names_say(name: str) -> None:
    config = load_config(CONFIGS / name)
    way, *data, _ = Path(name).stem.split("_")
    splitter = Path(name).stem.rpartition("_")[2]
    assert config.method.name == {"mezo": "mezo", "backprop": "fedavg"}[way]
    assert config.data.splitter == splitter
    assert {"alpaca": "alpaca", "code_alpaca": "rosetta_alpaca", "dolly": "dolly-15k", "gsm8k": "gsm8k"}[
        "_".join(data)
    ] == config.data.type.removesuffix("@llm")
    assert config.fwdllm.upload == "scalars" and config.early_stop.patience == 0


@pytest.mark.parametrize("strategy", ["random", "round-wise", "five-round", "model-diff"])
def test_the_strategies_are_one_override_away(strategy: str) -> None:
    for name in ("mezo_alpaca_iid.yaml", "backprop_alpaca_iid.yaml"):
        check_combination(load_config(CONFIGS / "federatedscope" / name, ["train.train_strategy", strategy]))
