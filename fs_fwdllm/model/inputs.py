"""The model's door: padded arrays of a batch become tensors on the model's device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fs_fwdllm.data.types import Batch

__all__ = ["DeviceBatch", "batch_on"]


@dataclass(frozen=True)
class DeviceBatch:
    """What a model and its readout see of a :class:`~fs_fwdllm.data.types.Batch`; the shapes are the same, int64."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    token_type_ids: torch.Tensor | None = None


def batch_on(device: torch.device | str, batch: Batch) -> DeviceBatch:
    """``batch`` as tensors on ``device``; on the CPU they share the arrays' memory. Tensors are taken, too."""

    def tensor(values: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(values, device=device)

    segments = None if batch.token_type_ids is None else tensor(batch.token_type_ids)
    return DeviceBatch(tensor(batch.input_ids), tensor(batch.attention_mask), tensor(batch.labels), segments)
