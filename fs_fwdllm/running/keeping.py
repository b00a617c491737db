"""What a run keeps besides its lines: where to go on from, the best round, and at the end the best and the last.

A :class:`Keeper` is told of every round. It writes checkpoints (:mod:`.checkpoint`), and the parameters of the best
round so far to a file beside them; in memory there is no second copy. At the end ``adapter/`` (or ``model/``) is the
best round and ``adapter-last/`` the last, so that a run that is ruined late still leaves what was good.

After a loss that has exploded no checkpoint is written: the one to go on from stays the last that was good.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fs_fwdllm.core.trainables import CHANGED_FILES, Trainables
from fs_fwdllm.errors import CheckpointError
from fs_fwdllm.method import RoundReport, RoundServer
from fs_fwdllm.method.server import PARAMETERS
from fs_fwdllm.report import RunFolder
from fs_fwdllm.report.files import disk_errors_named
from fs_fwdllm.report.folder import CHECKPOINT_FILES
from fs_fwdllm.report.sinks import plain, read_lines
from fs_fwdllm.report.units import format_metric
from fs_fwdllm.running.checkpoint import (
    Checkpoint,
    prove_checkpoint,
    withdraw_checkpoint,
    write_checkpoint,
)
from fs_fwdllm.running.choice import is_time_to_stop
from fs_fwdllm.running.losses import Losses
from fs_fwdllm.running.parameters_file import ParametersFiles, names_in
from fs_fwdllm.running.place import SavePlace
from fs_fwdllm.running.session import Session
from fs_fwdllm.running.state_file import read_about, read_state, write_state

__all__ = ["BestRound", "Keeper", "Kept", "take_over"]


@dataclass(frozen=True)
class BestRound:
    """The best round so far: its number from 1 on, the value it was chosen by, its evaluation, its digest in hex."""

    round: int
    value: float
    evaluation: dict[str, Any]
    digest: str


@dataclass(frozen=True)
class Kept:
    """A round that is saved: number, digest in hex, evaluation if it had one, parameters, and its folder."""

    round: int
    digest: str
    evaluation: Mapping[str, Any] | None
    trainables: Trainables
    path: Path = Path()


class Keeper:
    """Keeps what a run may need again.

    Args:
        session: configuration, model and data of this process.
        folder: the run folder.
        checkpoint: where the run continues, if it does.
        say: prints a remark about the run.
        server: whose parameters are kept.

    Attributes:
        best: the best round so far.
        losses: how the losses began.
        last_evaluation: of the parameters as they are now, if there is one.

    Raises:
        CheckpointError: the file of the best round is damaged.
        ConfigError: ``federate.save_to`` is taken by something else.
    """

    def __init__(
        self,
        session: Session,
        folder: RunFolder,
        checkpoint: Checkpoint | None,
        say: Callable[[str], None],
        server: RoundServer,
    ) -> None:
        self._session = session
        self._folder = folder
        self._say = say
        self._values = [] if checkpoint is None else list(checkpoint.evaluations)
        self._is_same_data = checkpoint is None or checkpoint.inputs == session.inputs
        self._is_ruined = False
        lines = read_lines(folder) if checkpoint is not None else []
        self.losses = Losses(lines)
        self._start = next((line.get("eval") for line in lines if line.get("round") == 0), None)
        self.last_evaluation: Mapping[str, Any] | None = None
        if checkpoint is not None and self._is_same_data:
            self.last_evaluation = _usable(
                next((line.get("eval") for line in lines if line.get("round") == checkpoint.next_round), None)
            )
        self._save_place = SavePlace.of(session.config)
        self._trainables = server.trainables
        known: Any = None if checkpoint is None else checkpoint.numbers.get(PARAMETERS)
        self._parameters = ParametersFiles(server, folder.checkpoint_path, known)
        self.best = self._best_on_disk()

    @property
    def says_stop(self) -> bool:
        """Whether ``early_stop.*`` ends the run."""
        choice, settings = self._session.choice, self._session.config.early_stop
        return choice is not None and is_time_to_stop(self._values, settings, lower_is_better=choice.lower_is_better)

    @property
    def evaluations(self) -> list[float]:
        """What early stopping looks back on, for a checkpoint."""
        return list(self._values)

    def note_start(self, evaluation: Mapping[str, Any] | None) -> None:
        """Remember how good the model was before training."""
        self._start = evaluation
        self.losses.note_start(evaluation)

    def note_round(self, report: RoundReport, evaluation: Mapping[str, Any] | None) -> None:
        """Look at a round's losses, and put its parameters on disk if it is the best so far.

        Raises:
            CheckpointError: they cannot be written.
        """
        number = report.round_index + 1
        if report.losses:  # measured by the clients, where the checkpoint before this round was
            self._is_ruined = self.losses.has_exploded("train", report.typical_loss)
            (withdraw_checkpoint if self._is_ruined else prove_checkpoint)(self._folder.checkpoint_path)
        if evaluation is not None:
            self._is_ruined = self.losses.has_exploded("eval", evaluation.get("loss"))
            self._compare(number, evaluation, report.digest.hex())
        self.last_evaluation = evaluation
        self._save_place.after_round(self._session, number, self._trainables)

    def _compare(self, number: int, evaluation: Mapping[str, Any], digest: str) -> None:
        choice = self._session.choice
        value = None if choice is None else choice.value_in(evaluation)
        if choice is None or value is None:
            return
        if self._is_ruined and choice.lower_is_better:
            value = math.nan
        self._values.append(value)
        if self._keeps_best and choice.is_better(value, None if self.best is None else self.best.value):
            best = BestRound(number, value, plain(evaluation), digest)
            spared = "there is no earlier best round" if self.best is None else f"round {self.best.round} is intact"
            self._write_best(best, spared)
            self._sweep()
            self.best = best

    def _write_best(self, best: BestRound, spared: str) -> None:
        about, reference = dict(vars(best)), self._parameters.reference(best.round)
        if reference is not None:
            write_state(
                self._folder.best_path, about | {PARAMETERS: reference}, self._parameters.records(reference), spared
            )
            return
        if files := self._trainables.kept_in_files():
            about[CHANGED_FILES] = files
        write_state(self._folder.best_path, about, self._trainables.kept_by_value(), spared)

    def write_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, unless a loss has exploded.

        Raises:
            CheckpointError: it cannot be written.
        """
        if not self._is_ruined:
            light = self._parameters.lightened(checkpoint)
            write_checkpoint(self._folder.checkpoint_path, light, proven=self.last_evaluation is not None)
            self._sweep()
        elif not self.losses.told:
            self.losses.told = True
            left = "the last good one stays" if self._folder.has_checkpoint else "there is none yet"
            self._say(
                f"warning: round {checkpoint.next_round}: the loss has exploded, so that no checkpoint is written; "
                f"{left}. Lower train.optimizer.lr (it is {self._session.config.train.optimizer.lr:g})"
            )

    def _sweep(self) -> None:
        """Remove files of parameters that neither a checkpoint nor the best round speaks of any more."""
        paths = [*(self._folder.checkpoint_path / name for name in CHECKPOINT_FILES), self._folder.best_path]
        kept = [read_about(path) for path in paths if path.is_file()]
        self._parameters.keep_only(set[str]().union(*map(names_in, kept)))
        if self._trainables.kept_in_files():
            self._trainables.keep_only(set[str]().union(*map(_changed_files_in, kept)))

    def finish(self, last: Kept, results_of: Callable[[Kept], dict[str, Any]]) -> list[Kept]:
        """Save the best round, and the last beside it; where no round was the best, the last alone.

        Args:
            results_of: what the model card says of a round.

        Returns:
            What was saved, the folder for use first.

        Raises:
            CheckpointError: it cannot be read or written.
        """
        if self.best is None:
            kept = [self._save(last, "", results_of(last))]
        else:
            beside = self._save(last, "-last", results_of(last))
            best = self._read_best(self.best)
            kept = [self._save(best, "", results_of(best)), beside]
        self._save_place.at_end(self._session, [(item.trainables, results_of(item)) for item in kept])
        return kept

    def _read_best(self, best: BestRound) -> Kept:
        about, values = read_state(self._folder.best_path)
        if PARAMETERS in about:
            in_order = self._parameters.rebuilt(about[PARAMETERS], values)
        else:
            in_order = self._trainables.restored(values, about.get(CHANGED_FILES, {}))
        return Kept(best.round, best.digest, _usable(best.evaluation) if self._is_same_data else None, in_order)

    def stop_for_ruin(self) -> None:
        """A run ends since its steps have left the range of numbers: keep what was good."""
        withdraw_checkpoint(self._folder.checkpoint_path)
        if self.best is not None:
            kept = self._save(self._read_best(self.best), "", {})
            self._say(
                f"{kept.path.name}/ holds round {kept.round}, the best so far; start from it with "
                f"fwdllm.init_adapter {kept.path}"
            )

    def columns(self, kept: list[Kept]) -> dict[str, object]:
        """What the final line of ``metrics.jsonl`` says of what was saved."""
        used, last = kept[0], kept[-1]
        found: dict[str, object] = {"saved": used.path.name, "saved_round": used.round, "saved_digest": used.digest}
        if self.best is not None:
            found |= {"saved_last": last.path.name, "chosen_by": self._key, "best": self.best.value}
        return found

    def describe(self, kept: list[Kept]) -> str:
        """Which round is where, in words."""
        used, last = kept[0], kept[-1]
        if self.best is None:
            why = " (no evaluation gave a value to choose by)" if self._keeps_best and self._values else ""
            return f"{used.path.name}/ holds round {used.round}, the last{why}"
        choice = self._session.choice
        assert choice is not None
        value = format_metric(self.best.value)
        too = "also " if used.round == last.round else ""
        said = (
            f"{used.path.name}/ holds round {used.round}, the best by {choice.in_words}: {value}; "
            f"{last.path.name}/ {too}holds round {last.round}, the last"
        )
        start = choice.value_in(self._start)
        if start is None or not choice.is_better(start, self.best.value):
            return said
        return f"{said}; warning: no round was as good as the model before training ({format_metric(start)})"

    def why_it_stops(self) -> str:
        """Early stopping in words."""
        settings = self._session.config.early_stop
        return (
            f"{self._key} did not improve in {settings.patience} evaluations (early_stop.patience, mode "
            f"{settings.improve_indicator_mode})"
        )

    @property
    def _key(self) -> str:
        return "" if self._session.choice is None else self._session.choice.key

    def _save(self, kept: Kept, suffix: str, results: Mapping[str, Any]) -> Kept:
        intact = "what was saved there before is intact"
        if self._folder.has_checkpoint:
            intact = f"the checkpoint is intact: make room or permission, then: fs-fwdllm resume {self._folder.path}"
        name = "adapter" if self._session.saves_adapter else "model"
        with disk_errors_named(self._folder.path / f"{name}{suffix}", intact):
            saved = self._session.save(self._folder.path, kept.trainables, results, suffix)
        return replace(kept, path=saved)

    @property
    def _keeps_best(self) -> bool:
        return self._session.config.fwdllm.saved_round == "best"

    def _best_on_disk(self) -> BestRound | None:
        """Of a run that goes on: its file is the truth also where it is younger than the checkpoint, since the rounds
        in between are done again and come out the same."""
        if not self._keeps_best or not self._folder.best_path.is_file():
            return None
        about, _ = read_state(self._folder.best_path)
        for elsewhere in (CHANGED_FILES, PARAMETERS):
            about.pop(elsewhere, None)
        try:
            return BestRound(**about)
        except TypeError as error:
            raise CheckpointError(f"{self._folder.best_path}: damaged or not of ours ({error})") from error


def _changed_files_in(about: Mapping[str, Any]) -> set[str]:
    """Names of the files of changed parameters that a checkpoint or a best round is kept in."""
    return {str(reference[0]) for reference in about.get("numbers", about).get(CHANGED_FILES, {}).values()}


def _usable(evaluation: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """An evaluation from a file, where a loss that was not finite is ``None``."""
    return evaluation if evaluation and evaluation.get("loss") is not None else None


def take_over(before: RunFolder, now: RunFolder) -> None:
    """Give another run, that goes on with one, its best round, and the files of the blocks it stopped at.

    Raises:
        CheckpointError: the disk is full.
    """
    with disk_errors_named(now.checkpoint_path):
        now.checkpoint_path.mkdir(parents=True, exist_ok=True)
        if before.best_path.is_file():
            shutil.copyfile(before.best_path, now.best_path)
            for name in names_in(read_about(before.best_path)):
                shutil.copyfile(before.checkpoint_path / name, now.checkpoint_path / name)
        if before.blocks_path.is_dir():
            shutil.copytree(before.blocks_path, now.blocks_path, dirs_exist_ok=True)
