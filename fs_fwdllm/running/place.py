"""``federate.save_to`` and ``save_freq``, as FederatedScope has them: ``PATH`` is the best round, ``final_PATH`` the
last, ``N_PATH`` the N-th. Each is a folder in Hugging Face's format, where FederatedScope writes a pickled file: of
``exp/a.ckpt`` the folder is ``exp/a``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fs_fwdllm.config import Config
from fs_fwdllm.core.trainables import Trainables
from fs_fwdllm.errors import ConfigError
from fs_fwdllm.model.initial_adapter import folder_named
from fs_fwdllm.model.own_folder import OWN_FOLDERS
from fs_fwdllm.report.files import disk_errors_named
from fs_fwdllm.running.session import Session

__all__ = ["SavePlace"]

#: A folder with one of these was saved by a run, and may be replaced.
_MARKS = ("adapter_config.json", *(own.config_file for own in OWN_FOLDERS.values()), "config.json")


@dataclass(frozen=True)
class SavePlace:
    """Where else to save; ``path`` is ``None`` where nothing is asked for."""

    path: Path | None
    every: int

    @classmethod
    def of(cls, config: Config) -> SavePlace:
        """What a configuration says, checked before the first round: the folder around the place is made.

        Raises:
            ConfigError: the place is taken by something that is not replaced, or cannot be made.
        """
        if not config.federate.save_to:
            return cls(None, 0)
        place = cls(folder_named(config.federate.save_to), config.federate.save_freq)
        assert place.path is not None
        for path in (place.path, place._beside("final"), place.path.with_name("base_model")):
            if not _may_be_replaced(path):
                raise ConfigError(
                    f"federate.save_to {config.federate.save_to!r}: {path} exists and is not a folder that a run "
                    "saved, so it is not replaced; name another place"
                )
        try:
            place.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"federate.save_to {str(place.path)!r}: its folder cannot be made ({error})") from error
        return place

    def after_round(self, session: Session, number: int, trainables: Trainables) -> None:
        """Save the round if it is one of the ``save_freq``-th. Raises :class:`CheckpointError` on a full disk."""
        if self.path is None or self.every <= 0 or number % self.every or number == session.total_rounds:
            return
        with disk_errors_named(self._beside(str(number))):
            session.save_as(self._beside(str(number)), trainables)

    def at_end(self, session: Session, kept: Sequence[tuple[Trainables, Mapping[str, Any]]]) -> None:
        """Save the parameters for use, which come first, and the last, with what their cards say.

        Raises:
            CheckpointError: a disk is full.
        """
        if self.path is None:
            return
        for (trainables, results), target in ((kept[0], self.path), (kept[-1], self._beside("final"))):
            with disk_errors_named(target):
                session.save_as(target, trainables, results)

    def _beside(self, prefix: str) -> Path:
        assert self.path is not None
        return self.path.with_name(f"{prefix}_{self.path.name}")


def _may_be_replaced(path: Path) -> bool:
    if not path.exists():
        return True
    return path.is_dir() and (any((path / mark).is_file() for mark in _MARKS) or not any(path.iterdir()))
