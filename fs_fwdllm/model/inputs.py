"""The model's door: padded arrays of a batch become tensors on the model's device, put as the model takes them.

Data is padded on the right for everybody. A model that must have it otherwise (see
:class:`~fs_fwdllm.model.trial.Conduct`) is given the same rows shifted to the right, or one group of rows after the
other, each without padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fs_fwdllm.data.types import Batch
from fs_fwdllm.model.trial import Conduct

__all__ = ["DeviceBatch", "Group", "batch_on", "groups_of"]


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


@dataclass(frozen=True)
class Group:
    """Rows of a batch that share a forward pass.

    Attributes:
        rows: which they are, ``[rows]``; ``None`` for all in their order.
        inputs: what the model is called with.
    """

    rows: torch.Tensor | None
    inputs: dict[str, torch.Tensor]


def groups_of(batch: DeviceBatch, conduct: Conduct, *, segments: bool) -> list[Group]:
    """The passes a batch takes: one, but for a model that mixes padding in.

    Args:
        segments: whether the model takes ``token_type_ids``.
    """
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if segments and batch.token_type_ids is not None:
        inputs["token_type_ids"] = batch.token_type_ids
    lengths = batch.attention_mask.sum(dim=1)
    width = batch.attention_mask.shape[1]
    if conduct.padding == "right" or int(lengths.min()) == width:
        return [Group(None, inputs)]
    if conduct.padding == "left":
        places = (torch.arange(width, device=lengths.device) + lengths[:, None]) % width
        return [Group(None, {name: tensor.gather(1, places) for name, tensor in inputs.items()})]
    groups = []
    for length in lengths.unique().tolist():
        rows = torch.nonzero(lengths == length).flatten()
        groups.append(Group(rows, {name: tensor[rows, :length] for name, tensor in inputs.items()}))
    return groups
