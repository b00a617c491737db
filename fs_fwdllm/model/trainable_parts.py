"""Which parameters are trained: one small function per ``adapter_method``.

Every function takes a frozen base model and returns the model to train, with exactly the trainable parameters
requiring gradients. LoRA, IA3 and norm tuning come from PEFT, so that their folders load anywhere; bias tuning, the
head alone and full training mark parameters in place; the bottleneck and the output residual are ours. A classifier's
head starts from random numbers, so it is trained with every method. :data:`PARTS` is the registry; a method joins it
with one line.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from peft import IA3Config, LNTuningConfig, LoraConfig, PeftConfig, get_peft_model
from peft.utils import constants as peft_constants
from torch import nn
from transformers.pytorch_utils import Conv1D

from fs_fwdllm.config import Config
from fs_fwdllm.data.types import Task
from fs_fwdllm.errors import ConfigError, ModelError, nearest
from fs_fwdllm.model.activations import Place
from fs_fwdllm.model.basis_file import check_digest
from fs_fwdllm.model.bottleneck import attach_bottleneck, bottleneck_places
from fs_fwdllm.model.initialisation import draw_uniform_, private_torch_rng
from fs_fwdllm.model.lora_basis import fix_lora_a, lora_places
from fs_fwdllm.model.output_residual import attach_output_residual, output_residual_places
from fs_fwdllm.model.peft_parameters import kept_modules, peft_task
from fs_fwdllm.model.sentence_classifier import SentenceClassifier
from fs_fwdllm.model.structure import (
    attention_projections,
    biases,
    feed_forward_outputs,
    is_norm,
    linear_layers,
    norm_layers,
    short_names,
)

__all__ = ["PARTS", "Part", "Request", "SavedAs", "adapter_request", "attach", "saved_as"]

_PACKAGES = ("peft", "fs_fwdllm")
_HARMLESS_WARNINGS = ("fan_in_fan_out is set to", "Unsupported layer type", "`is_gradient_checkpointing` is deprecated")
#: Layers whose weights the kernels of state-space models read themselves, so that an adapter beside them is not seen.
_READ_PAST_FORWARD = ("dt_proj", "out_proj")
_MANAGED_FIELDS = {field_.name for field_ in dataclasses.fields(PeftConfig)} | {"inference_mode"}


#: How what was trained is written.
SavedAs = Literal["peft", "parameters", "bottleneck", "output_residual", "model"]


@dataclass(frozen=True)
class Request:
    """What to make trainable.

    Attributes:
        model: the base model, frozen.
        task: ``causal_lm``, ``classification`` or ``question_answering``.
        head: names of the modules of ``model`` that make up its new head; empty for a language model.
        seed: key of new weights.
        arguments: the method's own arguments from ``llm.adapter.args``.
    """

    model: nn.Module
    task: Task
    head: tuple[str, ...]
    seed: int
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """One way to choose trainable parameters: how to attach it, which arguments it takes, how it is saved.

    Attributes:
        saved_as: an adapter of PEFT's, some parameters of the base in PEFT's format, one of this package's adapters,
            or a whole model.
        places: where the untrained adapter of a model reads activations, and how many directions its arguments ask
            for; ``None`` where it takes no ``basis``.
        basis_arguments: those of ``arguments`` that say what a basis is and how it is used.
    """

    attach: Callable[[Request], nn.Module]
    saved_as: SavedAs
    arguments: frozenset[str] = frozenset()
    places: Callable[[nn.Module, Mapping[str, Any]], list[Place]] | None = None
    basis_arguments: frozenset[str] = frozenset()


def adapter_request(config: Config) -> tuple[str, dict[str, Any]]:
    """``(method, arguments)`` of ``llm.adapter``; ``("full", {})`` when it is not used.

    Raises:
        ConfigError: an unknown package, method or argument, or more than one adapter.
    """
    if not config.llm.adapter.use:
        return "full", {}
    if len(config.llm.adapter.args) != 1:
        raise ConfigError(f"llm.adapter.args: must hold one adapter, but holds {len(config.llm.adapter.args)}")
    arguments = dict(config.llm.adapter.args[0])
    package = arguments.pop("adapter_package", _PACKAGES[0])
    method = arguments.pop("adapter_method", "lora")
    _require_known("adapter_package", package, _PACKAGES)
    _require_known("adapter_method", method, PARTS)
    for name in arguments:
        _require_known(f"{method} argument", name, sorted(PARTS[method].arguments))
    return method, arguments


def attach(method: str, request: Request) -> nn.Module:
    """Freeze ``request.model``, make the parts of ``method`` trainable, and return the model to train."""
    request.model.requires_grad_(False)
    return PARTS[method].attach(request)


def saved_as(method: str, *, pools: bool) -> SavedAs:
    """How what ``method`` trained is written.

    Args:
        pools: whether the model is a sentence classifier. Of such a model all is written: the folder is then one of
            sentence-transformers', where PEFT would put a head alone onto any other classifier without a word.
    """
    kind = PARTS[method].saved_as
    return "model" if pools and kind == "parameters" else kind


def _require_known(what: str, value: Any, allowed: Iterable[str]) -> None:
    choices = list(allowed)
    if value not in choices:
        listed = ", ".join(choices) or "(none)"
        hint = nearest(value, choices)
        raise ConfigError(f"llm.adapter.args: unknown {what} {value!r}; allowed are {listed}{hint}")


def _train_full(request: Request) -> nn.Module:
    return request.model.requires_grad_(True)


def _train_head(request: Request) -> nn.Module:
    for name in request.head or (_language_model_head(request.model),):
        request.model.get_submodule(name).requires_grad_(True)
    return request.model


def _language_model_head(model: Any) -> str:
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None:
        raise ModelError(f"{type(model).__name__}: has no output layer to train; use lora or full")
    if head.weight is table.weight:
        raise ModelError(
            f"{type(model).__name__}: its head is tied to the input embeddings, so adapter_method 'head' would train "
            "the embeddings too; use lora, ia3, layernorm or bottleneck"
        )
    name: str = next(name for name, module in model.named_modules() if module is head)
    return name


def _train_biases(request: Request) -> nn.Module:
    names = biases(request.model)
    if all(_belongs(name, request.head) for name in names):
        raise ModelError(
            f"{type(request.model).__name__}: has no bias parameters outside its head, so adapter_method 'bitfit' "
            "trains nothing; use layernorm, lora or ia3"
        )
    for name in names:
        request.model.get_parameter(name).requires_grad_(True)
    return _train_head(request) if request.head else request.model


def _belongs(name: str, modules: Iterable[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def _train_bottleneck(request: Request) -> nn.Module:
    attach_bottleneck(request.model, seed=request.seed, **request.arguments)
    return _train_head(request) if request.head else request.model


def _train_output_residual(request: Request) -> nn.Module:
    if request.task != "causal_lm":
        raise ConfigError(
            f"llm.adapter.args: adapter_method 'output_residual' is for language models, and "
            f"{type(request.model).__name__} is loaded for {request.task}; use head, bottleneck or lora"
        )
    attach_output_residual(request.model, seed=request.seed, **request.arguments)
    return request.model


def _train_lora(request: Request) -> nn.Module:
    if request.arguments.get("init_lora_weights", True) is not True:
        raise ConfigError(
            "llm.adapter.args init_lora_weights: must be true (A drawn from the run's seed, B zero), but the value is "
            f"{request.arguments['init_lora_weights']!r}: others change the base or differ between machines"
        )
    arguments = dict(request.arguments)
    basis = arguments.pop("basis", "")
    if basis and arguments.get("target_parameters"):
        raise ConfigError("llm.adapter.args basis: has no place beside target_parameters; name target_modules instead")
    known = peft_constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    if not arguments.get("target_modules") and not arguments.get("target_parameters"):
        # Given, also where PEFT knows them: its own way from a model's name to its modules fails for some.
        arguments["target_modules"] = _lora_targets(request.model) if _unknown(request, known) else _row(request, known)
    model = _train_peft(LoraConfig, request, arguments)
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            draw_uniform_(parameter, 1.0 / math.sqrt(parameter[0].numel()), request.seed, name)
        elif ".lora_embedding_B." in name:
            draw_uniform_(parameter, math.sqrt(3.0), request.seed, name)
    if basis:
        fix_lora_a(model, basis, request.seed)
    return model


def _lora_targets(model: nn.Module) -> list[str]:
    """The query and value projections; in a model without attention the linear layers of its blocks."""
    try:
        return short_names(model, attention_projections(model, "qv"))
    except ModelError:
        names = [name for name in linear_layers(model) if name.rpartition(".")[2] not in _READ_PAST_FORWARD]
        return short_names(model, names)


def _train_ia3(request: Request) -> nn.Module:
    arguments = dict(request.arguments)
    if arguments.get("init_ia3_weights", True) is not True:
        raise ConfigError("llm.adapter.args init_ia3_weights: must be true: IA3 starts from the unchanged model")
    known = peft_constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    if not arguments.get("target_modules") and _unknown(request, known):
        outputs = short_names(request.model, [name for name, _ in feed_forward_outputs(request.model)])
        projections = short_names(request.model, attention_projections(request.model, "kv"))
        arguments["target_modules"] = projections + outputs
        arguments["feedforward_modules"] = outputs
    elif arguments.get("target_modules") and "feedforward_modules" not in arguments:
        arguments["feedforward_modules"] = []
    return _train_peft(IA3Config, request, arguments)


def _train_norms(request: Request) -> nn.Module:
    arguments = dict(request.arguments)
    known = peft_constants.TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING
    if not arguments.get("target_modules") and _unknown(request, known):
        norms = norm_layers(request.model)
        if not norms:
            raise ModelError(
                f"{type(request.model).__name__}: its norms have no weights, so adapter_method 'layernorm' trains "
                "nothing; use lora, ia3 or bottleneck"
            )
        arguments["target_modules"] = short_names(request.model, norms)
    return _train_peft(LNTuningConfig, request, arguments)


def _unknown(request: Request, known: dict[str, Any]) -> bool:
    """Whether PEFT's table has nothing that fits this model: no row for its name, or one of modules it does not have.

    Names are reused: an architecture's modules change from one version of transformers to the next.
    """
    model: Any = request.model
    targets = _row(request, known)
    matching = [module for name, module in model.named_modules() if name.rpartition(".")[2] in targets]
    return not any(isinstance(module, (nn.Linear, nn.Embedding, Conv1D)) or is_norm(module) for module in matching)


def _row(request: Request, known: dict[str, Any]) -> list[str]:
    """PEFT's row for the model's architecture; empty where it has none."""
    model: Any = request.model
    targets = known.get(model.config.model_type)
    return list(targets) if isinstance(targets, (list, tuple, set)) else []


def _train_peft(config_type: type[PeftConfig], request: Request, arguments: dict[str, Any]) -> nn.Module:
    arguments = dict(arguments)
    kept = [*(arguments.pop("modules_to_save", None) or []), *request.head]
    task, pools = peft_task(request.model, request.task), isinstance(request.model, SentenceClassifier)
    if pools:
        arguments = _all_linear(request.model, arguments)
    try:
        with private_torch_rng(request.seed), warnings.catch_warnings():
            for harmless in _HARMLESS_WARNINGS:
                warnings.filterwarnings("ignore", message=harmless)
            settings = config_type(task_type=task, modules_to_save=kept_modules(task, kept), **arguments)  # type: ignore[call-arg]
            model: nn.Module = get_peft_model(request.model, settings)
            return _by_full_names(model) if pools else model
    except Exception as error:  # it meets modules and arguments of any kind
        raise ConfigError(f"llm.adapter.args: PEFT refuses {arguments!r}: {error}") from error


def _all_linear(model: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    """PEFT's word for all linear layers, which it takes for transformers' own models only, in names."""
    if str(arguments.get("target_modules")).lower() != "all-linear":
        return arguments
    return {**arguments, "target_modules": linear_layers(model)}


def _by_full_names(model: Any) -> Any:
    """Let the adapter's settings name its layers in full.

    Their last words (``query``) are those of a model with another head as well; full names fit no other, so that PEFT
    refuses to put the adapter there.
    """
    settings = model.peft_config["default"]
    names = set(model.base_model.targeted_module_names)
    settings.target_modules = names or settings.target_modules
    if getattr(settings, "feedforward_modules", None):
        layers = dict(model.base_model.model.named_modules())
        settings.feedforward_modules = {name for name in names if layers[name].is_feedforward}
    return model


def _peft_part(function: Callable[[Request], nn.Module], config_type: type[PeftConfig]) -> Part:
    names = {field_.name for field_ in dataclasses.fields(config_type)} - _MANAGED_FIELDS
    return Part(function, "peft", frozenset(names))


def _with_basis(part: Part, places: Callable[[nn.Module, Mapping[str, Any]], list[Place]], *ranks: str) -> Part:
    own = frozenset({"basis", "basis_digest", *ranks})

    def attach(request: Request) -> nn.Module:
        check_digest(request.arguments)
        others = {name: value for name, value in request.arguments.items() if name != "basis_digest"}
        return part.attach(dataclasses.replace(request, arguments=others))

    return Part(attach, part.saved_as, part.arguments | own, places, own)


PARTS: dict[str, Part] = {
    "lora": _with_basis(_peft_part(_train_lora, LoraConfig), lora_places),
    "ia3": _peft_part(_train_ia3, IA3Config),
    "layernorm": _peft_part(_train_norms, LNTuningConfig),
    "bitfit": Part(_train_biases, "parameters"),
    "bottleneck": _with_basis(
        Part(_train_bottleneck, "bottleneck", frozenset({"reduction_factor", "layers"})),
        bottleneck_places,
        "in_rank",
        "out_rank",
    ),
    "output_residual": _with_basis(
        Part(_train_output_residual, "output_residual", frozenset({"rank", "bias"})), output_residual_places
    ),
    "head": Part(_train_head, "parameters"),
    "full": Part(_train_full, "model"),
}
