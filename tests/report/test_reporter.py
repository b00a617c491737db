"""The reporter: valid JSON at any moment, a resumed run's files equal an uninterrupted one's, errors named."""

from __future__ import annotations

import importlib
import io
import json
import math
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from fs_fwdllm.config import Config, parse_config
from fs_fwdllm.errors import CheckpointError, ConfigError
from fs_fwdllm.report import RunFolder, RunReporter, TrafficRow
from fs_fwdllm.report.files import write_text_atomically
from fs_fwdllm.report.sinks import JsonLinesSink, TensorBoardSink, WandbSink, flatten, plain
from fs_fwdllm.report.traffic import read_traffic
from tests.report.conftest import make_line, make_rows


def lines_of(folder: RunFolder) -> list[dict[str, Any]]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return [json.loads(text, parse_constant=refuse) for text in folder.metrics_path.read_text().splitlines()]


def test_every_round_is_on_disk_before_the_next_begins(config: Config, quiet: Console) -> None:
    folder = RunFolder.create(config)
    with RunReporter(folder, config, total_rounds=3, start_round=1, console=quiet) as reporter:
        for number in (1, 2, 3):
            reporter.round(make_line(number), make_rows(number))
            assert len(lines_of(folder)) == number
            assert read_traffic(folder.traffic_path)[-2:] == make_rows(number)
    assert lines_of(folder)[0]["learning_rate"] == {"1": 0.1, "2": 0.2}
    assert folder.traffic_path.read_text().splitlines()[0] == "round,client,download_bytes,upload_bytes"


def test_numbers_that_are_not_finite_become_null(config: Config, quiet: Console) -> None:
    folder = RunFolder.create(config)
    losses = {1: math.nan, 2: np.float32("inf"), 3: np.float64(0.5)}
    with RunReporter(folder, config, total_rounds=1, start_round=1, console=quiet) as reporter:
        reporter.round(make_line(1, train_loss=-math.inf, loss=losses, forward_passes=np.int64(7)))
    (line,) = lines_of(folder)
    assert line["train_loss"] is None
    assert line["loss"] == {"1": None, "2": None, "3": 0.5}
    assert line["forward_passes"] == 7


def test_plain_converts_arrays_and_refuses_what_json_has_no_form_for() -> None:
    assert plain({"a": np.array([1.0, np.nan]), 2: (True, None, "x")}) == {"a": [1.0, None], "2": [True, None, "x"]}
    assert plain({3, 1, 2}) == [1, 2, 3]
    with pytest.raises(TypeError, match="object"):
        plain({"a": object()})


def test_flatten_keeps_numbers_only() -> None:
    line = {"round": 2, "eval": {"loss": 0.5, "mcc": None}, "digest": "ab", "final": True, "loss": {"3": 1.0}}
    assert flatten(line) == {"round": 2, "eval/loss": 0.5, "loss/3": 1.0}


def test_clients_are_summed_up_unless_they_are_asked_for() -> None:
    line = make_line(2, learning_rate={str(client): 0.1 for client in range(1000)}, loss={"1": 1.0, "2": 3.0})
    found = flatten(plain(line), clients=False)
    assert found["loss"] == 2.0 and found["learning_rate"] == pytest.approx(0.1)
    assert found["eval/accuracy"] == 0.52 and len(found) < 15
    assert len(flatten(plain(line))) > 1000


@pytest.mark.parametrize("torn", ["", '{"round": 5, "sec'])
def test_a_resumed_run_leaves_the_files_of_an_uninterrupted_one(
    config: Config, quiet: Console, write_run: Callable[..., RunFolder], torn: str
) -> None:
    whole = write_run(rounds=6, finished=True)
    stopped = write_run(rounds=4, finished=torn == "")
    with stopped.metrics_path.open("a") as file:
        file.write(torn)
    with stopped.traffic_path.open("a") as file:
        file.write("5,1,1" if torn else "")
    with RunReporter(stopped, config, total_rounds=6, start_round=3, console=quiet) as reporter:
        for number in range(3, 7):
            reporter.round(make_line(number), make_rows(number))
        reporter.finish({"rounds": 6, "digest": f"{6:08x}"})
    assert stopped.metrics_path.read_bytes() == whole.metrics_path.read_bytes()
    assert stopped.traffic_path.read_bytes() == whole.traffic_path.read_bytes()


def test_a_foreign_line_does_not_survive_and_does_not_stop_a_resume(config: Config, quiet: Console) -> None:
    folder = RunFolder.create(config)
    folder.metrics_path.write_text('{"round": 1}\n[1]\n"text"\n{"round": "two"}\n{}\nnonsense\n')
    folder.traffic_path.write_text("round,client\n1,2,3\nx,y,z,w\n1,2,3,4\n")
    with RunReporter(folder, config, total_rounds=3, start_round=2, console=quiet):
        pass
    assert lines_of(folder) == [{"round": 1}]
    assert read_traffic(folder.traffic_path) == [TrafficRow(1, 2, 3, 4)]


def test_finish_closes_the_run_with_picture_and_table(write_run: Callable[..., RunFolder], quiet: Console) -> None:
    folder = write_run()
    assert lines_of(folder)[-1] == {"final": True, "rounds": 6, "digest": "00000006"}
    assert folder.report_path.read_bytes().startswith(b"\x89PNG")
    shown = quiet.file.getvalue()  # type: ignore[attr-defined]
    assert shown.splitlines()[0] == f"run folder {folder.path}"
    assert "forward gradient (central, 8 probes)" in shown
    assert "0.5600" in shown and "600 B" in shown and "1.8 KiB" in shown
    log = folder.console_path.read_text()
    assert [line for line in log.splitlines() if line.startswith("round ")] == [
        line for line in shown.splitlines() if line.startswith("round ")
    ]


def test_one_plain_line_a_round_tells_what_happened(config: Config, quiet: Console) -> None:
    folder = RunFolder.create(config)
    with RunReporter(folder, config, total_rounds=10, start_round=1, console=quiet) as reporter:
        reporter.round(make_line(2, rejected=[{"client": 1, "reason": "[nan]"}]))
        reporter.round(make_line(3, train_loss=math.nan, rejected=2))
    second, majority, third = folder.console_path.read_text().splitlines()[-3:]
    assert second == (
        "round  2/10  loss 1.000  eval loss 0.5000  accuracy 0.5200  rejected 1  "
        "up 200 B  down 600 B  3.0 s  12.0 s left"
    )
    assert majority == "always answering the most frequent class reaches accuracy 0.2500"
    assert third == "round  3/10  loss -  rejected 2  up 300 B  down 900 B  4.5 s  10.5 s left"


def test_a_terminal_gets_a_bar_and_the_log_the_same_lines(config: Config, write_run: Callable[..., RunFolder]) -> None:
    plain_log = write_run(rounds=4, finished=False).console_path.read_text().splitlines()[1:]
    folder = RunFolder.create(config)
    screen = io.StringIO()
    terminal = Console(file=screen, width=140, force_terminal=True)
    with RunReporter(folder, config, total_rounds=4, start_round=1, console=terminal) as reporter:
        for number in range(1, 5):
            reporter.round(make_line(number), make_rows(number))
    assert folder.console_path.read_text().splitlines()[1:] == plain_log
    assert "round 3/4  loss" not in screen.getvalue()
    for kept in ("round 2/4  loss 1.000  eval loss 0.5000  accuracy 0.5200", "round 4/4  loss 0.5000"):
        assert screen.getvalue().count(kept) == 1  # what is drawn by the bar is drawn again and again


def test_an_interrupted_run_says_how_to_go_on_only_if_it_can(config: Config, quiet: Console) -> None:
    folder = RunFolder.create(config)
    for has_checkpoint in (False, True):
        if has_checkpoint:
            folder.checkpoint_path.mkdir()
            (folder.checkpoint_path / "state.safetensors").touch()
        with (
            pytest.raises(KeyboardInterrupt),
            RunReporter(folder, config, total_rounds=9, start_round=1, console=quiet) as reporter,
        ):
            reporter.round(make_line(1))
            raise KeyboardInterrupt
        told = f"stopped after round 1; go on with: fs-fwdllm resume {folder.path}" in folder.console_path.read_text()
        assert told is has_checkpoint


def test_a_disk_that_refuses_is_a_named_error(config: Config, quiet: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder.create(config)

    class FullDisk(io.StringIO):
        def flush(self) -> None:
            raise OSError(28, "No space left on device")

    with RunReporter(folder, config, total_rounds=2, start_round=1, console=quiet) as reporter:
        lines = reporter.sinks[0]
        assert isinstance(lines, JsonLinesSink)
        monkeypatch.setattr(lines, "file", FullDisk())
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl: cannot be written \(No space left"):
            reporter.round(make_line(1))


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.txt"
    write_text_atomically(path, "old\n")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(5, "broken")))
    with pytest.raises(CheckpointError, match="broken"):
        write_text_atomically(path, "new\n")
    assert path.read_text() == "old\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]


def test_absent_extras_are_errors_that_name_them(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    for key, section in (("wandb.use", "wandb"), ("fwdllm.tensorboard", "fwdllm")):
        changed = parse_config(config.model_dump(mode="json") | {section: {key.rpartition(".")[2]: True}})
        folder = RunFolder.create(changed)
        with pytest.raises(ConfigError, match=f"^{key}: .*pip install"):
            RunReporter(folder, changed, total_rounds=1, start_round=1)


@pytest.mark.parametrize("clients", [False, True])
def test_tensorboard_gets_the_numbers_of_every_round(config: Config, clients: bool) -> None:
    pytest.importorskip("tensorboard", reason="the package tensorboard is not installed")
    events = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    folder = RunFolder.create(config)
    sink = TensorBoardSink(folder, start_round=1, clients=clients)
    for number in (1, 2):
        sink.write(plain(make_line(number)))
    sink.write({"final": True, "seconds": 3.0})
    sink.close()
    sink.close()
    read = events.EventAccumulator(str(folder.tensorboard_path))
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars("train_loss")] == [(1, 2.0), (2, 1.0)]
    assert [event.step for event in read.Scalars("eval/accuracy")] == [2]
    assert ("loss/1" in read.Tags()["scalars"]) is clients


def test_the_folder_of_tensorboard_is_told(config: Config, quiet: Console) -> None:
    pytest.importorskip("tensorboard", reason="the package tensorboard is not installed")
    changed = parse_config(config.model_dump(mode="json") | {"fwdllm": {"tensorboard": True}})
    folder = RunFolder.create(changed)
    with RunReporter(folder, changed, total_rounds=1, start_round=1, console=quiet):
        pass
    assert f"tensorboard --logdir {folder.tensorboard_path}" in folder.console_path.read_text()


class FakeWandb(types.ModuleType):
    """Stands for the package: keeps what it is given."""

    class Error(Exception):
        pass

    def __init__(self, refusal: str = "") -> None:
        super().__init__("wandb")
        self.started: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.summary: dict[str, float] = {}
        self.refusal = refusal

    def init(self, **settings: Any) -> FakeWandb:
        if self.refusal:
            raise self.Error(self.refusal)
        self.started.append(settings)
        return self

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.logged.append((step, numbers))

    def finish(self) -> None:
        pass


def test_wandb_gets_the_numbers_and_a_resumed_run_keeps_its_identity(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config.wandb.online_track = False
    folder = RunFolder.create(config)
    for number in (1, 2):
        sink = WandbSink(folder, config)
        sink.write(plain(make_line(number)))
        sink.write({"final": True, "seconds": 3.0})
        sink.close()
    first, second = wandb.started
    assert first["mode"] == "offline" and Path(first["dir"]) == folder.path
    assert first["id"] == second["id"] != ""
    assert [(step, numbers["train_loss"]) for step, numbers in wandb.logged] == [(1, 2.0), (2, 1.0)]
    assert wandb.summary == {"seconds": 3.0}
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(refusal="no key"))
    with pytest.raises(ConfigError, match=r"wandb\.use: .*no key"):
        WandbSink(folder, config)
