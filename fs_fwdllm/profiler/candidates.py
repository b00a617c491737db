"""The candidates: adapters that ``llm.adapter`` can name, in sizes and places that make sense for the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from fs_fwdllm.config import Config
from fs_fwdllm.data.types import Task
from fs_fwdllm.estimator.backprop import transformer_layers

__all__ = ["Candidate", "candidates_for"]

_OURS = ("bitfit", "bottleneck", "head")
_LORA_RANKS = (1, 4, 8, 16)
_REDUCTION_FACTORS = (16, 64)


@dataclass(frozen=True)
class Candidate:
    """One choice of trainable parameters.

    Attributes:
        name: a few words, unique among the candidates.
        arguments: the entry of ``llm.adapter.args``.
    """

    name: str
    arguments: dict[str, Any]

    def apply(self, config: Config) -> Config:
        """``config`` with this adapter."""
        adapter = config.llm.adapter.model_copy(update={"use": True, "args": [dict(self.arguments)]})
        return config.model_copy(update={"llm": config.llm.model_copy(update={"adapter": adapter})})


def candidates_for(config: Config, model: nn.Module, task: Task) -> list[Candidate]:
    """What to try for ``model``: the configuration's own adapter first, then the standard ones.

    Args:
        model: the bare or adapted model; only its number of layers is looked at.
    """
    last = max(len(transformer_layers(model)) - 1, 0)
    found = [_adapter("lora", f"lora r={rank}", r=rank, lora_alpha=2 * rank) for rank in _LORA_RANKS]
    found.append(_adapter("lora", "lora r=8, all linear", r=8, lora_alpha=16, target_modules="all-linear"))
    found.append(_adapter("lora", "lora r=8, last layer", r=8, lora_alpha=16, layers_to_transform=[last]))
    found += [_adapter("ia3", "ia3"), _adapter("layernorm", "layernorm"), _adapter("bitfit", "bitfit")]
    for factor in _REDUCTION_FACTORS:
        found.append(_adapter("bottleneck", f"bottleneck 1/{factor}", reduction_factor=factor))
    if task in ("classification", "question_answering"):
        found.append(_adapter("head", "head"))
    own = config.llm.adapter
    if own.use and own.args and own.args[0]:
        configured = Candidate("as configured", dict(own.args[0]))
        found = [configured, *(candidate for candidate in found if not _same(candidate, configured))]
    return found


def _same(first: Candidate, second: Candidate) -> bool:
    """Whether two candidates train the same: dropout is never on here."""
    return {**first.arguments, "lora_dropout": 0} == {**second.arguments, "lora_dropout": 0}


def _adapter(method: str, name: str, **arguments: Any) -> Candidate:
    package = "fs_fwdllm" if method in _OURS else "peft"
    return Candidate(name, {"adapter_package": package, "adapter_method": method, **arguments})
