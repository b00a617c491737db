"""FedML's words for what our configuration also has a word for, and those our methods cannot run under."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fs_fwdllm.config.yaml_text import parse_yaml
from fs_fwdllm.errors import ConfigError

__all__ = ["REFUSED", "TRANSLATED", "translate"]

Translation = Callable[[Any], dict[str, Any]]


def _as(key: str) -> Translation:
    return lambda value: {key: value}


def _optimizer(value: Any) -> dict[str, Any]:
    kinds = {"sgd": "SGD", "adamw": "AdamW"}
    if str(value).lower() not in kinds:
        raise ConfigError(f"client_optimizer: {value!r}; allowed are sgd and adamw (decoupled weight decay; no adam)")
    return {"train.optimizer.type": kinds[str(value).lower()]}


def _partition(value: Any) -> dict[str, Any]:
    kinds = {"homo": "iid", "hetero": "lda"}
    if value not in kinds:
        raise ConfigError(f"partition_method: {value!r}; allowed are homo (iid) and hetero (lda), or data.splitter")
    return {"data.splitter": kinds[value]}


#: FedML's key: what it means in our configuration.
TRANSLATED: dict[str, Translation] = {
    "random_seed": _as("seed"),
    "comm_round": _as("federate.total_round_num"),
    "client_num_in_total": _as("federate.client_num"),
    "client_num_per_round": _as("federate.sample_client_num"),
    "batch_size": _as("dataloader.batch_size"),
    "epochs": lambda value: {"train.batch_or_epoch": "epoch", "train.local_update_steps": value},
    "learning_rate": _as("train.optimizer.lr"),
    "weight_decay": _as("train.optimizer.weight_decay"),
    "client_optimizer": _optimizer,
    "frequency_of_the_test": _as("eval.freq"),
    "partition_method": _partition,
    "partition_alpha": lambda value: {"data.splitter_args": [{"alpha": value}]},
    "using_gpu": _as("use_gpu"),
    "gpu_id": _as("device"),
}

_SCALARS = "our clients send slopes along seeded directions, not parameters"
#: FedML's key: the one value it may have, and why.
REFUSED: dict[str, tuple[Any, str]] = {
    "federated_optimizer": ("FedAvg", "our methods are chosen by federate.method and trainer.type"),
    "scenario": ("horizontal", "FedML 0.9.6 ends every process of a hierarchical run"),
    "enable_tracking": (False, "it needs FedML's cloud; runs/NAME/metrics.jsonl, TensorBoard and wandb.use are ours"),
    "using_mlops": (False, "it needs FedML's cloud"),
    "enable_wandb": (False, "use our key wandb.use, which logs the same lines as metrics.jsonl"),
    "enable_attack": (False, f"FedML's attacks work on parameters; {_SCALARS}"),
    "enable_defense": (False, f"FedML's defences work on parameters; {_SCALARS}"),
    "enable_dp": (False, f"FedML's noise is for parameters; {_SCALARS}"),
    "enable_fhe": (False, f"FedML encrypts parameters; {_SCALARS}"),
    "enable_contribution": (False, f"FedML's contribution scores need parameters; {_SCALARS}"),
}


def translate(flat: Mapping[str, Any]) -> dict[str, Any]:
    """What FedML's keys in ``flat`` say, in our dotted keys. A key that is absent or empty says nothing.

    Raises:
        ConfigError: a value has no meaning here.
    """
    said: dict[str, Any] = {}
    for word, meaning in TRANSLATED.items():
        value = flat.get(word)
        if value is not None:
            # FedML's own reader takes 1e-3 for a text.
            said.update(meaning(parse_yaml(value) if isinstance(value, str) and word != "client_optimizer" else value))
    return said
