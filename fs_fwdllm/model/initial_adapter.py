"""Starting from an adapter that exists: ``fwdllm.init_adapter`` (and ``federate.restore_from`` outside FederatedScope).

The folder is what a run has saved (``RUN/adapter``, ``RUN/model``, or the run itself), or one that PEFT wrote
elsewhere. The model is built as ``llm.adapter`` says; then the tensors in the folder take the place of the values that
training would start from. What is in the folder and what is to be trained must be the same thing: a setting that
differs, a tensor that is missing, left over or of another shape is refused by name, and so is a folder of another base,
as far as that can be seen. Only safetensors are read, one tensor at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn

from fs_fwdllm.config import Config
from fs_fwdllm.core.trainables import public_name
from fs_fwdllm.errors import ConfigError, ModelError, nearest, shown
from fs_fwdllm.model.facts import FACTS_FILE, SavedFacts
from fs_fwdllm.model.own_folder import OWN_FOLDERS
from fs_fwdllm.model.peft_parameters import OF_BASE, PEFT_CONFIG_FILE, PEFT_WEIGHTS_FILE, is_of_parameters
from fs_fwdllm.model.pooling import resolved
from fs_fwdllm.model.sentence_classifier import SentenceClassifier
from fs_fwdllm.model.sentence_layout import read_layout, saved_names, transformer_folder
from fs_fwdllm.model.trainable_parts import PARTS

__all__ = ["folder_named", "initial_folder", "start_from"]

#: Endings that FederatedScope's users give its pickled files.
_OF_FILES = (".bin", ".ckpt", ".pt", ".pth")

_MODEL_CONFIG = "config.json"
#: What a run saves, the best first.
_IN_A_RUN = ("adapter", "model")
#: Settings of PEFT's that change what the same tensors compute.
_PEFT_SETTINGS = (
    "peft_type", "r", "lora_alpha", "bias", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "lora_bias",
    "layer_replication",
)  # fmt: skip
#: Settings that decide which tensors there are; they are compared by those, since the same may be said in many ways.
_PEFT_PLACES = (
    "target_modules", "feedforward_modules", "modules_to_save", "layers_to_transform", "target_parameters",
    "trainable_token_indices",
)  # fmt: skip


def folder_named(path: str) -> Path:
    """The folder that stands for a path which names a file in FederatedScope: ``exp/a.ckpt`` is ``exp/a``.

    So one pair of ``federate.save_to`` and ``restore_from`` serves either, and neither overwrites what the other wrote.
    """
    place = Path(path).expanduser()
    return place.with_suffix("") if place.suffix in _OF_FILES and not place.is_dir() else place


def initial_folder(config: Config) -> Path | None:
    """The folder whose tensors a run starts from; ``None`` if it starts anew.

    Raises:
        ConfigError: it does not exist, or is nothing that was saved.
    """
    given = config.initial_adapter
    if not given:
        return None
    folder = folder_named(given)
    key = "fwdllm.init_adapter" if config.fwdllm.init_adapter else "federate.restore_from"
    if not folder.is_dir():
        is_file = Path(given).expanduser().is_file()
        what = "is a file, and pickled files are never read" if is_file else "there is no such folder"
        around = sorted(map(str, folder.parent.glob("*/"))) if folder.parent.is_dir() else []
        hint = "" if is_file else nearest(given, around)
        raise ConfigError(f"{key} {given!r}: {what}; name a folder that a run or PEFT has saved{hint}")
    inside = [folder, *(folder / name for name in _IN_A_RUN)]
    found = next((place for place in inside if _kind(place)), None)
    if found is None:
        raise ConfigError(
            f"{key} {given!r}: is no saved adapter or model: it has none of {', '.join(_CONFIGS.values())}, and no "
            f"folder {' or '.join(_IN_A_RUN)} with one; name such a folder, or leave it out"
        )
    return found


def start_from(folder: Path | None, model: nn.Module, method: str, arguments: Mapping[str, Any]) -> None:
    """Let the trained parameters of ``model`` start from the tensors in ``folder``, in place.

    Args:
        model: ready for training: adapter attached, ``requires_grad`` on what is trained.
        method: the ``adapter_method``, ``full`` without one.
        arguments: its arguments as configured.

    Raises:
        ConfigError: the folder holds another kind of adapter, or one with other settings.
        ModelError: a file is damaged, or its tensors do not fit.
    """
    if folder is None:
        return
    kind = _kind(folder)
    wanted = PARTS[method].saved_as
    if kind != wanted and (kind, wanted) != ("model", "parameters"):  # which are among a whole model's
        raise ConfigError(
            f"fwdllm.init_adapter {str(folder)!r}: holds {_IN_WORDS[kind]}, but llm.adapter trains {method!r}, which "
            f"starts from {_IN_WORDS[wanted]}"
        )
    _require_same_classes(folder, model)
    _START[kind](folder, model, arguments)


def _kind(folder: Path) -> str:
    """How a folder was saved, as ``Part.saved_as`` has it; empty if it was not."""
    found = next((kind for kind, file in _CONFIGS.items() if (folder / file).is_file()), "")
    if found == "peft" and is_of_parameters(_read_json(folder / PEFT_CONFIG_FILE)):
        return "parameters"
    return found or ("model" if (transformer_folder(folder) / _MODEL_CONFIG).is_file() else "")


_CONFIGS = {
    "peft": PEFT_CONFIG_FILE,
    **{kind: own.config_file for kind, own in OWN_FOLDERS.items()},
    "model": _MODEL_CONFIG,
}
_IN_WORDS = {
    "peft": "a PEFT adapter",
    "parameters": "a head or biases alone",
    **{kind: f"a {kind} adapter" for kind in OWN_FOLDERS},
    "model": "a whole model",
}


def _start_from_peft(folder: Path, model: Any, arguments: Mapping[str, Any]) -> None:
    theirs, ours = _read_json(folder / PEFT_CONFIG_FILE), model.peft_config["default"].to_dict()
    for name in _PEFT_SETTINGS:
        if name in theirs and name in ours:
            _require_equal(folder, name, _plain(theirs[name]), _plain(ours[name]))
    expected = {name: tensor for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()}
    with _tensors(folder) as saved:
        if set(expected) != set(saved):
            for name in _PEFT_PLACES:
                if name in theirs and name in ours:
                    _require_equal(folder, name, _plain(theirs[name]), _plain(ours[name]))
        for name, tensor in expected.items():
            if arguments.get("basis") and ".lora_A." in name and name in saved:
                _require_same_basis(folder / PEFT_WEIGHTS_FILE, name, saved[name], tensor)
        _copy(folder, saved, {name: (name, tensor) for name, tensor in expected.items()})


def _start_from_parameters(folder: Path, model: nn.Module, arguments: Mapping[str, Any]) -> None:
    _require_same_features(folder, model)
    trained = {public_name(name): tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    with _tensors(folder) as saved:
        _copy(folder, saved, {name: (f"{OF_BASE}{name}", tensor) for name, tensor in trained.items()})


def _start_from_own(folder: Path, model: nn.Module, arguments: Mapping[str, Any]) -> None:
    own = OWN_FOLDERS[_kind(folder)]
    theirs = _read_json(folder / own.config_file)
    for name, value in own.settings(arguments).items():
        _require_equal(folder, name, theirs.get(name), value)
    with _tensors(folder) as saved:
        for name, tensor in own.fixed(model).items():
            if name in saved and name.rpartition(".")[2] in own.basis:
                _require_same_basis(folder / own.weights_file, name, saved[name], tensor)
        _copy(folder, saved, {name: (name, tensor) for name, tensor in own.tensors(model)})


def _start_from_model(folder: Path, model: nn.Module, arguments: Mapping[str, Any]) -> None:
    _require_same_features(folder, model)
    aliases: dict[int, list[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(tensor), []).append(public_name(name))
    with _tensors(folder) as saved:
        pairs = {}
        for tensor in model.parameters():
            names = aliases[id(tensor)]
            name = next((name for name in names if name in saved), names[0])
            if tensor.requires_grad:
                pairs[names[0]] = (name, tensor)
            elif name in saved:
                _require_same_base(folder, name, saved[name], tensor)
        _copy(folder, saved, pairs, whole=False)


_START = {
    "peft": _start_from_peft,
    "parameters": _start_from_parameters,
    "model": _start_from_model,
    **dict.fromkeys(OWN_FOLDERS, _start_from_own),
}


class _Files:
    """The tensors of all safetensors files of a folder, read when they are asked for.

    Args:
        files: ``{name in our model: (open file, name in it)}``.
    """

    def __init__(self, files: Mapping[str, tuple[Any, str]]) -> None:
        self._files = files

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __getitem__(self, name: str) -> torch.Tensor:
        file, theirs = self._files[name]
        tensor: torch.Tensor = file.get_tensor(theirs)
        return tensor


@contextmanager
def _tensors(folder: Path) -> Iterator[_Files]:
    paths = list(saved_names(folder))
    if not paths:
        raise ModelError(
            f"fwdllm.init_adapter {str(folder)!r}: has no .safetensors file, and pickled files are never read; save it "
            "anew with save_pretrained(..., safe_serialization=True)"
        )
    try:
        opened: list[Any] = [(safe_open(path, framework="pt"), renamed) for path, renamed in paths]
        yield _Files({renamed(name): (file, name) for file, renamed in opened for name in file.keys()})  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(f"fwdllm.init_adapter {str(folder)!r}: its tensors cannot be read ({error})") from error


@torch.no_grad()
def _copy(folder: Path, saved: _Files, pairs: Mapping[str, tuple[str, torch.Tensor]], *, whole: bool = True) -> None:
    """Copy ``{our name: (saved name, our tensor)}``; with ``whole`` nothing else may have been saved."""
    missing = [name for name, (theirs, _) in pairs.items() if theirs not in saved]
    left_over = sorted(set(saved) - {theirs for theirs, _ in pairs.values()}) if whole else []
    for names, what in ((missing, "lacks"), (left_over, "has, and this run does not train,")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ModelError(
                f"fwdllm.init_adapter {str(folder)!r}: {what} the tensor {names[0]!r}{more}; let llm.adapter.args say "
                "what it was made with"
            )
    values = {name: saved[theirs] for name, (theirs, _) in pairs.items()}
    for name, (_, tensor) in pairs.items():
        if values[name].shape != tensor.shape:
            raise ModelError(
                f"fwdllm.init_adapter {str(folder)!r}: {name} has shape {tuple(values[name].shape)}, and here it has "
                f"{tuple(tensor.shape)}"
            )
        if not torch.isfinite(values[name]).all():
            raise ModelError(f"fwdllm.init_adapter {str(folder)!r}: {name} holds a value that is not finite")
    for name, (_, tensor) in pairs.items():
        tensor.copy_(values[name])


def _require_equal(folder: Path, name: str, theirs: Any, ours: Any) -> None:
    if theirs != ours:
        raise ConfigError(
            f"llm.adapter.args {name}: is {shown(ours)} here, but {shown(theirs)} in fwdllm.init_adapter "
            f"{str(folder)!r}; the two must agree"
        )


def _require_same_base(folder: Path, name: str, theirs: torch.Tensor, ours: torch.Tensor) -> None:
    if theirs.shape != ours.shape or not torch.equal(theirs.to(ours.dtype), ours.detach().cpu()):
        raise ModelError(
            f"fwdllm.init_adapter {str(folder)!r}: its frozen {name} is not that of model.type: it was made on "
            "another base"
        )


def _require_same_features(folder: Path, model: nn.Module) -> None:
    """A head means nothing on other vectors than those it was trained on."""
    here = resolved(model.features.layout if isinstance(model, SentenceClassifier) else None)
    there = _features_of(folder)
    for key in here:
        if here[key] != there[key]:
            raise ConfigError(
                f"fwdllm.{key}: is {here[key]} here, but {there[key]} in fwdllm.init_adapter {str(folder)!r}, and a "
                "head means nothing on other vectors; set both keys, pooling and feature_scale, to what it was trained "
                "on"
            )


def _features_of(folder: Path) -> Mapping[str, str]:
    """What a saved head reads, as its facts say or its folder is laid out."""
    if (folder / PEFT_CONFIG_FILE).is_file():
        own = SavedFacts.read(folder).config().fwdllm if (folder / FACTS_FILE).is_file() else None
        return {key: str(getattr(own, key, none)) for key, none in resolved(None).items()}
    layout = read_layout(str(folder))
    return resolved(layout if layout is not None and layout.head else None)


def _require_same_basis(file: Path, name: str, theirs: torch.Tensor, ours: torch.Tensor) -> None:
    if theirs.shape != ours.shape or not torch.equal(theirs, ours.cpu()):
        raise ConfigError(
            f"llm.adapter.args basis: gives another {name} than fwdllm.init_adapter {str(file.parent)!r} was trained "
            f"with; give basis its own, {str(file)!r}"
        )


def _require_same_classes(folder: Path, model: Any) -> None:
    """A head's rows are the classes in order: another order would swap them without a word."""
    theirs = None
    if (transformer_folder(folder) / _MODEL_CONFIG).is_file():
        by_index = _read_json(transformer_folder(folder) / _MODEL_CONFIG).get("id2label")
        theirs = [by_index[key] for key in sorted(by_index, key=int)] if isinstance(by_index, dict) else None
    elif (folder / FACTS_FILE).is_file():
        theirs = _read_json(folder / FACTS_FILE).get("classes") or None
    if theirs is None or not getattr(model.config, "label2id", None):
        return
    ours = [model.config.id2label[index] for index in sorted(model.config.id2label)]
    if theirs != ours and not _are_numbers(theirs) and not _are_numbers(ours):
        raise ConfigError(
            f"fwdllm.init_adapter {str(folder)!r}: was trained on the classes {shown(theirs)}, but the data has "
            f"{shown(ours)}; name them in that order in fwdllm.data.labels"
        )


def _are_numbers(names: list[str]) -> bool:
    """Whether classes have no names but those Hugging Face gives."""
    return all(name == f"LABEL_{index}" for index, name in enumerate(names))


def _plain(value: Any) -> Any:
    """A setting as it can be compared: without enums, order, and the several forms of nothing."""
    value = getattr(value, "value", value)
    if isinstance(value, list | tuple | set):
        return sorted(map(str, value)) or None
    return value or None if not isinstance(value, int | float) or isinstance(value, bool) else value


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path}: must be a JSON object, but is a {type(found).__name__}")
    return found
