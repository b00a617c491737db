"""One configuration, two readers: our typed schema as nodes of the host's configuration, and back.

FederatedScope refuses keys it does not know, so every key of ours that it lacks is added with its default. The other
way, a run's :class:`~fs_fwdllm.config.Config` takes from the host's configuration the keys that mean something to us
and is validated as a file would be. Features of the host that our workers do not carry are refused by name rather than
ignored.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from pydantic.fields import FieldInfo

from fs_fwdllm.config import Config, methods, parse_config
from fs_fwdllm.config.schema import Section
from fs_fwdllm.config.section import is_host_only
from fs_fwdllm.errors import ConfigError

__all__ = [
    "complete",
    "config_from_host",
    "extend_host_config",
    "is_ours",
    "refuse_client_settings",
    "refuse_unsupported",
    "section_of",
]

logger = logging.getLogger("federatedscope.fs_fwdllm")

#: The host's defaults for keys that mean nothing to a language model, and what they mean to us.
_MEANINGLESS = {"model.task": "node", "model.num_labels": 1, "trainer.type": "general"}

_CLIENTS_WITH_DECILES = 10
#: What the host writes into every section of its own accord.
_BOOKKEEPING = "is_ready_for_run"

#: Keys of the host that our workers cannot honour, with the values they can.
_ONLY: dict[str, tuple[Any, ...]] = {
    "asyn.use": (False,),
    "attack.attack_method": ("",),
    "fedopt.use": (False,),
    "fedprox.use": (False,),
    "federate.join_in_info": ([],),
    "federate.online_aggr": (False,),
    "federate.process_num": (0, 1),
    "federate.sampler": ("uniform", ""),
    "federate.unseen_clients_rate": (0.0,),
    "federate.use_ss": (False,),
    "finetune.before_eval": (False,),
    "llm.deepspeed.use": (False,),
    "llm.offsite_tuning.use": (False,),
    "model.model_num_per_trainer": (1,),
    "nbafl.use": (False,),
    "quantization.method": ("none", ""),
    "sgdmf.use": (False,),
    "vertical.use": (False,),
}


def is_ours(config: Any) -> bool:
    """Whether the host's configuration asks for one of our methods or trainers."""
    return methods.is_ours(config.federate.method, config.trainer.type)


def extend_host_config(node: Any) -> None:
    """Add every key of our schema that the host's global configuration lacks."""
    _extend(node, Config, node.__class__)


def _extend(node: Any, section: type[Section], make_node: Any) -> None:
    for name, field in section.model_fields.items():
        child = section_of(field)
        if child is not None:
            if name not in node:
                setattr(node, name, make_node())
            _extend(node[name], child, make_node)
        elif name not in node:
            default = field.get_default(call_default_factory=True)
            # A mapping whose keys nobody knows beforehand: the host refuses new keys elsewhere.
            setattr(node, name, make_node(new_allowed=True) if default == {} else default)


def section_of(field: FieldInfo) -> type[Section] | None:
    """The section a field holds, ``None`` if it holds a value."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def config_from_host(node: Any) -> Config:
    """Our configuration, from the host's.

    Raises:
        ConfigError: a value that our methods cannot use.
    """
    config = parse_config(_tree(node, Config, ""))
    config.wandb.use = False  # the host tracks the run
    config.federate.save_to = config.federate.restore_from = ""  # the host saves in its own format, and reads it
    return config


def _tree(node: Any, section: type[Section], prefix: str) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        if name not in node or is_host_only(field):
            continue
        child = section_of(field)
        if child is not None:
            tree[name] = _tree(node[name], child, f"{key}.")
        elif _MEANINGLESS.get(key) != node[name]:
            tree[name] = _plain(node[name])
    return tree


def _plain(value: Any) -> Any:
    """Lists and dictionaries in place of the host's nodes."""
    if isinstance(value, dict):
        return {
            name: _plain(item) for name, item in value.items() if not name.startswith("__") and name != _BOOKKEEPING
        }
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def refuse_unsupported(node: Any) -> None:
    """Refuse what the host can do but our workers cannot.

    Raises:
        ConfigError: names the key, its value and what is allowed.
    """
    for key, allowed in _ONLY.items():
        value = _value(node, key)
        if value is not None and value not in allowed:
            choices = " or ".join(repr(choice) for choice in allowed)
            raise ConfigError(
                f"{key} {value!r}: federate.method {node.federate.method!r} with trainer.type {node.trainer.type!r} "
                f"does not support it; allowed is {choices}"
            )
    if node.federate.mode.lower() == "distributed" and node.fwdllm.step.report_cosine:
        raise ConfigError(
            "fwdllm.step.report_cosine True: compares with backpropagation on the clients' data, which a server of "
            "several processes does not have; set it to False"
        )
    rule = _value(node, "aggregator.robust_rule")
    if rule not in (None, "fedavg"):
        raise ConfigError(f"aggregator.robust_rule {rule!r}: our servers aggregate scalars; allowed is 'fedavg'")


def refuse_client_settings(client_configs: Any) -> None:
    """Refuse ``--client_cfg``: our clients differ by ``train.train_strategy``, and by nothing else.

    Raises:
        ConfigError: the file says something.
    """
    if client_configs:
        raise ConfigError(
            f"--client_cfg: settings of single clients ({', '.join(sorted(map(str, client_configs)))}) mean nothing to "
            "our methods; leave the file out, or set train.train_strategy for learning rates that differ by client"
        )


def _value(node: Any, key: str) -> Any:
    for part in key.split("."):
        if not hasattr(node, "keys") or part not in node:
            return None
        node = node[part]
    return node


def complete(node: Any, splits_with_data: list[str]) -> None:
    """Fill in what the host needs and a file for several hosts leaves open: the trainer, and the key by which the best
    round is chosen (it must belong to a split that is evaluated)."""
    if not methods.is_ours("", node.trainer.type):
        node.trainer.type = methods.default_trainer(node.federate.method)
    node.eval.split = [split for split in node.eval.split if split in splits_with_data] or node.eval.split
    key = node.eval.best_res_update_round_wise_key
    split, _, metric = key.partition("_")
    if split in splits_with_data and split in ("val", "test") and split not in node.eval.split:
        node.eval.split = [*node.eval.split, split]  # rounds are chosen by it, whatever is reported on
    if split not in node.eval.split and splits_with_data:
        node.eval.best_res_update_round_wise_key = f"{node.eval.split[0]}_{metric or 'loss'}"
        logger.warning(
            "eval.best_res_update_round_wise_key %r belongs to a split without samples; using %r",
            key, node.eval.best_res_update_round_wise_key,
        )  # fmt: skip
    node.eval.count_flops = False
    if node.wandb.use:
        _make_results_readable(node)
    if node.federate.mode.lower() == "distributed":
        node.federate.share_local_model = False  # nobody to share with, and the host's client fails over it


def _make_results_readable(node: Any) -> None:
    """The host passes results to Weights & Biases through their printed form, which it then reads as JSON: numbers
    must look like numbers, and what is NaN with few clients (the fairness of deciles) cannot be passed."""
    if int(np.__version__.partition(".")[0]) > 1:
        np.set_printoptions(legacy="1.25")  # "0.5", not "np.float64(0.5)"
    if node.federate.client_num < _CLIENTS_WITH_DECILES:
        node.eval.report = [form for form in node.eval.report if form != "fairness"]
