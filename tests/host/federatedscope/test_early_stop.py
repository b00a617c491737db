"""Early stopping against the host's own, and the best round inside the host against ``local``'s."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fs_fwdllm.config.host_sections import EarlyStopConfig
from fs_fwdllm.running.choice import is_time_to_stop
from tests.host.federatedscope.federation import Federation, presplit, write_config
from tests.host.federatedscope.participants import Starter
from tests.host.fixtures import models, world
from tests.host.small import World, read_jsonl

__all__ = ["models", "world"]

_FINITE = st.floats(min_value=-10, max_value=10).map(lambda value: round(value, 2))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(_FINITE, min_size=1, max_size=12),
    patience=st.integers(0, 4),
    delta=st.sampled_from([0.0, 0.5]),
    mode=st.sampled_from(["best", "mean"]),
    larger=st.booleans(),
)
def test_a_run_ends_where_federatedscope_would_end_it(
    host_home: Path, values: list[float], patience: int, delta: float, mode: str, larger: bool
) -> None:
    path = host_home / "federatedscope" / "core" / "monitors" / "early_stopper.py"
    spec = importlib.util.spec_from_file_location("early_stopper", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    hosts = module.EarlyStopper(patience, delta, mode, larger)
    theirs = next((n for n in range(1, len(values) + 1) if hosts.track_and_check(values[:n])), None)
    chosen = EarlyStopConfig(patience=patience, delta=delta, improve_indicator_mode=mode)  # type: ignore[arg-type]
    counts = range(1, len(values) + 1)
    decided = (n for n in counts if is_time_to_stop(values[:n], chosen, lower_is_better=not larger))
    ours = next(decided, None)
    if mode == "best":
        assert ours == theirs
    elif ours != theirs:  # a mean may differ in its last bit
        n = min(n for n in (ours, theirs) if n is not None)
        mean = math.fsum(values[n - patience - 1 : n - 1]) / patience
        assert abs(abs(values[n - 1] - mean) - delta) < 1e-9


_SETTINGS: dict[str, Any] = {
    "federate.method": "fedfwd", "federate.make_global_eval": False, "eval.freq": 1, "data.splits": [0.4, 0.3, 0.3],
    "eval.best_res_update_round_wise_key": "val_loss", "train.optimizer.lr": 30.0, "federate.total_round_num": 8,
    "fwdllm.robust.clip": "none",
}  # fmt: skip


def _saved(folder: Path) -> tuple[Any, ...]:
    lines = read_jsonl(folder / "metrics.jsonl")
    names = ("round", "saved_round", "chosen_by", "saved_digest", "digest", "stopped_early")
    adapters = [(folder / name / "adapter_model.safetensors").read_bytes() for name in ("adapter", "adapter-last")]
    return (*(lines[-1].get(name) for name in names), *adapters)


@pytest.mark.parametrize("global_evaluation", [False, True])
def test_the_best_round_and_the_end_are_the_local_hosts(
    global_evaluation: bool, world: World, launcher: Starter, tmp_path: Path
) -> None:
    """The host would not stop at all where only its server evaluates."""
    data = {"data.type": presplit(world, rows=16), "federate.make_global_eval": global_evaluation}
    stop = {"early_stop.patience": 2, "early_stop.delta": 1000.0}
    federation = Federation(write_config(world, {**_SETTINGS, **data, **stop}), tmp_path, launcher)
    local = federation.local()
    federation.standalone()
    (here,) = (tmp_path / "local").iterdir()
    assert _saved(federation.folder("standalone")) == _saved(here)
    assert len(local.digests) < 10, "it stopped early"
    assert _saved(here)[0] != _saved(here)[1], "the best is not the last"


def test_no_run_stops_early_unless_its_file_says_so(world: World, launcher: Starter, tmp_path: Path) -> None:
    """The host's own default is a patience of 5, and one key has one meaning."""
    cfg = write_config(world, {**_SETTINGS, "data.type": presplit(world)})
    cfg.write_text(cfg.read_text().replace("early_stop:\n  patience: 0\n", ""))
    assert "early_stop" not in cfg.read_text()
    federation = Federation(cfg, tmp_path, launcher)
    federation.standalone()
    assert read_jsonl(federation.folder("standalone") / "metrics.jsonl")[-1]["round"] == 8
