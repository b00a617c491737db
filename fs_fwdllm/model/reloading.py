"""Loading what a run saved, as the run evaluated it.

Hugging Face and PEFT load a saved folder, too; what they cannot know is that norms and heads trained over a
half-precision base are float32 masters (:mod:`~fs_fwdllm.model.half_precision`): they load them in the base's dtype,
which rounds away most of what was learned. Here the base is loaded and the parts are attached by the very code that
prepared the run, from the saved folder's own facts, and then every trained tensor is filled in from the file,
unrounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open

from fs_fwdllm.config import Config
from fs_fwdllm.core.trainables import public_name
from fs_fwdllm.errors import ModelError
from fs_fwdllm.model.facts import SavedFacts
from fs_fwdllm.model.half_precision import HALF_DTYPES
from fs_fwdllm.model.loading import LoadedModel, load_model
from fs_fwdllm.model.own_folder import OWN_FOLDERS, OwnFolder
from fs_fwdllm.model.peft_parameters import OF_BASE, PEFT_CONFIG_FILE, PEFT_WEIGHTS_FILE
from fs_fwdllm.model.sentence_layout import saved_names
from fs_fwdllm.model.tokenizer import load_tokenizer
from fs_fwdllm.model.trainable_parts import PARTS, saved_as

__all__ = ["load_saved"]


def load_saved(folder: str | Path, facts: SavedFacts | None = None) -> tuple[LoadedModel, Config, SavedFacts]:
    """The model of a saved folder in eval mode, the configuration that loads it, and the folder's facts.

    Args:
        facts: the folder's, where they have been read already.

    Raises:
        ModelError: a file is missing or damaged, the base is not there, or the tensors do not fit it.
        ConfigError: the facts are of another version.
    """
    place = Path(folder).absolute()
    facts = facts or SavedFacts.read(place)
    if facts.trained not in PARTS:
        raise ModelError(f"{place}: was trained as {facts.trained!r}; this version knows {', '.join(PARTS)}")
    kind = saved_as(facts.trained, pools=facts.pools)
    if kind == "parameters" and not (place / PEFT_CONFIG_FILE).is_file():
        kind = "model"  # as earlier versions wrote it
    own = OWN_FOLDERS.get(kind)
    if kind == "model":  # as packed as it was, if it was, and on the disk if its blocks were trained there
        streams = bool(facts.tree.get("fwdllm", {}).get("base", {}).get("stream"))
        config = facts.without_packing().with_base(stream=streams).config(place)
    else:
        config = facts.config(facts.base_location)
        config = _with_own_basis(config, place / (own.weights_file if own is not None else PEFT_WEIGHTS_FILE))
    tokenizer = load_tokenizer(config, place)
    loaded = load_model(config, tokenizer, facts.classes)
    if kind == "peft":
        _fill_peft(loaded.model, place)
    elif kind == "parameters":
        tensors = _tensors(place / PEFT_WEIGHTS_FILE)
        _fill(loaded.model, {name.removeprefix(OF_BASE): tensor for name, tensor in tensors.items()}, place)
    elif own is not None:
        _fill_own(loaded.model, own, place)
    else:
        _fill_masters(loaded, place)
    return loaded, config, facts


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file."""
    return dict(_some_of(file, lambda name: name, None))


def _with_own_basis(config: Config, file: Path) -> Config:
    """The configuration with the saved bytes in place of the basis the run was given, which may be gone."""
    arguments = config.llm.adapter.args[0]
    if not arguments.get("basis"):
        return config
    kept = {name: value for name, value in arguments.items() if name != "basis_digest"}
    adapter = config.llm.adapter.model_copy(update={"args": [{**kept, "basis": str(file)}]})
    return config.model_copy(update={"llm": config.llm.model_copy(update={"adapter": adapter})})


def _fill_own(model: torch.nn.Module, own: OwnFolder, folder: Path) -> None:
    tensors = _tensors(folder / own.weights_file)
    for name, buffer in own.fixed(model).items():
        saved = tensors.pop(name, None)
        if saved is None or saved.shape != buffer.shape:
            raise ModelError(f"{folder}: does not fit its base: {name} is missing or has another shape")
        buffer.copy_(saved)
    _fill(model, tensors, folder)


def _some_of(file: Path, renamed: Callable[[str], str], wanted: set[str] | None) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a safetensors file by the model's names for them, one at a time; all, or those that are wanted."""
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                if wanted is None or renamed(name) in wanted:
                    yield renamed(name), opened.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file}: cannot be read ({error})") from error


def _fill_peft(model: Any, folder: Path) -> None:
    tensors = _tensors(folder / PEFT_WEIGHTS_FILE)
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    misfits = {name for name in expected.keys() | tensors.keys() if _shape(expected, name) != _shape(tensors, name)}
    if misfits:
        raise ModelError(f"{folder}: does not fit its base: {_some(misfits)} is missing or has another shape")
    set_peft_model_state_dict(model, tensors)


def _shape(tensors: dict[str, torch.Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(tensors[name].shape) if name in tensors else None


def _fill_masters(loaded: LoadedModel, folder: Path) -> None:
    """Give float32 masters over a half-precision base the values of the file, which loading has rounded."""
    halves = any(parameter.dtype in HALF_DTYPES for parameter in loaded.model.parameters())
    masters = {
        public_name(name)
        for name, parameter in loaded.model.named_parameters(remove_duplicate=False)
        if parameter.requires_grad and parameter.dtype == torch.float32
    }
    if halves and masters:
        files = saved_names(folder)
        found = {name: tensor for file, renamed in files for name, tensor in _some_of(file, renamed, masters)}
        _fill(loaded.model, found, folder)


@torch.no_grad()
def _fill(model: torch.nn.Module, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Copy each tensor into the trained parameter of its name, in any of the parameter's names; none may be missing."""
    names: dict[int, list[str]] = {}
    parameters = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad and parameter.dtype not in HALF_DTYPES:
            names.setdefault(id(parameter), []).append(public_name(name))
            parameters[id(parameter)] = parameter
    for key, aliases in names.items():
        found = next((tensors[name] for name in aliases if name in tensors), None)
        if found is None or found.shape != parameters[key].shape:
            raise ModelError(f"{folder}: does not fit its base: {aliases[0]} is missing or has another shape")
        parameters[key].copy_(found)
    if strangers := set(tensors) - {name for aliases in names.values() for name in aliases}:
        raise ModelError(f"{folder}: does not fit its base: the model has no {_some(strangers)}")


def _some(names: set[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" ({len(listed)} in all)" if len(listed) > 3 else "")
