"""Writing what was trained, in the form others can load.

PEFT methods leave a PEFT folder (``adapter/``), the bottleneck its own small folder (``adapter/``, read by
:func:`~fs_fwdllm.model.bottleneck.load_bottleneck`), and methods that train parameters of the base itself a whole
Hugging Face model (``model/``), which knows the classes by their names. Each has the tokenizer as the run used it. All
tensors are safetensors. A folder is written beside its place and moved there when it is complete, so that a reader sees
the old one or the new one, never half of one. The model in memory is only read.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from fs_fwdllm.core.trainables import public_name
from fs_fwdllm.errors import ModelError, nearest
from fs_fwdllm.model.bottleneck import BOTTLENECK_CONFIG_FILE, BOTTLENECK_WEIGHTS_FILE, DEFAULT_REDUCTION_FACTOR
from fs_fwdllm.model.loading import LoadedModel
from fs_fwdllm.model.quiet import quiet_transformers
from fs_fwdllm.model.trainable_parts import PARTS

__all__ = ["save_trained"]


def save_trained(loaded: LoadedModel, folder: str | Path, values: Mapping[str, torch.Tensor] | None = None) -> Path:
    """Write the trained part of ``loaded`` below ``folder`` and return the folder written (``adapter`` or ``model``).

    Args:
        loaded: the model.
        folder: the run's folder; created if it does not exist.
        values: ``{parameter name: tensor}`` that replace the model's values in what is written, by the names of
            ``model.named_parameters()`` or their public form; the model keeps its own.

    Raises:
        ModelError: a name in ``values`` is not a parameter of the model, or has another shape.
        OSError: the folder cannot be written; what was there before is still there.
    """
    part = PARTS[loaded.peft_method]
    state = _state(loaded.model, values or {})
    target = Path(folder) / ("model" if part.saved_as == "model" else "adapter")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        _WRITERS[part.saved_as](loaded, state, staging)
        _open_to_readers(staging)
        _move_into_place(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


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


def _write_bottleneck(loaded: LoadedModel, state: dict[str, torch.Tensor], folder: Path) -> None:
    trained = [public_name(name) for name, tensor in loaded.model.named_parameters() if tensor.requires_grad]
    tensors = {name: state[name].detach().cpu().contiguous() for name in trained}
    save_file(tensors, folder / BOTTLENECK_WEIGHTS_FILE, metadata={"format": "pt"})
    settings = {
        "adapter_type": "bottleneck",
        "format_version": 1,
        "base_model_name_or_path": loaded.source.location,
        "task": loaded.task,
        "reduction_factor": loaded.arguments.get("reduction_factor", DEFAULT_REDUCTION_FACTOR),
        "layers": loaded.arguments.get("layers"),
    }
    (folder / BOTTLENECK_CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    loaded.tokenizer.save_pretrained(str(folder))


def _write_model(loaded: LoadedModel, state: dict[str, torch.Tensor], folder: Path) -> None:
    model: Any = loaded.model
    with quiet_transformers():
        model.save_pretrained(str(folder), state_dict=state)
        loaded.tokenizer.save_pretrained(str(folder))


_WRITERS = {"peft": _write_peft, "bottleneck": _write_bottleneck, "model": _write_model}


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
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
