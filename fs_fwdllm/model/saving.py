"""Writing what was trained, in the form others can load.

PEFT methods leave a PEFT folder (``adapter/``), and so do those that train some parameters of the base itself, a head
or biases (:mod:`~fs_fwdllm.model.peft_parameters`); this package's own adapters leave a small folder of theirs
(``adapter/``, :mod:`~fs_fwdllm.model.own_folder`), and what trains all of the base a whole Hugging Face model
(``model/``), which knows the classes by their names. Each has the tokenizer as the run used it, the
facts that :func:`~fs_fwdllm.model.reloading.load_saved` needs, and a model card. All tensors are safetensors. A folder
is written beside its place and moved there when it is complete, so that a reader sees the old one or the new one, never
half of one. The model in memory is only read.

PEFT's own ``AutoPeftModel...from_pretrained(adapter)`` loads the base by what the base's files say of themselves: with
two classes instead of six, or in half precision where the run computed in float32. Where that would be another model
than the one that was evaluated, the adapter names as its base a folder ``base_model/`` beside it, which holds the
configuration as the run used it and links to the base's weights.

No class of transformers' pools as a sentence encoder does. A classifier on one is written as sentence-transformers lays
out its models (:mod:`~fs_fwdllm.model.sentence_layout`), and so is the base of its adapters; whatever does not know
that layout finds no configuration there.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from fs_fwdllm.core.trainables import public_name
from fs_fwdllm.errors import ModelError, nearest
from fs_fwdllm.model.base.packed import reader_of
from fs_fwdllm.model.base.writing import Unread, unread_state, write_unread
from fs_fwdllm.model.base_folder import base_model, config_as_used, config_of_base, config_to_keep, link_to, weights_of
from fs_fwdllm.model.card import model_card
from fs_fwdllm.model.facts import SavedFacts
from fs_fwdllm.model.half_precision import rounds_when_loaded_in_half
from fs_fwdllm.model.loading import LoadedModel
from fs_fwdllm.model.own_folder import OWN_FOLDERS
from fs_fwdllm.model.peft_parameters import (
    OF_BASE,
    PEFT_CONFIG_FILE,
    PEFT_WEIGHTS_FILE,
    settings_of_parameters,
    trained_names,
)
from fs_fwdllm.model.quiet import quiet_transformers
from fs_fwdllm.model.sentence_classifier import SentenceClassifier, SentenceFeatures
from fs_fwdllm.model.sentence_layout import (
    CLASSIFIER_FOLDER,
    TRANSFORMER_FOLDER,
    split_names,
    split_state,
    write_layout,
)

__all__ = ["save_trained", "write_folder"]

#: The folder beside an adapter that stands for its base.
_BASE_FOLDER = "base_model"


def save_trained(
    loaded: LoadedModel,
    folder: str | Path,
    values: Mapping[str, torch.Tensor] | None = None,
    facts: SavedFacts | None = None,
    suffix: str = "",
) -> Path:
    """Write the trained part of ``loaded`` below ``folder`` and return the folder written (``adapter`` or ``model``).

    Args:
        loaded: the model.
        folder: the run's folder; created if it does not exist.
        values: ``{parameter name: tensor}`` that replace the model's values in what is written, by the names of
            ``model.named_parameters()`` or their public form; the model keeps its own.
        facts: what the folder says of itself: the model's own, with what a run reached added to them.
        suffix: of the folder's name; ``-last`` gives ``adapter-last``.

    Raises:
        ModelError: a name in ``values`` is not a parameter of the model, or has another shape.
        OSError: the folder cannot be written; what was there before is still there.
    """
    name = "model" if loaded.saved_as == "model" else "adapter"
    return write_folder(loaded, Path(folder).absolute() / f"{name}{suffix}", values or {}, facts or loaded.facts)


def write_folder(loaded: LoadedModel, target: Path, values: Mapping[str, torch.Tensor], facts: SavedFacts) -> Path:
    """As :func:`save_trained`, to the folder ``target`` itself."""
    saved_as = loaded.saved_as
    write: Callable[[Path], None]
    if saved_as == "model" and reader_of(loaded.model) is not None:
        write = partial(_write_streamed, loaded, unread_state(loaded.model, values))
    else:
        write = partial(_WRITERS[saved_as], loaded, _state(loaded.model, values))
    target.parent.mkdir(parents=True, exist_ok=True)
    with _staged(target) as staging:
        write(staging)
        facts.write(staging)
        of_peft = saved_as in ("peft", "parameters")
        card = model_card(facts, "peft" if of_peft else saved_as, rounds_when_loaded_in_half(loaded.model))
        (staging / "README.md").write_text(card, encoding="utf-8", errors="replace")
        if of_peft:
            _name_base(loaded, staging, target.parent / _BASE_FOLDER)
    return target


@contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """A folder to fill, which is in the place of ``target`` after the block; an error leaves what was there."""
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield staging
        _open_to_readers(staging)
        _move_into_place(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _name_base(loaded: LoadedModel, adapter: Path, folder: Path) -> None:
    """Let PEFT's automatic loading find the base as the run used it."""
    base = base_model(loaded.model)
    features = base.features if isinstance(base, SentenceClassifier) else None
    config = config_to_keep(loaded) if features is None else config_as_used(loaded)
    weights = weights_of(loaded.source)
    if config is None or not weights:
        return
    with _staged(folder) as staging:
        place = staging if features is None else staging / TRANSFORMER_FOLDER
        if features is not None:
            _write_layout(loaded, features, staging, classes=0)
        config.save_pretrained(place)
        for path in weights:
            link_to(path, place / path.name)
    _change_json(adapter / PEFT_CONFIG_FILE, {"base_model_name_or_path": str(folder)})


def _write_layout(loaded: LoadedModel, features: SentenceFeatures, folder: Path, classes: int) -> None:
    longest = loaded.facts.config().llm.tok_len
    write_layout(folder, features.layout, features.token_width, classes, longest)


def _state(model: nn.Module, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The model's tensors by public name, with ``values`` in place of the parameters they name, ties included."""
    aliases = dict(model.named_parameters(remove_duplicate=False))
    by_public_name = {public_name(name): parameter for name, parameter in aliases.items()}
    replaced: dict[int, torch.Tensor] = {}
    for name, value in values.items():
        parameter = by_public_name.get(public_name(name))
        if parameter is None:
            raise ModelError(f"{name!r} is not a parameter of the model{nearest(name, by_public_name)}")
        if parameter.shape != value.shape:
            raise ModelError(f"{name}: shape {tuple(value.shape)} is not the model's {tuple(parameter.shape)}")
        replaced[id(parameter)] = value.detach().to(device="cpu", dtype=parameter.dtype)
    state = {public_name(name): tensor for name, tensor in model.state_dict().items()}
    for name, parameter in by_public_name.items():
        if id(parameter) in replaced:
            state[name] = replaced[id(parameter)]
    return state


def _write_peft(loaded: LoadedModel, state: dict[str, torch.Tensor], folder: Path) -> None:
    model: Any = loaded.model
    model.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)
    loaded.tokenizer.save_pretrained(str(folder))


def _write_parameters(loaded: LoadedModel, state: dict[str, torch.Tensor], folder: Path) -> None:
    tensors = {f"{OF_BASE}{name}": state[name].detach().cpu().contiguous() for name in trained_names(loaded.model)}
    save_file(tensors, folder / PEFT_WEIGHTS_FILE, metadata={"format": "pt"})
    settings, model_class = settings_of_parameters(loaded.model, loaded.task, loaded.source.location)
    settings.save_pretrained(str(folder), auto_mapping_dict=model_class)
    loaded.tokenizer.save_pretrained(str(folder))


def _write_own(loaded: LoadedModel, state: dict[str, torch.Tensor], folder: Path) -> None:
    own = OWN_FOLDERS[loaded.saved_as]
    tensors = {name: state[name].detach().cpu().contiguous() for name, _ in own.tensors(loaded.model)}
    save_file(tensors, folder / own.weights_file, metadata={"format": "pt"})
    settings = {
        "adapter_type": own.kind,
        "format_version": 1,
        "base_model_name_or_path": loaded.source.location,
        "task": loaded.task,
        **own.settings(loaded.arguments),
    }
    (folder / own.config_file).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    loaded.tokenizer.save_pretrained(str(folder))


def _write_model(loaded: LoadedModel, state: dict[str, torch.Tensor], folder: Path) -> None:
    model: Any = loaded.model
    if isinstance(model, SentenceClassifier):
        _write_layout(loaded, model.features, folder, classes=model.classifier.out_features)
        head, state = split_state(state)
        save_file(head, folder / CLASSIFIER_FOLDER / "model.safetensors", metadata={"format": "pt"})
        model, folder = model.features.transformer, folder / TRANSFORMER_FOLDER
    with quiet_transformers():
        model.save_pretrained(str(folder), state_dict=state)
    _write_beside_model(loaded, folder)


def _write_streamed(loaded: LoadedModel, state: dict[str, Unread], folder: Path) -> None:
    """A whole model of which most is on the disk."""
    model: Any = loaded.model
    if isinstance(model, SentenceClassifier):
        _write_layout(loaded, model.features, folder, classes=model.classifier.out_features)
        head, state = split_names(state)
        tensors = {name: tensor.read().detach().cpu().contiguous() for name, tensor in head.items()}
        save_file(tensors, folder / CLASSIFIER_FOLDER / "model.safetensors", metadata={"format": "pt"})
        model, folder = model.features.transformer, folder / TRANSFORMER_FOLDER
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], loaded.base_dtype
    with quiet_transformers():
        config.save_pretrained(str(folder))
        if model.can_generate():
            model.generation_config.save_pretrained(str(folder))
    write_unread(state, folder)
    _write_beside_model(loaded, folder)


def _write_beside_model(loaded: LoadedModel, folder: Path) -> None:
    """The tokenizer, and in ``config.json`` what training has changed for its own sake."""
    with quiet_transformers():
        loaded.tokenizer.save_pretrained(str(folder))
    own = config_of_base(loaded.source)
    changes: dict[str, Any] = {}
    if hasattr(own, "use_cache"):
        changes["use_cache"] = own.use_cache  # training runs without; whoever generates wants it back
    if rounds_when_loaded_in_half(loaded.model):
        changes["dtype"] = "float32"  # a plain load then keeps the masters, over the base's values, which all fit
    _change_json(folder / "config.json", changes)


_WRITERS = {
    "peft": _write_peft,
    "parameters": _write_parameters,
    "model": _write_model,
    **dict.fromkeys(OWN_FOLDERS, _write_own),
}


def _change_json(file: Path, changes: Mapping[str, Any]) -> None:
    tree = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(tree | dict(changes), indent=2) + "\n", encoding="utf-8")


def _move_into_place(staging: Path, target: Path) -> None:
    if not target.exists():
        os.replace(staging, target)
        return
    retired = staging.with_name(f"{staging.name}-old")
    os.replace(target, retired)
    try:
        os.replace(staging, target)
    except OSError:
        os.replace(retired, target)
        raise
    shutil.rmtree(retired, ignore_errors=True)


def _open_to_readers(folder: Path) -> None:
    """Undo the owner-only modes of temporary folders and safetensors files, as far as the process's mask allows."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (folder, *(path for path in folder.rglob("*") if not path.is_symlink())):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
