"""From a configuration to a tokenizer and a model that is ready to be trained, the same on every machine.

:func:`load_tokenizer` gives the tokenizer a padding token if it has none. :func:`load_model` reads the weights
(safetensors only: nothing is unpickled), draws what the checkpoint lacks (a classifier's head), attaches the trainable
parts, makes them float32 and hands the model over in eval mode, so that dropout is off in every probe.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from fs_fwdllm.config import Config
from fs_fwdllm.config.registries import ESTIMATORS
from fs_fwdllm.data.types import Task
from fs_fwdllm.errors import ConfigError, ModelError
from fs_fwdllm.model.facts import SavedFacts
from fs_fwdllm.model.half_precision import make_float32_masters
from fs_fwdllm.model.initial_adapter import initial_folder, start_from
from fs_fwdllm.model.initialisation import draw_uniform_, private_torch_rng
from fs_fwdllm.model.quiet import quiet_transformers
from fs_fwdllm.model.source import ModelSource, model_source
from fs_fwdllm.model.structure import head_modules, position_limit
from fs_fwdllm.model.trainable_parts import Request, adapter_request, attach

__all__ = ["LoadedModel", "load_model", "load_tokenizer"]

_AUTO_CLASSES: dict[Task, Any] = {
    "causal_lm": AutoModelForCausalLM,
    "classification": AutoModelForSequenceClassification,
    "question_answering": AutoModelForQuestionAnswering,
}
#: Said, since transformers otherwise asks on standard input whether to run code from the model's folder.
_NO_FOREIGN_CODE = {"trust_remote_code": False}
_LOADING_ERRORS = (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, SafetensorError)


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
    """

    model: nn.Module
    task: Task
    peft_method: str
    tokenizer: Any
    source: ModelSource
    facts: SavedFacts
    arguments: dict[str, Any] = field(default_factory=dict)
    fresh: frozenset[str] = frozenset()


def load_tokenizer(config: Config) -> Any:
    """The tokenizer of ``model.type``: pads on the right, cuts at ``llm.tok_len`` tokens, always has a padding token.

    A missing padding token becomes the end-of-text token (padding is masked out), or else a new ``[PAD]``.

    Raises:
        ConfigError: ``model.type`` or ``model.task`` is malformed.
        ModelError: there is no such tokenizer.
    """
    source = model_source(config)
    with _reported(source, "tokenizer"), quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(
            source.location, padding_side="right", model_max_length=config.llm.tok_len, **_NO_FOREIGN_CODE
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is not None:
            tokenizer.pad_token = tokenizer.eos_token
        else:
            tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    return tokenizer


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
    with private_torch_rng(config.seed):
        model, fresh = _load_base(config, source, names or _numbered(labels), dtype)
        _fit_embeddings(model, tokenizer, source)
    _check_positions(config, model)
    _set_special_tokens(model, tokenizer)
    head = () if source.task == "causal_lm" else _head(model, fresh)
    _draw_fresh(model, fresh, head, config.seed, source)
    model = attach(method, Request(model, source.task, head, config.seed, arguments))
    if not blocks:  # a block has its masters only while it is visited
        make_float32_masters(model, _places_of_head(model, head))
    start_from(initial_folder(config), model, method, arguments)
    facts = SavedFacts.of_run(
        config,
        source,
        task=source.task,
        classes=names or _numbered(labels),
        trained=method,
        base_dtype=str(dtype).removeprefix("torch."),
        attention=getattr(model.config, "_attn_implementation", None),
    )
    return LoadedModel(model.eval(), source.task, method, tokenizer, source, facts, arguments, frozenset(fresh))


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
    name = config.fwdllm.base_dtype
    if name == "auto":
        name = "float16" if config.train.is_enable_half else "float32"
    return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[name]


def _attention(config: Config) -> dict[str, str]:
    if config.fwdllm.attention != "auto":
        return {"attn_implementation": config.fwdllm.attention}
    if not config.method.forward_only:
        return {}
    wanted = ESTIMATORS[config.fwdllm.estimator].default_attention(config.fwdllm.probes_per_batch)
    return {} if wanted is None else {"attn_implementation": wanted}


def _check_radius(config: Config, method: str, dtype: torch.dtype) -> None:
    """IA3 multiplies activations by 1 +- radius: below half a unit in the last place, rounding undoes every probe."""
    smallest = torch.finfo(dtype).eps / 2
    has_radius = config.method.forward_only and ESTIMATORS[config.fwdllm.estimator].has_radius
    if method == "ia3" and has_radius and config.fwdllm.radius < smallest:
        raise ConfigError(
            f"fwdllm.radius: is {config.fwdllm.radius:g}, but ia3 over a {str(dtype).removeprefix('torch.')} base "
            f"rounds probes below {smallest:.2g} away; use a larger radius, fwdllm.base_dtype float32 or forward_mode"
        )


def _numbered(labels: int) -> tuple[str, ...]:
    """Names of classes that have none, as Hugging Face has them."""
    return tuple(f"LABEL_{index}" for index in range(labels))


def _load_base(config: Config, source: ModelSource, classes: Sequence[str], dtype: torch.dtype) -> tuple[Any, set[str]]:
    """The base model and the names of the parameters its checkpoint lacks or has in another shape."""
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, **_NO_FOREIGN_CODE, **_attention(config)}
    auto: Any = _AUTO_CLASSES[source.task]
    if source.task == "classification":
        by_index = dict(enumerate(classes))
        options |= {"id2label": by_index, "label2id": {name: index for index, name in by_index.items()}}
        options |= {"num_labels": len(classes), "ignore_mismatched_sizes": True}
        options["problem_type"] = "single_label_classification" if len(classes) > 1 else "regression"
    with _reported(source, "model"), quiet_transformers():
        model, report = auto.from_pretrained(source.location, output_loading_info=True, **options)
    model.config.use_cache = False
    model.name_or_path = source.location
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
            f"{source.name}: the checkpoint lacks {', '.join(strangers[:3])} ({len(strangers)} in all), "
            f"so it is not a {source.task} model of this architecture"
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
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) <= rows:
        return
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
    holders = [model.config, model.config.get_text_config(), getattr(model, "generation_config", None)]
    for holder in holders:
        if holder is not None:
            holder.pad_token_id = tokenizer.pad_token_id


@contextmanager
def _reported(source: ModelSource, what: str) -> Iterator[None]:
    try:
        yield
    except _LOADING_ERRORS as error:
        place = "folder" if source.is_local else "hub name"
        advice = "" if source.is_local else "; without the hub, give model.type a local folder"
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"{source.name}: the {place} gives no {what}: {reason[0]}{advice}") from error
