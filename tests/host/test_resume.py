"""A run that was stopped and resumed equals the run that was not, file by file and bit by bit."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fs_fwdllm.config import Config
from fs_fwdllm.errors import CheckpointError
from fs_fwdllm.method import ClientWorker
from fs_fwdllm.running import keeping
from fs_fwdllm.running.local import resume, run
from fs_fwdllm.running.session import Session
from tests.host.small import METHODS, World, bits_of, read_jsonl

pytestmark = pytest.mark.slow

#: Every state a server can have: none, momentum or Adam's over scalars, a dense optimiser's, PyTorch's momentum.
CASES: dict[str, dict[str, Any]] = {
    "mezo": {**METHODS["mezo"], "train.optimizer.weight_decay": 0.1},
    "mezo, five-round": {
        **METHODS["mezo"], "train.train_strategy": "five-round", "fwdllm.strategy_span": 0.04
    },
    "mezo, model-diff": {
        **METHODS["mezo"], "train.train_strategy": "model-diff", "fwdllm.strategy_span": 0.04
    },
    "forward, momentum": {**METHODS["forward_gradient"], "fwdllm.server_momentum": 0.9},
    "forward, adam": {**METHODS["forward_gradient"], "fwdllm.server_optimizer": "adam", "train.optimizer.lr": 0.01},
    "forward, dense, momentum": {
        **METHODS["forward_gradient"], "fwdllm.server_momentum": 0.9, "fwdllm.upload": "dense"
    },
    "fedavg, adamw": {**METHODS["fedavg"], "train.optimizer.type": "AdamW"},
    "fedsgd, adamw": {**METHODS["fedsgd"], "train.optimizer.type": "AdamW", "train.optimizer.weight_decay": 0.1},
    "fedsgd, momentum": {**METHODS["fedsgd"], "train.optimizer.momentum": 0.9},
    "fwdllm": {
        **METHODS["forward_gradient"], "federate.method": "fwdllm", "fwdllm.gate.kind": "relative",
        "fwdllm.gate.threshold": 1e-9, "fwdllm.gate.max_repeats": 1, "fwdllm.sampling.kind": "corrected",
        "fwdllm.step.control": "trust_ratio", "fwdllm.step.report_norms": True, "fwdllm.step.report_cosine": True,
    },
    "forward, cosine": {**METHODS["forward_gradient"], "train.scheduler.type": "cosine"},
}  # fmt: skip
_VARYING = ("seconds", "peak_rss_mib", "peak_device_mib")


@contextmanager
def interrupted_at(round_index: int, answers: int, error: type[BaseException] = KeyboardInterrupt) -> Iterator[None]:
    """Ctrl-C while some client of ``round_index`` works, after ``answers`` others have answered."""
    original, done = ClientWorker.work, []

    def work(self: ClientWorker, assignment: Any, examples: Any) -> Any:
        if assignment.round_index == round_index:
            if len(done) == answers:
                raise error
            done.append(assignment.client)
        return original(self, assignment, examples)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClientWorker, "work", work)
        with pytest.raises(error):
            yield
    assert len(done) == answers


def comparable(path: Path) -> tuple[list[dict[str, Any]], str, str]:
    """What must not depend on whether the run was stopped: metrics without time and memory, bytes, the adapter."""
    lines = [
        {key: value for key, value in line.items() if key not in _VARYING}
        for line in read_jsonl(path / "metrics.jsonl")
    ]
    saved = [(path / name / "adapter_model.safetensors").read_bytes() for name in ("adapter", "adapter-last")]
    return lines, (path / "bytes.csv").read_text(encoding="utf-8"), b"".join(saved).hex()


def started(config: Config, before: set[Path]) -> Path:
    (path,) = set(Path(config.outdir).iterdir()) - before
    return path


@pytest.mark.parametrize("case", CASES)
def test_an_interrupted_run_ends_like_an_uninterrupted_one(world: World, case: str) -> None:
    """Stopped twice, both times in the middle of a round, with clients that take turns."""
    settings = {**CASES[case], "federate.sample_client_num": 3, "federate.total_round_num": 6}
    config = world.config(settings)
    whole = run(config)
    with interrupted_at(2, answers=1):
        run(config)
    path = started(config, {whole})
    with interrupted_at(4, answers=2):
        resume(path)
    assert [line["round"] for line in read_jsonl(path / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    assert resume(path) == path
    assert comparable(path) == comparable(whole)


@pytest.mark.parametrize("case", ["mezo", "fedsgd, adamw"])
def test_rounds_since_the_last_checkpoint_are_done_again(world: World, case: str) -> None:
    config = world.config({**CASES[case], "fwdllm.checkpoint_every": 3, "federate.total_round_num": 7})
    whole = run(config)
    with interrupted_at(5, answers=0):
        run(config)
    path = started(config, {whole})
    assert [line["round"] for line in read_jsonl(path / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5]
    resume(path)
    assert comparable(path) == comparable(whole)
    assert (path / "console.log").read_text(encoding="utf-8").count("round 5/7") == 2


@pytest.mark.parametrize("case", ["forward, momentum", "fedavg, adamw"])
def test_a_run_killed_between_its_line_and_its_checkpoint(
    world: World, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = world.config(CASES[case])
    whole = run(config)
    original = keeping.write_checkpoint

    def die(folder: Path, checkpoint: Any, **proven: bool) -> None:
        if checkpoint.next_round == 3:
            raise KeyboardInterrupt
        original(folder, checkpoint, **proven)

    with monkeypatch.context() as patch:
        patch.setattr(keeping, "write_checkpoint", die)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    path = started(config, {whole})
    assert read_jsonl(path / "metrics.jsonl")[-1]["round"] == 3
    resume(path)
    assert comparable(path) == comparable(whole)


def test_half_written_lines_are_written_anew(world: World) -> None:
    config = world.config(CASES["mezo"])
    whole = run(config)
    with interrupted_at(3, answers=2):
        run(config)
    path = started(config, {whole})
    with (path / "metrics.jsonl").open("a") as metrics, (path / "bytes.csv").open("a") as traffic:
        metrics.write('{"round": 4, "dig')
        traffic.write("4,1,1")
    resume(path)
    assert comparable(path) == comparable(whole)


def test_before_the_first_checkpoint_there_is_nothing_to_resume(world: World) -> None:
    config = world.config(CASES["mezo"])
    with interrupted_at(0, answers=1):
        run(config)
    with pytest.raises(CheckpointError, match="no checkpoint there; a run writes one after its first round"):
        resume(started(config, set()))


def test_resuming_a_finished_run_changes_nothing(world: World) -> None:
    path = run(world.config(CASES["forward, momentum"]))
    before = comparable(path)
    assert resume(path) == path
    assert comparable(path) == before


@pytest.mark.parametrize("error", [MemoryError, RuntimeError])
def test_a_crash_of_any_kind_can_be_resumed(world: World, error: type[BaseException]) -> None:
    config = world.config(CASES["forward, momentum"])
    whole = run(config)
    with interrupted_at(3, answers=3, error=error):
        run(config)
    path = started(config, {whole})
    resume(path)
    assert comparable(path) == comparable(whole)


def test_seconds_count_the_work_and_not_the_pause(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    config = world.config(CASES["mezo"])
    with interrupted_at(3, answers=0):
        run(config)
    path = started(config, set())
    stopped = read_jsonl(path / "metrics.jsonl")[-1]["seconds"]
    real = time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: real() + 10_000)
    resume(path)
    seconds = [line["seconds"] for line in read_jsonl(path / "metrics.jsonl")]
    assert seconds == sorted(seconds)
    assert stopped <= seconds[-1] < stopped + 1000


def test_a_moved_run_folder_can_be_resumed(world: World) -> None:
    config = world.config(CASES["forward, momentum"])
    whole = run(config)
    with interrupted_at(3, answers=1):
        run(config)
    path = started(config, {whole})
    moved = path.rename(world.root / "elsewhere")
    resume(moved)
    assert comparable(moved) == comparable(whole)


def test_two_models_of_one_seed_are_one_model(world: World) -> None:
    """What a resumed process relies on: opening a configuration twice gives the same bits, frozen and trained."""
    first, again = (Session.open(world.config(CASES["mezo"])).loaded.model for _ in range(2))
    for trained in (False, True):
        assert bits_of(first, trained=trained) == bits_of(again, trained=trained)
