"""An adapter and its base as one model that needs neither PEFT nor this package.

LoRA and IA3 are matrices that can be multiplied into the base's; trained norms and heads take the place of the base's.
The sum is made in float32 and written in float32 unless another dtype is asked for: a LoRA step added to a bfloat16
weight is mostly rounded away. An output residual becomes a part of the output layer, which is then no longer tied to
the input embeddings. A bottleneck has a nonlinearity between its two matrices and cannot be merged.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper

from fs_fwdllm.errors import ConfigError
from fs_fwdllm.model import SavedFacts, find_saved, load_saved
from fs_fwdllm.model.base.packed import unpack
from fs_fwdllm.model.output_residual import merge_output_residual
from fs_fwdllm.model.saving import write_folder

__all__ = ["merge"]

_DTYPES = ("float32", "bfloat16", "float16")


def merge(path: str | Path, output: str | Path, dtype: str = "float32") -> Path:
    """Write the trained model of a run as one Hugging Face folder, and return it.

    Args:
        path: a run folder, or the adapter or model inside.
        output: the folder to write; it must not exist.
        dtype: ``float32``, ``bfloat16`` or ``float16``; the last two round.

    Raises:
        ConfigError: ``output`` exists, ``dtype`` is none of these, or what was trained cannot be merged.
        ModelError: the run's model cannot be loaded.
    """
    target = Path(output).absolute()
    if target.exists():
        raise ConfigError(f"{target}: exists already; name a folder that does not, for merge to make")
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype {dtype!r}: must be one of {', '.join(_DTYPES)}")
    folder = find_saved(path).absolute()
    facts = SavedFacts.read(folder)
    if facts.trained == "bottleneck":
        raise ConfigError(
            f"{folder}: a bottleneck is not linear and cannot be merged into its base; use it as it is, by "
            "fs_fwdllm.load"
        )
    loaded, _, _ = load_saved(folder, facts.with_base(compute_dtype="float32"))
    unpack(loaded.model)
    if facts.trained == "output_residual":
        merge_output_residual(loaded.model)
    merged = _without_adapter(loaded.model).requires_grad_(False).to(getattr(torch, dtype))
    return write_folder(replace(loaded, model=merged, peft_method="full"), target, {}, _whole(facts, dtype))


def _without_adapter(model: Any) -> Any:
    if not hasattr(model, "merge_and_unload"):
        return model
    merged = model.merge_and_unload()
    for name, module in list(merged.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):  # PEFT forgets trained heads when it merges norms
            parent, _, leaf = name.rpartition(".")
            setattr(merged.get_submodule(parent), leaf, module.modules_to_save[module.active_adapters[0]])
    return merged


def _whole(facts: SavedFacts, dtype: str) -> SavedFacts:
    """The facts of the merged model: every parameter is its own now, and there is no adapter."""
    tree = facts.without_packing().with_base(compute_dtype=dtype).tree
    llm = {**tree.get("llm", {}), "adapter": {"use": False}}
    return replace(facts, trained="full", tree={**tree, "llm": llm})
