"""Which codec a layer of a checkpoint has: by the names and shapes of its tensors.

A folder's ``quantization_config`` says which library wrote it, but what has to be known is in the tensors themselves:
bits and group follow from their shapes. Two facts do not, and are read: whether GPTQ's zeros are kept less one, and
which of AWQ's two layouts it is. A GGUF file says it of each tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from fs_fwdllm.errors import ModelError
from fs_fwdllm.model.base.checkpoint import Checkpoint, Entry
from fs_fwdllm.model.base.codecs import Awq, Codebook, Codec, Gptq, PackedWords, RowBytes, ScaledBytes, state_of
from fs_fwdllm.model.folder import QUANTISATION_METHODS

__all__ = ["codec_of"]

_STATE = "weight.quant_state.bitsandbytes__"


def codec_of(checkpoint: Checkpoint, layer: str, shape: tuple[int, int], settings: Mapping[str, Any]) -> Codec | None:
    """The codec of a layer's weight ``[out, in]``; ``None`` where it is saved in floating point.

    Args:
        layer: its name in the checkpoint.
        settings: the ``quantization_config`` of the folder.

    Raises:
        ModelError: the tensors are of a layout that is not known, or of another matrix.
    """
    entries = checkpoint.beside(layer)
    for mark, make in _BY_MARK.items():
        if mark in entries:
            try:
                return make(checkpoint, layer, shape, entries, settings)
            except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
                listed = ", ".join(f"{name} {tuple(entry.shape)}" for name, entry in sorted(entries.items())[:5])
                raise ModelError(
                    f"{checkpoint.place}: {layer} {shape} is packed in a way that is not read here ({listed}): {error}"
                ) from error
    weight = entries.get("weight")
    if weight is not None and weight.codec is not None and not weight.is_float:
        return weight.codec if weight.numbers == shape else None
    if weight is not None and not weight.is_float:
        raise ModelError(
            f"{checkpoint.place}: {layer}.weight is saved as {weight.dtype}, without the scales of any layout that is "
            f"read here ({', '.join(QUANTISATION_METHODS)}); give the float model it was made from"
        )
    return None


def _packed_words(
    checkpoint: Checkpoint, layer: str, shape: tuple[int, int], entries: Mapping[str, Entry], settings: Any
) -> Codec:
    words, scale = entries["weight_packed"].shape, entries["weight_scale"].shape
    width = _bits(words[1], shape[1])
    _require(words[0] == shape[0] and scale[0] == shape[0], "its rows are not the layer's")
    _require("weight_g_idx" in entries or shape[1] % scale[1] == 0, "its groups do not divide a row")
    return PackedWords(*shape, width=width)


def _scaled_bytes(
    checkpoint: Checkpoint, layer: str, shape: tuple[int, int], entries: Mapping[str, Entry], settings: Any
) -> Codec | None:
    if entries["weight"].is_float:
        return None  # a scale of something else
    _require(
        entries["weight"].shape == shape and entries["weight"].dtype.itemsize == 1, "its bytes are not the layer's"
    )
    scales = _count(entries["weight_scale"].shape)
    _require(
        scales == 1 or (scales % shape[0] == 0 and shape[1] % (scales // shape[0]) == 0), "its scales fit no group"
    )
    return ScaledBytes(*shape)


def _row_bytes(
    checkpoint: Checkpoint, layer: str, shape: tuple[int, int], entries: Mapping[str, Entry], settings: Any
) -> Codec:
    _require(
        entries["weight"].shape == shape and entries["weight"].dtype == torch.int8, "its bytes are not the layer's"
    )
    return RowBytes(*shape)


def _codebook(
    checkpoint: Checkpoint, layer: str, shape: tuple[int, int], entries: Mapping[str, Entry], settings: Any
) -> Codec:
    state = state_of(checkpoint.read(f"{layer}.{next(name for name in entries if name.startswith(_STATE))}"))
    _require(tuple(state["shape"]) == shape, f"its shape is {state['shape']}")
    _require(
        2 * _count(entries["weight"].shape) == shape[0] * shape[1] + shape[0] * shape[1] % 2, "its bytes are others"
    )
    nested = "weight.nested_absmax" in entries
    return Codebook(
        *shape,
        block_size=int(state["blocksize"]),
        nested_block_size=int(state["nested_blocksize"]) if nested else 0,
        nested_offset=float(state["nested_offset"]) if nested else 0.0,
    )


def _gptq_or_awq(
    checkpoint: Checkpoint, layer: str, shape: tuple[int, int], entries: Mapping[str, Entry], settings: Any
) -> Codec:
    words = entries["qweight"].shape
    out_features, in_features = shape
    if words == (in_features, out_features // 8):
        version = str(settings.get("version", "gemm")).lower()
        _require(version == "gemm", f"AWQ's version {version}; only gemm is read")
        return Awq(*shape)
    _require(words[1] == out_features, "its columns are not the layer's")
    width = _bits(words[0], in_features)
    shift = 0 if "v2" in str(settings.get("checkpoint_format", "")) else 1
    return Gptq(*shape, width=width, shift=shift)


_BY_MARK: dict[str, Callable[..., Codec | None]] = {
    "weight_packed": _packed_words,
    "weight_scale": _scaled_bytes,
    "SCB": _row_bytes,
    "weight.absmax": _codebook,
    "qweight": _gptq_or_awq,
}


def _bits(words: int, numbers: int) -> int:
    for width in (4, 8):
        if words == -(-numbers * width // 32):
            return width
    raise ValueError(f"{numbers} numbers in {words} words are neither 4 nor 8 bits each")


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)
