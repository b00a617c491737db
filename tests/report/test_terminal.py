"""What is seen: no word is broken, nothing is wider than 80 columns, and long work gives signs of life."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from fs_fwdllm.config import Config
from fs_fwdllm.report import RunFolder, RunReporter, analyse_costs, compare_runs
from fs_fwdllm.report.device_model import DEVICES_FILE, read_device_model
from fs_fwdllm.report.pace import Pace
from fs_fwdllm.report.terminal import loading, print_facts, say
from tests.report.conftest import make_line

PATH = "/a/very/long/path/" + "x" * 90 + "/report.png"


def screen(width: int = 80, *, terminal: bool = True) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None, highlight=False)


def shown(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_a_terminal_breaks_lines_between_words_and_never_inside_one() -> None:
    console = screen()
    text = f"warning: what follows is a path, which is to be copied: {PATH} and {'more words ' * 20}12.5 s"
    say(console, text)
    lines = shown(console).splitlines()
    assert len(lines) > 2
    assert " ".join(" ".join(lines).split()) == " ".join(text.split())
    assert all(len(line) <= 80 or PATH in line for line in lines)


def test_a_number_stays_with_its_unit() -> None:
    for padding in range(60, 90):
        console = screen()
        say(console, f"{'x' * padding} 37.3 KiB")
        assert "37.3 KiB" in shown(console)


@pytest.mark.parametrize("text", ["", "one", PATH, "two\nlines", "many words " * 40])
def test_elsewhere_a_line_stays_one_line(text: str) -> None:
    console = screen(terminal=False)
    say(console, text)
    assert shown(console) == text.rstrip() + "\n" or shown(console) == text + "\n"


def test_facts_stand_below_each_other() -> None:
    console = screen(40)
    print_facts(
        console, [("a", "one two three four five six seven eight nine"), ("longer", "first\nsecond"), ("b", "")]
    )
    assert shown(console).splitlines() == [
        "a       one two three four five six", "        seven eight nine", "longer  first", "        second", "b",
    ]  # fmt: skip


@pytest.mark.parametrize("terminal", [False, True])
def test_loading_is_told(config: Config, terminal: bool) -> None:
    console = screen(terminal=terminal)
    config.model.type, config.data.type = f"{PATH}/some/model@huggingface_llm", "rows.csv@text"
    with loading(config, console):
        pass
    assert "loading some/model and rows.csv@text" in shown(console) and "loaded in 0.0 s" in shown(console)


def test_every_table_fits_80_columns(
    write_run: Callable[..., RunFolder], config: Config, tmp_path: Path, quiet: Console
) -> None:
    """Eight runs of long names and large numbers, printed as the commands print them."""

    def costly(number: int) -> dict:
        large = {"upload_bytes": 999 * 2**30, "download_bytes": 1023 * 2**20, "forward_passes": 123_456_789}
        return make_line(number, seconds=3599.0, backward_passes=98_765_432, peak_rss_mib=99_999.0, **large)

    names = [f"a run with a long name of its own, number {number}, and_one_word_that_is_long" for number in range(4)]
    runs = [
        write_run(2, finished=False, line=costly, expname=name, fwdllm={"probes": 8 + number}, **changes).path
        for number, name in enumerate(names)
        for changes in ({}, {"federate": {"method": "FedAvg"}})
    ]
    compared = compare_runs(runs, tmp_path / "c.png")
    costs = analyse_costs(runs, read_device_model(DEVICES_FILE), tmp_path / "k.png", target=0.5)
    for terminal in (True, False):
        console = screen(terminal=terminal)
        console.print(compared.result, compared.costs, costs.measured, *costs.modelled)
        lines = shown(console).splitlines()
        assert max(map(len, lines)) <= 80
        assert "98.8 M" in shown(console) and "59 min 59 s" in shown(console)  # no number is cut


def test_evaluation_before_round_1_shows_how_far_it_is(config: Config) -> None:
    console = screen()
    with RunReporter(RunFolder.create(config), config, total_rounds=2, start_round=0, console=console) as reporter:
        for done in range(41):
            reporter.evaluating(done, 40)
            time.sleep(0.01)  # the bar is drawn ten times a second
    assert "of 40 batches" in shown(console) and "evaluating" in shown(console)


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_long_work_without_a_bar_gives_signs_of_life_and_short_work_none(
    config: Config, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr("fs_fwdllm.report.console.time.monotonic", clock)
    with RunReporter(RunFolder.create(config), config, total_rounds=2, start_round=0, console=quiet) as reporter:
        before = len(shown(quiet).splitlines())
        for done in range(101):
            reporter.evaluating(done, 100)
            clock.now += 10.0
        reporter.answered(0, 4)
        for done in range(1, 5):
            clock.now += 40.0
            reporter.answered(done, 4)
    lines = shown(quiet).splitlines()[before:]
    assert 20 <= len(lines) <= 40
    assert all("of 100 batches" in line and " left" in line for line in lines[:-3])
    assert lines[-3] == "round 1: 1 of 4 clients have answered, 4 min 40 s left"


def test_the_time_that_is_left_is_known_within_the_first_round() -> None:
    clock = Clock()
    pace = Pace(10, clock)
    pace.note(0, 500.0)  # the evaluation before training, which comes once
    assert pace.left_s() is None
    pace.answered(0, 4)
    clock.now = 3.0
    pace.answered(1, 4)
    assert pace.left_s() == pytest.approx(12 * 10 - 3)
    pace.note(1, 512.0)
    assert pace.left_s() == pytest.approx(12 * 9)
    pace.note(10, 620.0)
    assert pace.left_s() == 0


def test_a_resumed_run_counts_from_the_average_of_what_was_done() -> None:
    pace = Pace(10)
    pace.note(5, 50.0)
    assert pace.left_s() == pytest.approx(50)
