"""Checkpoints: from which a run continues as if it had never stopped.

One file (:mod:`.state_file`) has the server's tensors, the round to continue with, what the evaluations said so far,
the counters of the accounting, and fingerprints of the configuration and of what it names (rows, classes, model).

A checkpoint is *proven* when a loss was measured at its parameters, by an evaluation or by the clients of the next
round, and had not exploded. One that is not may already hold what a bad step left, so it gets a file of its own, and
the last proven one stays until it is. The proven one before that stays, too: disks fail, and what one loss has not
shown the next may.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from fs_fwdllm.config import Config, dump_config
from fs_fwdllm.errors import CheckpointError
from fs_fwdllm.method.server import PARAMETERS
from fs_fwdllm.report.files import disk_errors_named
from fs_fwdllm.report.folder import CHECKPOINT_FILES
from fs_fwdllm.running.state_file import read_state, write_state

__all__ = [
    "Checkpoint", "config_fingerprint", "is_of", "prove_checkpoint", "read_checkpoint", "read_parameters",
    "require_same_inputs", "withdraw_checkpoint", "write_checkpoint",
]  # fmt: skip

_FILE, _UNPROVEN, _PREVIOUS = CHECKPOINT_FILES
#: What the facts in a file are, before anything is made of them.
_FACTS = {
    "next_round": int, "total_rounds": int, "fingerprint": str, "numbers": dict, "counters": dict, "inputs": dict,
    "evaluations": list,
}  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """Everything a resumed run needs.

    Attributes:
        next_round: first round that has not been done.
        tensors, numbers: the server's state.
        counters: cumulative accounting (bytes, passes, seconds).
        fingerprint: of the configuration that made it.
        inputs: fingerprints of what the configuration names, by what a user calls it.
        evaluations: what early stopping looks back on: the value by which rounds are compared, of each evaluation.
        total_rounds: how many rounds the run was to have when this was written.
    """

    next_round: int
    tensors: dict[str, torch.Tensor]
    numbers: dict[str, object]
    counters: dict[str, float]
    fingerprint: str
    inputs: dict[str, str] = field(default_factory=dict)
    evaluations: list[float] = field(default_factory=list)
    total_rounds: int = 0


def require_same_inputs(checkpoint: Checkpoint, now: Mapping[str, str], place: Path) -> None:
    """Raises :class:`~fs_fwdllm.errors.CheckpointError` if a run would go on with other rows or another model."""
    changed = [name for name, found in checkpoint.inputs.items() if now.get(name) != found]
    if changed:
        raise CheckpointError(
            f"{place}: {' and '.join(changed)} changed after the checkpoint was written: the run would go on with "
            "something else than it began with, and might test on rows it trained on; put them back, start a new run, "
            "or set fwdllm.accept_changed_inputs: true in the run's config.yaml"
        )


def config_fingerprint(config: Config) -> str:
    """A digest of everything that determines the result; where it is written and how long a host waits do not."""
    own = config.fwdllm.model_copy(update={"deadline_s": 1.0, "accept_changed_inputs": False, "saved_round": "best"})
    federate = config.federate.model_copy(update={"save_to": "", "save_freq": -1})
    neutral = config.model_copy(update={"outdir": "", "expname": "", "federate": federate, "fwdllm": own})
    return hashlib.blake2b(dump_config(neutral).encode(), digest_size=16).hexdigest()


def is_of(checkpoint: Checkpoint, config: Config) -> bool:
    """Whether ``config`` made the checkpoint. Only the number of rounds may be another: a run may be given more, and
    says so (:mod:`.extension`)."""
    as_it_was = config.federate.model_copy(update={"total_round_num": checkpoint.total_rounds})
    return checkpoint.fingerprint == config_fingerprint(config.model_copy(update={"federate": as_it_was}))


def write_checkpoint(folder: Path, checkpoint: Checkpoint, *, proven: bool = True) -> None:
    """Write ``checkpoint`` to ``folder``; a crash at any moment leaves the previous one or this one.

    Raises:
        CheckpointError: it cannot be written.
    """
    about = {item.name: getattr(checkpoint, item.name) for item in fields(Checkpoint) if item.name != "tensors"}
    before = any((folder / name).is_file() for name in CHECKPOINT_FILES)
    spared = "the previous checkpoint is intact" if before else "there is no earlier checkpoint"
    write_state(folder / _UNPROVEN, about, checkpoint.tensors, spared)
    if proven:
        prove_checkpoint(folder)


def prove_checkpoint(folder: Path) -> None:
    """The newest checkpoint turned out well: it takes the place of the last proven one.

    Raises:
        CheckpointError: the disk will not have that; both are where they were.
    """
    if (folder / _UNPROVEN).is_file():
        _keep_previous(folder)
        with disk_errors_named(folder / _FILE, f"the newest checkpoint is {_UNPROVEN} beside it"):
            os.replace(folder / _UNPROVEN, folder / _FILE)


def _keep_previous(folder: Path) -> None:
    """Let the last proven checkpoint have a second name, before another takes its own. Where the disk will not have it,
    the one that is about to be written matters more."""
    beside = folder / f".{_PREVIOUS}.{os.getpid()}"
    with suppress(OSError):
        beside.unlink(missing_ok=True)
        try:
            try:
                os.link(folder / _FILE, beside)
            except PermissionError:  # a disk without links
                shutil.copyfile(folder / _FILE, beside)
            os.replace(beside, folder / _PREVIOUS)
        finally:  # also where the user interrupts
            beside.unlink(missing_ok=True)


def withdraw_checkpoint(folder: Path) -> None:
    """The newest checkpoint may hold what a bad step left: go back to the last proven one, if there is one."""
    if (folder / _FILE).is_file():
        (folder / _UNPROVEN).unlink(missing_ok=True)


def read_checkpoint(folder: Path) -> Checkpoint:
    """The newest checkpoint in ``folder``.

    Raises:
        CheckpointError: there is none, or it is damaged; the message names one that is intact, if there is.
    """
    present = [folder / name for name in CHECKPOINT_FILES if (folder / name).is_file()]
    if not present:
        raise CheckpointError(f"{folder / _FILE}: no checkpoint there; a run writes one after its first round")
    # A run killed while it proved one leaves an older one beside it.
    newest = [path for path in present if path.name != _PREVIOUS] or present
    try:
        return max((_read(path) for path in newest), key=lambda checkpoint: checkpoint.next_round)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_way_out(present)}") from error


def _way_out(present: Sequence[Path]) -> str:
    """Of a damaged checkpoint: another one to go on from."""
    for path in present:
        with suppress(CheckpointError):
            intact = _read(path)
            return (
                f"; {path.name} beside it is intact and goes on with round {intact.next_round + 1}: remove the damaged "
                "file to continue there"
            )
    return ""


def read_parameters(folder: Path, reference: Sequence[object]) -> dict[str, torch.Tensor]:
    """The parameters that a checkpoint or a best round in ``folder`` refers to.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    return read_state(folder / Path(str(reference[0])).name)[1]


def _read(path: Path) -> Checkpoint:
    about, tensors = read_state(path)
    try:
        found = Checkpoint(tensors=tensors, **about)
        if wrong := [name for name, kind in _FACTS.items() if type(getattr(found, name)) is not kind]:
            raise TypeError(f"its {wrong[0]} is a {type(getattr(found, wrong[0])).__name__}")
        reference: Any = found.numbers.get(PARAMETERS)
        if reference is not None:
            found.tensors.update(read_parameters(path.parent, reference))
        return found
    except (TypeError, LookupError) as error:
        raise CheckpointError(f"{path}: damaged or not a checkpoint of ours ({error})") from error
