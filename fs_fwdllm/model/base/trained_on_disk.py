"""The parameters of a base on the disk, for methods that train a few of them at a time.

Block training changes one block of a model in a round and reads all others. Over a base on the disk nothing but that
block has to be in memory::

    untouched matrix  --> read from the user's file, where it is
    changed matrix    --> read from a file of its own (:mod:`.changed_files`)
    matrix in training --> an ordinary parameter, for as long as :meth:`StreamedTrainables.resident` is open

Vectors (norms, biases) and heads that the checkpoint lacks are few numbers, and stay in memory. To the rest of the
program these are trainables like any others, with the names, the order and the digest that the model would have in
memory; but :attr:`~StreamedTrainables.tensors` are read when they are looked at, so that who wants them all takes them
one at a time.

A model has its own (in its own dtype), and its server a :meth:`~StreamedTrainables.clone` in float32, which no module
reads. :meth:`~StreamedTrainables.showing` lets the model stand at the server's for an evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fs_fwdllm.core.arrays import Arrays, arrays_of
from fs_fwdllm.core.trainables import Trainables
from fs_fwdllm.errors import ConfigError
from fs_fwdllm.model.base.changed_files import ChangedFiles, Written
from fs_fwdllm.model.base.checkpoint import Entry
from fs_fwdllm.model.base.packed import PackedLinear, put, reader_of
from fs_fwdllm.model.base.streaming import Reader
from fs_fwdllm.model.base.weights import entry_of, is_turned, named_weights

__all__ = ["StreamedTrainables"]


_TABLE = (
    "fwdllm.blocks: {} is a table of the vocabulary, which fwdllm.base.stream leaves on the disk and which cannot be "
    "trained there; set fwdllm.blocks.embeddings and fwdllm.blocks.head to out, or fwdllm.base.stream to false"
)


@dataclass
class _Matrix:
    """A matrix on the disk.

    Attributes:
        layer: the module that reads it, where it is a model's own; and ``place``, that module's name.
        base: where it is in the user's file; and ``base_dtype``, what the model reads it in.
        dtype: of its values, here.
        changed: where it is instead, since it was trained.
    """

    layer: PackedLinear
    place: str
    base: Entry
    base_dtype: torch.dtype
    dtype: torch.dtype
    changed: Written | None = None
    is_finite: bool = True

    @property
    def entry(self) -> Entry:
        return self.base if self.changed is None else self.changed.entry


@dataclass(frozen=True)
class _Lazily(Sequence[torch.Tensor]):
    """The tensors in order; those on the disk are read when they are looked at."""

    owner: StreamedTrainables

    def __len__(self) -> int:
        return len(self.owner.names)

    def __getitem__(self, index: Any) -> Any:
        return self.owner.read(range(len(self))[index]) if isinstance(index, int) else [
            self.owner.read(one) for one in range(len(self))[index]
        ]  # fmt: skip


@dataclass(frozen=True)
class _ByName(Mapping[str, torch.Tensor]):
    """The tensors by name; those on the disk are read when they are looked at."""

    owner: StreamedTrainables
    places: dict[str, int]

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.owner.read(self.places[name])


@dataclass
class _Shown:
    """Of another holder's changed matrix, the copy in this one's dtype."""

    theirs: Written
    own: Written


@dataclass(frozen=True)
class _Store:
    """What holders of one model's parameters share."""

    reader: Reader
    matrices: dict[int, _Matrix]
    files: ChangedFiles
    live: dict[int, nn.Parameter] = field(default_factory=dict)
    shown: dict[int, _Shown] = field(default_factory=dict)


class StreamedTrainables(Trainables):
    """Named parameters of a model whose matrices are on the disk. Make them with :meth:`of_streamed`."""

    def __init__(
        self, names: Sequence[str], held: Mapping[int, torch.Tensor], store: _Store, model: nn.Module | None
    ) -> None:
        self.names = tuple(names)
        self._held = dict(held)
        self._store = store
        self._model = model
        self.tensors: Any = _Lazily(self)
        self._shapes = tuple(
            tuple(held[index].shape) if index in held else store.matrices[index].base.shape
            for index in range(len(self.names))
        )
        self.count = sum(torch.Size(shape).numel() for shape in self._shapes)
        self.bytes = sum(
            torch.Size(shape).numel() * dtype.itemsize for shape, dtype in zip(self._shapes, self.dtypes, strict=True)
        )

    @classmethod
    def of_streamed(cls, model: Any, names: set[str], beside: Path) -> StreamedTrainables:
        """The parameters ``names`` of ``model``, in its order and dtypes.

        Args:
            beside: a folder on a disk with room for what is trained.

        Raises:
            ConfigError: a table is among them, which stays on the disk.
        """
        reader = reader_of(model)
        assert reader is not None
        modules, weights = dict(model.named_modules()), named_weights(model)
        tables = (model.get_input_embeddings(), model.get_output_embeddings())
        held: dict[int, torch.Tensor] = {}
        matrices: dict[int, _Matrix] = {}
        ordered = [name for name in weights if name in names]
        for index, name in enumerate(ordered):
            place = name.rpartition(".")[0]
            module = modules[place]
            entry = entry_of(module) if name.endswith(".weight") else None
            if entry is None:
                held[index] = weights[name]
            else:
                dtype = weights[name].dtype
                if not isinstance(module, PackedLinear) or module in tables:
                    raise ConfigError(_TABLE.format(name))
                matrices[index] = _Matrix(module, place, entry, dtype, dtype)
        return cls(ordered, held, _Store(reader, matrices, ChangedFiles(reader, None, beside)), model)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return self._shapes

    @property
    def dtypes(self) -> tuple[Any, ...]:
        return tuple(
            self._held[index].dtype if index in self._held else self._store.matrices[index].dtype
            for index in range(len(self.names))
        )

    @property
    def in_memory(self) -> dict[int, Any]:
        return dict(self._held)

    @property
    def arrays(self) -> Arrays:
        return arrays_of(torch.empty(0, device=self.device))

    @property
    def device(self) -> Any:
        return next((tensor.device for tensor in self._held.values()), torch.device("cpu"))

    def read(self, index: int) -> torch.Tensor:
        """A tensor: what is in memory itself, or a copy of what is on the disk.

        Raises:
            ModelError: a file cannot be read, is shorter than it was, or was changed.
        """
        if index in self._held:
            return self._held[index]
        matrix = self._store.matrices[index]
        memory = torch.empty(matrix.entry.bytes, dtype=torch.uint8)
        self._store.reader.file(matrix.entry.file).read_into(memoryview(memory.numpy()), matrix.entry.offset)  # type: ignore[arg-type]
        found = memory.view(matrix.entry.dtype).view(matrix.base.shape)
        return (found.to(matrix.base_dtype) if matrix.changed is None else found).to(matrix.dtype)

    def parameter(self, index: int) -> torch.Tensor:
        return self._held[index] if index in self._held else self._store.live[index]

    @contextmanager
    def resident(self, indices: Sequence[int]) -> Iterator[None]:
        """Ordinary modules stand in the model for a while, with the values of now; what becomes of them is forgotten
        unless it is assigned."""
        assert self._model is not None
        brought = [index for index in indices if index not in self._held]
        try:
            for index in brought:
                matrix = self._store.matrices[index]
                module = _module_of(matrix.layer, self.read(index).to(self.device))
                self._store.live[index] = module.weight
                put(self._model, matrix.place, module)
            yield
        finally:
            for index in brought:
                self._store.live.pop(index, None)
                put(self._model, self._store.matrices[index].place, self._store.matrices[index].layer)

    @torch.no_grad()
    def assign(self, indices: Sequence[int], values: Sequence[Any]) -> None:
        """Overwrite tensors; matrices of which a bit has changed go into one new file.

        Raises:
            ModelError: it cannot be written.
        """
        changed: dict[int, torch.Tensor] = {}
        for index, value in zip(indices, values, strict=True):
            if index in self._held:
                self._held[index].detach().copy_(value)
                continue
            matrix = self._store.matrices[index]
            rounded = value.detach().to("cpu", matrix.dtype).contiguous()
            matrix.is_finite = bool(torch.isfinite(rounded).all())
            if not _same_bits(rounded, self.read(index)):
                changed[index] = rounded
        if changed:
            written = self._store.files.write(list(changed.values()))
            self._move(dict(zip(changed, written, strict=True)))

    def _move(self, places: Mapping[int, Written]) -> None:
        """Matrices are elsewhere now; where they were before is let go."""
        before = [self._store.matrices[index].changed for index in places]
        for index, written in places.items():
            self._store.matrices[index].changed = written
        self._point({index: written.entry for index, written in places.items()})
        for written in filter(None, before):
            self._store.files.let_go(written)

    def _point(self, entries: Mapping[int, Entry]) -> None:
        """Let the model, where there is one, read its matrices from these places."""
        if self._model is not None:
            layers = {self._store.matrices[index].layer.streamed: entry for index, entry in entries.items()}
            self._store.reader.replace({layer: entry for layer, entry in layers.items() if layer is not None})

    def is_finite(self) -> bool:
        """Whether no value that was assigned is NaN or infinite."""
        vectors = all(bool(torch.isfinite(tensor).all()) for tensor in self._held.values())
        return vectors and all(matrix.is_finite for matrix in self._store.matrices.values())

    @property
    def folder(self) -> Path | None:
        """Where files of changed matrices keep their names, so that a checkpoint can speak of them."""
        return self._store.files.folder

    def clone(self, *, float32: bool = False, folder: Path | None = None) -> StreamedTrainables:
        """An independent replica, which no model reads; its changed matrices are in files in ``folder``."""
        replica = self._unchanged(torch.float32 if float32 else None, folder)
        for index, tensor in self._held.items():
            replica._held[index].copy_(tensor.detach())
        for index, matrix in self._store.matrices.items():
            if matrix.changed is not None:
                replica.assign([index], [self.read(index)])
        return replica

    def _unchanged(self, dtype: torch.dtype | None, folder: Path | None) -> StreamedTrainables:
        """A replica that stands where the user's files do; what is in memory has no values yet."""
        store = self._store
        held = {
            index: torch.empty_like(tensor, dtype=dtype, requires_grad=False) for index, tensor in self._held.items()
        }
        matrices = {
            index: _Matrix(matrix.layer, matrix.place, matrix.base, matrix.base_dtype, dtype or matrix.dtype)
            for index, matrix in store.matrices.items()
        }
        files = ChangedFiles(store.reader, folder, store.files.beside)
        return StreamedTrainables(self.names, held, _Store(store.reader, matrices, files), None)

    def holding(self, values: Sequence[Any]) -> NoReturn:
        """Not of a base on the disk, whose modules hold no storage to exchange; see :meth:`showing`."""
        raise TypeError("the parameters of a base on the disk cannot be exchanged; show those of a replica")

    @contextmanager
    def showing(self, others: StreamedTrainables) -> Iterator[None]:
        """Let the model stand at the values of a replica, rounded to its own dtypes, for a while."""
        kept = {index: tensor.detach().clone() for index, tensor in self._held.items()}
        apart = [
            index
            for index, matrix in self._store.matrices.items()
            if matrix.changed is not None or others._store.matrices[index].changed is not None
        ]
        try:
            self._point({index: self._place_of(others, index) for index in apart})
            for index, tensor in others._held.items():
                self._held[index].detach().copy_(tensor.detach())
            yield
        finally:
            self._point({index: self._store.matrices[index].entry for index in apart})
            for index, tensor in kept.items():
                self._held[index].detach().copy_(tensor)

    def _place_of(self, others: StreamedTrainables, index: int) -> Entry:
        """Where a replica's matrix can be read in this one's dtype; a copy is made once for each of its versions."""
        theirs, shown = others._store.matrices[index], self._store.shown
        if theirs.changed is None or theirs.dtype == self._store.matrices[index].dtype:
            return theirs.entry
        known = shown.get(index)
        if known is None or known.theirs is not theirs.changed:
            rounded = others.read(index).to(self._store.matrices[index].dtype)
            shown[index] = _Shown(theirs.changed, self._store.files.write([rounded])[0])
            if known is not None:
                self._store.files.let_go(known.own)
        return shown[index].own.entry

    def named(self) -> Mapping[str, torch.Tensor]:
        return _ByName(self, {name: index for index, name in enumerate(self.names)})

    def kept_by_value(self) -> dict[str, torch.Tensor]:
        return {self.names[index]: tensor for index, tensor in self._held.items()}

    def kept_in_files(self) -> dict[str, list[object]]:
        found = {index: matrix.changed for index, matrix in self._store.matrices.items()}
        return {self.names[index]: changed.reference() for index, changed in found.items() if changed is not None}

    @torch.no_grad()
    def restored(self, values: Mapping[str, Any], files: Mapping[str, Sequence[object]]) -> StreamedTrainables:
        """A float32 replica that stands where others were kept, by value and in files.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        replica = self._unchanged(torch.float32, self.folder)
        for index, tensor in replica._held.items():
            tensor.copy_(values[self.names[index]])
        replica.take_files(files)
        return replica

    def take_files(self, files: Mapping[str, Sequence[object]]) -> None:
        """Read matrices from where :meth:`kept_in_files` says.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        place = {name: index for index, name in enumerate(self.names)}
        for name, reference in files.items():
            matrix = self._store.matrices[place[name]]
            self._move({place[name]: self._store.files.find(reference, matrix.base.shape, matrix.dtype)})

    def keep_only(self, names: set[str]) -> None:
        self._store.files.keep_only(names)


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.view(torch.uint8), other.contiguous().view(torch.uint8))


def _module_of(layer: PackedLinear, weight: torch.Tensor) -> Any:
    """The ordinary module in the place of ``layer``, with its bias."""
    with torch.device("meta"):
        plain: Any = (
            Conv1D(layer.out_features, layer.in_features)
            if is_turned(layer)
            else nn.Linear(layer.in_features, layer.out_features, bias=False)
        )
    plain.weight = nn.Parameter(weight, requires_grad=False)
    plain.register_parameter("bias", layer.bias)
    return plain.train(layer.training)
