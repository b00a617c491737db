"""What a process loads once: tokenizer, data, model; and what it does with them between rounds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fs_fwdllm.config import Config
from fs_fwdllm.config.registries import ESTIMATORS
from fs_fwdllm.core.trainables import Trainables
from fs_fwdllm.data import Batch, FederatedData, load_federated_data
from fs_fwdllm.data.batches import evaluation_batches as cut_evaluation_batches
from fs_fwdllm.data.readers import data_task
from fs_fwdllm.data.types import rows_fingerprint
from fs_fwdllm.errors import ConfigError, DataError
from fs_fwdllm.evaluation.metrics import check_metrics, evaluate, majority_scores
from fs_fwdllm.method import Parts, RoundReport, RoundServer, check_combination, recipe_of
from fs_fwdllm.method.forward.cosine import add_cosine
from fs_fwdllm.method.parts import select_device
from fs_fwdllm.model import LoadedModel, load_model, load_tokenizer, save_trained
from fs_fwdllm.model.source import model_task

__all__ = ["Session"]

#: Evaluation keeps no gradients, so its batches may be larger than the training ones.
_EVALUATION_BATCH = 32
#: Above this share of zero slopes the run learns little, and says so.
_TOO_MANY_ZEROS = 0.5
#: An evaluation loss of more than this times the first one is no noise of a start any more.
_FAR_WORSE = 1.2
#: Finite differences with a smaller radius than this mostly measure a bfloat16 base's rounding.
_BFLOAT16_RADIUS = 5e-3


@dataclass
class Session:
    """Tokenizer, data and model of one process. Build it with :meth:`open`."""

    config: Config
    data: FederatedData
    loaded: LoadedModel
    parts: Parts
    device: torch.device
    client_samples: dict[int, int]
    _metrics: list[str]
    evaluation_batches: list[Batch] = field(default_factory=list)
    #: Told, while an evaluation goes on, how many batches are done and how many there are.
    progress: Callable[[int, int], None] = lambda done, total: None
    _warned: bool = False
    _told_divergence: bool = False

    @classmethod
    def open(cls, config: Config) -> Session:
        """Load everything ``config`` names.

        Raises:
            ConfigError, DataError, ModelError: see their messages.
        """
        check_combination(config)
        _check_task(config)
        tokenizer = load_tokenizer(config)
        session = cls.assemble(config, tokenizer, load_federated_data(config, tokenizer))
        if not session.client_samples:
            raise DataError("no client holds a training sample; check data.splits, federate.client_num and the file")
        session.evaluation_batches = session._evaluation_split(tokenizer.pad_token_id)
        return session

    @classmethod
    def assemble(cls, config: Config, tokenizer: Any, data: FederatedData) -> Session:
        """Load the model around data that a host has read; the clients may be elsewhere.

        Raises:
            ConfigError, ModelError: see their messages.
        """
        if config.threads:
            torch.set_num_threads(config.threads)
        device = select_device(config)
        loaded = load_model(config, tokenizer, data.label_names)
        loaded.model.to(device)
        return cls(
            config=config,
            data=data,
            loaded=loaded,
            parts=Parts.build(
                config,
                loaded.model,
                data.task,
                tokenizer.pad_token_id,
                full=loaded.peft_method == "full",
                label_tokens=data.label_tokens,
                fresh=loaded.fresh,
            ),
            device=device,
            client_samples={client: len(held.train) for client, held in sorted(data.clients.items()) if held.train},
            _metrics=check_metrics(config.eval.metrics, data.task),
        )

    def announce(self, say: Callable[[str], None]) -> None:
        """Say what is about to be trained, on what."""
        facts, recipe, trainables = self.config.method, recipe_of(self.config), self.parts.trainables
        total = sum(parameter.numel() for parameter in self.loaded.model.parameters())
        say(
            f"{facts.name}: {trainables.count:,} trainable of {total:,} parameters ({self.loaded.peft_method}), "
            f"{sum(self.client_samples.values()):,} samples on {len(self.client_samples)} clients, {self.device}"
        )
        if recipe.describe is not None:
            say(recipe.describe(self.parts))
        for remark in self.remarks():
            say(remark)

    def remarks(self) -> list[str]:
        """What a user should know of the configuration before the first round; a plan says the same."""
        found = []
        facts, own = self.config.method, self.config.fwdllm
        empty = len(self.data.clients) - len(self.client_samples)
        if empty:
            found.append(f"{empty} clients hold no training sample and are never asked")
        if self.config.use_gpu and self.device.type == "cpu":
            found.append("warning: use_gpu true, but no accelerator is found here: everything runs on the CPU")
        has_radius = facts.forward_only and ESTIMATORS[own.estimator].has_radius
        if has_radius and own.base_dtype == "bfloat16" and own.radius < _BFLOAT16_RADIUS:
            found.append(
                f"warning: fwdllm.radius {own.radius} over a bfloat16 base measures mostly rounding; use about 0.01"
            )
        train = self.config.train
        if train.train_strategy != "frozen" and own.strategy_span >= train.optimizer.lr:
            found.append(
                f"warning: fwdllm.strategy_span {own.strategy_span} is not below train.optimizer.lr "
                f"{train.optimizer.lr}: {train.train_strategy} can give a client the learning rate 0"
            )
        ignored = self.config.ignored_keys()
        if ignored:
            found.append(f"keys that only FederatedScope gives a meaning to: {', '.join(ignored)}")
        return found

    def watch(self, report: RoundReport, say: Callable[[str], None]) -> None:
        """Say, once, what a user should know about how the rounds go."""
        if report.zero_share > _TOO_MANY_ZEROS and self.config.method.forward_only and not self._warned:
            self._warned = True
            say(
                f"warning: {report.zero_share:.0%} of the slopes are exactly zero: fwdllm.radius "
                f"{self.config.fwdllm.radius} is below what the losses resolve; raise it (about 0.01 over a bfloat16 "
                "base), or use fwdllm.estimator: forward_mode"
            )

    def watch_evaluation(self, round_number: int, loss: float, start: float, say: Callable[[str], None]) -> None:
        """Say, once, that evaluation has come out far worse than before the first round."""
        if self._told_divergence or loss <= _FAR_WORSE * start:
            return
        self._told_divergence = True
        say(
            f"warning: round {round_number}: the evaluation loss is {loss:.4g}, and was {start:.4g} before the first "
            f"round: training diverges; lower train.optimizer.lr (it is {self.config.train.optimizer.lr:g})"
        )

    def diagnose(self, server: RoundServer, report: RoundReport) -> None:
        """Compare the step of a round that evaluates with backpropagation, if the server kept what that takes."""
        if self.evaluates_after(report.round_index):
            examples = {client: held.train for client, held in self.data.clients.items()}
            add_cosine(self.parts, server, report, examples)

    @cached_property
    def inputs(self) -> dict[str, str]:
        """Fingerprints of what this process was given beside the configuration, by what a user calls it."""
        held = [split for _, client in sorted(self.data.clients.items()) for split in (client.train, client.val)]
        tested = [client.test for _, client in sorted(self.data.clients.items())]
        return {
            "the training rows": rows_fingerprint(held),
            "the test rows": rows_fingerprint([*tested, self.data.test, self.data.val]),
            "the classes": _fingerprint("\0".join(self.data.label_names)),
            "the model's files": _fingerprint(self.loaded.source.files()),
        }

    def evaluates_after(self, round_index: int) -> bool:
        """Whether to evaluate after this round (always after the last)."""
        return self._due(round_index, self.config.eval.freq)

    def checkpoints_after(self, round_index: int) -> bool:
        """Whether to write a checkpoint after this round (always after the last)."""
        return self._due(round_index, self.config.fwdllm.checkpoint_every)

    def evaluate(self, trainables: Trainables) -> dict[str, Any] | None:
        """Metrics of the server's parameters on the evaluation split; ``None`` if there is no such sample."""
        if not self.evaluation_batches:
            return None
        with self.at(trainables):
            results = evaluate(
                self.parts.objective, self.evaluation_batches, self._metrics, self.data.label_names,
                self.loaded.tokenizer, self.progress,
            )  # fmt: skip
        if self.data.task in ("classification", "label_words"):
            results |= majority_scores(self.evaluation_batches, self._metrics)
        return results

    @contextmanager
    def at(self, trainables: Trainables) -> Iterator[None]:
        """Let the model stand at the server's parameters, in its own dtypes (a block server's are float32)."""
        own = self.parts.trainables.tensors
        values = [tensor.detach().to(mine.dtype) for tensor, mine in zip(trainables.tensors, own, strict=True)]
        with self.parts.trainables.holding(values):
            yield

    def save(
        self, folder: Path, trainables: Trainables, results: Mapping[str, Any] | None = None, suffix: str = ""
    ) -> Path:
        """Write the trained adapter or model in Hugging Face's format.

        Args:
            results: what the model card says of the run, by the names of ``metrics.jsonl``.
            suffix: of the folder's name: ``-last`` gives ``adapter-last``.
        """
        facts = replace(
            self.loaded.facts,
            task=self.data.task,
            classes=tuple(self.data.label_names) or self.loaded.facts.classes,
            results=dict(results or {}),
        )
        if self.data.template is not None:
            facts = facts.with_template(self.data.template.name)
        values = dict(zip(trainables.names, trainables.tensors, strict=True))
        return save_trained(self.loaded, folder, values, facts, suffix)

    def _due(self, round_index: int, every: int) -> bool:
        done = round_index + 1
        return done == self.config.federate.total_round_num or (every > 0 and done % every == 0)

    def _evaluation_split(self, pad_token_id: int) -> list[Batch]:
        for name in self.config.eval.split:
            examples = {"test": self.data.test, "val": self.data.val}.get(name, [])
            if examples:
                size = max(_EVALUATION_BATCH, self.config.dataloader.batch_size)
                return cut_evaluation_batches(examples, size, pad_token_id, name)
        return []


#: What data a model is for, in the words of ``data.type``.
_DATA_OF_MODEL = {
    "causal_lm": "NAME@llm, or NAME@text to classify by label words",
    "classification": "NAME@text",
    "question_answering": "NAME@qa",
}


def _fingerprint(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _check_task(config: Config) -> None:
    """Refuse data that the model is not for (instructions for a classifier), before anything is loaded."""
    task, model = data_task(config), model_task(config)
    if model != ("causal_lm" if task == "label_words" else task):
        raise ConfigError(
            f"data.type {config.data.type!r} does not go with model.type {config.model.type!r} and model.task "
            f"{config.model.task!r}: that model needs data of the form {_DATA_OF_MODEL[model]}"
        )
