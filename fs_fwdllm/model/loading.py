"""From a configuration to a model that is ready to be trained, the same on every machine.

:func:`load_model` reads the weights (safetensors only: nothing is unpickled), draws what the checkpoint lacks (a
classifier's head), attaches the trainable parts, makes them float32, tries the model out on a few tokens and hands it
over in eval mode, so that dropout is off in every probe.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
)

from fs_fwdllm.config import Config
from fs_fwdllm.config.sources import estimators_of
from fs_fwdllm.data.types import Task
from fs_fwdllm.errors import ConfigError, ModelError
from fs_fwdllm.model.base.loading import packed_base
from fs_fwdllm.model.base.packed import packed_layers, reader_of
from fs_fwdllm.model.base.tables import Table
from fs_fwdllm.model.converting import reading_what_is_converted
from fs_fwdllm.model.facts import SavedFacts
from fs_fwdllm.model.folder import checkpoint_dtype, checkpoint_elements
from fs_fwdllm.model.half_precision import make_float32_masters
from fs_fwdllm.model.initial_adapter import initial_folder, start_from
from fs_fwdllm.model.initialisation import draw_uniform_, private_torch_rng
from fs_fwdllm.model.over_packed import refuse_readers_of_weights, refuse_to_train_packed
from fs_fwdllm.model.pooling import chosen_layout, layout_remarks, resolved
from fs_fwdllm.model.quiet import quiet_transformers
from fs_fwdllm.model.sentence_classifier import empty_transformer, load_transformer, with_head
from fs_fwdllm.model.sentence_layout import SentenceLayout
from fs_fwdllm.model.source import ModelSource, model_source, reading
from fs_fwdllm.model.structure import head_modules, position_limit, positions_skip_padding, vocabulary_size
from fs_fwdllm.model.trainable_parts import Request, SavedAs, adapter_request, attach, saved_as
from fs_fwdllm.model.trial import (
    PADDED_RIGHT,
    Conduct,
    drop_unknown_mask,
    foreign_code,
    trial_rows,
    try_out,
)

__all__ = ["LoadedModel", "load_model"]

_AUTO_CLASSES: dict[Task, Any] = {
    "causal_lm": AutoModelForCausalLM,
    "classification": AutoModelForSequenceClassification,
    "question_answering": AutoModelForQuestionAnswering,
}
#: Ties that are not tied yet count twice, and a head may be new.
_LARGEST_EXCESS, _NEW_HEAD_ELEMENTS = 2, 1 << 24


@dataclass
class LoadedModel:
    """A model ready for training.

    Attributes:
        model: in eval mode; the parameters that require gradients are the trainables, all float32 (in the model's own
            dtype where blocks take turns).
        task: what it was loaded for: ``causal_lm``, ``classification`` or ``question_answering``.
        peft_method: the ``adapter_method``, ``full`` without one.
        tokenizer: the tokenizer it was loaded with; saved beside a whole model.
        source: where the base came from.
        facts: what has to be known, beside the tensors, to load it again.
        arguments: the arguments of ``peft_method`` as configured.
        fresh: names of the base's parameters that its checkpoint lacks, so that they start from random numbers.
        base_dtype: of the frozen base, or of all of the model where there is none.
        conduct: how samples have to be put before it.
        trial: token ids of two made-up samples, for whoever wants to try something out.
        remarks: what a user should know of how it was loaded.
    """

    model: nn.Module
    task: Task
    peft_method: str
    tokenizer: Any
    source: ModelSource
    facts: SavedFacts
    arguments: dict[str, Any] = field(default_factory=dict)
    fresh: frozenset[str] = frozenset()
    base_dtype: torch.dtype = torch.float32
    conduct: Conduct = PADDED_RIGHT
    trial: tuple[tuple[int, ...], ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def saved_as(self) -> SavedAs:
        """How what was trained is written."""
        return saved_as(self.peft_method, pools=self.facts.pools)


def load_model(config: Config, tokenizer: Any, classes: int | Sequence[str] = 0) -> LoadedModel:
    """Load ``model.type``, attach the trainable parts of ``llm.adapter``, and return the model in eval mode.

    Args:
        config: the configuration; ``seed`` keys every new weight.
        tokenizer: what :func:`load_tokenizer` returned.
        classes: of the data, by their names in index order or only how many; only a classifier asks for them. None
            takes ``model.num_labels``. Names go into the model's configuration, so that what is saved knows them.

    Raises:
        ConfigError: ``model.num_labels`` contradicts the data, ``llm.tok_len`` exceeds the model's positions,
            ``llm.adapter`` is malformed, or ``fwdllm.radius`` is lost in the base's rounding.
        ModelError: the weights cannot be loaded, or lack something that is not a head.
    """
    source = model_source(config)
    method, arguments = adapter_request(config)
    names = () if isinstance(classes, int) else tuple(map(str, classes))
    labels = _label_count(config, source.task, classes if isinstance(classes, int) else len(classes))
    blocks = config.method.trains_blocks
    dtype = _base_dtype(config) if blocks or method != "full" else torch.float32
    _check_radius(config, method, dtype)
    layout = chosen_layout(config, source)
    with private_torch_rng(config.seed):
        model, fresh = _load_base(config, source, layout, names or _numbered(labels), dtype)
        with foreign_code(f"{source.name}: its embedding tables cannot be told"):
            _fit_embeddings(model, tokenizer, source)
    _check_positions(config, model)
    _set_special_tokens(model, tokenizer)
    drop_unknown_mask(model)
    head = () if source.task == "causal_lm" else _head(model, fresh)
    _draw_fresh(model, fresh, head, config.seed, source)
    rows = _trial_rows(config, model, tokenizer, source)
    conduct = try_out(model.eval(), rows, source.task, tokenizer.pad_token_id, source.name)
    tokenizer.padding_side = "left" if conduct.padding == "left" else "right"
    with foreign_code(f"{source.name}: adapter_method {method!r} cannot be attached to this model"):
        model = attach(method, Request(model, source.task, head, config.seed, arguments))
    if not blocks:  # a block has its masters only while it is visited
        make_float32_masters(model, _places_of_head(model, head))
    start_from(initial_folder(config), model, method, arguments)
    if packed_layers(model):
        refuse_to_train_packed(model, arguments)
        refuse_readers_of_weights(model, rows, method, arguments)
    facts = SavedFacts.of_run(
        config,
        source,
        task=source.task,
        classes=names or _numbered(labels),
        trained=method,
        base_dtype=str(dtype).removeprefix("torch."),
        attention=getattr(model.config, "_attn_implementation", None),
        features=resolved(layout),
    )
    remarks = (
        *layout_remarks(config, source, layout), *_remarks(config, source, method, dtype), *_of_disk(model),
        *conduct.remarks(),
    )  # fmt: skip
    return LoadedModel(
        model.eval(), source.task, method, tokenizer, source, facts, arguments, frozenset(fresh),
        base_dtype=dtype, conduct=conduct, trial=rows, remarks=remarks,
    )  # fmt: skip


def _trial_rows(config: Config, model: nn.Module, tokenizer: Any, source: ModelSource) -> tuple[tuple[int, ...], ...]:
    paired = source.task == "question_answering"
    rows = trial_rows(tokenizer, vocabulary_size(model), config.llm.tok_len, paired=paired)
    return tuple(map(tuple, rows))


def _remarks(config: Config, source: ModelSource, method: str, dtype: torch.dtype) -> list[str]:
    """What is done with ``fwdllm.base.compute_dtype`` where it may not be what one expects."""
    wanted, used = config.fwdllm.base.compute_dtype, str(dtype).removeprefix("torch.")
    if wanted not in ("auto", used):
        return [
            f"warning: fwdllm.base.compute_dtype {wanted} has no effect: {method!r} trains all parameters, and what is "
            "trained is float32"
        ]
    is_folder = source.is_local and source.gguf is None
    saved = checkpoint_dtype(Path(source.transformer)) if is_folder else ""
    if wanted == "auto" and used == "float32" and saved in ("bfloat16", "float16"):
        way_out = f"fwdllm.base.compute_dtype {saved} halves that"
        if _has_radius(config) and saved == "bfloat16":
            way_out += ", with fwdllm.estimator: forward_mode"
        more = "what is trained is float32" if method == "full" else way_out
        return [f"the weights are saved in {saved} and loaded as float32, twice the memory; {more}"]
    return []


def _of_disk(model: nn.Module) -> list[str]:
    reader = reader_of(model)
    if reader is None:
        return []
    stored, held = f"{reader.stored_bytes / 1e9:.2f} GB", f"{reader.buffer_bytes / 1e6:.0f} MB"
    return [f"the base stays on the disk: a pass reads {stored}, and memory holds {held} of it (fwdllm.base.stream)"]


def _label_count(config: Config, task: Task, num_labels: int) -> int:
    if task != "classification":
        return 0
    wanted = config.model.num_labels
    if wanted and num_labels and wanted != num_labels:
        raise ConfigError(f"model.num_labels: is {wanted}, but the data has {num_labels} classes; 0 takes the data's")
    if wanted == 1 or config.fwdllm.data.regression:
        return 1
    if (wanted or num_labels) < 2:
        raise ConfigError(f"model.num_labels: a classifier needs at least 2 classes, but has {wanted or num_labels}")
    return wanted or num_labels


def _base_dtype(config: Config) -> torch.dtype:
    name = config.fwdllm.base.compute_dtype
    if name == "auto":
        name = "float16" if config.train.is_enable_half else "float32"
    return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[name]


def _attention(config: Config) -> dict[str, str]:
    if config.fwdllm.attention != "auto":
        return {"attn_implementation": config.fwdllm.attention}
    if not config.method.measures_slopes:
        return {}
    for estimator in estimators_of(config).values():
        wanted = estimator.default_attention(config.fwdllm.probes_per_batch)
        if wanted is not None:
            return {"attn_implementation": wanted}
    return {}


def _check_size(source: ModelSource, from_config: Any, safely: dict[str, Any]) -> None:
    """Refuse a configuration whose model is far larger than its weights, before memory is taken for it."""
    if not source.is_local:
        return
    settings = AutoConfig.from_pretrained(source.transformer, **safely)
    try:
        with torch.device("meta"):
            wanted = sum(parameter.numel() for parameter in from_config(settings, **safely).parameters())
    except NotImplementedError:  # something in its constructor must know values
        return
    held = checkpoint_elements(Path(source.transformer))
    if wanted > _LARGEST_EXCESS * held + _NEW_HEAD_ELEMENTS:
        raise ModelError(
            f"{source.name}: config.json describes a model of {wanted:,} parameters, but the folder holds {held:,}; "
            "one of its numbers is wrong"
        )


def _use_plain_experts(config: Config, model: Any) -> None:
    """Grouped kernels of a mixture of experts have no forward-mode derivative; the plain loop over experts has."""
    switch = getattr(model, "set_experts_implementation", None)
    if switch is None or not config.method.measures_slopes:
        return
    if not all(estimator.works_with_fused_attention for estimator in estimators_of(config).values()):
        switch("eager")


def _check_radius(config: Config, method: str, dtype: torch.dtype) -> None:
    """IA3 multiplies activations by 1 +- radius: below half a unit in the last place, rounding undoes every probe."""
    smallest = torch.finfo(dtype).eps / 2
    if method == "ia3" and _has_radius(config) and config.fwdllm.radius < smallest:
        raise ConfigError(
            f"fwdllm.radius: is {config.fwdllm.radius:g}, but ia3 over a {str(dtype).removeprefix('torch.')} base "
            f"rounds probes below {smallest:.2g} away; use a larger radius, fwdllm.base.compute_dtype float32, or "
            "forward_mode"
        )


def _has_radius(config: Config) -> bool:
    return config.method.measures_slopes and any(one.has_radius for one in estimators_of(config).values())


def _numbered(labels: int) -> tuple[str, ...]:
    """Names of classes that have none, as Hugging Face has them."""
    return tuple(f"LABEL_{index}" for index in range(labels))


def _load_base(
    config: Config, source: ModelSource, layout: SentenceLayout | None, classes: Sequence[str], dtype: torch.dtype
) -> tuple[Any, set[str]]:
    """The base model and the names of the parameters its checkpoint lacks or has in another shape."""
    options: dict[str, Any] = {"dtype": dtype, **_attention(config)}
    auto: Any = _AUTO_CLASSES[source.task]
    if source.task == "classification":
        by_index = dict(enumerate(classes))
        options |= {"id2label": by_index, "label2id": {name: index for index, name in by_index.items()}}
        options |= {"num_labels": len(classes), "ignore_mismatched_sizes": True}
        options["problem_type"] = "single_label_classification" if len(classes) > 1 else "regression"
    from_config = auto.from_config if layout is None else empty_transformer
    with reading(source, "model") as safely, quiet_transformers():
        packed = packed_base(config, source, safely)
        if packed is not None:
            model, fresh = packed.read(from_config, options)
        else:
            _check_size(source, from_config, safely)
            from_pretrained = auto.from_pretrained if layout is None else load_transformer
            with reading_what_is_converted(dtype):
                model, fresh = _from_pretrained(from_pretrained, source, {**options, **safely})
        _use_plain_experts(config, model)
    if layout is not None:
        model, fresh = with_head(model, fresh, layout, len(classes), Path(source.location))
    model.config.use_cache = False
    model.name_or_path = source.location
    return model, fresh


def _from_pretrained(from_pretrained: Any, source: ModelSource, options: dict[str, Any]) -> tuple[Any, set[str]]:
    model, report = from_pretrained(source.transformer, output_loading_info=True, use_safetensors=True, **options)
    return model, set(report["missing_keys"]) | {name for name, *_ in report["mismatched_keys"]}


def _head(model: nn.Module, fresh: set[str]) -> tuple[str, ...]:
    """The classifier's own modules, and a pooler the checkpoint lacks: it is as random as they are."""
    poolers = sorted({name.partition("pooler")[0] + "pooler" for name in fresh if "pooler" in name})
    return (*head_modules(model), *poolers)


def _places_of_head(model: nn.Module, head: tuple[str, ...]) -> list[str]:
    """Where the modules of ``head`` are after an adapter has wrapped the model."""
    places = {f"{prefix}{name}" for name in head for prefix in ("", "base_model.model.")}
    return [name for name, _ in model.named_modules() if name in places]


def _draw_fresh(model: nn.Module, fresh: set[str], head: tuple[str, ...], seed: int, source: ModelSource) -> None:
    """Draw the parameters of a new head: matrices uniform with the model's own spread, biases zero."""
    strangers = sorted(name for name in fresh if not any(name.startswith(f"{module}.") for module in head))
    if strangers:
        raise ModelError(
            f"{source.name}: the checkpoint lacks {', '.join(strangers[:3])}, or has them in another shape "
            f"({len(strangers)} in all), so it is not a {source.task} model of this architecture and these settings"
        )
    spread = getattr(model.config, "initializer_range", None) or 0.02
    for name in sorted(fresh):
        parameter = model.get_parameter(name)
        if parameter.dim() > 1:
            draw_uniform_(parameter, math.sqrt(3.0) * spread, seed, name)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


@torch.no_grad()
def _fit_embeddings(model: Any, tokenizer: Any, source: ModelSource) -> None:
    """Give added special tokens rows: the mean of the old rows, in the input and the output table."""
    rows = vocabulary_size(model)
    if len(tokenizer) <= rows:
        return
    if isinstance(model.get_input_embeddings(), Table):
        raise ConfigError(
            f"fwdllm.base.stream: the tokenizer of {source.name} has {len(tokenizer)} tokens and its table {rows} "
            "rows, and a table that is packed or on the disk cannot grow; pad with a word the tokenizer has, or give "
            "the float model, resident"
        )
    if len(tokenizer) > rows + len(set(tokenizer.all_special_ids)) or tokenizer.pad_token_id is None:
        raise ModelError(f"{source.name}: the tokenizer has {len(tokenizer)} tokens but the model only {rows}")
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    tables = [module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None]
    for tensor in [tensor for table in tables for tensor in table.parameters(recurse=False)]:
        tensor[rows:] = tensor[:rows].double().mean(dim=0).to(tensor.dtype)


def _check_positions(config: Config, model: nn.Module) -> None:
    limit = position_limit(model)
    if limit is not None and config.llm.tok_len > limit:
        raise ConfigError(f"llm.tok_len: is {config.llm.tok_len}, but the model has positions for {limit} tokens")


def _set_special_tokens(model: Any, tokenizer: Any) -> None:
    """Tell the model what batches are padded with, unless it counts positions from a padding token of its own.

    The modules of such a model (RoBERTa's kin) have taken that token over already: another one in the configuration
    would be another model once it is saved and loaded. Their padding is masked out, whatever token it is.
    """
    own = [] if positions_skip_padding(model) else [model.config, model.config.get_text_config()]
    for holder in [*own, getattr(model, "generation_config", None)]:
        if holder is not None:
            holder.pad_token_id = tokenizer.pad_token_id
