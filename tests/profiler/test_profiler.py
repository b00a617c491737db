"""The profiler: what it measures is what a run would meet, and it leaves nothing changed."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch

from fs_fwdllm.config import load_config
from fs_fwdllm.errors import ConfigError, ModelError
from fs_fwdllm.profiler import Budget, Candidate, Measured, candidates_for, measure, rank
from fs_fwdllm.profiler.report import write_profile
from fs_fwdllm.profiler.run import run_profile
from fs_fwdllm.running.session import Session
from tests.host.small import World

pytestmark = pytest.mark.slow

FORWARD = {"federate.method": "fedfwd", "trainer.type": "fwdtrainer", "fwdllm.probes": 4, "fwdllm.prefix_cache_mib": 0}
HEAD = Candidate("head", {"adapter_package": "fs_fwdllm", "adapter_method": "head"})
LORA = Candidate("lora r=1", {"adapter_package": "peft", "adapter_method": "lora", "r": 1, "lora_alpha": 2})
SMALL = Budget(probes=8, batches=2, forward_passes=64, rate_factors=(0.1, 1.0))


def silent(_: str) -> None:
    """Say nothing."""


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
    path = run_profile(world.config(FORWARD), tmp_path / "profile", probes=4, passes=64, say=silent)
    winner = load_config(path)
    with (tmp_path / "profile" / "profile.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["adapter"] for row in rows} == {"head", "lora r=1"}
    best = {"head": HEAD, "lora r=1": LORA}[rows[0]["adapter"]]
    assert winner.llm.adapter.args == [best.arguments]
    assert winner.train.optimizer.lr == pytest.approx(float(rows[0]["learning_rate"]))
    assert (tmp_path / "profile" / "profile.png").read_bytes().startswith(b"\x89PNG")


def test_a_profile_without_any_result_says_why(world: World, tmp_path: Path) -> None:
    failed = Measured(LORA, problem="ModelError: no place for it")
    with pytest.raises(ModelError, match="no place for it"):
        write_profile(tmp_path, world.config(FORWARD), [failed], SMALL)
