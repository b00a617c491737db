"""FedML's configuration file, plus one section of ours, resolved to the :class:`~fs_fwdllm.config.Config` of a run.

FedML flattens its sections: every key of every section becomes an attribute of one object. Ours survives that because
its keys carry their own prefix:

    fwdllm_args:
      fwdllm_config: ../fwd_agnews.yaml           # one of our files, relative to this one, or packaged; may be left out
      fwdllm_overrides: {fwdllm: {probes: 20}}    # our keys, nested or dotted
      fwdllm_deadline_s: 600                      # how long a process waits for others in a round; may be left out,
                                                  # for fwdllm.deadline_s of our file

Where FedML has a word of its own (``comm_round``, ``learning_rate`` ...; see :data:`TRANSLATED`), that word is used and
takes the place of what the named file says, since that file may have been written for another number of clients. What
stands in the same file twice must agree: an override that contradicts one of FedML's keys is refused. Only the command
line wins over everything.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fs_fwdllm.config import Config, parse_config
from fs_fwdllm.config.load import apply_overrides, find_config, read_tree
from fs_fwdllm.config.yaml_text import dump_yaml, parse_yaml
from fs_fwdllm.errors import ConfigError, nearest
from fs_fwdllm.host.fedml.translation import REFUSED, TRANSLATED, translate
from fs_fwdllm.running.sampling import clients_per_round

__all__ = ["FedMLSettings", "dump_settings", "read_settings", "resolve_settings"]

_OWN = ("fwdllm_config", "fwdllm_overrides", "fwdllm_deadline_s")
_BACKENDS = {"simulation": ("sp", "MPI"), "cross_silo": ("MPI", "GRPC")}
#: What FedML's loops read and a file may leave out.
_DEFAULTS: dict[str, Any] = {
    "training_type": "simulation", "backend": "sp", "scenario": "horizontal", "federated_optimizer": "FedAvg",
    "dataset": "fs_fwdllm", "model": "fs_fwdllm", "run_id": "0", "rank": 0, "client_id_list": None,
    "using_gpu": False, "gpu_mapping_file": None, "gpu_mapping_key": None, "enable_wandb": False,
    "enable_tracking": False, "using_mlops": False, "sys_perf_profiling": False,
}  # fmt: skip


@dataclass(frozen=True)
class FedMLSettings:
    """A FedML file, read.

    Attributes:
        args: FedML's own keys, flattened, with defaults for what its loops need.
        config: what is trained, resolved.
        deadline_s: how long a process waits for others in a round.
    """

    args: dict[str, Any]
    config: Config
    deadline_s: float

    @property
    def is_single_process(self) -> bool:
        return bool(self.args["backend"] == "sp")

    @property
    def worker_num(self) -> int:
        """Client processes: FedML's ``worker_num``, or one for each client of a round, as FedML has it."""
        return int(self.args["worker_num"])


def read_settings(path: Path, overrides: Sequence[str] = ()) -> FedMLSettings:
    """Read a FedML file and apply ``key value`` overrides, FedML's words or ours.

    Raises:
        ConfigError: the file is missing or not YAML, a key of ours is unknown, a value is out of range, FedML is asked
            for something that our methods cannot run under, or two keys contradict each other.
    """
    path = find_config(path, "--cf")
    args: dict[str, Any] = {}
    for name, section in read_tree(path, "--cf").items():
        if section is not None and not isinstance(section, dict):
            raise ConfigError(f"--cf {path}: {name}: FedML's files consist of sections, but this is {section!r}")
        if name == "fwdllm_args":
            _check_own_keys(section or {})
        args.update(section or {})
    settings = resolve_settings(args, path.parent, overrides)
    if not settings.config.expname:
        settings.config.expname = path.stem
    return settings


def resolve_settings(args: Mapping[str, Any], folder: Path, overrides: Sequence[str] = ()) -> FedMLSettings:
    """As :func:`read_settings`, from arguments that are already flat; ``folder`` is where relative paths start."""
    theirs, ours = _sort_overrides(overrides)
    flat = {**_DEFAULTS, **args, **theirs}
    _check_own_keys([key for key in flat if key.startswith("fwdllm")])
    _check_fedml(flat)
    ours_file = flat.get("fwdllm_config")
    tree = read_tree(find_config(str(ours_file), "fwdllm_config", folder), "fwdllm_config") if ours_file else {}
    apply_overrides(tree, _as_texts(translate(args)))
    apply_overrides(tree, _as_texts(_own_overrides(args)))
    apply_overrides(tree, _as_texts(translate(theirs)))
    apply_overrides(tree, ours)
    config = _parse(tree, {**args, **theirs})
    return FedMLSettings(_complete(flat, config), config, _deadline(flat, config))


def dump_settings(settings: FedMLSettings, config_file: str) -> str:
    """A FedML file that reads back to ``settings``, beside a file ``config_file`` that holds the configuration."""
    plain = {
        key: value for key, value in settings.args.items() if key not in TRANSLATED and not key.startswith("fwdllm_")
    }
    own = {"fwdllm_config": config_file, "fwdllm_deadline_s": settings.deadline_s}
    return dump_yaml({"common_args": plain, "fwdllm_args": own})


def _parse(tree: dict[str, Any], words: Mapping[str, Any]) -> Config:
    """The configuration; a mistake in a value that FedML's word stands for names that word too."""
    try:
        return parse_config(tree)
    except ConfigError as error:
        named = [word for word in words if any(f"{key}: " in str(error) for key in translate({word: words[word]}))]
        raise ConfigError(f"{error} (FedML's {', '.join(named)})" if named else str(error)) from error


def _check_own_keys(keys: Iterable[str]) -> None:
    for key in keys:
        if key not in _OWN:
            raise ConfigError(f"fwdllm_args.{key}: unknown key; allowed are {', '.join(_OWN)}{nearest(key, _OWN)}")


def _check_fedml(flat: Mapping[str, Any]) -> None:
    kind, backend = flat["training_type"], flat["backend"]
    if kind not in _BACKENDS:
        raise ConfigError(f"training_type: {kind!r}; allowed are {', '.join(_BACKENDS)}{nearest(kind, _BACKENDS)}")
    if backend not in _BACKENDS[kind]:
        allowed = ", ".join(_BACKENDS[kind])
        raise ConfigError(
            f"backend: {backend!r} with training_type {kind}; allowed are {allowed}{nearest(backend, _BACKENDS[kind])}"
        )
    for key, (allowed_value, reason) in REFUSED.items():
        value = flat.get(key, allowed_value)
        if value != allowed_value and not (allowed_value is False and value is None):
            raise ConfigError(f"{key}: {value!r}; must be {allowed_value!r} or left out: {reason}")


def _sort_overrides(overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """FedML's keys, as values, and ours, as texts. A key without a dot that is no key of ours is FedML's."""
    if len(overrides) % 2:
        raise ConfigError(f"overrides come in pairs 'key value', but {overrides[-1]!r} stands alone")
    theirs: dict[str, Any] = {}
    ours: list[str] = []
    for key, text in zip(overrides[::2], overrides[1::2], strict=True):
        known = key in TRANSLATED or key in _DEFAULTS or key in ("worker_num", "grpc_ipconfig_path", *_OWN)
        if known:
            try:
                theirs[key] = parse_yaml(text)
            except yaml.YAMLError as error:
                raise ConfigError(f"{key}: the value {text!r} is not YAML: {error}") from error
        elif "." in key or key in Config.model_fields:
            ours += [key, text]
        else:
            raise ConfigError(f"{key}: is a key of neither FedML's nor ours{nearest(key, [*TRANSLATED, *_DEFAULTS])}")
    return theirs, ours


def _own_overrides(args: Mapping[str, Any]) -> dict[str, Any]:
    given = args.get("fwdllm_overrides") or {}
    if not isinstance(given, dict):
        raise ConfigError(f"fwdllm_overrides: must be a mapping of our keys, but is {given!r}")
    found, said = _dotted(given), translate(args)
    for key, value in found.items():
        if key in said and said[key] != value:
            word = next(word for word in TRANSLATED if key in translate({word: args.get(word)}))
            raise ConfigError(
                f"fwdllm_overrides: {key} is {value!r}, but {word} says {said[key]!r} in the same file; keep one"
            )
    return found


def _dotted(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            found.update(_dotted(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = value
    return found


def _as_texts(values: Mapping[str, Any]) -> list[str]:
    """``key value`` texts, as a command line has them."""
    try:
        return [text for key, value in values.items() for text in (key, json.dumps(value))]
    except TypeError as error:
        raise ConfigError(f"fwdllm_args: holds a value that is not plain YAML ({error})") from error


def _complete(flat: dict[str, Any], config: Config) -> dict[str, Any]:
    """FedML's arguments with the words it needs, as the resolved configuration has them."""
    total = config.federate.client_num
    args = {
        **flat,
        "comm_round": config.federate.total_round_num,
        "random_seed": config.seed,
        "client_num_in_total": total,
        "client_num_per_round": clients_per_round(config, total) if total else 0,
        "frequency_of_the_test": config.eval.freq,
        "batch_size": config.dataloader.batch_size,
        "learning_rate": config.train.optimizer.lr,
    }
    workers = args.setdefault("worker_num", max(1, args["client_num_per_round"]))
    if not isinstance(workers, int) or isinstance(workers, bool) or workers < 1:
        raise ConfigError(f"worker_num: must be a number of client processes from 1 on, but is {workers!r}")
    return args


def _deadline(flat: Mapping[str, Any], config: Config) -> float:
    value = flat.get("fwdllm_deadline_s", config.fwdllm.deadline_s)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise ConfigError(f"fwdllm_deadline_s: must be a number of seconds above 0, but is {value!r}")
    return float(value)
