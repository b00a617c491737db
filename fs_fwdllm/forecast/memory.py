"""How much memory a run will need: an estimate by a few products, next to what is already in use.

It is for the local host, where one process plays the server and all clients::

    peak = process + model + replicas + messages + prefix cache + max(work, evaluation + check + best)

``T`` are the bytes of the trainables in float32; ``points`` are the parameter points in one forward pass and ``copies``
those of the trainables, as the estimator's class says (:class:`fs_fwdllm.estimator.Footprint`):

* process: resident memory after loading, less the model (libraries, data). model: its parameters and buffers
  (of a base on the disk, the two layers that are in memory), without the rows of a frozen embedding table that no
  sample looks up, where the table is mapped from its file: the system brings in 64 KiB around every row that is read.
* replicas: the server's ``T``; on scalars ``2 T`` for momentum (server and client) or ``5 T`` for Adam (both moments of
  either, and the gradient while one of them steps); ``T`` for momentum on dense gradients, ``2 T`` for AdamW on the
  server; on scalars the log for clients that missed rounds, as long as all uploads and at most ``T``.
* messages: what a client is sent exists as frame, message, unpacked message, payload and values: five times the largest
  frame that the played rounds send (:mod:`.dry_run`), or ``5 T`` where none were played (twice that with momentum on
  scalars, three times with Adam). A run on scalars whose clients keep up never sends a state; one that is resumed sends
  one, which is not counted. A dense upload adds ``3 T`` on its way and ``T`` per client of the round until it is
  averaged.
* work, slopes (of the costliest source): ``copies T`` (for full-parameter tuning one by one, the largest module; for
  points in one pass over a base on the disk, ``copies`` of the largest trainable), ``T``
  for the starting point where clients move, and ``points * (layer + logits)``; from backpropagation as below.
* work, slopes over a base on the disk: passes go side by side (``fwdllm.base.passes_per_read``); one is inside a layer,
  those that wait hold half of the outputs of a block's linear layers, or at the head a hidden state and their logits.
* work, backpropagation: gradient ``T``, starting point and change ``2 T``, AdamW ``2 T`` or momentum ``T`` (these four
  where clients move), and the activations: ``1.5 layer`` per layer from the lowest trainable one on (norms and
  activations keep copies of their own), with checkpointing ``1.5 layer`` once and a hidden state per layer; and
  ``1.5 logits``.
* layer: the outputs of all linear layers of one block for one batch, and the scores where attention is eager.
  logits: two float32 numbers per labelled position and class; of a vocabulary only a slice of the classes, where losses
  are taken without logits.
* blocks: replicas are the server's float32 model and the frames of blocks that are kept for clients that lack them, at
  most the model and no more than the largest assignment; messages four times that assignment; work is 8 bytes (start,
  gradient), 8 (AdamW) and, for a half-precision model, 4 (master) per parameter of the largest block, and the
  activations from the lowest layer on. Of a base on the disk the block itself is beside that, and of the server's model
  and frames only what is in memory.
* evaluation: ``layer + logits`` of the largest evaluation batch. check: the model once more, which a run loads at its
  end to compare what it has saved (``fwdllm.check_saved``), when the activations of the rounds have been given back.
  best: ``T`` in float32, where the best round is read back from its file to be saved.
* not counted: what a checkpoint copies of tensors that are not contiguous, and the heap's fragmentation in a round.
* prefix cache: what one batch occupies, measured, for all samples; at most its budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fs_fwdllm.config import Config
from fs_fwdllm.config.sources import Source, groups_of_sources
from fs_fwdllm.data.types import IGNORED_LABEL, Batch, Example
from fs_fwdllm.estimator import Footprint
from fs_fwdllm.estimator.backprop import transformer_layers
from fs_fwdllm.method import Parts
from fs_fwdllm.method.cybgd.forecast import server_bytes, visit_bytes
from fs_fwdllm.model.base.packed import reader_of
from fs_fwdllm.model.base.vocabulary import columns_at_once
from fs_fwdllm.model.base.weights import named_weights
from fs_fwdllm.model.converting import mapped_embedding
from fs_fwdllm.model.objective import Objective
from fs_fwdllm.model.source import model_task
from fs_fwdllm.running.session import Session
from fs_fwdllm.running.slope_check import first_batch

__all__ = ["MemoryEstimate", "Traffic", "estimate_memory", "resident_bytes"]

#: What Linux brings into memory around an address of a mapped file that is read (its ``fault_around_bytes``).
_READ_AROUND_BYTES = 64 << 10


@dataclass(frozen=True)
class MemoryEstimate:
    """Parts of the predicted peak, in bytes; host and device memory together. The module explains each."""

    process_bytes: int
    model_bytes: int
    replicas_bytes: int
    messages_bytes: int
    work_bytes: int
    evaluation_bytes: int
    prefix_cache_bytes: int
    check_bytes: int = 0
    best_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """The predicted peak."""
        held = self.process_bytes + self.model_bytes + self.replicas_bytes + self.messages_bytes
        at_end = self.evaluation_bytes + self.check_bytes + self.best_bytes
        return held + self.prefix_cache_bytes + max(self.work_bytes, at_end)


@dataclass(frozen=True)
class Traffic:
    """What played rounds carry: the largest frame to a client, and all uploads of the run."""

    largest_download_bytes: int
    upload_bytes: int


def resident_bytes() -> int:
    """Resident memory of this process now."""
    return int(psutil.Process().memory_info().rss)


def estimate_memory(
    session: Session, clients_per_round: int, steps: int, before_loading_bytes: int, traffic: Traffic | None = None
) -> MemoryEstimate:
    """The estimate for a loaded session.

    Args:
        clients_per_round: clients asked in a round.
        steps: most local steps of a client in a round.
        before_loading_bytes: :func:`resident_bytes` before the session was opened; weights that are mapped but not yet
            read do not show in the resident memory of a loaded process, so this is a lower bound of its own part.
        traffic: of played rounds; without it, messages carry all trainables.
    """
    model = session.loaded.model
    examples = [example for held in session.data.clients.values() for example in held.train]
    on_device = session.device.type != "cpu"
    model_bytes = _held_bytes(model) - (0 if on_device else _unread_bytes(session, examples))
    process_bytes = max(before_loading_bytes, resident_bytes() - (0 if on_device else model_bytes))
    shape = _Shape.of(session.config, session.parts.objective)
    rows = min(session.config.dataloader.batch_size, max(session.client_samples.values()))
    work = _Pass(rows, max(len(example.input_ids) for example in examples), rows * max(map(_labels, examples)))
    measures = session.config.method.measures_slopes
    trainable_bytes, held = session.parts.trainables.bytes, session.parts.trainables.in_memory
    traffic = traffic or Traffic(trainable_bytes, trainable_bytes)
    return MemoryEstimate(
        process_bytes=process_bytes,
        model_bytes=model_bytes,
        replicas_bytes=_replicas(session.config, session.parts, traffic),
        messages_bytes=_messages(session.config, trainable_bytes, clients_per_round, traffic),
        work_bytes=_slopes(session, shape, work, steps) if measures else _backprop(session, shape, work),
        evaluation_bytes=max((shape.forward(_evaluation_pass(b)) for b in session.evaluation_batches), default=0),
        prefix_cache_bytes=_prefix_cache(session, examples),
        check_bytes=model_bytes if session.config.fwdllm.check_saved else 0,
        best_bytes=4 * sum(tensor.numel() for tensor in held.values()) if _keeps_best(session) else 0,
    )


def _keeps_best(session: Session) -> bool:
    """Whether a run ends with a round that it has put on the disk: an evaluation must give a value to choose by."""
    evaluates = session.choice is not None and bool(session.evaluation_batches)
    return evaluates and session.config.fwdllm.saved_round == "best"


def _held_bytes(model: nn.Module) -> int:
    """Parameters and buffers, and of a base on the disk the two layers that are in memory."""
    reader = reader_of(model)
    held = sum(tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers()])
    return held + (reader.buffer_bytes if reader is not None else 0)


def _unread_bytes(session: Session, examples: list[Example]) -> int:
    """Of a frozen embedding table that is mapped from its file, what no sample of this process looks up."""
    weight = mapped_embedding(session.loaded.model, session.loaded.source)
    if weight is None:
        return 0
    looked_up = [*(example.input_ids for example in examples), *(b.input_ids for b in session.evaluation_batches)]
    ids = np.unique(np.concatenate([np.asarray(ids).reshape(-1) for ids in looked_up])).astype(np.int64)
    row_bytes = weight.element_size() * weight.shape[1]
    ends = np.concatenate([ids * row_bytes, (ids + 1) * row_bytes - 1])
    read_bytes = _READ_AROUND_BYTES * len(np.unique(ends // _READ_AROUND_BYTES))
    return max(0, weight.numel() * weight.element_size() - read_bytes)


@dataclass(frozen=True)
class _Pass:
    """A forward pass: sequences, tokens in the longest of them, and labelled positions in all of them."""

    rows: int
    tokens: int
    labels: int


@dataclass(frozen=True)
class _Shape:
    """What the activations of a model depend on; ``width`` is the sum of a block's linear outputs."""

    width: int
    hidden: int
    heads: int
    classes: int
    layers: int
    trained_layers: int
    element_bytes: int
    eager: bool

    @classmethod
    def of(cls, config: Config, objective: Objective) -> _Shape:
        model: Any = objective.model
        settings: Any = model.config
        settings = settings.get_text_config()
        blocks = transformer_layers(model)
        trained = [index for index, block in enumerate(blocks) if any(p.requires_grad for p in block.parameters())]
        layers = getattr(settings, "num_hidden_layers", len(blocks))
        weights = list(named_weights(model).values())
        matrices = [weight for weight in weights if weight.dim() > 1]  # none of floats where all are packed
        classes = {
            "classification": getattr(settings, "num_labels", 0),
            "question_answering": config.llm.tok_len,
            "causal_lm": getattr(settings, "vocab_size", 0),
        }
        return cls(
            width=max((sum(map(_outputs, block.modules())) for block in blocks), default=0),
            hidden=settings.hidden_size,
            heads=settings.num_attention_heads,
            classes=columns_at_once(objective.head) if objective.judges_in_head else classes[model_task(config)],
            layers=layers,
            trained_layers=layers - trained[0] if trained else 0,
            element_bytes=max(weight.element_size() for weight in matrices or weights),
            eager=settings._attn_implementation == "eager",
        )

    def layer(self, work: _Pass) -> int:
        scores = 2 * self.heads * work.tokens if self.eager else 0
        return self.element_bytes * work.rows * work.tokens * (self.width + scores)

    def waiting(self, work: _Pass) -> int:
        """Of a pass that waits before a matrix: at most the outputs of about half of its block."""
        return self.element_bytes * work.rows * work.tokens * self.width // 2

    def logits(self, work: _Pass) -> int:
        return 8 * work.labels * self.classes

    def forward(self, work: _Pass) -> int:
        return self.layer(work) + self.logits(work)


def _outputs(module: nn.Module) -> int:
    if isinstance(module, nn.Linear):
        return module.out_features
    return int(module.nf) if isinstance(module, Conv1D) else 0


def _labels(example: Example) -> int:
    return int((example.labels != IGNORED_LABEL).sum())


def _evaluation_pass(batch: Batch) -> _Pass:
    rows, tokens = batch.input_ids.shape
    return _Pass(rows, tokens, int((batch.labels != IGNORED_LABEL).sum()))


def _replicas(config: Config, parts: Parts, traffic: Traffic) -> int:
    optimizer, own, facts = config.train.optimizer, config.fwdllm, config.method
    trainable_bytes = parts.trainables.bytes
    if facts.trains_blocks:
        return server_bytes(parts, traffic.largest_download_bytes)
    copies, log_bytes = 1, 0
    if facts.measures_slopes:
        scalars = own.upload == "scalars"
        copies += 5 if own.server_optimizer == "adam" else (2 if scalars else 1) * bool(own.server_momentum)
        log_bytes = min(trainable_bytes, traffic.upload_bytes) if scalars else 0
    elif not facts.clients_step:
        copies += 2 if optimizer.type == "AdamW" else bool(optimizer.momentum)
    return copies * trainable_bytes + log_bytes


def _messages(config: Config, trainable_bytes: int, clients_per_round: int, traffic: Traffic) -> int:
    if config.method.trains_blocks:  # an assignment of the blocks that a client lacks, its frame, and both unpacked
        return 4 * traffic.largest_download_bytes
    if config.method.measures_slopes and config.fwdllm.upload == "scalars":
        return 5 * traffic.largest_download_bytes
    return (8 + clients_per_round) * trainable_bytes


def _slopes(session: Session, shape: _Shape, work: _Pass, steps: int) -> int:
    sources = [source for group in groups_of_sources(session.config) for source in group if source.estimator]
    return max(_of_source(session, source, shape, work, steps) for source in sources)


def _of_source(session: Session, source: Source, shape: _Shape, work: _Pass, steps: int) -> int:
    own, trainable_bytes = session.config.fwdllm, session.parts.trainables.bytes
    held: Footprint = source.estimator.footprint(source.probes, own.probes_per_batch)
    if held.backpropagates:
        return trainable_bytes + _backprop_activations(session, shape, work)
    layer_by_layer = session.parts.full and held.by_layer
    copies_bytes = _largest_module(session.loaded.model) if layer_by_layer else held.copies * trainable_bytes
    if held.points > 1 and source.estimator.has_radius and reader_of(session.loaded.model) is not None:
        copies_bytes = held.copies * max(4 * tensor.numel() for tensor in session.parts.trainables.tensors)
    moves = session.config.method.clients_step and (steps > 1 or own.upload == "dense")
    layer_points = held.points if shape.trained_layers else 1
    activations: int = layer_points * shape.layer(work) + held.points * shape.logits(work)
    if reader_of(session.loaded.model) is not None:
        activations = _side_by_side(session, source, shape, work)
    return copies_bytes + moves * trainable_bytes + activations


def _side_by_side(session: Session, source: Source, shape: _Shape, work: _Pass) -> int:
    """Activations of passes that go side by side: one of them is inside a layer, the others wait before a matrix."""
    own = session.config.fwdllm
    points: int = source.estimator.footprint(source.probes, own.probes_per_batch).points
    wanted: int = source.estimator.side_by_side(source.probes, own.probes_per_batch)
    runs = min(wanted, 1 + own.base.passes_per_read)
    waiting = max(0, runs - 1) * points
    hidden = shape.element_bytes * work.rows * work.tokens * shape.hidden
    inside = points * shape.layer(work) + waiting * shape.waiting(work)
    at_head = (waiting + points) * (hidden + shape.logits(work) // 2) + points * shape.logits(work) // 2
    return max(inside, at_head)


def _largest_module(model: nn.Module) -> int:
    return max(4 * sum(parameter.numel() for parameter in module.parameters(False)) for module in model.modules())


def _backprop(session: Session, shape: _Shape, work: _Pass) -> int:
    facts = session.config.method
    if facts.trains_blocks:
        return visit_bytes(session.parts) + _backprop_activations(session, shape, work)
    optimizer = session.config.train.optimizer
    copies = 1
    if facts.clients_step:
        copies += 2 + (2 if optimizer.type == "AdamW" else bool(optimizer.momentum))
    return copies * session.parts.trainables.bytes + _backprop_activations(session, shape, work)


def _backprop_activations(session: Session, shape: _Shape, work: _Pass) -> int:
    if session.config.fwdllm.gradient_checkpointing:
        hidden = shape.element_bytes * work.rows * work.tokens * shape.hidden
        activations = 3 * shape.layer(work) // 2 + shape.layers * hidden
    else:
        activations = 3 * shape.layer(work) * shape.trained_layers // 2
    return activations + 3 * shape.logits(work) // 2


def _prefix_cache(session: Session, examples: list[Example]) -> int:
    """Run what is frozen on one batch of the first client, and see what is kept of it."""
    cache, batch = session.parts.objective.cache, first_batch(session)
    with torch.no_grad():
        session.parts.objective.on(batch)
    samples = len(examples) + sum(map(len, session.evaluation_batches))
    return min(cache.budget_bytes, cache.used_bytes * samples // len(batch))
