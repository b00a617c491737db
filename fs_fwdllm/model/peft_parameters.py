"""Parameters of the base itself, in the form in which PEFT saves adapters.

A head alone, or all biases, are a thousandth of a model, and a folder with all of it for their sake is a thousand times
too large. PEFT's format has room for them without a layer of its own: ``modules_to_save`` names modules that are saved
whole, ``bias: all`` lets single biases in, and the targets are PEFT's own word for none. So PEFT loads and merges such
a folder like any other adapter, and so does transformers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from peft import LoraConfig, TaskType
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from fs_fwdllm.core.trainables import public_name
from fs_fwdllm.model.sentence_classifier import SentenceClassifier

__all__ = [
    "OF_BASE",
    "PEFT_CONFIG_FILE",
    "PEFT_WEIGHTS_FILE",
    "is_of_parameters",
    "kept_modules",
    "peft_task",
    "settings_of_parameters",
    "trained_names",
]

PEFT_CONFIG_FILE, PEFT_WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

#: Before the name of a base's parameter in a file of PEFT's.
OF_BASE = "base_model.model."


def peft_task(model: nn.Module, task: str) -> TaskType | None:
    """PEFT's word for a model's task.

    For question answering there is none: PEFT's own model drops ``token_type_ids`` on their way to the base. A sentence
    classifier has none either: what is saved then names this very class, and no other is loaded in its place.
    """
    if isinstance(model, SentenceClassifier):
        return None
    return {"classification": TaskType.SEQ_CLS, "causal_lm": TaskType.CAUSAL_LM}.get(task)


def kept_modules(task: TaskType | None, names: Iterable[str]) -> list[str] | None:
    """``modules_to_save`` for these; two of them PEFT adds itself for classifiers, and would list them twice."""
    added = ("classifier", "score") if task is TaskType.SEQ_CLS else ()
    return [name for name in names if name not in added] or None


def trained_names(model: nn.Module) -> list[str]:
    """Public names of what is trained."""
    return [public_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad]


def settings_of_parameters(model: nn.Module, task: str, location: str) -> tuple[LoraConfig, dict[str, str] | None]:
    """What PEFT has to know of a folder with the trained parameters of ``model``, and which class it belongs to, where
    the task does not say so.

    Args:
        location: of the base.
    """
    kind, modules = peft_task(model, task), _trained_modules(model)
    single = [name for name in trained_names(model) if not any(name.startswith(f"{module}.") for module in modules)]
    settings = LoraConfig(
        task_type=kind,
        target_modules=DUMMY_TARGET_MODULES,
        modules_to_save=kept_modules(kind, modules),
        bias="all" if single else "none",
        base_model_name_or_path=location,
        inference_mode=True,
    )
    named = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    return settings, named if kind is None else None


def is_of_parameters(settings: Mapping[str, Any]) -> bool:
    """Whether ``adapter_config.json`` is one that :func:`settings_of_parameters` makes."""
    return settings.get("target_modules") == DUMMY_TARGET_MODULES


def _trained_modules(model: nn.Module) -> list[str]:
    """The largest modules of which everything is trained, not only biases."""
    found: list[str] = []

    def visit(name: str, module: nn.Module) -> None:
        held = dict(module.named_parameters())
        if name and held and all(parameter.requires_grad for parameter in held.values()):
            if any(not public_name(one).endswith("bias") for one in held):
                found.append(name)
            return
        for leaf, child in module.named_children():
            if leaf != "parametrizations":
                visit(f"{name}.{leaf}" if name else leaf, child)

    visit("", model)
    return found
