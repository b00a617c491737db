"""A folder that stands for an adapter's base: the configuration as a run used it, and links to the base's weights.

PEFT's ``AutoPeftModel...from_pretrained(adapter)`` loads the base by what the base's own files say of it. They do not
know that a run made a classifier of six classes of it, padded with another token, or computed in float32. What the run
used is written down here, so that the automatic loading gives the model that was evaluated.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel
from torch import nn
from transformers import AutoConfig

from fs_fwdllm.model.gguf_settings import gguf_config
from fs_fwdllm.model.half_precision import HALF_DTYPES, rounds_when_loaded_in_half
from fs_fwdllm.model.quiet import quiet_transformers
from fs_fwdllm.model.source import ModelSource, reading

if TYPE_CHECKING:
    from fs_fwdllm.model.loading import LoadedModel

__all__ = ["base_model", "config_as_used", "config_of_base", "config_to_keep", "link_to", "weights_of"]

#: What a base's own configuration may say otherwise than the run, to a classifier (which may find the end of a text by
#: its padding) and to any model.
_DECISIVE_FOR_CLASSES = ("id2label", "pad_token_id")
_DECISIVE = ("dtype",)


def base_model(model: nn.Module) -> nn.Module:
    """The model below an adapter of PEFT's; itself where there is none."""
    found: nn.Module = model.get_base_model() if isinstance(model, PeftModel) else model
    return found


def config_of_base(source: ModelSource) -> Any:
    """The configuration in the base's own files."""
    with reading(source, "configuration") as safely, quiet_transformers():
        if source.gguf is not None:
            return gguf_config(source.gguf)
        return AutoConfig.from_pretrained(source.transformer, **safely)


def config_to_keep(loaded: LoadedModel) -> Any | None:
    """The configuration of the base as the run used it; ``None`` where the base's own files say the same."""
    own, used = config_of_base(loaded.source), config_as_used(loaded)
    decisive = _DECISIVE + (_DECISIVE_FOR_CLASSES if loaded.task == "classification" else ())
    agrees = all(getattr(own, name, None) == getattr(used, name, None) for name in decisive)
    return None if agrees else used


def config_as_used(loaded: LoadedModel) -> Any:
    """The configuration of the base as the run used it."""
    own = config_of_base(loaded.source)
    used: Any = copy.deepcopy(base_model(loaded.model).config)
    used.dtype = torch.float32 if rounds_when_loaded_in_half(loaded.model) else _dtype_of_base(loaded.model)
    used.use_cache = getattr(own, "use_cache", True)
    used.get_text_config().vocab_size = own.get_text_config().vocab_size  # PEFT adds the tokenizer's rows itself
    return used


def weights_of(source: ModelSource) -> list[Path]:
    """The base's safetensors files: in its folder, or in the hub's cache, where loading has put them."""
    folder = Path(source.transformer)
    patterns = ("*.safetensors", "*.safetensors.index.json")
    if not source.is_local:
        try:
            folder = Path(snapshot_download(source.location, local_files_only=True, allow_patterns=[*patterns]))
        except (OSError, ValueError):
            return []
    return [path for pattern in patterns for path in sorted(folder.glob(pattern))]


def link_to(path: Path, link: Path) -> None:
    """A link to a base's file, or a copy where the file system has no links."""
    try:
        link.symlink_to(path.resolve())
    except OSError:
        shutil.copyfile(path, link)


def _dtype_of_base(model: nn.Module) -> torch.dtype:
    """Half precision if any parameter is."""
    return next((parameter.dtype for parameter in model.parameters() if parameter.dtype in HALF_DTYPES), torch.float32)
