"""A linear layer whose weight is packed: floats exist for a few rows at a time, in a buffer that all layers share.

To the rest of the program it is a linear layer: adapters hang on it, the structure of a model is found through it, and
``weight`` has the shape and dtype one expects, though there are no numbers behind it. A forward pass goes over blocks
of output rows::

    packed rows --codec--> float rows [block, in] --> x @ rows^T      for every block, then side by side

A block is some four million bytes, so that the second step reads from the cache what the first one wrote there.
Nothing is kept for a backward pass either: the weight is frozen, and the gradient of the input unpacks it once more.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fs_fwdllm.model.base.codecs import Codec, rows_at_a_time
from fs_fwdllm.model.base.meeting import Meeting
from fs_fwdllm.model.base.streaming import Reader, StreamedLayer
from fs_fwdllm.model.base.tables import StreamedEmbedding, Table

__all__ = ["PackedLinear", "elements_of", "meeting_of", "packed_layers", "put", "reader_of", "unpack"]


class PackedLinear(nn.Linear):
    """``x @ W^T + b`` with a packed, frozen ``W``.

    Args:
        codec: how the matrix is kept.
        parts: its tensors, by the codec's names; or the layer of a reader that has them for as long as they are used.
        bias: ``[out_features]``, or ``None``.
        dtype: of ``weight``, for whoever asks; the product is computed in the dtype of the input.
    """

    bias: nn.Parameter | None  # type: ignore[assignment]

    def __init__(
        self,
        codec: Codec,
        parts: Mapping[str, torch.Tensor] | StreamedLayer,
        bias: nn.Parameter | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make room for a weight
        self.in_features, self.out_features = codec.in_features, codec.out_features
        self.codec = codec
        self.register_parameter("bias", bias)
        self.streamed = parts if isinstance(parts, StreamedLayer) else None
        held: Mapping[str, torch.Tensor] = {} if isinstance(parts, StreamedLayer) else parts
        self._names = {name: "packed_" + name.replace(".", "_") for name in held}
        for name, tensor in held.items():
            self.register_buffer(self._names[name], tensor, persistent=False)
        device = next((tensor.device for tensor in held.values()), torch.device("cpu"))
        self._like = torch.full((), torch.nan, dtype=dtype, device=device)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The matrix's shape and dtype, with no numbers behind them: whoever computes with it gets NaN, not a result.

        :meth:`dequantised` has the numbers.
        """
        return self._like.expand(self.out_features, self.in_features)

    def parts(self) -> dict[str, torch.Tensor]:
        """The packed tensors that are in memory, by the codec's names."""
        return {name: self.get_buffer(attribute) for name, attribute in self._names.items()}

    def _held(self, device: torch.device) -> Iterator[tuple[int, int, Mapping[str, torch.Tensor]]]:
        """``(first row, last row, tensors)`` of what is held at a time: everything, or the pieces of a reader."""
        if self.streamed is None:
            yield 0, self.out_features, self.parts()
            return
        for first, last, parts in self.streamed.held():
            yield first, last, {name: tensor.to(device) for name, tensor in parts.items()}

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``[..., in_features]`` to ``[..., out_features]``, in the input's dtype."""
        bias = self.bias
        if bias is None or not bias.requires_grad:  # added by the kernel of the product, as that of floats does
            return _Product.apply(input, self, bias is not None)  # type: ignore[no-untyped-call, no-any-return]
        product: torch.Tensor = _Product.apply(input, self, False)  # type: ignore[no-untyped-call]
        return product + bias.to(product.dtype)

    def blocks(self, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[int, int, torch.Tensor]]:
        """``(first, last, rows)`` over the matrix; ``rows`` ``[last - first, in]`` last until the next are wanted."""
        step = self._rows_of_block(dtype)
        for start, stop, parts in self._held(device):
            with _scratch(step * self.in_features, dtype, device) as scratch:
                for first in range(start, stop, step):
                    last = min(first + step, stop)
                    yield first, last, self.codec.rows(parts, first - start, last - start, scratch)

    @torch.no_grad()
    def dequantised(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The matrix ``[out, in]`` as floats, all of it."""
        whole = torch.empty(self.out_features, self.in_features, dtype=dtype, device=self._like.device)
        for first, last, rows in self.blocks(dtype, self._like.device):
            whole[first:last] = rows
        return whole

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, codec={type(self.codec).__name__}"

    def _rows_of_block(self, dtype: torch.dtype) -> int:
        rows = rows_at_a_time(self.in_features, dtype)
        return min(self.out_features, -(-rows // self.codec.row_multiple) * self.codec.row_multiple)

    def _apply(self, fn: Any, recurse: bool = True) -> PackedLinear:
        """As of any module, but a change of dtype is the computation's; the packed tensors are what they are."""
        before = self.parts()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, attribute in self._names.items():
            moved = self.get_buffer(attribute)
            if moved.dtype != before[name].dtype:
                setattr(self, attribute, before[name].to(moved.device))
        self._like = fn(self._like)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self.parts().items():
            destination[prefix + name] = tensor


class _Product(torch.autograd.Function):
    """The product with its derivatives; the weight has none.

    A function of its own also where no derivative is wanted: inside a transformation of ``torch.func`` nothing may be
    written into the shared buffer, and what happens in here is outside of it.
    """

    @staticmethod
    def forward(input: torch.Tensor, layer: PackedLinear, with_bias: bool) -> torch.Tensor:
        bias = layer.bias.detach().to(input.dtype) if with_bias and layer.bias is not None else None
        output = None  # made when the first rows are there: passes that wait for them side by side do without
        for first, last, rows in layer.blocks(input.dtype, input.device):
            if output is None:
                output = input.new_empty(*input.shape[:-1], layer.out_features)
            output[..., first:last] = F.linear(input, rows, None if bias is None else bias[first:last])
        assert output is not None
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, PackedLinear, bool], output: torch.Tensor) -> None:
        ctx.layer = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        layer: PackedLinear = ctx.layer
        total = torch.zeros(*gradient.shape[:-1], layer.in_features, dtype=gradient.dtype, device=gradient.device)
        for first, last, rows in layer.blocks(gradient.dtype, gradient.device):
            total += gradient[..., first:last] @ rows
        return total, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor, *_: None) -> torch.Tensor:
        product: torch.Tensor = _Product.apply(tangent, ctx.layer, False)  # type: ignore[no-untyped-call]
        return product

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, input: torch.Tensor, layer: PackedLinear, with_bias: bool
    ) -> tuple[torch.Tensor, int]:
        return _Product.apply(input.movedim(in_dims[0], 0), layer, with_bias), 0  # type: ignore[no-untyped-call]


def packed_layers(model: nn.Module) -> list[tuple[str, PackedLinear]]:
    """The packed layers by name."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, PackedLinear)]


@torch.no_grad()
def unpack(model: nn.Module, names: Iterable[str] | None = None) -> None:
    """Put ordinary linear layers in the place of packed ones, in the dtype of their weight: of ``names``, or of all.

    Where all are meant, tables of embeddings become ordinary ones as well, and heads that are tied to them stay so.
    """
    wanted = None if names is None else set(names)
    tables = _unpack_tables(model) if wanted is None else {}
    for name, layer in packed_layers(model):
        if wanted is not None and name not in wanted:
            continue
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        tied = tables.get(_place_of(layer))
        numbers = layer.dequantised(layer.weight.dtype) if tied is None else tied
        plain.weight = numbers if tied is not None else nn.Parameter(numbers, requires_grad=False)
        plain.register_parameter("bias", layer.bias)
        put(model, name, plain.train(layer.training))
    if not packed_layers(model):
        for module in model.modules():  # what is saved does not say of itself any more that it is packed
            vars(getattr(module, "config", None) or module).pop("quantization_config", None)


def _unpack_tables(model: nn.Module) -> dict[Any, nn.Parameter]:
    """The numbers of all tables, by where they were."""
    found = {}
    for name, table in [(name, module) for name, module in model.named_modules() if isinstance(module, Table)]:
        plain = nn.Embedding(table.num_embeddings, table.embedding_dim, table.padding_idx, device="meta")
        plain.weight = nn.Parameter(table.dequantised(), requires_grad=False)
        found[_place_of(table)] = plain.weight
        put(model, name, plain.train(table.training))
    return found


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Let ``module`` stand in ``model`` under ``name``."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _place_of(module: PackedLinear | Table) -> Any:
    """Where the bytes are that a module stands for, on the disk or in memory; a head may share a table's."""
    if isinstance(module, StreamedEmbedding):
        return module.entry.file, module.entry.offset
    if isinstance(module, PackedLinear) and module.streamed is not None:
        first = module.streamed.entries[0]
        return first.file, first.offset
    held = [*module.buffers()]
    return held[0].data_ptr() if held else id(module)


def reader_of(model: nn.Module) -> Reader | None:
    """What reads the layers of a model that stay on the disk; ``None`` where all are in memory."""
    readers = (layer.streamed.reader for _, layer in packed_layers(model) if layer.streamed is not None)
    return next(readers, None)


def meeting_of(model: nn.Module) -> Meeting:
    """Where passes over a model share what is read; over one in memory they come one after the other."""
    reader = reader_of(model)
    return Meeting(1) if reader is None else reader.meeting


def elements_of(model: nn.Module) -> int:
    """Numbers in a model's parameters, the packed ones counted as what they stand for."""
    held = sum(parameter.numel() for parameter in model.parameters())
    tables = {_place_of(module): module for module in model.modules() if isinstance(module, Table)}
    held += sum(table.num_embeddings * table.embedding_dim for table in tables.values())
    layers = {id(layer): layer for _, layer in packed_layers(model) if _place_of(layer) not in tables}  # tied ones
    return held + sum(layer.in_features * layer.out_features for layer in layers.values())


#: Buffers that nobody has borrowed, and who may look for one; layers do not call one another, so there is mostly one.
_FREE: list[torch.Tensor] = []
_LOOKING = threading.Lock()


@contextmanager
def _scratch(elements: int, dtype: torch.dtype, device: torch.device) -> Iterator[torch.Tensor]:
    """A flat buffer of at least ``elements``, given back at the end."""
    with _LOOKING:
        fits = [buffer for buffer in _FREE if buffer.dtype == dtype and buffer.device == device]
        buffer = max(fits, key=len, default=None)
        if buffer is not None:
            _FREE[:] = [other for other in _FREE if other is not buffer]
    if buffer is None or len(buffer) < elements:
        buffer = torch.empty(elements, dtype=dtype, device=device)
    try:
        yield buffer
    finally:
        _FREE.append(buffer)
