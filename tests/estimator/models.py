"""Loaded tiny models with dropout everywhere, ready for an estimator."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fs_fwdllm.config.registries import ESTIMATORS
from fs_fwdllm.core.direction import DirectionKey, make_distribution
from fs_fwdllm.core.trainables import Trainables
from fs_fwdllm.estimator import Estimator, make_estimator
from fs_fwdllm.model import load_model, load_tokenizer
from fs_fwdllm.model.objective import BatchLoss, Objective
from tests.model.tiny import DECODERS, save_tiny_model, tiny_batch, tiny_config

__all__ = ["ANYWHERE", "DROPOUT", "KEYS", "Ready", "base_hash", "nothing_is_patched", "ready"]

#: Estimators of whatever is trained; the closed form is one of output layers alone (tests/estimator/test_exact.py).
ANYWHERE = [name for name in ESTIMATORS.names() if name != "closed_form"]

KEYS = [DirectionKey(5, seed) for seed in range(5)]

#: Every dropout a configuration of these architectures has, so high that a live one could not go unnoticed.
DROPOUT: dict[str, dict[str, float]] = {
    "llama": {"attention_dropout": 0.5},
    "gpt2": {"attn_pdrop": 0.5, "embd_pdrop": 0.5, "resid_pdrop": 0.5},
    "distilbert": {"dropout": 0.5, "attention_dropout": 0.5, "seq_classif_dropout": 0.5},
    **{
        name: {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5, "classifier_dropout": 0.5}
        for name in ("bert", "roberta")
    },
    "albert": {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5, "classifier_dropout_prob": 0.5},
}


@dataclass
class Ready:
    """A model and everything around it."""

    model: nn.Module
    trainables: Trainables
    objective: Objective
    method: str

    def loss(self, **changes: Any) -> BatchLoss:
        """The batch loss of :func:`~tests.model.tiny.tiny_batch`."""
        return self.objective.on(tiny_batch(classifier=self.objective.task == "classification", **changes))

    def estimator(self, **settings: Any) -> Estimator:
        """What the configuration section ``fwdllm:`` with these settings gives."""
        config = tiny_config("unused", "full", **{f"fwdllm.{key}": value for key, value in settings.items()}).fwdllm
        distribution = make_distribution(config.direction)
        return make_estimator(self.model, self.trainables, distribution, config, full=self.method == "full")


def ready(
    folder: Path,
    architecture: str,
    method: str,
    *,
    classifier: bool | None = None,
    cache_bytes: int = 0,
    config: dict[str, Any] | None = None,
    **changes: Any,
) -> Ready:
    """Load a tiny model; its trainables are moved off their symmetric start (LoRA's ``B = 0``).

    Args:
        config: changes of the model's own configuration.
        changes: the adapter's arguments, and dotted keys of the run's configuration.
    """
    classifier = architecture not in DECODERS if classifier is None else classifier
    settings = {"attention_probs_dropout_prob": 0.5, **DROPOUT[architecture], **(config or {})}
    if method == "lora":
        changes = {"lora_dropout": 0.5, "r": 2, **changes}
    place = folder / f"{architecture}-{len(list(folder.iterdir())) if folder.exists() else 0}"
    loading = tiny_config(save_tiny_model(place, architecture, **settings), method, classifier=classifier, **changes)
    loaded = load_model(loading, load_tokenizer(loading), 3)
    trainables = Trainables.of_model(loaded.model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in trainables.tensors:
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.05)
    return Ready(
        loaded.model,
        trainables,
        Objective(loaded.model, trainables, loaded.task, cache_bytes, conduct=loaded.conduct),
        method,
    )


def base_hash(model: nn.Module) -> str:
    """Of everything frozen, buffers included."""
    state = hashlib.sha256()
    frozen = [(name, tensor) for name, tensor in model.named_parameters() if not tensor.requires_grad]
    for name, tensor in [*frozen, *model.named_buffers()]:
        state.update(name.encode())
        state.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def nothing_is_patched(model: nn.Module) -> bool:
    """No module instance has a ``forward`` of its own, which would shadow its class's."""
    return not any("forward" in vars(module) for module in model.modules())
