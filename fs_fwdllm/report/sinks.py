"""Where a round's line goes: one interface, three places.

A line is a dictionary as DESIGN's "Output of a run" has it. ``metrics.jsonl`` keeps it whole; TensorBoard and Weights &
Biases get its numbers, flattened (``eval/accuracy``, ``learning_rate/3``). A number that is not finite is ``null`` in
JSON, which has no word for it, and is left out of the other two.
"""

from __future__ import annotations

import abc
import importlib
import json
import math
import uuid
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from fs_fwdllm.config import Config
from fs_fwdllm.errors import ConfigError
from fs_fwdllm.report.files import disk_errors_named, write_text_atomically
from fs_fwdllm.report.folder import RunFolder

__all__ = [
    "JsonLinesSink",
    "MetricSink",
    "TensorBoardSink",
    "WandbSink",
    "flatten",
    "open_sinks",
    "plain",
    "read_lines",
]


class MetricSink(abc.ABC):
    """Receives the lines of a run, one a round and a final one."""

    @abc.abstractmethod
    def write(self, line: Mapping[str, Any]) -> None:
        """Take one line, as :func:`plain` leaves it."""

    @abc.abstractmethod
    def close(self) -> None:
        """Write what is held back and let go; closing twice is fine."""


class JsonLinesSink(MetricSink):
    """``metrics.jsonl``: one JSON object a line, flushed at once.

    Opening it drops the lines of ``start_round`` and later ones, a final line and a half-written one: what a resumed
    run will write again.

    Attributes:
        file: the open file.

    Raises:
        CheckpointError: the file cannot be written.
    """

    def __init__(self, folder: RunFolder, start_round: int) -> None:
        self._path = folder.metrics_path
        kept = [line for line in read_lines(folder) if not line.get("final") and _round(line) < start_round]
        write_text_atomically(self._path, "".join(map(_as_json, kept)))
        with disk_errors_named(self._path):
            self.file = self._path.open("a", encoding="utf-8")

    def write(self, line: Mapping[str, Any]) -> None:
        with disk_errors_named(self._path):
            self.file.write(_as_json(line))
            self.file.flush()

    def close(self) -> None:
        with disk_errors_named(self._path):
            self.file.close()


class TensorBoardSink(MetricSink):
    """Event files under ``tensorboard/``, with ``clients`` also of each client's numbers.

    Events of ``start_round`` and later ones that a killed run left are purged.

    Raises:
        ConfigError: the package tensorboard is not installed.
    """

    def __init__(self, folder: RunFolder, start_round: int, *, clients: bool = False) -> None:
        self._clients = clients
        try:
            writer = importlib.import_module("torch.utils.tensorboard")
        except ImportError as error:
            raise ConfigError(
                "fwdllm.tensorboard: needs the package tensorboard, which is not installed; install it "
                "(pip install tensorboard) or set fwdllm.tensorboard to false"
            ) from error
        self._writer = writer.SummaryWriter(log_dir=str(folder.tensorboard_path), purge_step=start_round)

    def write(self, line: Mapping[str, Any]) -> None:
        if line.get("final"):
            return
        for name, value in flatten(line, clients=self._clients).items():
            self._writer.add_scalar(name, value, global_step=line["round"])

    def close(self) -> None:
        self._writer.close()


class WandbSink(MetricSink):
    """A run at Weights & Biases, online or (``wandb.online_track: false``) in files inside the run folder.

    Raises:
        ConfigError: the extra ``wandb`` is not installed, or the service refuses the run.
    """

    def __init__(self, folder: RunFolder, config: Config) -> None:
        self._clients = config.fwdllm.log_clients
        try:
            wandb = importlib.import_module("wandb")
        except ImportError as error:
            raise ConfigError(
                "wandb.use: needs the extra 'wandb', which is not installed; pip install 'fs-fwdllm[wandb]', "
                "or set wandb.use to false"
            ) from error
        if not folder.wandb_id_path.exists():
            write_text_atomically(folder.wandb_id_path, uuid.uuid4().hex)
        try:
            self._run = wandb.init(
                entity=config.wandb.name_user or None,
                project=config.wandb.name_project,
                name=folder.name,
                id=folder.wandb_id_path.read_text(encoding="utf-8").strip(),
                resume="allow",
                mode="online" if config.wandb.online_track else "offline",
                dir=str(folder.path),
                config=config.model_dump(mode="json"),
            )
        except wandb.Error as error:
            raise ConfigError(
                f"wandb.use: Weights & Biases refuses the run ({error}); log in, or set wandb.online_track to false"
            ) from error

    def write(self, line: Mapping[str, Any]) -> None:
        if line.get("final"):
            self._run.summary.update(flatten(line))
        else:
            self._run.log(flatten(line, clients=self._clients), step=line["round"])

    def close(self) -> None:
        self._run.finish()


def open_sinks(folder: RunFolder, config: Config, start_round: int) -> list[MetricSink]:
    """The sinks ``config`` asks for; ``metrics.jsonl`` is always the first. Raises what their constructors raise."""
    sinks: list[MetricSink] = [JsonLinesSink(folder, start_round)]
    try:
        if config.fwdllm.tensorboard:
            sinks.append(TensorBoardSink(folder, start_round, clients=config.fwdllm.log_clients))
        if config.wandb.use:
            sinks.append(WandbSink(folder, config))
    except BaseException:
        for sink in sinks:
            sink.close()
        raise
    return sinks


def plain(value: Any) -> Any:
    """``value`` as JSON has it: NaN and infinity are ``None``, NumPy and torch numbers are Python's, keys are strings.

    Raises:
        TypeError: JSON has no form for it.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in (value if isinstance(value, list | tuple) else sorted(value))]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    raise TypeError(f"a line of metrics cannot hold a {type(value).__name__}: {value!r}")


def flatten(line: Mapping[str, Any], prefix: str = "", *, clients: bool = True) -> dict[str, float]:
    """The numbers of a line, nested names joined by ``/``; text, truth values, lists and gaps are left out.

    Without ``clients``, numbers by client become their mean: a thousand clients would have thousands of names.
    """
    numbers: dict[str, float] = {}
    for key, value in line.items():
        if isinstance(value, Mapping):
            nested = flatten(value, f"{prefix}{key}/", clients=clients)
            by_client = bool(nested) and all(name.isdigit() for name in value)
            numbers |= {prefix + key: fmean(nested.values())} if by_client and not clients else nested
        elif isinstance(value, int | float) and not isinstance(value, bool):
            numbers[prefix + key] = value
    return numbers


def read_lines(folder: RunFolder) -> list[dict[str, Any]]:
    """The objects of ``metrics.jsonl``; none when it is absent. A line left half-written is passed over."""
    if not folder.metrics_path.exists():
        return []
    lines: list[dict[str, Any]] = []
    for text in folder.metrics_path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def _round(line: Mapping[str, Any]) -> float:
    found = line.get("round")
    return found if isinstance(found, int) else math.inf


def _as_json(line: Mapping[str, Any]) -> str:
    return json.dumps(line, allow_nan=False, ensure_ascii=False) + "\n"
