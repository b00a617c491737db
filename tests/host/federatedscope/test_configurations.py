"""Our configuration files on this host: they load, have the published values, and run on ``local`` unchanged too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fs_fwdllm.running.local import run_file
from tests.host.federatedscope.participants import Starter
from tests.host.small import read_jsonl
from tests.model.tiny import save_tiny_model

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
#: Those meant for this host too; of the others, some leave the clients to the data, which the host does not allow.
FILES = sorted(str(path.relative_to(CONFIGS)) for path in [*CONFIGS.glob("*.yaml"), *CONFIGS.glob("federatedscope/*")])

#: Ours and the published file it has its values from; ``dynamic/`` differs from ``frozen/`` by one key.
PUBLISHED = {
    "mezo_alpaca_iid": "frozen/alpaca/alpaca_mezo_iid",
    "backprop_alpaca_iid": "frozen/alpaca/alpaca_bpbased_iid",
    "mezo_gsm8k_iid": "frozen/gsm8k/gsm8k_mezo_iid",
    "backprop_gsm8k_iid": "frozen/gsm8k/gsm8k_bpbased_iid",
    "mezo_dolly_meta": "frozen/dolly/dolly_mezo_meta",
    "backprop_dolly_meta": "frozen/dolly/dolly_bpbased_meta",
    "mezo_code_alpaca_lda": "frozen/code/code_mezo_lda",
    "backprop_code_alpaca_lda": "frozen/code/code_bpbased_lda",
}
STRATEGIES = ("frozen", "random", "round-wise", "five-round", "model-diff")
#: Keys that are ours to choose: where results go, and the name under which the method is asked for.
OWN = {"federate.save_to", "federate.method"}

#: Merges every file named in a JSON list into the host's configuration and writes the results as JSON.
_LOAD = """
import json
from pathlib import Path
from federatedscope.core.configs.config import global_cfg
from fs_fwdllm.host.federatedscope.settings import extend_host_config
extend_host_config(global_cfg)  # the host overwrote sections of ours, as the launcher knows
loaded = {}
for name in json.loads(Path("names.json").read_text()):
    node = global_cfg.clone()
    node.merge_from_file(name)
    node.assert_cfg()
    loaded[name] = node
plain = lambda value: {key: plain(item) for key, item in value.items()} if isinstance(value, dict) else value
Path("loaded.json").write_text(json.dumps(plain(loaded), default=str))
raise SystemExit
"""


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys and their values."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def load_in_host(launcher: Starter, folder: Path, files: list[Path]) -> list[dict[str, Any]]:
    """Every file's values in the host's configuration, defaults included."""
    (folder / "names.json").write_text(json.dumps([str(file) for file in files]))
    launcher.start([], folder, name="load", before=_LOAD).succeed()
    loaded = json.loads((folder / "loaded.json").read_text())
    return [flat(loaded[str(file)]) for file in files]


def test_every_file_loads_in_the_host(launcher: Starter, tmp_path: Path) -> None:
    files = [CONFIGS / name for name in FILES]
    for file, values in zip(files, load_in_host(launcher, tmp_path, files), strict=True):
        for key, value in flat(yaml.safe_load(file.read_text())).items():
            assert values[key] == value, f"{file.name}: {key}"


def test_ours_have_the_published_values(peer_home: Path, launcher: Starter, tmp_path: Path) -> None:
    published = peer_home / "federatedscope" / "llm" / "baseline"
    files = [published / f"{name}.yaml" for name in PUBLISHED.values()]
    theirs = load_in_host(launcher, tmp_path, files)
    ours = load_in_host(launcher, tmp_path, [CONFIGS / "federatedscope" / f"{name}.yaml" for name in PUBLISHED])
    for name, mine, published_values in zip(PUBLISHED, ours, theirs, strict=True):
        differing = {key for key in mine if mine[key] != published_values.get(key)}
        assert differing <= OWN, name


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_published_strategy_is_ours_with_one_override(strategy: str, peer_home: Path) -> None:
    folder = peer_home / "federatedscope" / "llm" / "baseline" / "dynamic"
    theirs = flat(yaml.safe_load((folder / f"alpaca_{strategy}.yaml").read_text()))
    theirs.setdefault("train.train_strategy", "frozen")
    ours = flat(yaml.safe_load((CONFIGS / "federatedscope" / "mezo_alpaca_iid.yaml").read_text()))
    ours["train.train_strategy"] = strategy
    assert {key for key, value in ours.items() if theirs.get(key, value) != value} <= OWN
    assert set(theirs) <= set(ours)


@pytest.fixture(scope="module")
def shrink(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that shrink an Alpaca run: a tiny model, sixty rows, three rounds."""
    root = tmp_path_factory.mktemp("alpaca")
    model = save_tiny_model(root / "model", "llama")
    rng = np.random.default_rng(4)

    def words() -> str:
        return " ".join(f"w{index}" for index in rng.integers(3, 100, 3))

    rows = [{"instruction": words(), "input": "", "output": words()} for _ in range(60)]
    (root / "alpaca_data.json").write_text(json.dumps(rows))
    overrides: dict[str, Any] = {
        "data.root": root, "model.type": f"{model}@huggingface_llm", "federate.total_round_num": 3,
        "federate.client_num": 3, "train.local_update_steps": 2, "llm.tok_len": 48, "eval.freq": 2,
    }  # fmt: skip
    return [str(part) for pair in overrides.items() for part in pair]


@pytest.mark.parametrize("name", ["fwd_alpaca.yaml", "mezo_alpaca.yaml"])
def test_one_file_serves_both_hosts(name: str, shrink: list[str], launcher: Starter, tmp_path: Path) -> None:
    here = launcher.start(
        ["--cfg", CONFIGS / name, *shrink, "outdir", tmp_path / "host", "expname", "run"], tmp_path, name="host"
    )
    run_file(CONFIGS / name, [*shrink, "outdir", str(tmp_path / "local"), "expname", "run"])
    here.succeed()
    for folder in (tmp_path / "host" / "run" / "fwdllm", tmp_path / "local" / "run"):
        _, *rounds, final = read_jsonl(folder / "metrics.jsonl")
        assert [line["round"] for line in rounds] == [1, 2, 3] and final["final"]
        assert [line.get("eval") is not None for line in rounds] == [False, True, True]
        assert len({line["digest"] for line in rounds}) == 3, "training moves the parameters"
        assert (folder / "adapter" / "adapter_model.safetensors").is_file()
