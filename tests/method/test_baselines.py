"""The backpropagation baselines against plain PyTorch training of the same model on the same batches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fs_fwdllm.data.types import Batch
from fs_fwdllm.running.session import Session
from tests.host.small import METHODS, PLAIN_MEAN, Federation, World
from tests.method.reference import loss_of, to_flat, trained

RATE, DECAY = 0.05, 0.3
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"train.optimizer.type": "SGD"},
    "sgd, momentum": {"train.optimizer.type": "SGD", "train.optimizer.momentum": 0.9},
    "sgd, decay": {"train.optimizer.type": "SGD", "train.optimizer.weight_decay": DECAY},
    "adamw": {"train.optimizer.type": "AdamW"},
    "adamw, decay": {"train.optimizer.type": "AdamW", "train.optimizer.weight_decay": DECAY},
}
TASKS = pytest.mark.parametrize("language_model", [False, True], ids=["classifier", "language model"])
FULL = {"llm.adapter.use": False, "llm.adapter.args": [{}]}


def plain_optimizer(model: nn.Module, case: str) -> torch.optim.Optimizer:
    """Decay on matrices alone, taken from the parameters before the step (PyTorch's own rule for AdamW)."""
    parameters = trained(model).values()
    settings = OPTIMIZERS[case]
    decay = settings.get("train.optimizer.weight_decay", 0.0)
    groups = [
        {"params": [value for value in parameters if value.dim() > 1], "weight_decay": decay},
        {"params": [value for value in parameters if value.dim() == 1], "weight_decay": 0.0},
    ]
    if settings["train.optimizer.type"] == "AdamW":
        return torch.optim.AdamW(groups, lr=RATE)
    for group in groups:
        group["weight_decay"] = 0.0
    return torch.optim.SGD(groups, lr=RATE, momentum=settings.get("train.optimizer.momentum", 0.0))


def plain_steps(model: nn.Module, optimizer: torch.optim.Optimizer, case: str, losses: Iterable[Any]) -> None:
    """One optimiser step for each callable in ``losses``."""
    decay = OPTIMIZERS[case].get("train.optimizer.weight_decay", 0.0)
    for loss in losses:
        optimizer.zero_grad()
        loss().backward()
        if decay and isinstance(optimizer, torch.optim.SGD):
            with torch.no_grad():
                for value in trained(model).values():
                    if value.dim() > 1:
                        value.mul_(1 - RATE * decay)
        optimizer.step()


def values_of(model: nn.Module) -> np.ndarray:
    return to_flat({name: value.detach() for name, value in trained(model).items()})


def assert_close(actual: np.ndarray, expected: np.ndarray, case: str) -> None:
    """Equal up to rounding. AdamW divides by the root of a second moment: where that is nearly zero, rounding shows."""
    if "adamw" in case:
        assert np.quantile(np.abs(actual - expected), 0.95) < 2e-5
        np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-3)
    else:
        np.testing.assert_allclose(actual, expected, rtol=0, atol=5e-6)


@TASKS
@pytest.mark.parametrize("case", OPTIMIZERS)
def test_fedavg_with_one_client_is_plain_training(world: World, case: str, language_model: bool) -> None:
    settings = {
        **METHODS["fedavg"], **OPTIMIZERS[case], "federate.client_num": 1, "train.local_update_steps": 4,
        "train.optimizer.lr": RATE, **(FULL if case == "sgd, decay" else {}),
    }  # fmt: skip
    config = world.config(settings, language_model=language_model)
    federation, model = Federation(config), Session.open(config).loaded.model
    start = values_of(model)
    for round_index in range(2):
        report = federation.round(round_index)
        assert (report.backward_passes, report.forward_passes) == (4, 4)
        optimizer = plain_optimizer(model, case)  # a client keeps no optimiser state between its visits
        plain_steps(model, optimizer, case, losses(model, federation.batches(1, round_index)))
    assert_close(federation.parameters(), values_of(model), case)
    assert np.abs(values_of(model) - start).max() > 1e-2


def losses(model: nn.Module, batches: Iterable[Batch]) -> list[Any]:
    return [lambda batch=batch: loss_of(model, batch) for batch in batches]


@TASKS
@pytest.mark.parametrize("case", OPTIMIZERS)
def test_fedsgd_is_an_optimiser_on_the_mean_gradient(world: World, case: str, language_model: bool) -> None:
    """State is the server's and lives through the rounds; clients weigh by the samples they saw."""
    settings = {
        **METHODS["fedsgd"],
        **OPTIMIZERS[case],
        **PLAIN_MEAN,
        "train.optimizer.lr": RATE,
        "dataloader.batch_size": 7,
    }
    config = world.config(settings, language_model=language_model)
    federation, model = Federation(config), Session.open(config).loaded.model
    optimizer = plain_optimizer(model, case)
    for round_index in range(3):
        batches = {client: federation.batches(client, round_index) for client in federation.clients}
        samples = {client: sum(map(len, own)) for client, own in batches.items()}
        assert len(set(samples.values())) > 1
        federation.round(round_index)

        def mean_loss(batches: Any = batches, samples: Any = samples) -> torch.Tensor:
            weighted = [
                samples[client] / sum(samples.values()) * sum(loss_of(model, batch) for batch in own) / len(own)
                for client, own in batches.items()
            ]
            return torch.stack(weighted).sum()

        plain_steps(model, optimizer, case, [mean_loss])
    assert_close(federation.parameters(), values_of(model), case)


@TASKS
@pytest.mark.parametrize("method", ["fedavg", "fedsgd"])
def test_checkpointing_changes_the_cost_not_the_gradient(world: World, method: str, language_model: bool) -> None:
    plain = Federation(world.config(METHODS[method], language_model=language_model))
    settings = {**METHODS[method], "fwdllm.gradient_checkpointing": True}
    recomputed = Federation(world.config(settings, language_model=language_model))
    for one, other in zip(plain.answers(0), recomputed.answers(0), strict=True):
        np.testing.assert_allclose(other.values, one.values, rtol=1e-5, atol=1e-7)
        assert np.abs(one.values).max() > 1e-4
        assert (one.forward_passes, other.forward_passes) == (2, 4)
        assert (one.backward_passes, other.backward_passes) == (2, 2)
        assert other.loss == pytest.approx(one.loss, rel=1e-6)


@pytest.mark.parametrize("ignore_weight", [False, True])
def test_fedavg_weighs_clients_by_samples(world: World, ignore_weight: bool) -> None:
    settings = {
        **METHODS["fedavg"], **PLAIN_MEAN, "data.splitter": "lda", "data.splitter_args": [{"alpha": 0.3}],
        "train.batch_or_epoch": "epoch", "train.local_update_steps": 1, "federate.ignore_weight": ignore_weight,
    }  # fmt: skip
    federation = Federation(world.config(settings))
    start, answers = federation.parameters(), federation.answers(0)
    samples = np.array([answer.samples for answer in answers], dtype=np.float64)
    assert samples.tolist() == list(federation.session.client_samples.values())
    assert samples.max() > 1.5 * samples.min()
    weights = np.full(len(answers), 1 / len(answers)) if ignore_weight else samples / samples.sum()
    report = federation.server.absorb(answers)
    expected = start + np.sum([w * a.values.astype(np.float64) for w, a in zip(weights, answers, strict=True)], axis=0)
    np.testing.assert_allclose(federation.parameters(), expected, rtol=0, atol=1e-6)
    mean_loss = np.average([answer.loss for answer in answers], weights=samples)
    assert report.train_loss == pytest.approx(mean_loss)
