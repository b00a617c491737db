"""From a matrix of floats to a packed one: round to nearest, a scale for every group of neighbours in a row.

===== ======================================================= ==========================================================
form  numbers                                                 kept as
===== ======================================================= ==========================================================
int8  whole, -128 to 127                                      compressed-tensors ``pack-quantized``, 8 bits
int4  whole, -8 to 7; with a zero of its own a group          compressed-tensors ``pack-quantized``, 4 bits
      (asymmetric), or none
nf4   the 16 quantiles of a normal distribution (QLoRA,       bitsandbytes ``nf4``, without double quantisation
      arXiv 2305.14314), of the group's largest magnitude
===== ======================================================= ==========================================================

These are the layouts of the two libraries that most programs read, so that what is written here is loaded by them, too.
A scale is rounded to the dtype it is kept in before numbers are divided by it: the error of a weight is then half a
step of what will really be read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fs_fwdllm.model.base.codecs import Codebook, Codec, PackedWords

__all__ = ["Form", "group_of", "pack"]

FormName = Literal["int8", "int4", "nf4"]

#: Quantiles of a normal distribution as QLoRA defines them: eight negative, zero, seven positive, each half's evenly
#: spaced in probability, and scaled to -1 and 1.
_NORMAL_FLOATS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
#: Rows that are packed at once, so that the floats between beginning and end stay few.
_ROWS = 256


@dataclass(frozen=True)
class Form:
    """How matrices are to be packed.

    Attributes:
        name: ``int8``, ``int4`` or ``nf4``.
        group: neighbours in a row that share a scale (``nf4``: in the flattened matrix).
        symmetric: without a zero of its own for every group; ``nf4`` has none.
    """

    name: FormName
    group: int = 64
    symmetric: bool = True

    @property
    def bits(self) -> int:
        """Bits of a number."""
        return 8 if self.name == "int8" else 4

    def settings(self, ignored: list[str], by_group: dict[int, list[str]]) -> dict[str, Any]:
        """What a model's ``quantization_config`` says of itself, for the programs that read it.

        Args:
            ignored: layers that were left as they are.
            by_group: names of the packed layers by the group they got.
        """
        if self.name == "nf4":
            return {
                "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False,
                "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False, "bnb_4bit_compute_dtype": "float32",
                "bnb_4bit_quant_storage": "uint8", "llm_int8_skip_modules": ignored,
            }  # fmt: skip
        groups = {f"group_{index}": self._scheme(*entry) for index, entry in enumerate(sorted(by_group.items()))}
        return {
            "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
            "config_groups": groups, "ignore": ignored, "global_compression_ratio": None, "kv_cache_scheme": None,
        }  # fmt: skip

    def _scheme(self, group: int, layers: list[str]) -> dict[str, Any]:
        weights = {
            "num_bits": self.bits, "type": "int", "symmetric": self.symmetric, "strategy": "group", "group_size": group,
            "dynamic": False, "observer": "minmax", "actorder": None,
        }  # fmt: skip
        return {"targets": layers, "weights": weights, "input_activations": None, "output_activations": None}


def group_of(form: Form, out_features: int, in_features: int) -> int | None:
    """The group a matrix gets: the form's, or the largest one below that divides its rows; ``None`` if it stays float.

    Rows of a prime number of columns have no groups, and a scale for fewer than 8 numbers costs what it saves.
    """
    if form.name == "nf4":  # groups of the flattened matrix, whose bytes hold two numbers each
        return form.group if out_features * in_features % form.group == 0 else None
    for group in range(min(form.group, in_features), 7, -1):
        if in_features % group == 0 and in_features % (32 // form.bits) == 0:
            return group
    return None


@torch.no_grad()
def pack(weight: torch.Tensor, form: Form) -> tuple[Codec, dict[str, torch.Tensor]]:
    """``weight`` ``[out, in]`` in packed form: its codec, and the tensors by the codec's names.

    Scales are in the weight's dtype (``nf4``: float32).

    Raises:
        ValueError: the matrix has no groups (:func:`group_of`), or numbers that are not finite.
    """
    rows, columns = weight.shape
    group = group_of(form, rows, columns)
    if group is None:
        raise ValueError(f"rows of {columns} numbers cannot be packed as {form.name}")
    if not torch.isfinite(weight).all():
        raise ValueError("holds numbers that are not finite")
    if form.name == "nf4":
        return _as_normal_floats(weight, group)
    codec = PackedWords(rows, columns, width=form.bits)
    blocks = [_as_words(weight[first : first + _ROWS], form, group) for first in range(0, rows, _ROWS)]
    parts = {"weight_packed": torch.cat([words for words, _, _ in blocks])}
    parts["weight_scale"] = torch.cat([scale for _, scale, _ in blocks])
    if not form.symmetric:
        zeros = torch.cat([zeros for _, _, zeros in blocks])
        parts["weight_zero_point"] = _words(zeros.T, form.bits).T.contiguous()
    parts["weight_shape"] = torch.tensor([rows, columns])
    return codec, parts


def _as_words(rows: torch.Tensor, form: Form, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Packed words, scales and zeros (whole numbers from 0) of some rows."""
    values = rows.float().view(len(rows), -1, group)
    levels, middle = (1 << form.bits) - 1, 1 << form.bits - 1
    if form.symmetric:
        span, zeros = 2 * values.abs().amax(dim=2), None
    else:
        low, high = values.amin(dim=2).clamp_max(0), values.amax(dim=2).clamp_min(0)
        span, zeros = high - low, low
    scale = (span / levels).to(rows.dtype)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # of a group of zeros
    wide = scale.float()
    offset = torch.full_like(wide, middle) if zeros is None else (-zeros / wide).round().clamp(0, levels)
    numbers = (values / wide[:, :, None] + offset[:, :, None]).round().clamp(0, levels)
    return _words(numbers.view(len(rows), -1).to(torch.int32), form.bits), scale, offset.to(torch.int32)


def _words(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Whole numbers of ``bits`` bits ``[rows, columns]`` in 32-bit words along the rows, the first one lowest."""
    in_word = 32 // bits
    padded = torch.nn.functional.pad(numbers, (0, -numbers.shape[1] % in_word)).to(torch.int32)
    split = padded.reshape(len(numbers), -1, in_word)
    words = torch.zeros(split.shape[:2], dtype=torch.int32, device=numbers.device)
    for index in range(in_word):
        words |= split[:, :, index] << bits * index
    return words


def _as_normal_floats(weight: torch.Tensor, group: int) -> tuple[Codec, dict[str, torch.Tensor]]:
    values = torch.tensor(_NORMAL_FLOATS)
    borders = (values[1:] + values[:-1]) / 2
    flat = weight.reshape(-1, group)
    magnitudes, packed = [], []
    step = max(1, _ROWS * weight.shape[1] // group)
    for first in range(0, len(flat), step):
        block = flat[first : first + step].float()
        largest = block.abs().amax(dim=1)
        numbers = torch.bucketize(block / torch.where(largest > 0, largest, 1.0)[:, None], borders).to(torch.uint8)
        pairs = numbers.view(-1, 2)
        packed.append(pairs[:, 0] << 4 | pairs[:, 1])
        magnitudes.append(largest)
    state = {
        "quant_type": "nf4", "blocksize": group, "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }  # fmt: skip
    rows, columns = weight.shape
    return Codebook(rows, columns, block_size=group), {
        "weight": torch.cat(packed)[:, None],
        "weight.absmax": torch.cat(magnitudes),
        "weight.quant_map": values,
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }
