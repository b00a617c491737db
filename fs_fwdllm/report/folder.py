"""The run folder: the one place that knows which file of a run is called what."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from pathlib import Path

from fs_fwdllm.config import Config, dump_config, load_config
from fs_fwdllm.errors import CheckpointError, ConfigError, nearest
from fs_fwdllm.report.files import write_text_atomically

__all__ = ["RunFolder"]

#: Where run folders are looked for when a folder that is none was named.
_DEPTHS = ("*/", "*/*/")


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
        name = config.expname or "run"
        if Path(name).name != name or name == "..":
            raise ConfigError(f"expname: must be the name of one folder, but is {name!r}; put the rest into outdir")
        outdir = Path(config.outdir)
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
