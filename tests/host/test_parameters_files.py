"""A run whose parameters are in files of their own, with records since, is the run that keeps them in checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors import safe_open

from fs_fwdllm.errors import CheckpointError
from fs_fwdllm.method.server import PARAMETERS
from fs_fwdllm.report import RunFolder
from fs_fwdllm.running import parameters_file
from fs_fwdllm.running.choice import Choice
from fs_fwdllm.running.evaluating import evaluate_run
from fs_fwdllm.running.keeping import take_over
from fs_fwdllm.running.local import resume, run
from fs_fwdllm.running.state_file import read_about
from tests.host.small import World
from tests.host.test_resume import CASES, comparable, interrupted_at, started

pytestmark = pytest.mark.slow

#: Cases whose steps no record describes: their checkpoints hold the parameters.
DENSE = ("forward, dense, momentum", "fedavg, adamw", "fedsgd, adamw", "fedsgd, momentum")


@pytest.fixture
def files_of_their_own() -> Iterator[None]:
    """Small parameters count as large, and are written every other round."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parameters_file, "LARGE_BYTES", 0)
        patch.setattr(parameters_file, "MOST_ROUNDS", 2)
        yield


def files_in(path: Path) -> list[str]:
    return sorted(file.name for file in (path / "checkpoint").glob("parameters-*"))


def about(path: Path) -> dict[str, object]:
    numbers: dict[str, object] = read_about(path / "checkpoint" / "state.safetensors")["numbers"]
    return numbers


@pytest.mark.parametrize("case", CASES)
def test_an_interrupted_run_ends_like_one_that_keeps_everything(
    world: World, case: str, request: pytest.FixtureRequest
) -> None:
    settings = {**CASES[case], "federate.sample_client_num": 3, "federate.total_round_num": 6}
    config = world.config(settings)
    whole = run(config)
    assert not files_in(whole), "they are small"
    request.getfixturevalue("files_of_their_own")
    with interrupted_at(3, answers=1):
        run(config)
    path = started(config, {whole})
    assert (PARAMETERS in about(path)) is (case not in DENSE)
    assert bool(files_in(path)) is (case not in DENSE)
    with interrupted_at(4, answers=2):
        resume(path)
    assert resume(path) == path
    assert comparable(path) == comparable(whole)
    assert len(files_in(path)) <= 3, "what nothing speaks of any more is removed"
    assert evaluate_run(path) == evaluate_run(whole)


def test_a_checkpoint_is_small_and_refers_to_an_earlier_round(world: World, files_of_their_own: None) -> None:
    config = world.config({**CASES["mezo"], "federate.total_round_num": 4})
    with interrupted_at(2, answers=0):
        run(config)
    path = started(config, set())
    name, written, _ = about(path)[PARAMETERS]  # type: ignore[misc]
    assert (name, written) == (files_in(path)[0], 1)
    with safe_open(path / "checkpoint" / "state.safetensors", framework="pt") as state:
        assert all(name.startswith("catch_up.") for name in state.keys())  # noqa: SIM118 - not a dict
    assert read_about(path / "checkpoint" / "best.safetensors")[PARAMETERS]


def test_files_do_not_gather_between_checkpoints(
    world: World, files_of_their_own: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Choice, "is_better", lambda *_: True)  # every round is the best so far
    settings = {**CASES["mezo"], "federate.total_round_num": 9, "fwdllm.checkpoint_every": 9, "eval.freq": 1}
    with interrupted_at(8, answers=0):
        run(world.config(settings))
    path = started(world.config(settings), set())
    assert not (path / "checkpoint" / "state.safetensors").exists()
    assert len(files_in(path)) == 1, "that of the best round"


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("harm", ["lost", "damaged", "of another run"])
def test_parameters_that_are_lost_or_damaged_are_told(
    world: World, files_of_their_own: None, harm: str, rounds: int
) -> None:
    """Also where no record leads on from them yet."""
    config = world.config({**CASES["mezo"], "federate.total_round_num": 4})
    with interrupted_at(rounds, answers=0):
        run(config)
    path = started(config, set())
    file = path / "checkpoint" / files_in(path)[0]
    if harm == "lost":
        file.unlink()
    elif harm == "damaged":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    else:
        other = world.config({**CASES["mezo"], "federate.total_round_num": 4, "seed": 77})
        before = {path}
        with interrupted_at(rounds, answers=0):
            run(other)
        theirs = started(other, before)
        file.write_bytes((theirs / "checkpoint" / files_in(theirs)[0]).read_bytes())
    with pytest.raises(CheckpointError, match="records of a checkpoint" if harm == "of another run" else file.name):
        resume(path)


def test_a_run_that_goes_on_elsewhere_takes_the_file_of_its_best_round_along(
    world: World, files_of_their_own: None
) -> None:
    config = world.config({**CASES["mezo"], "federate.total_round_num": 4})
    path = run(config)
    now = RunFolder.create(config)
    take_over(RunFolder.open(path), now)
    named = read_about(now.best_path)[PARAMETERS][0]
    assert files_in(now.path) == [named]
