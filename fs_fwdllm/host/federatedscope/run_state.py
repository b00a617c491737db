"""What one FederatedScope process holds for us: configuration, examples, one model, one worker.

The host builds data, model, trainer, server and clients one after the other and hands each only a part of what it knows
(a registered model builder, for instance, sees the ``model`` section alone). So the first of our callables that sees a
run, the data loader, opens a :class:`HostProcess`; the others find it here. Simulated clients share its one model:
the host would build one for each.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fs_fwdllm.config import Config, dump_config
from fs_fwdllm.core.trainables import Trainables
from fs_fwdllm.data.types import ClientData, FederatedData
from fs_fwdllm.errors import CheckpointError, DataError, HostError, nearest
from fs_fwdllm.host.federatedscope import HOST, RUN_FOLDER
from fs_fwdllm.method import ClientWorker, assemble_worker
from fs_fwdllm.report import RunFolder
from fs_fwdllm.report.files import write_text_atomically
from fs_fwdllm.running.checkpoint import Checkpoint, is_of, read_checkpoint
from fs_fwdllm.running.keeping import take_over
from fs_fwdllm.running.sampling import clients_per_round
from fs_fwdllm.running.session import Session

__all__ = [
    "HostModel", "HostProcess", "close", "current_model", "is_active", "load_named_values", "load_values",
    "named_values", "open_folder", "open_process", "require_end", "require_work", "save_values", "splits_of",
]  # fmt: skip


class HostProcess:
    """Everything of ours in one process of the host.

    Args:
        config: our configuration of the run.
        data: task and label names; clients may be absent (a server process holds none).
        tokenizer: the one the examples were made with.
        restore_from: checkpoint to continue from; empty starts anew.

    Attributes:
        is_over: whether this process has heard, or said, that the run is over.
    """

    def __init__(self, config: Config, data: FederatedData, tokenizer: Any, restore_from: str) -> None:
        self.config = config
        self.data = data
        self.restore_from = restore_from
        self._tokenizer = tokenizer
        self._threads = torch.get_num_threads()
        self.is_over = False

    @cached_property
    def session(self) -> Session:
        torch.set_num_threads(self._threads)  # a simulation of the host sets it to one, and last bits can depend on it
        return Session.assemble(self.config, self._tokenizer, self.data)

    @cached_property
    def worker(self) -> ClientWorker:
        return assemble_worker(self.session.parts)

    @cached_property
    def model(self) -> HostModel:
        return HostModel(self)


class HostModel(nn.Module):
    """The model as the host sees it: its state is what we train, and it is never pickled.

    The host pickles every worker's model only to learn its size, which costs about three times the model's memory, and
    falls back to a constant where that fails. Here it always fails.
    """

    def __init__(self, process: HostProcess) -> None:
        super().__init__()
        self.model = process.session.loaded.model
        self.process = process

    @property
    def trainables(self) -> Trainables:
        return self.process.session.parts.trainables

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return self.model(*arguments, **named)

    def half(self) -> HostModel:
        """Nothing: the precision of the base is chosen when it is loaded (``train.is_enable_half``)."""
        return self

    def state_dict(self, *arguments: Any, **named: Any) -> Any:
        """The trained parameters by the host's names."""
        return named_values(self.trainables)

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> None:
        """Load trained parameters by the host's names. Raises as :func:`load_named_values`."""
        load_named_values(self.trainables, state)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise pickle.PicklingError("the model is not pickled to learn its size")


def named_values(trainables: Trainables) -> dict[str, torch.Tensor]:
    """Trained parameters under the names that the host's own adapter models give them."""
    return {name: tensor.detach().clone() for name, tensor in zip(trainables.names, trainables.tensors, strict=True)}


def load_named_values(trainables: Trainables, state: dict[str, torch.Tensor]) -> None:
    """Inverse of :func:`named_values`.

    Raises:
        CheckpointError: a parameter is missing or has another shape.
    """
    missing = [name for name in trainables.names if name not in state]
    if missing:
        raise CheckpointError(
            f"federate.restore_from: the checkpoint lacks {missing[0]!r} and {len(missing) - 1} more of this run's "
            f"parameters{nearest(missing[0], state)}"
        )
    values = [state[name] for name in trainables.names]
    for name, tensor, value in zip(trainables.names, trainables.tensors, values, strict=True):
        if value.shape != tensor.shape:
            raise CheckpointError(
                f"federate.restore_from: {name!r} has shape {tuple(value.shape)}, not {tuple(tensor.shape)}"
            )
    trainables.load_values([value.to(tensor.dtype) for value, tensor in zip(values, trainables.tensors, strict=True)])


def save_values(path: str, finished_rounds: int, trainables: Trainables) -> None:
    """Write ``{'cur_round', 'model'}``, the file the host's evaluation scripts read; atomically.

    Raises:
        CheckpointError: it cannot be written.
    """
    content = io.BytesIO()
    torch.save({"cur_round": finished_rounds, "model": named_values(trainables)}, content)
    temporary = Path(f"{path}.{os.getpid()}")
    try:
        temporary.write_bytes(content.getvalue())
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(f"federate.save_to {path!r}: cannot be written ({error.strerror})") from error


def load_values(path: str, trainables: Trainables) -> int:
    """Load what :func:`save_values` (or the host) wrote, without unpickling objects; the rounds it had finished.

    Raises:
        CheckpointError: it is no such file, or of another model.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        values, finished_rounds = saved["model"], int(saved["cur_round"])
    except Exception as error:  # torch raises a dozen types for files that are not its own
        raise CheckpointError(f"federate.restore_from {path!r}: is no checkpoint of the host ({error})") from error
    load_named_values(trainables, values)
    return finished_rounds


def open_folder(process: HostProcess, outdir: Path) -> tuple[RunFolder, Checkpoint | None]:
    """Our run folder, inside the host's; with ``federate.restore_from`` naming one of ours, what it stopped at.

    Raises:
        CheckpointError: what is to be continued is no run folder, has no checkpoint, had another configuration, or has
            finished.
    """
    folder = RunFolder(outdir / RUN_FOLDER)
    folder.path.mkdir(parents=True, exist_ok=True)
    write_text_atomically(folder.config_path, dump_config(process.config))
    write_text_atomically(folder.path / HOST.marker, "made inside FederatedScope; goes on with federate.restore_from\n")
    source = Path(process.restore_from)
    if not process.restore_from or not source.is_dir():
        return folder, None
    before = RunFolder.open(source)
    with before.locked():
        checkpoint = read_checkpoint(before.checkpoint_path)
    if not is_of(checkpoint, process.config):
        raise CheckpointError(
            f"federate.restore_from {str(source)!r}: that run had another configuration; a run continues with the one "
            "it was started with"
        )
    if checkpoint.next_round >= process.config.federate.total_round_num:
        raise CheckpointError(f"federate.restore_from {str(source)!r}: that run has finished; nothing is left to do")
    take_over(before, folder)
    return folder, checkpoint


def require_work(config: Config, clients: int) -> None:
    """Refuse a run in which nobody has anything to do, or more are asked for than have.

    Args:
        clients: how many hold a training sample.

    Raises:
        DataError: nobody does.
        ConfigError: ``federate.sample_client_num`` is larger.
    """
    if not clients:
        raise DataError(
            f"no client holds a training sample; check data.splits {config.data.splits}, federate.client_num "
            f"{config.federate.client_num}, llm.tok_len {config.llm.tok_len} (it may cut off every answer) and the file"
        )
    clients_per_round(config, clients)


_current: HostProcess | None = None


def open_process(process: HostProcess) -> None:
    """Make ``process`` the one the other callables find."""
    global _current
    _current = process


def close() -> None:
    """Forget the current run; the host's own methods are untouched from here on."""
    global _current
    _current = None


def require_end() -> None:
    """Called when the host has returned. A simulation ends when no message is under way, whatever the reason.

    Raises:
        HostError: the run of ours that was under way is not over.
    """
    if _current is not None and not _current.is_over:
        raise HostError("FederatedScope has returned before the run was over: nobody had anything left to say")


def is_active() -> bool:
    """Whether the run that is being set up is one of ours."""
    return _current is not None


def current_model() -> HostModel | None:
    """The model of the current run, ``None`` if it is not one of ours."""
    return None if _current is None else _current.model


def splits_of(clients: Sequence[ClientData]) -> list[str]:
    """Names of the splits in which some client has a sample."""
    return [name for name in ("train", "val", "test") if any(getattr(client, name) for client in clients)]
