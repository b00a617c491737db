"""The folder of a sentence encoder: which modules make a vector of a text, and where each lies.

sentence-transformers describes a model by ``modules.json``, a list of modules that hand a text's vectors on, each with
a folder of its own: a transformer, a pooling over its tokens, and perhaps more. Only the files are read here; the
library is not needed. A classifier that was trained on top is written in the same layout, its head as a ``Dense``
module of the name ``classifier`` at the end, so that ``SentenceTransformer(folder).encode(texts)`` gives the logits.

A transformer may lie in a folder of its own. Ours does, on purpose: a program that knows nothing of the pooling finds
no ``config.json`` and stops, instead of putting a head of its own making on the transformer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file

from fs_fwdllm.errors import ModelError, shown
from fs_fwdllm.model.folder import read_settings
from fs_fwdllm.model.hub import hub_file

__all__ = [
    "CLASSIFIER_FOLDER",
    "MODULES_FILE",
    "POOLINGS",
    "TRANSFORMER_FOLDER",
    "SentenceLayout",
    "layout_files",
    "read_layout",
    "saved_names",
    "split_names",
    "split_state",
    "transformer_folder",
    "write_layout",
]

_Tensor = TypeVar("_Tensor")
MODULES_FILE = "modules.json"
#: Where ours lie in a folder that is written.
TRANSFORMER_FOLDER, CLASSIFIER_FOLDER = "0_Transformer", "3_Dense"
_POOLING_FOLDER, _SCALE_FOLDER = "1_Pooling", "2_Scale"
#: The name that tells a trained head from a ``Dense`` layer of the encoder's own.
_HEAD = "classifier"
#: ``{our word: sentence-transformers' word}``, in the order in which several vectors are put side by side: the one that
#: flags give. A file may name another, which is all the same to a head that is new.
POOLINGS = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len": "mean_sqrt_len_tokens",
    "weightedmean": "weightedmean",
    "lasttoken": "lasttoken",
}
#: The same as flags, which is how all versions of the library can read it.
_FLAGS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
#: ``{how a vector is scaled: the module that does it}``
_SCALES = {"unit": "Normalize", "layer_norm": "LayerNorm"}
_WITHOUT_EFFECT = ("Dropout",)
#: ``(prefix of names in our model, prefix in the file)``
_OF_HEAD, _OF_TRANSFORMER = (f"{_HEAD}.", "linear."), ("features.transformer.", "")


@dataclass(frozen=True)
class SentenceLayout:
    """What ``modules.json`` says of an encoder.

    Attributes:
        pooling: how tokens become one vector, by the words of :data:`POOLINGS`; several stand side by side.
        scale: what is done to the vector: ``none``, ``unit`` (its length is one), or ``layer_norm``.
        head: the folder of a trained head; empty without one.
        unknown: modules that are not read here, so that vectors cannot be made as the encoder makes them.
    """

    pooling: tuple[str, ...]
    scale: str = "none"
    head: str = ""
    unknown: tuple[str, ...] = ()


def read_layout(location: str) -> SentenceLayout | None:
    """What the model in a folder, or of a hub name, says of itself; ``None`` where it is no sentence encoder.

    Raises:
        ModelError: a file is damaged.
    """
    file = _find(location, MODULES_FILE)
    if file is None:
        return None
    pooling: tuple[str, ...] = ()
    scale, head, unknown = "none", "", []
    scales = {module: word for word, module in _SCALES.items()}
    for name, kind, path in _modules(file)[1:]:
        if kind == "Pooling" and not pooling:
            pooling = _pooling_in(_find(location, f"{path}/config.json"), file)
        elif kind == "Dense" and name == _HEAD:
            head = path
        elif kind == "Normalize" or (kind == "LayerNorm" and name == "scale"):
            scale = scales[kind]
        elif kind not in _WITHOUT_EFFECT:
            unknown.append(kind)
    return SentenceLayout(pooling, scale, head, tuple(unknown)) if pooling else None


def transformer_folder(folder: Path) -> Path:
    """Where a model's folder has its transformer: in itself, or where ``modules.json`` says.

    Raises:
        ModelError: ``modules.json`` is damaged.
    """
    file = folder / MODULES_FILE
    if (folder / "config.json").is_file() or not file.is_file():
        return folder
    return folder / _modules(file)[0][2]


def layout_files(folder: Path) -> list[Path]:
    """The files of all modules of a sentence encoder's folder beside its own; none of another folder."""
    file = folder / MODULES_FILE
    places = {folder / path for _, _, path in _modules(file) if path} if file.is_file() else set()
    return sorted(path for place in places if place.is_dir() for path in place.iterdir() if path.is_file())


def split_state(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The tensors of a classifier as the files of its head and of its transformer have them."""
    return split_names({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()})


def split_names(state: Mapping[str, _Tensor]) -> tuple[dict[str, _Tensor], dict[str, _Tensor]]:
    """What stands for the tensors of a classifier, by the names they have in its head's and its transformer's files."""
    parts: tuple[dict[str, _Tensor], ...] = ({}, {})
    for part, (ours, theirs) in zip(parts, (_OF_HEAD, _OF_TRANSFORMER), strict=True):
        part.update((theirs + name.removeprefix(ours), own) for name, own in state.items() if name.startswith(ours))
    return parts[0], parts[1]


def saved_names(folder: Path) -> Iterator[tuple[Path, Callable[[str], str]]]:
    """The weight files of a folder, each with what turns a name in it into the model's name of that tensor."""
    for file in sorted(folder.glob("*.safetensors")):
        yield file, lambda name: name
    if not (folder / MODULES_FILE).is_file() or (folder / "config.json").is_file():
        return
    for place, (ours, theirs) in ((TRANSFORMER_FOLDER, _OF_TRANSFORMER), (CLASSIFIER_FOLDER, _OF_HEAD)):
        for file in sorted((folder / place).glob("*.safetensors")):
            yield file, partial(_renamed, theirs=theirs, ours=ours)


def _renamed(name: str, theirs: str, ours: str) -> str:
    return ours + name.removeprefix(theirs)


def write_layout(folder: Path, layout: SentenceLayout, width: int, classes: int, longest: int) -> None:
    """Write everything but the weights of transformer and head, and the transformer's own files.

    Args:
        width: of a token's vector.
        classes: of the head; 0 writes none.
        longest: tokens to which a text is cut.
    """
    names = [("transformer", "Transformer", TRANSFORMER_FOLDER), ("pooling", "Pooling", _POOLING_FOLDER)]
    names += [("scale", _SCALES[layout.scale], _SCALE_FOLDER)] if layout.scale != "none" else []
    names += [(_HEAD, "Dense", CLASSIFIER_FOLDER)] if classes else []
    listed = [
        {"idx": index, "name": name, "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (name, kind, path) in enumerate(names)
    ]
    features = width * len(layout.pooling)
    pooling = {"word_embedding_dimension": width, **{flag: word in layout.pooling for word, flag in _FLAGS.items()}}
    activation = "torch.nn.modules.linear.Identity"
    dense = {"in_features": features, "out_features": classes, "bias": True, "activation_function": activation}
    _write_json(folder / MODULES_FILE, listed)
    _write_json(folder / "config_sentence_transformers.json", {"__version__": {}, "prompts": {}})
    _write_json(
        folder / TRANSFORMER_FOLDER / "sentence_bert_config.json", {"max_seq_length": longest, "do_lower_case": False}
    )
    _write_json(folder / _POOLING_FOLDER / "config.json", pooling)
    if layout.scale == "layer_norm":
        _write_json(folder / _SCALE_FOLDER / "config.json", {"dimension": features})
        parameters = {"norm.weight": torch.ones(features), "norm.bias": torch.zeros(features)}  # theirs has some
        save_file(parameters, folder / _SCALE_FOLDER / "model.safetensors", metadata={"format": "pt"})
    if classes:
        _write_json(folder / CLASSIFIER_FOLDER / "config.json", dense)


def _write_json(file: Path, tree: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def _find(location: str, name: str) -> Path | None:
    """A file of a folder or of a hub name, if it has it."""
    if Path(location).is_dir():
        file = Path(location, name)
        return file if file.is_file() else None
    return hub_file(location, name)


def _modules(file: Path) -> list[tuple[str, str, str]]:
    """``(name, class without its package, folder)`` of every module."""
    try:
        listed = json.loads(file.read_text(encoding="utf-8"))
        found = [(str(entry["name"]), str(entry["type"]).rpartition(".")[2], str(entry["path"])) for entry in listed]
    except (OSError, ValueError, RecursionError, TypeError, KeyError) as error:
        raise ModelError(f"{file}: must be a list of modules with name, type and path ({error!r})") from error
    outside = [path for _, _, path in found if Path(path).is_absolute() or ".." in Path(path).parts]
    if outside or not found:
        raise ModelError(f"{file}: names {shown(outside[0]) if outside else 'no module'}, which is not in this folder")
    return found


def _pooling_in(file: Path | None, listing: Path) -> tuple[str, ...]:
    if file is None:
        raise ModelError(f"{listing}: names a pooling that has no config.json; copy the folder anew")
    settings = read_settings(file)
    named = settings.get("pooling_mode")
    theirs = {word: ours for ours, word in POOLINGS.items()}
    words = [named] if isinstance(named, str) else named
    if words is None:
        return tuple(word for word, flag in _FLAGS.items() if settings.get(flag)) or ("mean",)
    if not isinstance(words, list) or not words or any(word not in theirs for word in words):
        raise ModelError(f"{file}: pooling_mode must be of {', '.join(theirs)}, but is {shown(named, 60)}")
    return tuple(word for word in POOLINGS if POOLINGS[word] in words)
