"""What a process loads once: tokenizer, data, model; and what it does with them between rounds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fs_fwdllm.config import Config
from fs_fwdllm.core.trainables import Trainables
from fs_fwdllm.data import Batch, FederatedData, load_federated_data
from fs_fwdllm.data.batches import evaluation_batches as cut_evaluation_batches
from fs_fwdllm.data.summary import data_remarks
from fs_fwdllm.data.types import rows_fingerprint
from fs_fwdllm.errors import DataError
from fs_fwdllm.evaluation.metrics import check_metrics, evaluate, majority_scores
from fs_fwdllm.method import Parts, RoundReport, RoundServer, check_combination, recipe_of
from fs_fwdllm.method.forward.cosine import add_cosine
from fs_fwdllm.method.parts import select_device
from fs_fwdllm.model import LoadedModel, load_model, load_tokenizer, save_trained
from fs_fwdllm.model.base.identity import base_digest
from fs_fwdllm.model.base.packed import elements_of
from fs_fwdllm.model.base.trained_on_disk import StreamedTrainables
from fs_fwdllm.model.basis_file import basis_file, basis_fingerprint
from fs_fwdllm.model.facts import SavedFacts
from fs_fwdllm.model.initial_adapter import initial_folder
from fs_fwdllm.model.saving import write_folder
from fs_fwdllm.model.source import folder_files
from fs_fwdllm.running.choice import Choice, choose
from fs_fwdllm.running.evaluation_work import evaluates_first, remark_on_evaluations
from fs_fwdllm.running.first_rate import check_first_rate, describe_rate, with_first_rate
from fs_fwdllm.running.preflight import ask_hub_last, check_task
from fs_fwdllm.running.sampling import clients_per_round

__all__ = ["Session"]

#: Evaluation keeps no gradients, so its batches may be larger than the training ones.
_EVALUATION_BATCH = 32


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
    choosing_batches: list[Batch] = field(default_factory=list)
    choice: Choice | None = None
    #: Where ``train.optimizer.lr`` is from, if it is not the file's.
    rate_remark: str = ""
    #: Told, while an evaluation goes on, how many batches are done and how many there are.
    progress: Callable[[int, int], None] = lambda done, total: None
    #: The configuration before its rate was found.
    given: Config = field(default_factory=Config)

    @classmethod
    def open(cls, config: Config) -> Session:
        """Load everything ``config`` names.

        Raises:
            ConfigError, DataError, ModelError: see their messages.
        """
        check_combination(config)
        check_task(config)
        check_first_rate(config)
        ask_hub_last(config)
        tokenizer = load_tokenizer(config)
        session = cls.assemble(config, tokenizer, load_federated_data(config, tokenizer))
        if not session.client_samples:
            raise DataError("no client holds a training sample; check data.splits, federate.client_num and the file")
        session._cut_evaluation(tokenizer.pad_token_id)
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
        client_samples = {client: len(held.train) for client, held in sorted(data.clients.items()) if held.train}
        given, config = config, with_first_rate(config, loaded, _asked(config, len(client_samples)))
        parts = Parts.build(
            config,
            loaded.model,
            data.task,
            tokenizer.pad_token_id,
            full=loaded.peft_method == "full",
            label_tokens=data.label_tokens,
            fresh=loaded.fresh,
            conduct=loaded.conduct,
            trial=loaded.trial,
        )
        return cls(
            config=parts.config,
            given=given,
            data=data,
            loaded=loaded,
            parts=parts,
            device=device,
            client_samples=client_samples,
            rate_remark=describe_rate(given, config),
            _metrics=check_metrics(config.eval.metrics, data.task),
            choice=choose(config, data.task, _splits_with_samples(data)),
        )

    def admit(self, client_samples: dict[int, int]) -> None:
        """Learn who takes part, where clients are elsewhere and say so as they join; a rate that follows from their
        number is found anew.

        Args:
            client_samples: each client's training samples, counted.
        """
        self.client_samples = client_samples
        config = with_first_rate(self.given, self.loaded, _asked(self.given, len(client_samples)))
        self.rate_remark = describe_rate(self.given, config)
        rate = config.train.optimizer.lr
        if rate != self.config.train.optimizer.lr:
            optimizer = self.config.train.optimizer.model_copy(update={"lr": rate})
            train = self.config.train.model_copy(update={"optimizer": optimizer})
            self.config = self.config.model_copy(update={"train": train})
            self.parts = replace(self.parts, config=self.config)

    def announce(self, say: Callable[[str], None]) -> None:
        """Say what is about to be trained, on what."""
        facts, recipe, trainables = self.config.method, recipe_of(self.config), self.parts.trainables
        total = elements_of(self.loaded.model)
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
        found = data_remarks(self.data)
        own = self.config.fwdllm
        empty = len(self.data.clients) - len(self.client_samples)
        if empty:
            found.append(f"{empty} clients hold no training sample and are never asked")
        if self.config.use_gpu and self.device.type == "cpu":
            found.append("warning: use_gpu true, but no accelerator is found here: everything runs on the CPU")
        found += [*self.loaded.remarks, *self.parts.remarks]
        train = self.config.train
        if self.rate_remark:
            found.append(self.rate_remark)
        if train.train_strategy != "frozen" and own.strategy_span >= train.optimizer.lr:
            found.append(
                f"warning: fwdllm.strategy_span {own.strategy_span} is not below train.optimizer.lr "
                f"{train.optimizer.lr}: {train.train_strategy} can give a client the learning rate 0"
            )
        choice, start = self.choice, self.config.initial_adapter
        if start:
            found.append(f"starts from the parameters in {start}")
        if choice is not None and choice.split == "test" and self.compares_rounds:
            found.append(
                f"warning: the best round is chosen by {choice.in_words} on the test split, so that its numbers there "
                "are too good; give data.splits a validation share, or set fwdllm.saved_round: last"
            )
        if remark := remark_on_evaluations(self.config, self.client_samples, self.evaluation_rows):
            found.append(remark)
        ignored = self.config.ignored_keys()
        if ignored:
            found.append(f"keys that only FederatedScope gives a meaning to: {', '.join(ignored)}")
        return found

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
        known = {
            "the training rows": rows_fingerprint(held),
            "the test rows": rows_fingerprint([*tested, self.data.test, self.data.val]),
            "the classes": _fingerprint("\0".join(self.data.label_names)),
            "the model's files": _fingerprint(self.loaded.source.files()),
            "the model's weights": self.base_digest.hex(),
        }
        if basis := basis_file(self.loaded.arguments):
            known["the basis file"] = basis_fingerprint(basis)
        place = initial_folder(self.config)
        return known if place is None else {**known, "the initial adapter's files": _fingerprint(folder_files(place))}

    @cached_property
    def base_digest(self) -> bytes:
        """What names the base's weights and settings on every machine; reads its files once."""
        return base_digest(self.loaded.source, self.config.fwdllm.base)

    def evaluates_after(self, round_index: int) -> bool:
        """Whether to evaluate after this round (always after the last)."""
        return self._due(round_index, self.config.eval.freq)

    def checkpoints_after(self, round_index: int) -> bool:
        """Whether to write a checkpoint after this round (always after the last)."""
        return self._due(round_index, self.config.fwdllm.checkpoint_every)

    def evaluate(self, trainables: Trainables) -> dict[str, Any] | None:
        """Metrics of the server's parameters on the evaluation split; ``None`` if there is no such sample.

        Where rounds are compared by another split, its value is among them, under :attr:`Choice.key`.
        """
        if not self.evaluation_batches:
            return None
        choice = self.choice
        by_it = [choice.metric] if choice is not None and choice.metric != "loss" else []
        reported = [*self._metrics, *(by_it if choice and choice.is_reported else ())]
        with self.at(trainables):
            found = self._measure(self.evaluation_batches, dict.fromkeys(reported))
            if choice is not None and self.choosing_batches:
                found[choice.key] = self._measure(self.choosing_batches, by_it)[choice.metric]
        if self.data.task in ("classification", "label_words"):
            found |= majority_scores(self.evaluation_batches, self._metrics)
        return found

    def evaluate_first(self, trainables: Trainables, say: Callable[[str], None]) -> dict[str, Any] | None:
        """As :meth:`evaluate`, of the model before training; ``None``, and why, where that would take too long."""
        if evaluates_first(self.config, self.client_samples, self.evaluation_rows):
            return self.evaluate(trainables)
        if self.config.fwdllm.first_evaluation == "auto":
            say(
                f"no evaluation before the first round: its {self.evaluation_rows:,} rows are more than a tenth of all "
                "that training takes; fwdllm.first_evaluation: always asks for it"
            )
        return None

    @property
    def evaluation_rows(self) -> int:
        """Rows that an evaluation looks at."""
        return sum(map(len, [*self.evaluation_batches, *self.choosing_batches]))

    def _measure(self, batches: list[Batch], metrics: Iterable[str]) -> dict[str, Any]:
        return evaluate(
            self.parts.objective, batches, [*metrics], self.data.label_names, self.loaded.tokenizer, self.progress
        )

    @property
    def total_rounds(self) -> int:
        return self.config.federate.total_round_num

    @property
    def saves_adapter(self) -> bool:
        """Whether :meth:`save` writes an adapter, rather than a whole model."""
        return self.loaded.saved_as != "model"

    @property
    def compares_rounds(self) -> bool:
        """Whether evaluations decide anything: which round is saved, or when to stop."""
        return self.config.fwdllm.saved_round == "best" or self.config.early_stop.patience > 0

    @contextmanager
    def at(self, trainables: Trainables) -> Iterator[None]:
        """Let the model stand at the server's parameters, in its own dtypes (a block server's are float32)."""
        own = self.parts.trainables
        if isinstance(own, StreamedTrainables) and isinstance(trainables, StreamedTrainables):
            with own.showing(trainables):
                yield
            return
        values = [tensor.detach().to(dtype) for tensor, dtype in zip(trainables.tensors, own.dtypes, strict=True)]
        with own.holding(values):
            yield

    def save(
        self, folder: Path, trainables: Trainables, results: Mapping[str, Any] | None = None, suffix: str = ""
    ) -> Path:
        """Write the trained adapter or model in Hugging Face's format below ``folder``, and return its own folder.

        Args:
            results: what the model card says of the run, by the names of ``metrics.jsonl``.
            suffix: of the folder's name: ``-last`` gives ``adapter-last``.
        """
        return save_trained(self.loaded, folder, trainables.named(), self._facts(results), suffix)

    def save_as(self, target: Path, trainables: Trainables, results: Mapping[str, Any] | None = None) -> None:
        """As :meth:`save`, to the folder ``target`` itself."""
        write_folder(self.loaded, target.absolute(), trainables.named(), self._facts(results))

    def _facts(self, results: Mapping[str, Any] | None) -> SavedFacts:
        facts = replace(
            self.loaded.facts,
            task=self.data.task,
            classes=tuple(self.data.label_names) or self.loaded.facts.classes,
            results=dict(results or {}),
        )
        if self.data.template is not None:
            facts = facts.with_data(template=self.data.template.name)
        return facts.with_data(unanswerable=True) if self.data.unanswerable else facts

    def _due(self, round_index: int, every: int) -> bool:
        done = round_index + 1
        return done == self.config.federate.total_round_num or (every > 0 and done % every == 0)

    def _cut_evaluation(self, pad_token_id: int) -> None:
        """Cut the split that is reported on, and, where rounds are chosen by another, that one too."""
        size = max(_EVALUATION_BATCH, self.config.dataloader.batch_size)
        splits = {"test": self.data.test, "val": self.data.val}

        def cut(names: Iterable[str]) -> list[Batch]:
            name = next((name for name in names if splits.get(name)), "")
            return cut_evaluation_batches(splits[name], size, pad_token_id, name) if name else []

        self.evaluation_batches = cut(self.config.eval.split)
        if self.compares_rounds and self.choice is not None and not self.choice.is_reported:
            self.choosing_batches = cut([self.choice.split])


def _asked(config: Config, available: int) -> int:
    """Clients of a round; 1 where this process knows of none with data, so that it has no say in a rate."""
    return clients_per_round(config, available) if available else 1


def _splits_with_samples(data: FederatedData) -> set[str]:
    """The evaluated splits that somebody here holds a sample of."""
    holders = [*data.clients.values(), data]
    return {name for name in ("val", "test") if any(getattr(holder, name) for holder in holders)}


def _fingerprint(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
