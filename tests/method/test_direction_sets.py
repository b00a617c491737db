"""Clients that share directions: one coefficient a direction stands for all of them, and is where they end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fs_fwdllm.config import parse_config
from fs_fwdllm.core.direction import DirectionKey, Rademacher, direction_seed
from fs_fwdllm.core.wire import RoundUpdate, decode
from fs_fwdllm.errors import ConfigError
from fs_fwdllm.method.direction_sets import DirectionSets, directions_seeds, merged
from fs_fwdllm.method.forward.gate import RelativeVariance
from fs_fwdllm.method.forward.pool import Pool, PoolEntry
from fs_fwdllm.method.mezo.recipe import coefficients
from fs_fwdllm.method.replica import probe_spreads
from tests.host.small import METHODS, PLAIN_MEAN, SCALAR_METHODS, Federation, World
from tests.method.pools import RUN_SEED, replayer_for

SHARED = [{"fwdllm.directions": "common"}, {"fwdllm.directions": "groups", "fwdllm.direction_groups": 2}]
shared = pytest.mark.parametrize("sets", SHARED, ids=["common", "groups"])
DECAY = 0.3


def signs_of(federation: Federation, owner: int, round_index: int, step: int, probes: int) -> np.ndarray:
    """Float64 ``[probes, d]``, tensor after tensor."""
    seeds = directions_seeds(round_index, owner, step, (probes,))
    keys = [DirectionKey(federation.config.seed, seed) for seed in seeds]
    sizes = [tensor.numel() for tensor in federation.server.trainables.tensors]
    rows = [Rademacher().values(keys, index, 0, size) for index, size in enumerate(sizes)]
    return np.concatenate(rows, axis=1).astype(np.float64)


def owners(sets: dict[str, Any], clients: Sequence[int]) -> dict[int, int]:
    count = sets.get("fwdllm.direction_groups", 1)
    return {client: DirectionSets(count).owner(client) for client in clients}


@shared
@pytest.mark.parametrize("decay", [0.0, DECAY])
def test_the_server_is_the_weighted_mean_of_where_stepping_clients_end(
    world: World, sets: dict[str, Any], decay: float
) -> None:
    """Each client's end is walked here in float64, along the set's directions, with the slopes that it sent."""
    own = {"train.local_update_steps": 3, "fwdllm.probes": 2, "train.optimizer.weight_decay": decay}
    federation = Federation(world.config({**METHODS["mezo"], **PLAIN_MEAN, **own, **sets}))
    decays = np.concatenate([
        np.full(tensor.numel(), float(decaying))
        for tensor, decaying in zip(
            federation.server.trainables.tensors, federation.server.trainables.decays(), strict=True
        )
    ])  # fmt: skip
    start, rate = federation.parameters().astype(np.float64), federation.config.train.optimizer.lr
    updates = federation.answers(0)
    whose = owners(sets, federation.clients)
    ends, weights = [], []
    for update in updates:
        point = start.copy()
        for step, slopes in enumerate(update.values.astype(np.float64).reshape(3, 2)):
            move = coefficients(slopes, rate) @ signs_of(federation, whose[update.client], 0, step, 2)
            point = point * (1 - rate * decay * decays) + move
        ends.append(point)
        weights.append(update.samples)
    federation.server.absorb(updates)
    mean = np.average(ends, axis=0, weights=weights)
    np.testing.assert_allclose(federation.parameters(), mean, rtol=0, atol=2e-7)
    assert np.abs(mean - start).max() > 1e-4


@shared
@pytest.mark.parametrize("method", SCALAR_METHODS)
def test_replicas_follow_by_as_many_numbers_as_sets_have_directions(
    world: World, method: str, sets: dict[str, Any]
) -> None:
    federation = Federation(world.config({**METHODS[method], **sets}), separate_workers=True)
    for round_index in range(3):
        federation.round(round_index)
    plan = federation.server.settings.plans[1]
    assignment = federation.server.assign(3, federation.clients)[1]
    record = decode(assignment.catch_up[-1])
    assert isinstance(record, RoundUpdate)
    assert len(record.participants) == sets.get("fwdllm.direction_groups", 1)
    assert len(record.values) == len(record.participants) * plan.steps * plan.directions
    replica = federation.worker(1).replica
    replica.follow(assignment.catch_up, assignment.digest)
    assert replica.digest == federation.server.digest


@shared
def test_a_pooled_step_is_the_estimate_along_the_sets_directions(world: World, sets: dict[str, Any]) -> None:
    own = {"fwdllm.probes": 5, "train.local_update_steps": 2}
    federation = Federation(world.config({**METHODS["forward_gradient"], **PLAIN_MEAN, **own, **sets}))
    start, updates = federation.parameters().astype(np.float64), federation.answers(0)
    whose, total = owners(sets, federation.clients), sum(update.samples for update in updates)
    estimate = np.zeros_like(start)
    for update in updates:
        for step, slopes in enumerate(update.values.astype(np.float64).reshape(2, 5)):
            along = slopes @ signs_of(federation, whose[update.client], 0, step, 5)
            estimate += update.samples / total / 10 * along
    federation.server.absorb(updates)
    expected = start - federation.config.train.optimizer.lr * estimate
    np.testing.assert_allclose(federation.parameters(), expected, rtol=0, atol=2e-7)


def test_clients_of_different_numbers_of_steps_and_probes_share_the_first_directions() -> None:
    rng = np.random.default_rng(4)
    participants = [(3, 9, 2, 2, 1), (3, 9, 1, 1, 3), (3, 8, 1, 1, 1)]
    own = [rng.standard_normal((steps, sum(probes))) for _, _, steps, *probes in participants]
    together, sums = merged(participants, own)
    assert together == [(3, 9, 2, 2, 3), (3, 8, 1, 1, 1)]
    expected = np.zeros((2, 5))
    expected[:, [0, 1, 2]] += own[0]
    expected[0, [0, 2, 3, 4]] += own[1][0]
    np.testing.assert_array_equal(sums[0], expected)
    np.testing.assert_array_equal(sums[1], own[2])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(0, 3), st.integers(0, 1000))
def test_noise_is_the_variance_of_the_estimate(probes: int, count: int, seed: int) -> None:
    """Against the mean squared error of many draws of the same slopes' directions, at the law's own gradient."""
    rng = np.random.default_rng(seed)
    replayer, sets = replayer_for([40, 23]), DirectionSets(count)
    gradients = {client: rng.standard_normal(63) + 1.0 for client in range(1, 7)}
    mean, errors, said = np.mean(list(gradients.values()), axis=0), [], []
    for round_index in range(60):
        pool = Pool(equal_weights=True, sets=sets)
        entries = []
        for client, gradient in gradients.items():
            owner = sets.owner(client)
            keys = [DirectionKey(RUN_SEED, direction_seed(round_index, owner, 0, probe)) for probe in range(probes)]
            z = np.concatenate([Rademacher().values(keys, i, 0, n) for i, n in enumerate((40, 23))], axis=1)
            entries.append(PoolEntry(round_index, client, 1, (z @ gradient).astype(np.float32)[None]))
        pool.add(entries)
        estimate = torch.cat([part.flatten() for part in pool.estimate(replayer)]).numpy()
        errors.append(np.square(estimate - mean).sum())
        said.append(pool.noise(probe_spreads(replayer)))
    assert np.mean(said) == pytest.approx(np.mean(errors), rel=0.35)


def test_shared_directions_are_noisier_and_the_gate_knows() -> None:
    replayer = replayer_for([40, 23])
    gradient = np.random.default_rng(0).standard_normal(63)
    noise = {}
    for count in (0, 1, 3):
        sets, pool = DirectionSets(count), Pool(equal_weights=True)
        pool = Pool(equal_weights=True, sets=sets)
        for client in range(1, 13):
            keys = [DirectionKey(RUN_SEED, direction_seed(0, sets.owner(client), 0, probe)) for probe in range(8)]
            z = np.concatenate([Rademacher().values(keys, i, 0, n) for i, n in enumerate((40, 23))], axis=1)
            pool.add([PoolEntry(0, client, 1, (z @ gradient).astype(np.float32)[None])])
        noise[count] = pool.noise(probe_spreads(replayer))
        RelativeVariance()(pool, replayer)
    assert noise[1] > 5 * noise[0] and noise[0] < noise[3] < noise[1]


REFUSED = [
    ("forward_gradient", {"fwdllm.gate.kind": "published"}, "fwdllm.gate.kind 'published'"),
    ("forward_gradient", {"fwdllm.upload": "dense"}, "fwdllm.upload 'dense'"),
    ("mezo", {"fwdllm.upload": "dense"}, "fwdllm.upload 'dense'"),
    ("mezo", {"train.optimizer.weight_decay": DECAY, "train.batch_or_epoch": "epoch"}, "train.batch_or_epoch 'epoch'"),
    ("mezo", {"train.optimizer.weight_decay": DECAY, "train.train_strategy": "random"}, "train.train_strategy"),
]


@shared
@pytest.mark.parametrize(("method", "own", "words"), REFUSED)
def test_what_has_no_single_coefficient_is_refused_by_name(
    world: World, method: str, own: dict[str, Any], words: str, sets: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError) as caught:
        Federation(world.config({**METHODS[method], **own, **sets}))
    assert words in str(caught.value) and "fwdllm.directions" in str(caught.value)


def test_groups_are_counted_only_where_there_are_groups() -> None:
    with pytest.raises(ConfigError, match="direction_groups 3"):
        parse_config({"fwdllm": {"direction_groups": 3}})


@shared
@pytest.mark.parametrize("strategy", ["frozen", "random", "model-diff"])
def test_rates_of_their_own_go_with_shared_directions_where_nothing_decays(
    world: World, strategy: str, sets: dict[str, Any]
) -> None:
    own = {"train.train_strategy": strategy, "fwdllm.strategy_span": 0.02, "train.local_update_steps": 2}
    federation = Federation(world.config({**METHODS["mezo"], **own, **sets}), separate_workers=True)
    for round_index in range(3):
        federation.round(round_index)
    for client, assignment in federation.server.assign(3, federation.clients).items():
        replica = federation.worker(client).replica
        replica.follow(assignment.catch_up, assignment.digest)
        assert replica.digest == federation.server.digest
