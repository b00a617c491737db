"""The base of a configuration, where it is packed: in its own files, or by ``fwdllm.base.quantise``.

:func:`packed_base` answers with what has to be read, or with ``None`` where the base is ordinary floats, which
transformers' own loading reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from torch import nn
from transformers import AutoConfig, GenerationConfig

from fs_fwdllm.config import Config
from fs_fwdllm.config.sources import estimators_of
from fs_fwdllm.errors import ConfigError, shown
from fs_fwdllm.model.base.checkpoint import Checkpoint, SafetensorsCheckpoint
from fs_fwdllm.model.base.gguf_checkpoint import GgufCheckpoint
from fs_fwdllm.model.base.packed import packed_layers
from fs_fwdllm.model.base.packing import Form
from fs_fwdllm.model.base.quantising import is_quantised_from, quantise_folder
from fs_fwdllm.model.base.reading import read_base
from fs_fwdllm.model.base.streaming import Reader
from fs_fwdllm.model.folder import quantisation
from fs_fwdllm.model.gguf_file import read_gguf
from fs_fwdllm.model.gguf_settings import gguf_config, has_own_config
from fs_fwdllm.model.sentence_layout import transformer_folder
from fs_fwdllm.model.source import ModelSource
from fs_fwdllm.model.trainable_parts import adapter_request

__all__ = ["PackedBase", "packed_base"]

#: Options of ``from_pretrained`` that are the configuration's; the others are the model's.
_OF_CONFIGURATION = ("id2label", "label2id", "num_labels", "problem_type")
_OF_MODEL = ("dtype", "attn_implementation")


@dataclass(frozen=True)
class PackedBase:
    """A base to be read packed.

    Attributes:
        place: the folder of the configuration and the weights, or the GGUF file with both.
        settings: what the folder says of how they are packed; empty where they are floats.
        form: how they are packed as they are read; ``None`` where they are not.
        stream: whether they stay on the disk.
        passes_per_read: how many passes share what is read from there.
        keep_head: whether a language model's head is in memory all the same.
    """

    place: Path
    settings: dict[str, Any]
    form: Form | None = None
    stream: bool = False
    passes_per_read: int = 8
    keep_head: bool = False

    def read(self, from_config: Callable[..., nn.Module], options: dict[str, Any]) -> tuple[Any, set[str]]:
        """The model, and the names of the parameters that its checkpoint lacks.

        Args:
            from_config: builds a model of the wanted kind from its configuration.
            options: as for ``from_pretrained``.
        """
        own = {name: options[name] for name in _OF_CONFIGURATION if name in options}
        config, checkpoint = self._opened(own)
        chosen = {name: options[name] for name in _OF_MODEL if name in options}
        model: Any
        model, missing = read_base(
            lambda: from_config(config, **chosen),
            checkpoint,
            self.settings,
            options["dtype"],
            self.form,
            Reader(self.passes_per_read) if self.stream else None,
            self.keep_head,
        )
        if self.form is not None:
            model.config.quantization_config = _settings_of(model, self.form)
        folder = self.place if self.place.is_dir() else self.place.parent
        if (folder / "generation_config.json").is_file() and hasattr(model, "generation_config"):
            model.generation_config = GenerationConfig.from_pretrained(folder)
        return model.eval(), missing

    def _opened(self, changes: dict[str, Any]) -> tuple[Any, Checkpoint]:
        """The configuration, with other values for some of its settings, and the tensors."""
        if self.place.is_file():
            config = gguf_config(self.place, **changes)
            return config, GgufCheckpoint(self.place, config, own_config=has_own_config(self.place))
        config = AutoConfig.from_pretrained(self.place, trust_remote_code=False, local_files_only=True, **changes)
        return config, SafetensorsCheckpoint(self.place)


def packed_base(config: Config, source: ModelSource, safely: dict[str, Any]) -> PackedBase | None:
    """The base of ``source`` as ``fwdllm.base`` wants it; ``None`` for ordinary floats.

    Args:
        safely: options for reading ``source``.

    Raises:
        ConfigError: all parameters are to be trained, or the base is packed already and should be packed, or it is a
            GGUF file and its packed form should be kept.
        ModelError: it is packed in a way that is not read here.
    """
    wanted, (place, found) = config.fwdllm.base, _place(config, source, safely)
    if place is None or not (source.gguf or found or wanted.stream or wanted.quantise != "none"):
        return None
    _refuse_to_train_it(config, source, found)
    if found and wanted.quantise != "none":
        raise ConfigError(
            f"fwdllm.base.quantise: is {wanted.quantise}, but {source.name} is packed already "
            f"({found['quant_method']}); set it to none"
        )
    form = None if wanted.quantise == "none" else Form(wanted.quantise, wanted.group, wanted.symmetric)
    if form is not None and wanted.folder:
        if source.gguf is not None:
            raise ConfigError(
                f"fwdllm.base.folder: is {wanted.folder!r}, but {source.name} is a GGUF file, which is packed as it is "
                "read and not written anew; leave the key out, or give the folder of the float model"
            )
        place, form = _kept(Path(wanted.folder).expanduser().absolute(), Path(source.location), place, form), None
        found = quantisation(place)
    return PackedBase(
        place, found, form, wanted.stream, wanted.passes_per_read, keep_head=_looks_into_head(config)
    )  # fmt: skip


def _place(config: Config, source: ModelSource, safely: dict[str, Any]) -> tuple[Path | None, dict[str, Any]]:
    """Where the base is (``None`` as of :func:`_folder`), and what it says of how it is packed."""
    if source.gguf is not None:
        forms = read_gguf(source.gguf).packed_forms
        return source.gguf, {"quant_method": f"GGUF {', '.join(forms)}"} if forms else {}
    folder = _folder(config, source, safely)
    return folder, {} if folder is None else quantisation(folder)


def _folder(config: Config, source: ModelSource, safely: dict[str, Any]) -> Path | None:
    """The folder of the transformer's files; ``None`` for a name on the hub whose weights are ordinary floats."""
    if source.is_local:
        return Path(source.transformer)
    wanted = config.fwdllm.base
    settings = AutoConfig.from_pretrained(source.location, **safely)
    if wanted.quantise == "none" and not wanted.stream and not getattr(settings, "quantization_config", None):
        return None
    offline = bool(safely.get("local_files_only"))
    kinds = ["*.json", "*.safetensors"]
    return Path(snapshot_download(source.location, allow_patterns=kinds, local_files_only=offline))


def _kept(target: Path, root: Path, folder: Path, form: Form) -> Path:
    """The packed folder of the transformer in ``target``, written now if it is not there."""
    model = root if root.is_dir() else folder
    if not is_quantised_from(target, model, form):
        quantise_folder(model, target, form)
    return transformer_folder(target)


def _looks_into_head(config: Config) -> bool:
    """Whether somebody reads the numbers of a language model's head, and does not only multiply with it."""
    method, _ = adapter_request(config)
    exact = config.method.measures_slopes and "closed_form" in estimators_of(config)
    return exact or method in ("head", "output_residual")


def _refuse_to_train_it(config: Config, source: ModelSource, found: dict[str, Any]) -> None:
    wanted = config.fwdllm.base
    how = f"{source.name} is packed ({found['quant_method']})" if found else (
        f"fwdllm.base.quantise {wanted.quantise} packs it" if wanted.quantise != "none" else
        "fwdllm.base.stream leaves it on the disk" if wanted.stream else f"{source.name} is a GGUF file"
    )  # fmt: skip
    if config.method.trains_blocks:
        if start := config.initial_adapter:
            raise ConfigError(
                f"fwdllm.init_adapter {start!r}: a whole model over another on the disk is not read "
                "(fwdllm.base.stream); give that folder as model.type, or set fwdllm.base.stream to false"
            )
        if not found and wanted.quantise == "none" and source.gguf is None:
            return  # floats on the disk: a block is in memory while it is trained
        raise ConfigError(
            f"federate.method: is {shown(config.federate.method)}, which trains the base's own weights, but {how}; "
            "give the float model (fwdllm.base.stream true leaves it on the disk), or another method with an adapter"
        )
    method, _ = adapter_request(config)
    if method == "full":
        raise ConfigError(
            f"llm.adapter.use: is false, which trains every parameter, but {how} and its weights cannot be "
            "trained; use an adapter (lora), or the float model, resident"
        )
    if (wanted.stream or source.gguf is not None) and method == "bitfit":
        otherwise = "the folder of the float model" if source.gguf is not None else "fwdllm.base.stream false"
        raise ConfigError(
            f"llm.adapter.args adapter_method: {method!r} trains in place what the layers of the base add, but {how}; "
            f"use an adapter (lora, bottleneck, output_residual), or {otherwise}"
        )


def _settings_of(model: nn.Module, form: Form) -> dict[str, Any]:
    by_group: dict[int, list[str]] = {}
    packed = dict(packed_layers(model))
    for name, layer in packed.items():
        scales = layer.parts().get("weight_scale")
        group = form.group if scales is None else layer.in_features // scales.shape[1]
        by_group.setdefault(group, []).append(name)
    others = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in packed]
    return form.settings(others, by_group)
