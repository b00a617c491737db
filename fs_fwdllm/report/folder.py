"""The run folder: the one place that knows which file of a run is called what."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import ValidationError

from fs_fwdllm.config import Config, dump_config, load_config
from fs_fwdllm.errors import CheckpointError, ConfigError, nearest
from fs_fwdllm.report.files import disk_errors_named, require_writable, write_text_atomically

__all__ = ["CHECKPOINT_FILES", "RunFolder"]

#: The checkpoint whose parameters have been looked at, a younger one that nobody has looked at yet, and the one before.
CHECKPOINT_FILES = ("state.safetensors", "unproven.safetensors", "previous.safetensors")

#: Where run folders are looked for when a folder that is none was named.
_DEPTHS = ("*/", "*/*/")
_LOCK = ".lock"
#: What a file or folder is called while it is written, beside its place: ``.NAME.RANDOM`` and ``.NAME-RANDOM``.
_UNFINISHED = re.compile(
    r"\.(config\.yaml|metrics\.jsonl|bytes\.csv|report\.png|wandb-id|\w+\.safetensors)\..+|\.(adapter|model|base_model)(-last)?-.+"
)
#: A folder that was moved aside while the new one took its place.
_RETIRED = re.compile(r"\.((?:adapter|model|base_model)(?:-last)?)-[^-]+-old")


@dataclass(frozen=True)
class RunFolder:
    """A folder that holds one run. Make a new one with :meth:`create`, take an existing one with :meth:`open`."""

    path: Path

    @classmethod
    def create(cls, config: Config) -> RunFolder:
        """Make ``outdir/expname``, or ``outdir/expname-2``, ``-3`` ... when that exists, and write ``config.yaml``.

        Raises:
            ConfigError: ``expname`` is not a folder name, or ``outdir`` cannot be written.
        """
        cls.require_place(config)
        name, outdir = config.expname or "run", Path(config.outdir)
        for number in count(1):
            path = outdir / (name if number == 1 else f"{name}-{number}")
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                if not outdir.is_dir():
                    raise ConfigError(f"outdir: {str(outdir)!r} is a file, not a folder") from None
                continue
            except OSError as error:
                raise ConfigError(f"outdir: {path} cannot be made ({error.strerror})") from error
            break
        folder = cls(path)
        write_text_atomically(folder.config_path, dump_config(config))
        return folder

    @staticmethod
    def require_place(config: Config) -> None:
        """Check that :meth:`create` would find a place; nothing is made. Raises as it does."""
        name = config.expname or "run"
        if Path(name).name != name or name == "..":
            raise ConfigError(f"expname: must be the name of one folder, but is {name!r}; put the rest into outdir")
        require_writable(config.outdir)

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """An existing run folder.

        Raises:
            CheckpointError: ``path`` does not exist, or is not a run folder: it has no ``config.yaml``, or it holds no
                round, but a folder inside does. A host may keep our run folder, and a ``config.yaml``, in its own.
        """
        folder = cls(Path(path))
        if not folder.path.is_dir():
            parent = folder.path.parent
            others = sorted(str(near) for near in parent.iterdir() if near.is_dir()) if parent.is_dir() else []
            raise CheckpointError(f"{folder.path}: there is no such run folder{nearest(folder.path, others)}")
        if inside := folder._runs_inside():
            some = ", ".join(map(str, inside[:3])) + (", ..." if len(inside) > 3 else "")
            raise CheckpointError(f"{folder.path}: is not a run folder; name the one inside that is meant: {some}")
        if not folder.config_path.is_file():
            raise CheckpointError(f"{folder.path}: is not a run folder; a run folder has a file config.yaml")
        return folder

    def _runs_inside(self) -> list[Path]:
        """Run folders somewhat below this one, if this one has no round itself."""
        if self.metrics_path.is_file():
            return []
        found = (path for depth in _DEPTHS for path in self.path.glob(f"{depth}{self.metrics_path.name}"))
        return sorted(path.parent for path in found)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from working in this folder; one that dies, however it does, gives it back.

        The process may take it again and again. What a process that was killed left half-written is removed.

        Raises:
            CheckpointError: another process holds it, or the lock cannot be made.
        """
        lock = FileLock(self.path.resolve() / _LOCK, timeout=0, is_singleton=True, thread_local=False)
        with disk_errors_named(self.path / _LOCK):
            try:
                lock.acquire()
            except Timeout as error:
                raise CheckpointError(
                    f"{self.path}: another process is working in this run folder; wait until it has ended, or end it, "
                    "and then resume"
                ) from error
        try:
            if lock.lock_counter == 1:
                self._remove_unfinished()
            yield
        finally:
            if lock.lock_counter == 1:
                Path(lock.lock_file).unlink(missing_ok=True)  # while it is held: who opened it meanwhile looks again
            lock.release()

    def _remove_unfinished(self) -> None:
        for place in (self.path, self.checkpoint_path):
            for path in sorted(place.glob(".*")):
                retired = _RETIRED.fullmatch(path.name)
                if retired and not (place / retired[1]).exists():
                    os.replace(path, place / retired[1])
                elif _UNFINISHED.fullmatch(path.name) and path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                elif _UNFINISHED.fullmatch(path.name):
                    path.unlink(missing_ok=True)

    def give_rounds(self, rounds: int) -> None:
        """Write ``config.yaml`` anew with another ``federate.total_round_num``.

        Raises:
            ConfigError: it is not a number of rounds.
            CheckpointError: the file cannot be written.
        """
        config = self.config()
        try:
            config.federate.total_round_num = rounds
        except ValidationError as error:
            raise ConfigError(f"--rounds {rounds}: must be a whole number from 1 on") from error
        write_text_atomically(self.config_path, dump_config(config))

    def config(self) -> Config:
        """The resolved configuration of the run.

        Raises:
            ConfigError: ``config.yaml`` is damaged or written for another version.
        """
        return load_config(self.config_path)

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.resolve().name

    @property
    def config_path(self) -> Path:
        """The resolved configuration, YAML."""
        return self.path / "config.yaml"

    @property
    def metrics_path(self) -> Path:
        """One JSON object a round, and a final one."""
        return self.path / "metrics.jsonl"

    @property
    def traffic_path(self) -> Path:
        """Bytes of each client in each round."""
        return self.path / "bytes.csv"

    @property
    def console_path(self) -> Path:
        """The plain lines of the console."""
        return self.path / "console.log"

    @property
    def report_path(self) -> Path:
        """The picture of the run."""
        return self.path / "report.png"

    @property
    def checkpoint_path(self) -> Path:
        """Folder of what a resumed run needs."""
        return self.path / "checkpoint"

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is something to go on from."""
        return any((self.checkpoint_path / name).is_file() for name in CHECKPOINT_FILES)

    @property
    def best_path(self) -> Path:
        """The parameters of the best round so far, while a run is under way."""
        return self.checkpoint_path / "best.safetensors"

    @property
    def blocks_path(self) -> Path:
        """Folder of trained blocks that a checkpoint and the best round speak of, where the base is on the disk."""
        return self.checkpoint_path / "blocks"

    @property
    def adapter_path(self) -> Path:
        """Folder of the trained adapter, in PEFT's format."""
        return self.path / "adapter"

    @property
    def model_path(self) -> Path:
        """Folder of the trained model, where every parameter was trained or the method is not one of PEFT's."""
        return self.path / "model"

    @property
    def tensorboard_path(self) -> Path:
        """Folder of TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def wandb_id_path(self) -> Path:
        """Identifier of the run at Weights & Biases, so that a resumed run continues it."""
        return self.path / "wandb-id"
