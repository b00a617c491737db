"""The profiler: what it measures is what a run would meet, and it leaves nothing changed."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from fs_fwdllm.config import load_config
from fs_fwdllm.errors import ConfigError, ModelError
from fs_fwdllm.profiler import Budget, Candidate, Measured, candidates_for, measure, rank
from fs_fwdllm.profiler.measure import lead, search_rates
from fs_fwdllm.profiler.report import describe_lead, write_profile
from fs_fwdllm.profiler.run import run_profile, run_rate_search
from fs_fwdllm.running.session import Session
from tests.host.small import World

pytestmark = pytest.mark.slow

FORWARD = {"federate.method": "fedfwd", "trainer.type": "fwdtrainer", "fwdllm.probes": 4, "fwdllm.prefix_cache_mib": 0}
HEAD = Candidate("head", {"adapter_package": "fs_fwdllm", "adapter_method": "head"})
LORA = Candidate("lora r=1", {"adapter_package": "peft", "adapter_method": "lora", "r": 1, "lora_alpha": 2})
SMALL = Budget(probes=8, batches=2, forward_passes=64, rate_factors=(0.1, 1.0))


def silent(_: str, share: float) -> None:
    """Say nothing."""
    assert 0 <= share < 1


def console() -> Console:
    return Console(file=io.StringIO(), width=80, color_system=None)


def said(there: Console) -> str:
    return there.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_a_candidate_is_measured_and_the_session_is_left_alone(world: World) -> None:
    session = Session.open(world.config(FORWARD))
    before = [tensor.detach().clone() for tensor in session.parts.trainables.tensors]
    found = measure(session, HEAD, SMALL, silent)
    assert not found.problem
    assert found.trainable < session.parts.trainables.count
    assert found.dense_bytes == 4 * found.trainable
    assert found.memory_bytes > found.dense_bytes
    assert math.isfinite(found.loss_after) and found.learning_rate > 0
    for old, now in zip(before, session.parts.trainables.tensors, strict=True):
        assert torch.equal(old, now)


def test_many_probes_find_the_gradient(world: World) -> None:
    """The measured cosine follows sqrt(K / (K + d - 1)); with K far above d it is nearly one."""
    session = Session.open(world.config({**FORWARD, "fwdllm.radius": 0.001}))
    few = measure(session, HEAD, Budget(8, 4, 1, (1.0,)), silent)
    many = measure(session, HEAD, Budget(40 * few.trainable, 4, 1, (1.0,)), silent)
    assert many.cosine > 0.95 > few.expected_cosine
    assert many.cosine == pytest.approx(many.expected_cosine, abs=0.03)


def test_ranking_prefers_what_learnt_most_and_keeps_failures_last() -> None:
    found = [
        Measured(HEAD, problem="ModelError: no place"),
        Measured(HEAD, loss_after=math.inf),
        Measured(HEAD, loss_after=0.7),
        Measured(LORA, loss_after=0.5),
    ]
    assert [item.loss_after for item in rank(found)[:3]] == [0.5, 0.7, math.inf]
    assert rank(found)[-1].problem


def test_an_impossible_candidate_is_reported_not_raised(world: World) -> None:
    session = Session.open(world.config(FORWARD))
    wrong = Candidate("nonsense", {"adapter_package": "peft", "adapter_method": "lora", "target_modules": ["absent"]})
    assert "absent" in measure(session, wrong, SMALL, silent).problem


def test_candidates_are_distinct_and_begin_with_the_configured_one(world: World) -> None:
    session = Session.open(world.config(FORWARD))
    found = candidates_for(session.config, session.loaded.model, "classification")
    assert found[0].name == "as configured"
    assert len({candidate.name for candidate in found}) == len(found)
    for_text = candidates_for(session.config, session.loaded.model, "causal_lm")
    assert "head" not in {candidate.name for candidate in for_text}


def test_backpropagation_is_refused(world: World) -> None:
    session = Session.open(world.config({"federate.method": "fedavg", "trainer.type": "llmtrainer"}))
    with pytest.raises(ConfigError, match="forward-only"):
        measure(session, HEAD, SMALL, silent)


def test_nothing_to_evaluate_on_is_refused(world: World) -> None:
    session = Session.open(world.config({**FORWARD, "data.splits": [1.0, 0.0, 0.0]}))
    with pytest.raises(ConfigError, match="share"):
        measure(session, HEAD, SMALL, silent)


def test_a_profile_leaves_table_picture_and_a_configuration_that_runs(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fs_fwdllm.profiler.run.candidates_for", lambda *_: [HEAD, LORA])
    there, config = console(), world.config(FORWARD)
    profile = run_profile(config, tmp_path / "profile", probes=4, passes=64, console=there)
    assert profile.finished and profile.winner is not None
    winner = load_config(profile.winner)
    with (tmp_path / "profile" / "profile.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["adapter"] for row in rows} == {"head", "lora r=1"}
    best = {"head": HEAD, "lora r=1": LORA}[rows[0]["adapter"]]
    assert winner.llm.adapter.args == [best.arguments]
    assert winner.train.optimizer.lr == pytest.approx(float(rows[0]["learning_rate"]))
    assert (tmp_path / "profile" / "profile.png").read_bytes().startswith(b"\x89PNG")
    assert "1/2 head: " in said(there) and "2/2 lora r=1: " in said(there) and " left" in said(there)
    assert "standard error" in said(there) and max(map(len, said(there).splitlines()[:-1])) <= 400
    assert not winner.model_fields_set - config.model_fields_set  # nothing but what the configuration says
    assert winner.federate == config.federate and winner.eval == config.eval


def test_what_was_measured_before_a_profile_was_stopped_is_kept(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured_until_stopped(session: Session, candidate: Candidate, *rest: Any) -> Measured:
        if candidate is LORA:
            raise KeyboardInterrupt
        return measure(session, candidate, *rest)

    monkeypatch.setattr("fs_fwdllm.profiler.run.candidates_for", lambda *_: [HEAD, LORA])
    monkeypatch.setattr("fs_fwdllm.profiler.run.measure", measured_until_stopped)
    there = console()
    profile = run_profile(world.config(FORWARD), tmp_path / "profile", probes=4, passes=64, console=there)
    assert not profile.finished and "stopped after 1 of 2 candidates" in said(there)
    assert profile.winner is not None and load_config(profile.winner).llm.adapter.args == [HEAD.arguments]


def test_the_choice_is_made_on_validation_rows_where_there_are_any(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[tuple[int, ...]]] = []

    def look(session: Session, candidate: Candidate, *rest: Any) -> Measured:
        seen.append({tuple(row) for batch in session.evaluation_batches for row in batch.input_ids.tolist()})
        return Measured(candidate, loss_after=1.0)

    monkeypatch.setattr("fs_fwdllm.profiler.run.candidates_for", lambda *_: [HEAD])
    monkeypatch.setattr("fs_fwdllm.profiler.run.measure", look)
    for splits, warned in (([0.6, 0.2, 0.2], False), ([0.8, 0.0, 0.2], True)):
        there, config = console(), world.config({**FORWARD, "data.splits": splits})
        run_profile(config, tmp_path / "profile", probes=4, passes=64, console=there)
        assert ("warning: data.splits gives no validation rows" in said(there)) is warned
        data = Session.open(config).data
        judged = {tuple(example.input_ids.tolist()) for example in (data.test if warned else data.val)}
        assert len(seen.pop()) <= len(judged)


def test_a_lead_is_chance_within_two_standard_errors() -> None:
    rng = np.random.default_rng(0)
    hard = rng.normal(1.0, 1.0, 400)  # rows differ much more among themselves than the candidates do
    better, same = hard - 0.1 + rng.normal(0, 0.1, 400), hard + rng.normal(0, 0.1, 400)
    clear = lead([Measured(LORA, row_losses=better), Measured(HEAD, row_losses=hard)])
    assert clear is not None and not clear.is_chance and clear.second == "head"
    assert clear.difference == pytest.approx(0.1, abs=0.02) and clear.standard_error == pytest.approx(0.005, rel=0.2)
    few = lead([Measured(LORA, row_losses=better[:3] + 0.1), Measured(HEAD, row_losses=same[:3])])
    assert few is not None and few.is_chance and "warning" in describe_lead(few, "test")
    assert lead([Measured(LORA, row_losses=better)]) is None


@pytest.mark.parametrize("method", ["fedfwd", "fedmezo"])
def test_a_search_of_rates_keeps_what_is_trained(world: World, tmp_path: Path, method: str) -> None:
    config = world.config({**FORWARD, "federate.method": method, "trainer.type": ""})
    there = console()
    found = run_rate_search(config, tmp_path / "rates", passes=32, console=there)
    assert found.finished and found.winner is not None
    winner = load_config(found.winner)
    assert winner.llm == config.llm and winner.federate == config.federate
    assert f"{winner.train.optimizer.lr:g}" in said(there)
    session = Session.open(config)
    trials = list(search_rates(session, Budget(forward_passes=32, rate_factors=(1.0, 1e9)), silent))
    assert math.isfinite(trials[0].loss_after) and trials[1].loss_after > trials[0].loss_after
    assert float(trials[0].row_losses.mean()) == pytest.approx(trials[0].loss_after, rel=1e-5)


def test_a_profile_without_any_result_says_why(world: World, tmp_path: Path) -> None:
    failed = Measured(LORA, problem="ModelError: no place for it")
    with pytest.raises(ModelError, match="no place for it"):
        write_profile(tmp_path, world.config(FORWARD), [failed], SMALL)
