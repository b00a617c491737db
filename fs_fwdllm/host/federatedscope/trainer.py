"""The host's trainer under our methods: it evaluates. Training is the worker's part, called by the client directly.

Results carry the host's names (``test_loss``, ``test_total``, ``test_avg_loss``) with the host's meaning: for language
models the loss is the mean over a batch's answer tokens, summed with the batch's size as weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from federatedscope.core.trainers.base_trainer import BaseTrainer

from fs_fwdllm.core.trainables import Trainables
from fs_fwdllm.data.batches import evaluation_batches
from fs_fwdllm.data.types import Batch
from fs_fwdllm.evaluation.metrics import check_metrics, evaluate
from fs_fwdllm.evaluation.names import LOWER_IS_BETTER, METRICS, METRICS_ON_REQUEST, numbers
from fs_fwdllm.host.federatedscope.run_state import HostModel
from fs_fwdllm.model.objective import Objective

__all__ = ["EvaluationTrainer", "host_metric", "let_monitor_know"]


class EvaluationTrainer(BaseTrainer):
    """Evaluates a participant's splits at the parameters of its replica, or of the server.

    Attributes:
        held: parameters to evaluate at, instead of the model's own; the server sets its own.
    """

    def __init__(self, model: HostModel, data: Any, device: Any, **_: Any) -> None:
        self.model = model
        self.data = data
        self.held: Trainables | None = None
        self._process = model.process
        self._batches: dict[str, list[Batch]] = {}

    @torch.no_grad()
    def evaluate(self, target_data_split_name: str = "test") -> dict[str, float]:
        """Results on one split; empty if the participant holds no sample of it."""
        name = target_data_split_name
        batches = self._cut(name)
        if not batches:
            return {}
        session = self._process.session
        with nullcontext() if self.held is None else session.at(self.held):
            results = self._measure(session.parts.objective, batches)
        return {f"{name}_{metric}": value for metric, value in results.items()}

    def _measure(self, objective: Objective, batches: Sequence[Batch]) -> dict[str, float]:
        total = sum(len(batch) for batch in batches)
        if objective.task == "causal_lm":
            loss = sum(_mean_loss(objective, batch) * len(batch) for batch in batches)
            known = (*METRICS[objective.task], *METRICS_ON_REQUEST[objective.task])
            wanted = [name for name in self._process.config.eval.metrics if name in known]
            others = self._others(objective, batches, wanted) if wanted else {}
        else:
            others = self._others(objective, batches, self._process.config.eval.metrics)
            loss = others["loss"] * total
            others["acc"] = others.get("accuracy", float("nan"))
        others.pop("loss", None)
        return {"loss": loss, "total": total, "avg_loss": loss / total, **others}

    def _others(self, objective: Objective, batches: Sequence[Batch], wanted: Sequence[str]) -> dict[str, float]:
        """Our own evaluation, of which the host merges what is a number."""
        session = self._process.session
        names, tokenizer = session.data.label_names, session.loaded.tokenizer
        found = evaluate(objective, batches, check_metrics(wanted, objective.task), names, tokenizer)
        return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}

    def _cut(self, split: str) -> list[Batch]:
        if split not in self._batches:
            session = self._process.session
            examples = getattr(self.data, f"{split}_data", None) or []
            pad = session.parts.batches.pad_token_id
            size = session.config.dataloader.batch_size
            self._batches[split] = evaluation_batches(examples, size, pad, split) if examples else []
        return self._batches[split]

    def train(self) -> Any:
        """Never called: our client works through the method's own worker."""
        raise NotImplementedError("clients of this method train through ClientWorker.work")

    def update(self, model_parameters: Any, strict: bool = False) -> None:
        """Load parameters by the host's names."""
        self.model.load_state_dict(model_parameters)

    def get_model_para(self) -> dict[str, torch.Tensor]:
        """The trained parameters by the host's names."""
        parameters: dict[str, torch.Tensor] = self.model.state_dict()
        return parameters

    def print_trainer_meta_info(self) -> str:
        """One line on what is trained, in the host's log."""
        trainables = self._process.session.parts.trainables
        return f"fs_fwdllm: {trainables.count} trainable parameters in {len(trainables.names)} tensors"


def _mean_loss(objective: Objective, batch: Batch) -> float:
    with torch.no_grad():
        return float(objective.on(batch).here())


def let_monitor_know(monitor: Any) -> None:
    """Tell a host's monitor of every name that a result of ours may have: it looks each up to learn how values
    compare, also those that ``eval.metrics`` leaves to the task."""
    known = monitor.metric_calculator.eval_metric
    for name in ("acc", *numbers()):
        known.setdefault(name, host_metric(name)[1:])


def host_metric(name: str) -> tuple[str, Any, bool]:
    """What the host's registry wants to know of a metric of ours; its value is computed by the evaluation itself."""

    def not_used(ctx: Any, **_: Any) -> float:
        raise NotImplementedError(f"{name} is computed by EvaluationTrainer")

    return name, not_used, name not in LOWER_IS_BETTER
