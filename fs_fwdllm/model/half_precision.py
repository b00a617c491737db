"""float32 trainables over a half-precision base.

Training needs float32: a step of 1e-5, or a probe at radius 1e-3, vanishes when it is added to a bfloat16 weight of
1.0, whose neighbours are 0.004 and 0.008 away. The frozen base needs half precision: that is where the memory is. So
each trainable tensor is a float32 *master*, and the module that owns it is made to work with it in one of two ways:

* A module all of whose own parameters are trainable (a norm, a linear head) computes in float32: its input is cast up
  and, inside the body, its output is cast back. Heads hand their float32 result on. The probe survives because it is
  rounded after it has been mixed with the activations, not before.
* A module that also has frozen half-precision parameters (a linear layer of which only the bias is trained) keeps
  computing in half precision and sees the master through the parametrisation :class:`CastTo`. Here a probe is
  rounded to the base's grid, so ``fwdllm.radius`` must exceed the spacing at the values' size.

LoRA, IA3 and the package's own adapters cast inside their own forward passes and are float32 from the start; their
results are rounded to the base's grid as well. Finite differences over a bfloat16 base therefore want a radius near
1e-2, over float16 1e-3 will do; forward mode differentiates through the casts and does not care. Both devices are plain
modules and hooks, so autograd, checkpointing, ``functional_call`` and ``vmap`` see nothing special.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

__all__ = ["HALF_DTYPES", "CastTo", "make_float32_masters", "rounds_when_loaded_in_half"]

HALF_DTYPES = (torch.float16, torch.bfloat16)


class CastTo(nn.Module):
    """Parametrisation that shows a float32 parameter as ``dtype``; its derivative is the cast of the derivative."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, master: torch.Tensor) -> torch.Tensor:
        return master.to(self.dtype)


def make_float32_masters(model: nn.Module, heads: Iterable[str] = ()) -> None:
    """Turn every half-precision parameter that requires a gradient into a float32 master, in place.

    Args:
        model: any module; parameters keep their identity, so ties and optimisers survive.
        heads: names of modules that end the network and may hand on float32 results.
    """
    prefixes = tuple(heads)
    dtypes = {id(p): p.dtype for p in model.parameters() if p.requires_grad and p.dtype in HALF_DTYPES}
    for parameter in model.parameters():
        if id(parameter) in dtypes:
            parameter.data = parameter.data.float()
    for name, module in list(model.named_modules()):
        own = dict(module.named_parameters(recurse=False))
        masters = {key: dtypes[id(parameter)] for key, parameter in own.items() if id(parameter) in dtypes}
        trains_all = all(parameter.requires_grad for parameter in own.values())
        if masters and trains_all and not any(True for _ in module.children()):
            _compute_in_float32(module, None if _is_within(name, prefixes) else next(iter(masters.values())))
            continue
        for key, dtype in masters.items():
            parametrize.register_parametrization(module, key, CastTo(dtype), unsafe=True)


def rounds_when_loaded_in_half(model: nn.Module) -> bool:
    """Whether another program that loads the saved model in the base's half precision rounds trained values.

    Adapters (LoRA, IA3, the package's own) stay float32 whatever the base is; norms, biases and heads do not.
    """
    trained = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and not _is_half(parameter)
    ]
    stays = (".lora_", ".ia3_", ".bottleneck.", ".output_residual.")
    return any(map(_is_half, model.parameters())) and not all(any(mark in name for mark in stays) for name in trained)


def _is_half(parameter: nn.Parameter) -> bool:
    return parameter.dtype in HALF_DTYPES


def _is_within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def _compute_in_float32(module: nn.Module, output_dtype: torch.dtype | None) -> None:
    module.register_forward_pre_hook(_cast_inputs_up, with_kwargs=True)
    if output_dtype is not None:
        module.register_forward_hook(partial(_cast_output, dtype=output_dtype))


def _up(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in HALF_DTYPES else value


def _cast_inputs_up(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return tuple(_up(value) for value in args), {key: _up(value) for key, value in kwargs.items()}


def _cast_output(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return output.to(dtype)
