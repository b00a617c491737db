"""Writing a model's folder with its linear layers packed: ``fs-fwdllm quantise``.

The checkpoint is read tensor by tensor and written shard by shard, so that memory holds one shard of packed tensors and
one matrix of floats, however large the model is. A shard is written beside its place and moved there when it is
complete; what was interrupted goes on with the first shard that is missing. ``config.json`` comes last: a folder that
has one is whole.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.pytorch_utils import Conv1D

from fs_fwdllm._version import __version__
from fs_fwdllm.errors import ConfigError, ModelError
from fs_fwdllm.model.base.checkpoint import Checkpoint, SafetensorsCheckpoint
from fs_fwdllm.model.base.packing import Form, group_of, pack
from fs_fwdllm.model.base.reading import matrix_shape, saved_name
from fs_fwdllm.model.base.shards import INDEX_FILE, shard_file, shard_index, split_into_shards
from fs_fwdllm.model.folder import check_folder, quantisation, read_settings, weight_files
from fs_fwdllm.model.quiet import quiet_transformers
from fs_fwdllm.model.sentence_layout import transformer_folder
from fs_fwdllm.model.source import folder_files
from fs_fwdllm.model.structure import linear_layers

__all__ = ["Quantised", "is_quantised_from", "quantise_folder"]

#: What says of a folder that is not complete yet what it is to become.
_UNFINISHED = "quantising.json"
#: What says of a complete one what it was made from.
_ORIGIN = "fs_fwdllm_base.json"
_CONFIG = "config.json"

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".h5", ".msgpack", ".onnx", ".gguf", ".pth", ".ot")
_OWN_FILES = (_CONFIG, INDEX_FILE, _ORIGIN, _UNFINISHED)

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Quantised:
    """What was written.

    Attributes:
        folder: where.
        layers: that were packed.
        left: linear layers of the blocks that were not, since their rows have no groups.
        bytes_before: of the weight files.
        bytes_after: of the weight files.
    """

    folder: Path
    layers: int
    left: tuple[str, ...]
    bytes_before: int
    bytes_after: int


def quantise_folder(model: str | Path, target: str | Path, form: Form, progress: Progress | None = None) -> Quantised:
    """Write the model of a folder into ``target`` with the linear layers of its blocks packed.

    Args:
        model: the folder of a float model, as Hugging Face or sentence-transformers lay it out.
        target: a folder that does not exist, or one that an interrupted call with the same arguments left.
        progress: is told how many of how many tensors are done.

    Raises:
        ModelError: the model cannot be read, is packed already, or the disk is full.
        ConfigError: ``target`` holds something else.
    """
    root, place = Path(model).expanduser().absolute(), Path(target).expanduser().absolute()
    if root.is_file():
        raise ModelError(
            f"{str(model)!r} is a file; a GGUF file is packed already, or is packed as it is read "
            "(fwdllm.base.quantise); give the folder of a float model"
        )
    if not root.is_dir():
        raise ModelError(f"{str(model)!r} is no folder; give the folder of a float model")
    inner = transformer_folder(root)
    check_folder(inner)
    if found := quantisation(inner):
        raise ModelError(f"{str(inner)!r} is packed already ({found['quant_method']}); give the float model")
    shards_at = place / inner.relative_to(root)
    job = {"form": asdict(form), "files": folder_files(root), "version": __version__}
    _claim(place, job)
    try:
        shards_at.mkdir(parents=True, exist_ok=True)
        plan = _Plan.of(inner, form)
        sizes = _write_shards(plan, shards_at, progress)
        _copy_others(root, place, inner)
        _write_json(shards_at / INDEX_FILE, plan.index(sizes))
        _write_json(place / _ORIGIN, job)
        _write_json(shards_at / _CONFIG, plan.settings())
        (place / _UNFINISHED).unlink()
    except (OSError, SafetensorError) as error:
        full = "the disk is full" if _is_full(error) else str(error)
        raise ModelError(f"{place}: {full}; call it again to go on where it stopped") from error
    before = sum(file.stat().st_size for file in weight_files(inner))
    return Quantised(place, len(plan.packed), tuple(plan.left), before, sum(sizes))


def _is_full(error: Exception) -> bool:
    """Whether the disk is; safetensors hands the system's reason on as text."""
    return getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error)


def is_quantised_from(folder: Path, model: Path, form: Form) -> bool:
    """Whether ``folder`` is complete, and was made from this very model in this form."""
    file = folder / _ORIGIN
    if not file.is_file() or (folder / _UNFINISHED).exists():
        return False
    origin = read_settings(file)
    return origin.get("form") == asdict(form) and origin.get("files") == folder_files(model)


@dataclass(frozen=True)
class _Plan:
    """Which tensors go where.

    Attributes:
        packed: per weight of the checkpoint the layer, its kind and its group.
        left: layers that stay as they are.
    """

    checkpoint: Checkpoint
    form: Form
    packed: dict[str, tuple[str, bool, int]]
    left: list[str]
    shards: list[list[str]]

    @classmethod
    def of(cls, folder: Path, form: Form) -> _Plan:
        checkpoint = SafetensorsCheckpoint(folder)
        model = _empty_model(folder)
        packed, left = {}, []
        for name in linear_layers(model):
            module = model.get_submodule(name)
            shape = matrix_shape(module)
            layer = saved_name(checkpoint, model, name)
            if shape is None or f"{layer}.weight" not in checkpoint:
                continue
            group = group_of(form, *shape)
            if group is None:
                left.append(layer)
            else:
                packed[f"{layer}.weight"] = (layer, isinstance(module, Conv1D), group)
        if not packed:
            raise ModelError(f"{folder}: no linear layer of it can be packed as {form.name}")
        return cls(
            checkpoint,
            form,
            packed,
            left,
            split_into_shards({name: entry.bytes for name, entry in checkpoint.entries.items()}),
        )

    def file(self, index: int) -> str:
        return shard_file(index, len(self.shards))

    def tensors(self, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        for name in names:
            tensor = self.checkpoint.read(name)
            if name not in self.packed:
                yield name, tensor
                continue
            layer, transposed, _ = self.packed[name]
            try:
                _, parts = pack(tensor.T.contiguous() if transposed else tensor, self.form)
            except ValueError as error:
                raise ModelError(f"{self.checkpoint.place}: {name} {error}") from error
            for part, values in parts.items():
                yield f"{layer}.{part}", values

    def index(self, sizes: list[int]) -> dict[str, Any]:
        inside = [[part for name in names for part in self._names(name)] for names in self.shards]
        return shard_index(inside, sum(sizes))

    def _names(self, name: str) -> list[str]:
        if name not in self.packed:
            return [name]
        layer = self.packed[name][0]
        _, parts = pack(torch.zeros(8, 64), Form(self.form.name, 64, self.form.symmetric))
        return [f"{layer}.{part}" for part in parts]

    def settings(self) -> dict[str, Any]:
        by_group: dict[int, list[str]] = {}
        for layer, _, group in self.packed.values():
            by_group.setdefault(group, []).append(layer)
        settings = read_settings(self.checkpoint.place / _CONFIG)
        inside = {layer for layer, _, _ in self.packed.values()}
        others = sorted(
            name.removesuffix(".weight")
            for name, entry in self.checkpoint.entries.items()
            if name.endswith(".weight") and len(entry.shape) == 2 and name.removesuffix(".weight") not in inside
        )
        return {**settings, "quantization_config": self.form.settings(others, by_group)}


def _empty_model(folder: Path) -> nn.Module:
    settings = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    known = [getattr(transformers, name, None) for name in settings.architectures or ()]
    made: Any = next((kind for kind in known if kind is not None), None)
    with init_empty_weights(include_buffers=False), quiet_transformers():
        model: nn.Module = AutoModel.from_config(settings) if made is None else made._from_config(settings)
    return model


def _claim(place: Path, job: dict[str, Any]) -> None:
    """Make ``place`` this job's."""
    note = place / _UNFINISHED
    if note.is_file() and read_settings(note) == job:
        return
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        other = "an unfinished folder of another model or form" if note.is_file() else "something else"
        raise ConfigError(f"{place}: holds {other} already; name a folder that does not exist")
    place.mkdir(parents=True, exist_ok=True)
    _write_json(note, job)


def _write_shards(plan: _Plan, folder: Path, progress: Progress | None) -> list[int]:
    """The sizes of all shards, those that were there included."""
    sizes, done, count = [], 0, sum(map(len, plan.shards))
    for index, names in enumerate(plan.shards):
        file = folder / plan.file(index)
        if not file.is_file():
            held = {}
            for name, tensor in plan.tensors(names):
                held[name] = tensor.contiguous()
                if progress is not None:
                    progress(min(done + len(held), done + len(names)), count)
            with _beside(file) as staging:
                save_file(held, staging, metadata={"format": "pt"})
        done += len(names)
        sizes.append(file.stat().st_size)
        if progress is not None:
            progress(done, count)
    return sizes


@contextmanager
def _beside(file: Path) -> Iterator[Path]:
    """A file beside ``file`` that takes its place at the end, and is gone if anything fails."""
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=".writing-")
    os.close(handle)
    staging = Path(name)
    try:
        yield staging
        mask = os.umask(0)
        os.umask(mask)
        staging.chmod(0o666 & ~mask)
        os.replace(staging, file)
    finally:
        staging.unlink(missing_ok=True)


def _copy_others(root: Path, place: Path, inner: Path) -> None:
    """Tokenizer, pooling and whatever else lies beside the weights; no code, and no weights in another form."""
    for file in sorted(root.rglob("*")):
        inside = file.relative_to(root)
        skipped = file.parent == inner and (file.suffix in _WEIGHT_SUFFIXES or file.name in _OWN_FILES)
        hidden = any(part.startswith(".") for part in inside.parts)
        if file.is_file() and file.suffix != ".py" and not skipped and not hidden:
            (place / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place / inside)


def _write_json(file: Path, tree: dict[str, Any]) -> None:
    with _beside(file) as staging:
        staging.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
