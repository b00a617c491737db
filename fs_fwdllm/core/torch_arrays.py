"""The operations of :mod:`~fs_fwdllm.core.arrays` on PyTorch tensors, one kernel each; imported with the first tensor.

What is written to is detached first, so whether gradients are enabled makes no difference.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fs_fwdllm.core.arrays import LONG_ROW, NUMPY, Arrays

__all__ = ["TorchArrays", "signs_from_octets"]

_ONE = torch.ones((), dtype=torch.int8)


class TorchArrays(Arrays):
    """Tensors on one device, in float32 or (to be copied and hashed only) in half precision."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._on_host = device.type == "cpu"

    def place(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self.device)

    def signs(self, octets: np.ndarray, skip: int, count: int) -> torch.Tensor:
        if self._on_host:
            # One pass over the elements: 2 b - 1 = 1 - 2 (1 - b), and inverting packed bits is almost free.
            inverted = np.unpackbits(~octets, axis=-1, bitorder="little")[:, skip : skip + count].view(np.int8)
            signs = torch.from_numpy(inverted)
            return torch.sub(_ONE, signs, alpha=2, out=signs)
        # Only the packed bits cross the bus: a thirty-second of what float32 values would be.
        return signs_from_octets(torch.from_numpy(octets).to(self.device))[:, skip : skip + count]

    def stack(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.stack([self.as_float32(row) for row in rows])

    def flat(self, array: torch.Tensor) -> torch.Tensor:
        return array.detach().view(-1)

    def is_contiguous(self, array: torch.Tensor) -> bool:
        return array.is_contiguous()

    def copy(self, array: torch.Tensor) -> torch.Tensor:
        return array.detach().clone()

    def zeros_like(self, array: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(array.detach())

    def as_float32(self, array: torch.Tensor) -> torch.Tensor:
        return array.detach().to(torch.float32)

    def assign(self, target: torch.Tensor, values: torch.Tensor | np.ndarray) -> None:
        if isinstance(values, np.ndarray):
            # PyTorch knows no read-only memory and warns of it, though here it is only read.
            values = torch.from_numpy(values if values.flags.writeable else values.copy())
        target.detach().copy_(values.detach())

    def exchange_storage(self, target: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        original, target.data = target.data, values
        return original

    def to_numpy(self, array: torch.Tensor) -> np.ndarray:
        return array.detach().to("cpu", torch.float32).numpy()

    def octets(self, array: torch.Tensor) -> memoryview:
        values = array.detach().to("cpu").contiguous()
        if values.element_size() == 2:  # numpy has no bfloat16: its bits are those of an int16
            return values.view(torch.int16).numpy().astype("<i2", copy=False).data
        return values.numpy().astype("<f4", copy=False).data

    def add(self, target: torch.Tensor, other: torch.Tensor) -> None:
        target.detach().add_(other.detach())

    def subtract(self, target: torch.Tensor, other: torch.Tensor) -> None:
        target.detach().sub_(other.detach())

    def multiply(self, target: torch.Tensor, other: torch.Tensor) -> None:
        target.detach().mul_(other.detach())

    def divide(self, target: torch.Tensor, other: torch.Tensor) -> None:
        target.detach().div_(other.detach())

    def take_root(self, target: torch.Tensor) -> None:
        # PyTorch's float32 root is off by a last bit for one number in seven where it comes from MKL. From float64 the
        # rounding is right even if that root is off by its own last bit: no float32 has a root within 2^-50 (relative)
        # of the middle between two float32.
        values = target.detach()
        values.copy_(values.double().sqrt_())

    def increase(self, target: torch.Tensor, number: float) -> None:
        target.detach().add_(float(np.float32(number)))

    def scale(self, target: torch.Tensor, factor: float) -> None:
        target.detach().mul_(float(np.float32(factor)))

    def scaled(self, array: torch.Tensor, factor: float) -> torch.Tensor:
        return array.detach() * float(np.float32(factor))

    def add_scaled(self, source: torch.Tensor, row: torch.Tensor, factor: float, target: torch.Tensor) -> None:
        torch.add(source, row, alpha=factor, out=target)  # which rounds alpha to the type of the sum

    def add_rows(self, target: torch.Tensor, rows: torch.Tensor, factors: Sequence[float]) -> None:
        if self._on_host and rows.shape[1] <= LONG_ROW and target.dtype == torch.float32:
            with np.errstate(over="ignore", invalid="ignore"):  # PyTorch says nothing of them; whoever steps looks
                NUMPY.add_rows(target.detach().numpy(), rows.numpy(), factors)
        else:
            super().add_rows(target, rows, factors)

    def is_finite(self, array: torch.Tensor) -> bool:
        if not array.numel():
            return True
        least, most = array.detach().aminmax()  # NaN goes through both, and nothing as large as the array is made
        return bool(torch.isfinite(least) and torch.isfinite(most))

    def sum_of_squares(self, array: torch.Tensor) -> float:
        return float(array.detach().double().square().sum())

    def products(self, rows: torch.Tensor, vector: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        values = self.as_float32(rows)
        dots, squares = values @ vector.detach(), values.square().sum(1)
        return dots.double().cpu().numpy(), squares.double().cpu().numpy()


def signs_from_octets(octets: torch.Tensor) -> torch.Tensor:
    """Signs ``[rows, 8 * octets]`` from packed bits (uint8, lowest bit first), with operations every device has."""
    shifts = torch.arange(8, dtype=torch.uint8, device=octets.device)
    bits = octets.unsqueeze(-1).bitwise_right_shift(shifts).bitwise_and_(1).flatten(1)
    return bits.to(torch.int8).mul_(2).sub_(1)
