"""Adapters over a base whose weights are packed or on the disk: what they may not ask of it.

To PEFT a packed layer is a linear layer, whose ``weight`` has a shape and no numbers. An adapter that trains such a
weight beside its own would leave it as it is without a word, and one that computes with it would compute with NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from fs_fwdllm.errors import ConfigError
from fs_fwdllm.model.base.packed import PackedLinear
from fs_fwdllm.model.base.tables import Table
from fs_fwdllm.model.initialisation import private_torch_rng
from fs_fwdllm.model.trial import first_results, foreign_code

__all__ = ["refuse_readers_of_weights", "refuse_to_train_packed"]


def refuse_to_train_packed(model: nn.Module, arguments: dict[str, Any]) -> None:
    """What PEFT is asked to train beside LoRA's matrices would be left out without a word where it has no numbers.

    Raises:
        ConfigError: a module to save is packed or on the disk, or single parameters are named.
    """
    wrapped = [(name, module) for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    without_numbers = (PackedLinear, Table)
    found = [name for name, module in wrapped if any(isinstance(one, without_numbers) for one in module.modules())]
    keys = ("modules_to_save", "trainable_token_indices") if found else ("target_parameters",)
    key = next((key for key in keys if arguments.get(key)), "")
    if key:
        place = f" ({found[0]})" if found else ""
        raise ConfigError(
            f"llm.adapter.args {key}: {arguments[key]!r} names weights that are packed or on the disk{place} and "
            "cannot be trained; name target_modules, leave it out, or give the float model, resident "
            "(fwdllm.base.quantise none, fwdllm.base.stream false)"
        )


@torch.no_grad()
def refuse_readers_of_weights(
    model: nn.Module, rows: Sequence[Sequence[int]], method: str, arguments: dict[str, Any]
) -> None:
    """An adapter that looks into the base's weights (for DoRA's norms) finds no numbers there.

    Raises:
        ConfigError: what it starts from, or what comes out, is not a number.
    """
    started = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with private_torch_rng(0), foreign_code(f"a first forward pass with adapter_method {method!r} failed"):
        found = first_results(model, rows[0])
    if not all(bool(values.isfinite().all()) for values in [*started, *found]):
        told = ", ".join(f"{name}: {value}" for name, value in arguments.items() if value not in (None, False, ""))
        raise ConfigError(
            f"llm.adapter.args: adapter_method {method!r} ({told}) reads the numbers of the base's weights, which are "
            "packed or on the disk; leave out what reads them (use_dora), or give the float model, resident "
            "(fwdllm.base.quantise none, fwdllm.base.stream false)"
        )
